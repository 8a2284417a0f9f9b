"""From a command to the state of its run: new, to be resumed, finished, or with a changed configuration; and the claim.

``run.on_drift`` and ``run.on_conflict`` are decided here and nowhere else. Of the latter, ``wait`` holds the command
back before it opens the run (``must_wait``), so that it imports nothing and occupies no device meanwhile; ``fail`` and
``steal`` decide at the claim.
"""

import logging
import shlex
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.config.identity import digest
from runner.config.schema import OnConflict
from runner.errors import ConfigError, DriftRefused, FinishedMeanwhile, StorageError, printable
from runner.run import attempts
from runner.run.attempts import Attempt
from runner.run.directory import RunDirectory
from runner.run.drift import ChangedKey, compare, drift_table, resolve
from runner.run.parent import CheckpointRef, Parent, ParentRecord
from runner.storage.location import is_remote, local_root

log = logging.getLogger("runner")

# What Hydra, its launchers and its sweepers write in a run directory, following any link.
_HYDRA_FILES = [".hydra", ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", ".submitit"]
_HYDRA_FILES += ["multirun.yaml", "optimization_results.yaml", "optuna.sqlite3"]


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """A run directory as this command finds it, before it claims the run.

    ``command``: this command, for messages. ``changes``: those of the configuration that the user accepted, or all
    changes if the run has not trained yet.
    ``accepted``: the configuration from now on, if it is not the one that the run was created with. ``parent``: what a
    new run starts from. ``result``: that of a finished run.
    """

    directory: RunDirectory
    identity: dict[str, Any]
    command: str
    on_conflict: OnConflict
    changes: Sequence[ChangedKey] = ()
    accepted: dict[str, Any] | None = None
    parent: Parent | None = None
    result: dict[str, Any] | None = None


def must_wait(directory: RunDirectory, on_conflict: OnConflict) -> bool:
    """Whether ``run.on_conflict=wait`` holds the command back, because a living process works on the run."""
    if on_conflict is not OnConflict.wait:
        return False
    return attempts.live(directory.location, attempts.names(directory.location), dead=set()) is not None


def open_run(
    directory: RunDirectory,
    identity: dict[str, Any],
    *,
    on_drift: str,
    command: str,
    parent: Parent | None = None,
    on_conflict: OnConflict = OnConflict.fail,
) -> OpenedRun:
    """The state of the run; a new one starts from ``parent``. Only reads. Raises DriftRefused and ConfigError."""
    refuse_links(directory.root, directory.name)
    saved = None
    if directory.record() is not None:
        _require_same_parent(directory, parent)
        saved = directory.identity()
    if saved is None:
        return OpenedRun(directory, identity, command, on_conflict, parent=parent)
    differences = compare(saved, identity)
    if differences and on_drift != "accept" and has_trained(directory):
        if on_drift == "fork":
            return _fork(directory, identity, command, on_conflict)
        raise DriftRefused(_refusal(directory, differences, command))
    if not differences:
        identity = saved  # as it was first written: 1 where this command says 1.0, which is the same run
    accepted = identity if compare(directory.configuration() or identity, identity) else None
    result = None if differences else directory.result(identity)
    if result is not None and (missing := directory.missing_export(result)):
        log.warning("finished, but %s: made again from the last checkpoint", missing)
        result = None
    return OpenedRun(directory, identity, command, on_conflict, differences, accepted, parent, result)


def _require_same_parent(directory: RunDirectory, parent: Parent | None) -> None:
    """Raise DriftRefused if the existing run started from something else than this command asks for."""

    def words(source: CheckpointRef, inherit: str) -> str:
        return printable(f"with run.parent={shlex.quote(str(source))} run.inherit={inherit}")

    then = now = "without run.parent"
    origin = ParentRecord.of(directory)
    if origin and origin.asked:  # the checkpoint that was asked for, with the place that the parent had then
        then = words(CheckpointRef(origin.run, CheckpointRef.parse(origin.asked).checkpoint), origin.inherit)
    if parent:
        now = words(parent.source, parent.inherit)
    moved = origin and parent and (origin.asked, origin.inherit) == (parent.asked, parent.inherit)
    if then != now and not moved:
        raise DriftRefused(
            f"{directory.location.url} was started {then}, and this command starts {now}.\n"
            "The run was left as it is. A run is started once: use its run.parent and run.inherit, or start "
            "a new run with run.name=..."
        )
    if origin and origin.foreign:
        origin.unchanged_files(parent)


def claim_run(opening: OpenedRun, facts: dict[str, Any], *, above: int, parent: dict[str, Any] | None) -> Attempt:
    """Claim the run, with a number above ``above``, and write its record and configuration unless they are there.

    Raises RunInUse while another process works on it, unless ``run.on_conflict=steal``. Raises, and withdraws the
    claim, if the run has changed since it was opened: DriftRefused if another command with the same run.name created
    or changed it, FinishedMeanwhile if it now has a result.
    """
    directory = opening.directory
    steal = opening.on_conflict is OnConflict.steal
    attempt = attempts.claim(directory.location, facts | {"accepted": opening.accepted}, above=above, steal=steal)
    try:
        directory.create(opening.identity, parent=parent)
        saved = directory.identity(before=attempt.number) or {}
        differences = compare(saved, opening.identity)
        if differences and drift_table(differences) != drift_table(opening.changes):
            raise DriftRefused(_refusal(directory, differences, opening.command))
        if not differences and directory.complete_result(opening.identity) is not None:
            raise FinishedMeanwhile(f"{directory.location.url} was finished by another process")
    except BaseException:
        with suppress(StorageError):
            attempt.withdraw()
        raise
    return attempt


def has_trained(directory: RunDirectory) -> bool:
    """Whether any attempt completed a step. If none did, a correction of the configuration loses nothing."""
    if directory.location.list("commits"):
        return True
    history = attempts.history(directory.location)
    return any(facts.get("step") or facts.get("committed") for each in history for facts in (each.beat, each.end or {}))


def _fork(parent: RunDirectory, identity: dict[str, Any], command: str, on_conflict: OnConflict) -> OpenedRun:
    """The fork's name is made from its configuration, so that the same command finds it again."""
    older = resolve(identity)  # an older version named it so
    fork, before = (
        RunDirectory.under(parent.root, parent.experiment, f"{parent.variant}~{digest(each)}", parent.options)
        for each in (identity, older)
    )
    if fork.record() is None and before.record() is not None:
        fork, identity = before, older
    refuse_links(fork.root, fork.name)
    finished = fork.complete_result(identity) if fork.record() is not None else None
    return OpenedRun(fork, identity, command, on_conflict, parent=Parent.forked(parent), result=finished)


def _refusal(directory: RunDirectory, differences: Sequence[ChangedKey], command: str) -> str:
    return (
        f"the configuration is not the one that {directory.location.url} was made with:\n\n"
        f"{drift_table(differences)}\n\n"
        "The run was left as it is. Either\n"
        f"  restore the saved values (config.yaml has them all) and run the same command again, or\n"
        f"  continue with the new values:    {command} run.on_drift=accept\n"
        f"  start a new run from its state: {command} run.on_drift=fork\n"
        f"  start a new run from scratch:   {command} run.name={shlex.quote(directory.variant[:150] + '-2')}"
    )


def refuse_links(root: str, below: str, *, log_file: str = "runner.log") -> None:
    """Raise ConfigError where a file of Hydra's in the folder ``below`` a local ``root``, or the way to that folder, is
    a link or a special file: what Hydra writes there would end elsewhere, or wait forever.
    """
    if is_remote(root):
        return
    folder = Path(local_root(root), below)
    way = [folder, *folder.parents][: len(Path(below).parts)]
    for path in (*reversed(way), *(folder / name for name in (log_file, *_HYDRA_FILES))):
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        regular = stat.S_ISREG(status.st_mode)
        if stat.S_ISDIR(status.st_mode) or (regular and status.st_nlink == 1):
            continue
        kind = "a link" if regular or stat.S_ISLNK(status.st_mode) else "no file"
        raise ConfigError(
            f"{printable(path)} is {kind}, and what is written there would end elsewhere. Everything below run.root "
            "must be there itself: remove it, or choose another run.root or run.name"
        )
