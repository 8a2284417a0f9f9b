"""From a command to the state of its run: new, to be resumed, finished, or with a changed configuration."""

import logging
import shlex
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from runner.config.identity import digest
from runner.errors import DriftRefused, FinishedMeanwhile, RunInUse, StorageError
from runner.run import attempts, drift
from runner.run.attempts import Attempt
from runner.run.directory import RunDirectory
from runner.run.links import refuse_links
from runner.run.parent import Parent, require_same

log = logging.getLogger("runner")


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """A run directory as this command finds it, before it claims the run.

    ``drift``: changes of the configuration that the user accepted. ``accepted``: the configuration from now on, if it
    is not the one that the run was created with. ``parent``: what a new run starts from. ``result``: that of a finished
    run. ``command``: this command, for messages.
    """

    directory: RunDirectory
    identity: dict[str, Any]
    drift: list[drift.ChangedKey]
    accepted: dict[str, Any] | None
    parent: Parent | None
    result: dict[str, Any] | None
    command: str


def open_run(
    directory: RunDirectory, identity: dict[str, Any], *, on_drift: str, command: str, parent: Parent | None = None
) -> OpenedRun:
    """Find out in which state the run is; a new one starts from ``parent``. Only reads.

    Raises DriftRefused, ConfigError (not a run directory, a newer format) or StorageError.
    """
    refuse_links(directory.root, directory.name)
    if directory.record() is None:
        return OpenedRun(directory, identity, [], None, parent, None, command)
    require_same(directory, parent)
    saved = directory.identity()
    differences = drift.compare(saved, identity) if saved is not None else []
    if differences and on_drift == "fork":
        return _fork(directory, identity, command)
    if differences and on_drift == "refuse":
        raise DriftRefused(_refusal(directory, differences, command))
    if saved is None:
        return OpenedRun(directory, identity, [], None, parent, None, command)
    if not differences:
        identity = saved  # as it was first written: 1 where this command says 1.0, which is the same run
    accepted = identity if drift.compare(directory.configured() or identity, identity) else None
    result = None if differences else directory.result(identity)
    if result is not None and (lacking := directory.lacks(result)):
        log.warning("finished, but %s: made again from the last checkpoint", lacking)
        result = None
    return OpenedRun(directory, identity, differences, accepted, parent, result, command)


def begin(opening: OpenedRun, attempt: Attempt, *, parent: dict[str, Any] | None) -> None:
    """Write the run's record and configuration unless they are there.

    Raises, and withdraws the attempt, if the run has changed since it was opened: DriftRefused if another command with
    the same run.name created or changed it, FinishedMeanwhile if it now has a result.
    """
    directory = opening.directory
    try:
        directory.create(opening.identity, parent=parent)
        saved = directory.identity(before=attempt.number) or {}
        differences = drift.compare(saved, opening.identity)
        if differences and drift.table(differences) != drift.table(opening.drift):
            raise DriftRefused(_refusal(directory, differences, opening.command))
        if not differences and directory.finished(opening.identity) is not None:
            raise FinishedMeanwhile(f"{directory.location.url} was finished by another process")
    except BaseException:
        with suppress(StorageError):
            attempt.withdraw()
        raise


def is_free(directory: RunDirectory) -> bool:
    """Whether no living process works on the run."""
    try:
        attempts.raise_if_live(directory.location)
    except RunInUse:
        return False
    return True


def _fork(parent: RunDirectory, identity: dict[str, Any], command: str) -> OpenedRun:
    """The fork's name is made from its configuration, so that the same command finds it again."""
    older = drift.resolved(identity)  # an older version named it so
    fork, before = (
        RunDirectory.under(parent.root, parent.experiment, f"{parent.variant}~{digest(each)}", parent.options)
        for each in (identity, older)
    )
    if fork.record() is None and before.record() is not None:
        fork, identity = before, older
    refuse_links(fork.root, fork.name)
    finished = fork.finished(identity) if fork.record() is not None else None
    return OpenedRun(fork, identity, [], None, Parent.forked(parent), finished, command)


def _refusal(directory: RunDirectory, differences: list[drift.ChangedKey], command: str) -> str:
    return (
        f"the configuration is not the one that {directory.location.url} was made with:\n\n"
        f"{drift.table(differences)}\n\n"
        "The run was left as it is. Either\n"
        f"  restore the saved values (config.yaml has them all) and run the same command again, or\n"
        f"  go on with the new ones:        {command} run.on_drift=accept\n"
        f"  begin a new run from its state: {command} run.on_drift=fork\n"
        f"  begin a new run from scratch:   {command} run.name={shlex.quote(directory.variant[:150] + '-2')}"
    )
