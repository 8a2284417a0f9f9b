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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.config.identity import ChangedKey, compare, value_digest
from runner.config.schema import OnConflict, OnDrift
from runner.errors import ChangedMeanwhile, ConfigError, DriftRefused, RunInUse, StorageError, printable
from runner.run import attempts
from runner.run.attempts import Attempt
from runner.run.directory import RunDirectory
from runner.run.parent import CheckpointRef, Parent, ParentRecord
from runner.storage.location import is_remote, local_root

log = logging.getLogger("runner")

# What Hydra, its launchers and its sweepers write in a run directory, following any link.
_HYDRA_FILES = [".hydra", ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", ".submitit"]
_HYDRA_FILES += ["multirun.yaml", "optimization_results.yaml", "optuna.sqlite3"]
# Keys that decide the order of samples.
_ORDER = {"seed", "data.shuffle", "data.tail", "data.randomness", "data.max_tokens"}


@dataclass(frozen=True, slots=True)
class RunSpec:
    """The run that a command asks for: its directory, the configuration that it computes, and the parent of a new run.
    ``command`` starts this run alone, for messages.

    ``open_run`` adds what the directory says, before the run is claimed. ``changes``: the changes of the configuration
    that the user accepted, or all changes if the run has not trained yet. ``accepted``: the configuration from now on,
    if the run was created with another. ``result``: the result of a finished run.
    """

    directory: RunDirectory
    identity: dict[str, Any]
    command: str = ""
    overrides: Sequence[str] = ()
    parent: Parent | None = None
    on_drift: OnDrift = OnDrift.refuse
    on_conflict: OnConflict = OnConflict.fail
    changes: Sequence[ChangedKey] = ()
    accepted: dict[str, Any] | None = None
    result: dict[str, Any] | None = None


def must_wait(directory: RunDirectory, on_conflict: OnConflict) -> bool:
    """Whether ``run.on_conflict=wait`` holds the command back, because a living process works on the run."""
    if on_conflict is not OnConflict.wait:
        return False
    return attempts.live(directory.location, attempts.names(directory.location), dead=set()) is not None


def open_run(spec: RunSpec) -> RunSpec:
    """The run with the state of its directory, or its fork. Only reads. Raises DriftRefused and ConfigError."""
    directory, identity = spec.directory, spec.identity
    refuse_links(directory.root, directory.name)
    current = None
    if directory.record() is not None:
        _require_same_parent(directory, spec.parent)
        current = directory.identity()
    if current is None:
        return spec
    changes = compare(current, identity)
    if changes and spec.on_drift is not OnDrift.accept and has_trained(directory):
        if spec.on_drift is OnDrift.fork:
            return _fork(spec)
        raise DriftRefused(_refusal(spec, changes))
    if not changes:
        identity = current  # spelled as the run has it: 1 where this command says 1.0
    accepted = identity if compare(directory.configuration() or identity, identity) else None
    result = None if changes else directory.result(identity)
    if result is not None and (missing := directory.missing_export(result)):
        log.warning("the run is finished, but %s; it is exported again from the last checkpoint", missing)
        result = None
    return replace(spec, identity=identity, changes=changes, accepted=accepted, result=result)


def _require_same_parent(directory: RunDirectory, parent: Parent | None) -> None:
    """Raise DriftRefused if the existing run started from another parent than the command names."""

    def words(source: CheckpointRef, inherit: str) -> str:
        return printable(f"with run.parent={shlex.quote(str(source))} run.inherit={inherit}")

    then = now = "without run.parent"
    origin = ParentRecord.of(directory)
    if origin and origin.asked:  # the checkpoint of the command, at the URL that the parent had then
        then = words(CheckpointRef(origin.run, CheckpointRef.parse(origin.asked).checkpoint), origin.inherit)
    if parent:
        now = words(parent.source, parent.inherit)
    same_request = origin and parent and (origin.asked, origin.inherit) == (parent.asked, parent.inherit)
    if then != now and not same_request:
        raise DriftRefused(
            f"{directory.location.url} was started {then}, and this command starts {now}.\n"
            "The run was left as it is. A run is started once: use its run.parent and run.inherit, or start "
            "a new run with run.name=..."
        )
    if origin and origin.foreign:
        origin.unchanged_files(parent)


def claim_run(spec: RunSpec, facts: dict[str, Any], *, above: int, parent: dict[str, Any] | None) -> Attempt:
    """Claim the run, with a number above ``above``, and write its record and configuration unless they are there.

    Raises RunInUse while another process works on it, unless ``run.on_conflict=steal``. Raises, and withdraws the
    claim, if the run has changed since it was opened: DriftRefused if another command with the same run.name created
    or changed it, ChangedMeanwhile if it now has a result, or another process although ``run.on_conflict=wait``.
    """
    directory = spec.directory
    steal = spec.on_conflict is OnConflict.steal
    try:
        attempt = attempts.claim(directory.location, facts | {"accepted": spec.accepted}, above=above, steal=steal)
    except RunInUse as error:  # several commands waited for the same process
        raise ChangedMeanwhile(str(error)) if spec.on_conflict is OnConflict.wait else error from None
    try:
        directory.create(spec.identity, parent=parent)
        current = directory.identity(before=attempt.number) or {}  # without what this attempt's own claim accepts
        changes = compare(current, spec.identity)
        if changes and drift_table(changes) != drift_table(spec.changes):
            raise DriftRefused(_refusal(spec, changes))
        if not changes and directory.complete_result(spec.identity) is not None:
            raise ChangedMeanwhile(f"{directory.location.url} was finished by another process")
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


def _fork(spec: RunSpec) -> RunSpec:
    """The fork's name is made from its configuration, so that the same command finds it again."""
    parent = spec.directory
    variant = f"{parent.variant}~{value_digest(spec.identity)}"
    fork = RunDirectory.under(parent.root, parent.experiment, variant, parent.options)
    refuse_links(fork.root, fork.name)
    result = fork.complete_result(spec.identity) if fork.record() is not None else None
    return replace(spec, directory=fork, parent=Parent.forked(parent), result=result)


def drift_table(changes: Sequence[ChangedKey]) -> str:
    """``key | saved | now``, with control characters escaped, because anyone may have written the saved values."""
    from tabulate import tabulate  # takes 40 ms, which a start without a table saves

    rows = [[*map(printable, (key, repr(before), repr(now)))] for key, before, now in changes]
    return tabulate(rows, headers=["key", "saved", "now"], disable_numparse=True)


def _refusal(spec: RunSpec, changes: Sequence[ChangedKey]) -> str:
    directory, command = spec.directory, spec.command
    remedies = [
        "  restore the saved values (config.yaml has them all) and run the same command again, or",
        f"  continue with the new values:    {command} run.on_drift=accept",
        f"  start a new run from its state: {command} run.on_drift=fork",
        f"  start a new run from scratch:   {command} run.name={shlex.quote(directory.variant[:150] + '-2')}",
    ]
    if order := ", ".join(key for key, _, _ in changes if key in _ORDER):
        remedies[1:3] = [f"  (it cannot continue with another {order}: each sample exactly once needs the same order)"]
    return (
        f"the configuration is not the one that {directory.location.url} was made with:\n\n"
        f"{drift_table(changes)}\n\n"
        "The run was left as it is. Either\n" + "\n".join(remedies)
    )


def refuse_links(root: str, below: str, *, log_file: str = "runner.log") -> None:
    """Raise ConfigError where a file of Hydra's in the folder ``below`` a local ``root``, or the way to that folder, is
    a link or a special file: a write by Hydra would end elsewhere, or wait forever.
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
        except OSError as error:
            raise ConfigError(f"cannot read {printable(path)}: {error.strerror}. Choose another run.root.") from error
        regular = stat.S_ISREG(status.st_mode)
        if stat.S_ISDIR(status.st_mode) or (regular and status.st_nlink == 1):
            continue
        kind = "a link" if regular or stat.S_ISLNK(status.st_mode) else "a special file"
        raise ConfigError(
            f"{printable(path)} is {kind}: refusing to write through it. Everything below run.root must be a file or a "
            "folder: remove it, or choose another run.root or run.name"
        )
