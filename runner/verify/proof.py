"""From a command to a verdict: run undisturbed, run killed, compare, and diagnose a difference."""

import math
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from runner.errors import ConfigError, StorageError
from runner.storage.location import is_remote, local_root
from runner.verify.campaign import KillPlan, Progress, evaluation_interval, plan, run_killed, run_undisturbed
from runner.verify.causes import CAUSES, Cause, of_error, of_part, of_structure
from runner.verify.diagnosis import Investigation
from runner.verify.difference import changes, difference_of_results, first_difference, lost_memory, structural_changes
from runner.verify.execution import AttemptFailure, Executor, OutOfTime, RunTrace, Servers, fork_servers
from runner.verify.options import Options
from runner.verify.source import Sources, line_of
from runner.verify.verdict import Verdict, cost

_OUT_OF_TIME = "verify.minutes was over before the killed run was finished; allow more"
LEAST_SECONDS = 60.0  # of an attempt, before it is taken for one that hangs
TIMES = 10.0  # the seconds of the undisturbed run, before another attempt is taken for one that hangs
_STATES = 6  # on the disk at once, besides those of the undisturbed run: the last ones, the best, one being written


def prove(command: Sequence[str], options: Options, *, progress: Progress, servers: Servers | None = None) -> Verdict:
    """Judge whether the experiment of a command resumes exactly. Raises ConfigError for a command that cannot run,
    and StorageError for a root that cannot hold the runs.

    ``progress`` is called with lines for people. ``servers`` are used if they are running already. Nothing is left
    behind except the runs of a proof that failed.
    """
    began = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="runner-verify-"))
    folder = f"verify-{secrets.token_hex(4)}"
    root = str(scratch / "runs") if options.root is None else f"{options.root.rstrip('/')}/{folder}"
    runs: list[RunTrace] = []
    keep = False
    new = [] if options.root is None or is_remote(root) else _missing_folders(Path(local_root(options.root)))
    try:
        with nullcontext(servers) if servers else fork_servers() as both:
            interval = evaluation_interval(options)
            deadline = math.inf if options.minutes is None else began + 60 * options.minutes
            executor = Executor(
                tuple(command), scratch, root, both, runs, interval, options.processes, deadline=deadline
            )
            verdict = replace(_judge(executor, options, progress), seconds=time.monotonic() - began)
        keep = options.keep or not verdict.holds
        places = str(scratch) if options.root is None else f"{scratch} and {root}"
        return replace(verdict, scratch=places) if keep else verdict
    finally:
        if not keep:
            _remove(root, scratch, runs, servers)
            for made in new:
                with suppress(OSError):  # others use it
                    made.rmdir()


def _judge(executor: Executor, options: Options, progress: Progress) -> Verdict:
    base = run_undisturbed(executor, options)
    failure, attempt = base.failure, base.attempts[0]
    if failure and failure.status == ConfigError.status:
        raise ConfigError(failure.message)
    if failure and not attempt.select("made"):  # it did not get as far as the experiment
        raise StorageError(failure.message)
    verdict = Verdict(executor.command, base, RunTrace("killed"))
    if failure:
        cause = _of_failure(failure, base, _changes_while_probed(base))
        return replace(verdict, refusal=failure.message, cause=cause)
    if base.evidence is None:
        return replace(verdict, refusal=_unfinished(base), cause=CAUSES["incomplete"])
    executor = replace(executor, limit=max(LEAST_SECONDS, TIMES * attempt.seconds))
    for server in executor.servers:
        server.import_modules(attempt.select("imported")[0]["modules"])
    kills = plan(base, options)
    _require_room(executor.root, kills.size)
    progress(f"undisturbed: {kills.steps} steps, a checkpoint every {kills.every}")
    try:
        run = run_killed(executor, kills, attempt, progress)
    except OutOfTime:
        return replace(verdict, refusal=_OUT_OF_TIME, cause=CAUSES["incomplete"])
    verdict = _compare(executor, kills, base, run, progress)
    return replace(
        verdict, notes=[*verdict.notes, *_notes(kills, base, run), *(_lost_memory(base, run) if verdict.holds else ())]
    )


def _require_room(root: str, size: int) -> None:
    """Raise StorageError if the disk cannot hold the checkpoints, each of ``size`` bytes."""
    if is_remote(root):
        return
    free = shutil.disk_usage(local_root(root)).free
    if free < _STATES * size:
        raise StorageError(
            f"{root} has {free / 1e9:.1f} GB free, and the proof needs {_STATES * size / 1e9:.1f} GB there for "
            f"{_STATES} checkpoints of {size / 1e9:.1f} GB; give a larger place with verify.root=..."
        )


def _compare(executor: Executor, kills: KillPlan, base: RunTrace, run: RunTrace, progress: Progress) -> Verdict:
    difference = first_difference(run, base) or difference_of_results(run, base)
    failure = run.failure
    verdict = Verdict(
        executor.command,
        base,
        run,
        difference=difference,
        refusal=failure.message if failure else "" if difference else _incomplete(base, run),
        audit=[problem for each in (base, run) for problem in _problems(each)],
        cost=cost(base, run, imports=min(server.import_seconds for server in executor.servers)),
    )
    if difference is not None:
        progress(f"differs at step {difference.step}: {difference.part} ({difference.path}); looking for the cause")
        try:
            diagnosis = Investigation(executor, kills, base, progress).diagnose(run, difference)
        except OutOfTime:
            cut = "the search for the cause was cut short by verify.minutes"
            return replace(verdict, cause=replace(of_part(difference), sure=False), notes=[cut])
        return replace(verdict, diagnosis=diagnosis, cause=diagnosis.cause)
    if failure:
        changed = _changes_while_probed(run) or _changes_in_training(base)
        return replace(verdict, cause=_of_failure(failure, base, changed))
    return replace(verdict, cause=CAUSES["incomplete"]) if verdict.refusal else verdict


