"""From a command to a verdict: run undisturbed, run killed, compare, and diagnose a difference."""

import json
import math
import re
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from runner.errors import ConfigError, StorageError, printable
from runner.storage.location import is_remote, local_root
from runner.verify import difference as differences
from runner.verify.campaign import KillPlan, Progress, plan_kills, run_killed, run_undisturbed
from runner.verify.causes import CAUSES, Cause, of_error, of_part
from runner.verify.diagnosis import Investigation
from runner.verify.difference import FirstDifference
from runner.verify.execution import (
    AttemptFailure,
    AttemptRequest,
    AttemptTrace,
    Executor,
    OutOfTime,
    RunTrace,
    Servers,
    fork_servers,
)
from runner.verify.fingerprint import UNSEEN
from runner.verify.options import Options
from runner.verify.source import line_of, untried

LEAST_SECONDS = 60.0  # no attempt counts as hanging earlier
TIMES = 10.0  # an attempt counts as hanging if it takes so many times as long as the undisturbed run
_UNKNOWN = ("other", "time-limit")  # kinds of errors that say nothing of a resume
_STATES = 6  # the killed run has so many on the disk at once: the last, the best, and one that is being written


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one proof, for people and for programs.

    It holds if there is no ``difference``, no ``refusal`` (the message of an attempt that failed) and no problem in the
    ``audit`` of the samples of the runs. ``cause`` belongs to any of these; ``tried`` are the repetitions that led to
    it, with their outcomes. ``scratch`` says where the runs are, if they were kept.
    """

    command: Sequence[str]
    undisturbed: RunTrace
    killed: RunTrace = field(default_factory=lambda: RunTrace("killed"))
    seconds: float = 0.0
    difference: FirstDifference | None = None
    refusal: str = ""
    cause: Cause | None = None
    tried: Sequence[str] = ()
    audit: Sequence[str] = ()
    scratch: str | None = None
    notes: Sequence[str] = ()

    @property
    def holds(self) -> bool:
        """Whether the experiment resumes exactly."""
        return self.difference is None and not self.refusal and not self.audit

    @property
    def proven(self) -> dict[str, Any]:
        """How much was tried."""
        evidence = [run.evidence or {} for run in (self.undisturbed, self.killed)]
        undisturbed, killed = self.undisturbed.attempts, self.killed.attempts
        moments = Counter(attempt.killed for attempt in killed if attempt.killed)
        return {
            "steps": max((attempt.last for attempt in undisturbed), default=0),
            "samples": evidence[0].get("audit", {}).get("positions", 0),
            "kills": sum(moments.values()),
            "moments": dict(moments),
            "kills_of_one_process": sum(attempt.victim is not None for attempt in killed),
            "processes": max((attempt.request.processes for attempt in undisturbed), default=1),
            "attempts": len(killed),
            "workers": sorted({attempt.workers for attempt in [*undisturbed, *killed]}),
            "checkpoints": sum(len(each.get("checkpoints", {})) for each in evidence) if killed else 0,
            "steps_done_again": sum(max(0, before.last - after.first) for before, after in pairwise(killed)),
            "seconds": round(self.seconds, 1),
        }

    def json(self) -> str:
        """The verdict for programs."""
        difference = self.difference
        attempts = [
            {"first": each.first, "last": each.last, "workers": each.workers, "killed": each.killed}
            for each in self.killed.attempts
        ]
        values = {
            "verdict": "PASS" if self.holds else "FAIL",
            "command": [*self.command],
            "proven": self.proven,
            "difference": difference and asdict(replace(difference, remembered=(), changing=())),
            "refusal": self.refusal or None,
            "audit": [*self.audit],
            "cause": asdict(self.cause) if self.cause else None,
            "tried": [*self.tried],
            "attempts": attempts,
            "notes": [*self.notes],
            "scratch": self.scratch,
        }
        return json.dumps(values, indent=2, default=str)

    def text(self) -> str:
        """The verdict for people: the result in one line, then the reasons."""
        return printable("\n".join(f"{label:9}{text}".replace("\n", f"\n{'':9}") for label, text in self.rows()))

    def rows(self) -> Iterator[tuple[str, str]]:
        """The same as label and text of each row."""
        proven, difference, cause = self.proven, self.difference, self.cause
        alone, processes = proven["kills_of_one_process"], proven["processes"]
        several = f" ({alone} of one process alone), {processes} processes" if processes > 1 else ""
        tried = (
            f"{proven['kills']} kills{several}, {proven['steps']} steps, {proven['attempts']} attempts, "
            f"{proven['samples']} samples, {' and '.join(map(str, proven['workers']))} workers, "
            f"{proven['seconds']:.0f} s"
        )
        yield ("PASS" if self.holds else "FAIL"), tried
        if self.holds:
            yield "", f"{_EQUAL}\n{proven['checkpoints']} checkpoints, evaluations, metric lines and final weights."
        if difference is not None:
            when = "right after loading" if difference.restored else "the first that differs"
            yield "step", f"{difference.step}, {when}; attempt {difference.attempt + 1}"
            yield "part", f"{difference.part}: {difference.path}"
            values = f"{_short(difference.expected)} undisturbed, {_short(difference.actual)} killed"
            yield "differs", "\n".join(filter(None, (values, difference.size())))
        if self.refusal:
            yield "error", self.refusal
        yield from (("audit", problem) for problem in self.audit[:5])
        if cause is not None and not self.holds:
            yield ("cause" if cause.sure else "perhaps"), cause.description
            yield "remedy", cause.remedy
            if cause.where:
                yield "where", cause.where
        yield from (("note", note) for note in self.notes)
        if self.scratch:
            yield "kept", f"{self.scratch}: the runs, output (*.log) and record (*.jsonl) of each attempt"


_EQUAL = "Equal to the bit: losses, gradients and samples of every step, the state after steps and loads,"


def _short(value: Any) -> str:
    text = f"{value:.9g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 90 else f"{text[:87]}..."


def prove(command: Sequence[str], options: Options, *, progress: Progress, servers: Servers | None = None) -> Verdict:
    """Judge whether the experiment of a command resumes exactly. Raises ConfigError for a command that cannot run,
    and StorageError for a root that cannot hold the runs.

    ``progress`` is called with lines for people. ``servers`` are used if they are running already. Nothing is left
    behind except the runs of a proof that failed.
    """
    began = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="runner-verify-"))
    root = str(scratch / "runs")
    if options.root is not None:
        root = f"{options.root.rstrip('/')}/verify-{secrets.token_hex(4)}"
    parents = [] if options.root is None or is_remote(root) else [*Path(local_root(root)).parents]
    new_folders = [folder for folder in parents if not folder.exists()]  # the innermost first
    deadline = math.inf if options.minutes is None else began + 60 * options.minutes
    requests: dict[str, AttemptRequest] = {}
    keep = False
    try:
        with nullcontext(servers) if servers else fork_servers() as both:
            executor = Executor(tuple(command), scratch, root, both, requests, options.processes, deadline=deadline)
            executor.ignored |= {*options.ignore}
            verdict = replace(_judge(executor, options, progress), seconds=time.monotonic() - began)
        keep = options.keep or not verdict.holds
        folders = str(scratch) if options.root is None else f"{scratch} and {root}"
        return replace(verdict, scratch=folders) if keep else verdict
    finally:
        if not keep:
            _remove(root, requests.values(), servers)
        # Only now, because the attempts that remove runs make these folders once more.
        for request in requests.values():
            shutil.rmtree(request.temporary, ignore_errors=True)
        if not keep:
            shutil.rmtree(scratch, ignore_errors=True)
            for folder in new_folders:
                with suppress(OSError):  # another process uses it
                    folder.rmdir()


def _remove(root: str, requests: Collection[AttemptRequest], servers: Servers | None) -> None:
    """Remove all runs from their storage; each is named by the last request for an attempt at it."""
    if not is_remote(root):
        shutil.rmtree(local_root(root), ignore_errors=True)
    elif requests:
        with nullcontext(servers) if servers else fork_servers() as (server, _):
            for request in requests:
                server(replace(request, removes=True, kill=None, pins=(), processes=1))


def _judge(executor: Executor, options: Options, progress: Progress) -> Verdict:
    base = run_undisturbed(executor, options)
    failure, attempt = base.failure, base.attempts[0]
    if failure and failure.status == ConfigError.status:
        raise ConfigError(failure.message)
    if failure and not attempt.select("instances"):  # it did not get as far as the experiment
        raise StorageError(failure.message)
    verdict = Verdict(executor.command, base)
    if failure:
        cause = _of_failure(failure, base, _changes_while_probed(base))
        return replace(verdict, refusal=failure.message, cause=cause)
    if base.evidence is None:
        return replace(verdict, refusal=_unfinished(base), cause=CAUSES["incomplete"])
    executor.limit = max(LEAST_SECONDS, TIMES * attempt.seconds)
    executor.imports = tuple(base.evidence["modules"])
    _require_room(executor.root, base.evidence["size"])
    kills = plan_kills(base, options)
    progress(f"undisturbed: {kills.steps} steps, a checkpoint every {kills.every}")
    try:
        run, kills, cut = _killed(executor, kills, attempt, progress)
    except OutOfTime:
        refusal = "verify.minutes ended before the killed run did; give it more"
        return replace(verdict, refusal=refusal, cause=CAUSES["incomplete"])
    verdict = _compare(executor, kills, base, run, progress)
    unproven = _unproven(base, run) if verdict.holds else ()
    return replace(verdict, notes=[*verdict.notes, *_notes(kills, base, run, options.ignore), *cut, *unproven])


def _killed(
    executor: Executor, kills: KillPlan, undisturbed: AttemptTrace, progress: Progress
) -> tuple[RunTrace, KillPlan, list[str]]:
    """The killed run, its plan and notes. If it fails with another number of workers only, it is repeated without."""
    run = run_killed(executor, kills, undisturbed, progress)
    last, first = run.attempts[-1], kills.workers[:1]
    if not last.failure or last.failure.kind not in _UNKNOWN or last.workers in first:
        return run, kills, []
    error = last.failure.message.partition("\n")[0]
    progress(f"an attempt with {last.workers} data workers failed; once more without them")
    kills = replace(kills, workers=first)
    run = run_killed(executor, kills, undisturbed, progress, name="killed-again")
    note = f"not proven with {last.workers} data workers, with which an attempt failed: {error}"
    return run, kills, [note]


def _require_room(root: str, size: int) -> None:
    """Raise StorageError if the disk cannot hold the checkpoints, each of ``size`` bytes."""
    free = math.inf if is_remote(root) else shutil.disk_usage(local_root(root)).free
    if free < _STATES * size:
        raise StorageError(
            f"{root} has {free / 1e9:.1f} GB free, and the proof needs {_STATES * size / 1e9:.1f} GB there for "
            f"{_STATES} checkpoints of {size / 1e9:.1f} GB; give a larger disk with verify.root=..."
        )


def _compare(executor: Executor, kills: KillPlan, base: RunTrace, run: RunTrace, progress: Progress) -> Verdict:
    failure, notes = run.failure, list[str]()
    audits = {each.name: each.evidence["audit"]["problems"] for each in (base, run) if each.evidence}
    audit = [f"{name}: {problem}" for name, problems in audits.items() for problem in problems]
    verdict = Verdict(executor.command, base, run, audit=audit, refusal=failure.message if failure else "", notes=notes)
    while difference := differences.first_difference(run, base) or differences.difference_of_results(run, base):
        progress(f"differs at step {difference.step}: {difference.part} ({difference.path}); looking for the cause")
        investigation = Investigation(executor, kills, base, progress)
        try:
            cause = investigation.diagnose(run, difference)
        except OutOfTime:
            notes.append("the search for the cause was cut short by verify.minutes")
            return replace(verdict, difference=difference, cause=replace(of_part(difference), sure=False))
        if difference.part not in ("metrics", "evaluation") or cause.kind != "time":
            return replace(verdict, difference=difference, cause=cause, tried=investigation.tried)
        notes.append(f"not compared: the metric {difference.path}, which depends on the clock ({cause.where})")
        executor.ignore(difference.path, base, run)
    if failure:
        of_data = [entry for entry in differences.changes(base) if entry[0].startswith("data.")]
        changed = _changes_while_probed(run) or differences.in_words(of_data, ", then {}")
        if failure.kind == "rollouts-changed":
            changed = differences.in_words(differences.lost_memory(run, base))
        return replace(verdict, cause=_of_failure(failure, base, changed))
    refusal = _incomplete(base, run)
    return replace(verdict, refusal=refusal, cause=CAUSES["incomplete"]) if refusal else verdict


def _of_failure(failure: AttemptFailure, base: RunTrace, changed: str) -> Cause:
    """The cause of an error. ``changed``: memory of the data set that changes, in words."""
    sources = base.sources
    where = failure.where
    if failure.kind == "structure":
        path = re.search(r"model/([\w.]+)", failure.message)
        names = re.findall(r"\w+", path[1])[::-1] if path else ["add_param_group"]
        where = line_of(names[1:] or names, sources.get("task") or sources.get("model") or [])
    if changed and not where:
        where = line_of(re.findall(r"\w+", changed.partition(" was ")[0])[::-1], sources.get("data.train", []))
    return replace(of_error(failure.kind, changed), where=where)


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
    killed = any(attempt.killed for attempt in run.attempts)
    return "" if killed else "no kill came before the end; try more verify.steps"


def _unfinished(run: RunTrace) -> str:
    """Why a run has no result although no attempt failed with an error."""
    last = run.attempts[-1]
    if last.status is None:
        return "a run did not come to its end: a process was killed from outside, perhaps for its memory"
    return (
        f"attempt {last.request.record().stem} ended with exit status {last.status} after step {last.last}, before the "
        "run was finished: something in your code ends the process, as os._exit does"
    )


def _changes_while_probed(run: RunTrace) -> str:
    """Memory of a data set that the runner refused, if drawing a few samples changed it."""
    last = run.attempts[-1]
    before = {path: value for event in last.select("instances") for path, value in event["memory"].items()}
    after = {path: value for event in last.select("refused") for path, value in event["memory"].items()}
    return differences.in_words(
        differences.unequal(before, {path: after.get(path, value) for path, value in before.items()}), ", then {}"
    )


def _unproven(base: RunTrace, run: RunTrace) -> Iterator[str]:
    """Notes on memory and inputs that had no effect within the steps of a proof that holds."""
    if lost := differences.in_words(differences.lost_memory(run, base)):
        yield f"not proven: not in the state, and without effect within these steps: {lost}"
    last, internals = base.by_step()[base.attempts[0].last]["memory"], (*(base.evidence or {})["private"],)
    unseen = [f"{path} ({words})" for path, words in last.items() if UNSEEN in words and not path.startswith(internals)]
    if unseen:
        yield f"not proven: what {', '.join(unseen[:3])} remembers"
    reached, workers = (base.evidence or {})["reached"], differences.worker_events(base, run)
    if not workers and any(attempt.workers for attempt in [*base.attempts, *run.attempts]):
        yield "not proven: what data workers alone remember, of which none came to its end by itself; more verify.kills"
    if same := untried(reached | {key: line for event in workers for key, line in event["reached"].items()}):
        yield f"not proven: what depends on {' and '.join(same)}, of which another start may read another value"


def _notes(kills: KillPlan, base: RunTrace, run: RunTrace, ignored: Sequence[str]) -> list[str]:
    notes = [f"not compared: the metrics {', '.join(ignored)} of verify.ignore"] if ignored else []
    built = base.attempts[0].select("built")[0]
    if (epoch := built["epoch"]) is None:
        notes.append("the data is an iterable, which is resumed with the same number of workers only")
    elif kills.steps <= epoch:
        notes.append(
            f"an epoch has {epoch} steps, so none ended within these {kills.steps}; "
            f"verify.steps={epoch + epoch // 4 + 1} goes past the end of one"
        )
    if built["unlimited"]:
        notes.append("trainer.max_seconds was left out: a run that ends by the clock ends at another step every time")
    if built["evaluated_every"]:
        notes.append(f"evaluated every {built['evaluated_every']} steps, besides what is configured")
    if missing := len(kills.kills) - sum(attempt.killed is not None for attempt in run.attempts):
        notes.append(f"{missing} of {len(kills.kills)} kills did not come: the run or verify.minutes ended before")
    if not any(event["evaluation"] for _, event in base.steps() if event["step"] < kills.steps):
        notes.append("these steps have no evaluation but the last; verify.steps=... reaches further")
    return notes