def _of_failure(failure: AttemptFailure, base: RunTrace, changes: str) -> Cause:
    structure = structural_changes(base) if failure.kind in ("restore", "structure") else []
    if structure:
        return replace(of_structure(structure), where=_line(base, structure[0][1]))
    path = changes.partition(" was ")[0]
    where = failure.where or (
        line_of(re.findall(r"\w+", path)[::-1], _made(base).get("data.train", [])) if path else ""
    )
    return replace(of_error(failure.kind, changes), where=where)


def _made(base: RunTrace) -> dict[str, Sources]:
    """The lines of the user's classes of each object of the experiment."""
    return {key: places for event in base.attempts[0].select("made") for key, places in event["sources"].items()}


def _line(base: RunTrace, path: str) -> str:
    """The line of the user's class whose object is part of the state at a path."""
    made = _made(base)
    names = ["add_param_group"] if path.startswith("optimizer") else re.findall(r"\w+", path.partition(" ")[0])[-2:0:-1]
    return line_of(names, made.get("task") or made.get("model") or [])


def _incomplete(base: RunTrace, run: RunTrace) -> str:
    """Why nothing is proven although nothing differs; empty if the runs did all that was planned."""
    if run.evidence is None:
        return _unfinished(run)
    for before, after in pairwise(run.attempts):
        if before.stopped and after.select("resumed") and after.first != before.last:
            return f"stopped by SIGTERM after step {before.last}, the run continued from step {after.first}"
    missed = base.by_step().keys() ^ run.by_step().keys()
    if missed or not base.by_step():
        return f"steps were not compared: {sorted(missed)[:10]}"
    return (
        "" if any(attempt.killed for attempt in run.attempts) else "no kill came before the end; try more verify.steps"
    )


def _unfinished(run: RunTrace) -> str:
    """Why a run has no result although no attempt failed with an error."""
    last = run.attempts[-1]
    if last.status is None:
        return "a run did not come to its end: a process was killed from outside, perhaps for its memory"
    return (
        f"attempt {last.request.record.stem} ended with exit status {last.status} after step {last.last}, before the "
        "run was finished: something in your code ends the process, as os._exit does"
    )


def _changes_while_probed(run: RunTrace) -> str:
    """Memory of a data set that the runner refused, as far as drawing a few samples changed it."""
    last = run.attempts[-1]
    before = {path: value for event in last.select("made") for path, value in event["memory"].items()}
    after = {path: value for event in last.select("refused") for path, value in event["memory"].items()}
    return "; ".join(
        f"{path} was {was}, then {after[path]}" for path, was in before.items() if after.get(path, was) != was
    )


def _changes_in_training(base: RunTrace) -> str:
    """Memory of data sets that training changes."""
    entries = [entry for entry in changes(base) if entry[0].startswith("data.")]
    return "; ".join(f"{path} was {was}, then {now}" for path, was, now in entries[:3])


def _problems(run: RunTrace) -> list[str]:
    evidence = run.evidence
    return [f"{run.name}: {problem}" for problem in evidence["audit"]["problems"]] if evidence else []


def _notes(kills: KillPlan, base: RunTrace, run: RunTrace) -> list[str]:
    notes = []
    if kills.epoch is not None and kills.steps <= kills.epoch:
        notes.append(
            f"an epoch has {kills.epoch} steps, so none ended within these {kills.steps}; "
            f"verify.steps={kills.epoch + kills.epoch // 4 + 1} goes past the end of one"
        )
    if kills.epoch is None:
        notes.append("the data is an iterable, which is resumed with the same number of workers only")
    if base.attempts[0].select("unlimited"):
        notes.append("trainer.max_seconds was left out: a run that ends by the clock ends at another step every time")
    if oftener := base.attempts[0].select("oftener"):
        notes.append(f"evaluated every {oftener[0]['every']} steps, besides what is configured")
    if missing := len(kills.kills) - sum(attempt.killed is not None for attempt in run.attempts):
        notes.append(
            f"{missing} of {len(kills.kills)} kills did not come: the run ended before, or verify.minutes was over"
        )
    if not any(event["evaluation"] for _, event in base.steps() if event["step"] < kills.steps):
        notes.append("no evaluation but the last lies within these steps; verify.steps=... reaches further")
    return notes


def _lost_memory(base: RunTrace, run: RunTrace) -> list[str]:
    """Memory whose loss may make a difference later."""
    entries = lost_memory(run, base)
    text = "; ".join(
        f"{path} was {was or 'absent'} and is {now or 'absent'} after loading" for path, was, now in entries[:3]
    )
    more = f"; and {len(entries) - 3} more" if len(entries) > 3 else ""
    return [f"not in the state, and without effect within these steps: {text}{more}"] if entries else []


def _missing_folders(folder: Path) -> list[Path]:
    """The folders of a path that do not exist, the innermost first."""
    return [each for each in (folder, *folder.parents) if not each.exists()]


def _remove(root: str, scratch: Path, runs: Sequence[RunTrace], servers: Servers | None) -> None:
    """Remove all that a proof made, also where it was cut short."""
    if is_remote(root) and runs:
        with nullcontext(servers) if servers else fork_servers() as (server, _):
            for run in runs:
                server(run.removal())
    elif not is_remote(root):
        shutil.rmtree(local_root(root), ignore_errors=True)
    shutil.rmtree(scratch, ignore_errors=True)
