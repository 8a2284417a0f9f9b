"""From a command to a verdict: undisturbed, killed, compared, and if need be explained."""

import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from runner.errors import ConfigError, StorageError
from runner.storage.location import is_remote, local_root
from runner.verify import campaign, difference
from runner.verify.campaign import KillPlan, Tell
from runner.verify.causes import CAUSES, of_refusal
from runner.verify.diagnosis import Investigation
from runner.verify.execution import Executor, RunTrace, Servers, by_step, servers
from runner.verify.options import Options, new_name
from runner.verify.verdict import Verdict, cost

_KILLED = "a run did not come to its end: a process was killed by somebody else, perhaps for its memory"

_STATES = 6  # that lie on the disk at once beside those of the undisturbed run: the last ones, the best, one in making


def prove(command: Sequence[str], options: Options, *, tell: Tell, two: Servers | None = None) -> Verdict:
    """Judge whether the experiment of a command resumes exactly. Raises ConfigError for a command that cannot run,
    and StorageError for a root where none can.

    ``tell`` is given lines on what is going on; lives come from ``two`` servers, if they are there already. Nothing is
    left behind but the runs of a proof that failed.
    """
    began = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="runner-verify-"))
    root = str(scratch / "runs") if options.root is None else f"{options.root.rstrip('/')}/{new_name()}"
    runs: list[RunTrace] = []
    kept = False
    try:
        with nullcontext(two) if two else servers() as both:
            evaluations = campaign.evaluations(options)
            stage = Executor(tuple(command), scratch, root, both, runs, evaluations, options.processes)
            verdict = _judged(stage, options, tell, began)
        kept = options.keep or not verdict.holds
        return replace(verdict, scratch=_where(scratch, root)) if kept else verdict
    finally:
        if not kept:
            _remove(root, scratch, runs, two)


def _judged(stage: Executor, options: Options, tell: Tell, began: float) -> Verdict:
    base = campaign.undisturbed(stage, options)
    run, failed = RunTrace("killed"), base.failed
    if failed is not None and failed.status == ConfigError.status:
        raise ConfigError(campaign.failure(failed))
    if failed is not None and not base.lives[0].of("made"):  # it did not get as far as the experiment
        raise StorageError(campaign.failure(failed))
    verdict = Verdict(stage.command, base, run, 0.0)
    if failed is not None or base.evidence is None:
        said = campaign.failure(failed) if failed else _KILLED
        cause = of_refusal(said, _moved(base)) if failed else CAUSES["incomplete"]
        return replace(verdict, refusal=said, cause=cause, seconds=time.monotonic() - began)
    for server in stage.servers:
        server.import_modules(base.lives[0].of("imported")[0]["modules"])
    plan = campaign.plan(base, options)
    _require_room(stage.root, plan.size)
    tell(f"undisturbed: {plan.steps} steps, a checkpoint every {plan.every}")
    run = campaign.disturbed(stage, plan, tell)
    verdict = _compared(stage, plan, base, run, tell)
    notes = [*_notes(plan, base), *(_forgotten(base, run) if verdict.holds else ())]
    return replace(verdict, notes=notes, seconds=time.monotonic() - began)


def _require_room(root: str, size: int) -> None:
    """Raises StorageError where the disk cannot hold the checkpoints, each of so many bytes."""
    if is_remote(root):
        return
    free = shutil.disk_usage(local_root(root)).free
    if free < _STATES * size:
        raise StorageError(
            f"{root} has {free / 1e9:.1f} GB free, and the proof needs {_STATES * size / 1e9:.1f} GB there for "
            f"{_STATES} checkpoints of {size / 1e9:.1f} GB; give a larger place with verify.root=..."
        )


def _compared(stage: Executor, plan: KillPlan, base: RunTrace, run: RunTrace, tell: Tell) -> Verdict:
    found = difference.first(run, base) or difference.at_the_end(run, base)
    failed = run.failed
    verdict = Verdict(
        stage.command,
        base,
        run,
        0.0,
        difference=found,
        refusal=campaign.failure(failed) if failed else "" if found else _incomplete(base, run),
        audit=[problem for one in (base, run) for problem in _problems(one)],
        cost=cost(base, run, imports=min(server.import_seconds for server in stage.servers)),
        checkpoints=difference.checkpoints(base, run),
    )
    if found is not None:
        tell(f"differs at step {found.step}: {found.part} ({found.where}); looking for the cause")
        diagnosis = Investigation(stage, plan, base, tell).diagnose(run, found)
        return replace(verdict, diagnosis=diagnosis, cause=diagnosis.cause)
    if failed:
        return replace(verdict, cause=of_refusal(verdict.refusal, _moved(run) or _moving(base)))
    return replace(verdict, cause=CAUSES["incomplete"]) if verdict.refusal else verdict


def _incomplete(base: RunTrace, run: RunTrace) -> str:
    """Why nothing is proven although nothing differs; empty where the runs did all that they were to do."""
    if base.evidence is None or run.evidence is None:
        return _KILLED
    missed = by_step(base).keys() ^ by_step(run).keys()
    if missed or not by_step(base):
        return f"steps were not compared: {sorted(missed)[:10]}"
    return "" if any(life.killed for life in run.lives) else "no kill came before the end; try more verify.steps"


def _moved(run: RunTrace) -> str:
    """What a data set that was refused remembers and changed while a few of its samples were drawn."""
    last = run.lives[-1]
    made = {path: value for event in last.of("made") for path, value in event["memory"].items()}
    now = {path: value for event in last.of("refused") for path, value in event["memory"].items()}
    return "; ".join(
        f"{path} was {made[path]}, then {now[path]}" for path in made if now.get(path, made[path]) != made[path]
    )


def _moving(base: RunTrace) -> str:
    """What its data sets remember and change while it trains."""
    entries = [entry for entry in difference.moving(base) if entry[0].startswith("data.")]
    return "; ".join(f"{path} was {was}, then {now}" for path, was, now in entries[:3])


def _problems(run: RunTrace) -> list[str]:
    evidence = run.evidence
    return [f"{run.name}: {problem}" for problem in evidence["audit"]["problems"]] if evidence else []


def _notes(plan: KillPlan, base: RunTrace) -> list[str]:
    notes = []
    if plan.epoch is not None and plan.steps <= plan.epoch:
        notes.append(
            f"an epoch has {plan.epoch} steps, so none ended within these {plan.steps}; "
            f"verify.steps={plan.epoch + plan.epoch // 4 + 1} goes past the end of one"
        )
    if plan.epoch is None:
        notes.append("the data is an iterable, which is resumed with the same number of workers only")
    if base.lives[0].of("unlimited"):
        notes.append("trainer.max_seconds was left out: what ends by the clock ends at another step every time")
    oftener = base.lives[0].of("oftener")
    if oftener:
        notes.append(f"evaluated every {oftener[0]['every']} steps, beside what is configured")
    if not any(
        event["evaluation"] for _, event in base.steps() if event["event"] == "step" and event["step"] < plan.steps
    ):
        notes.append("no evaluation but the last lies within these steps; verify.steps=... reaches further")
    return notes


def _forgotten(base: RunTrace, run: RunTrace) -> list[str]:
    """What may make a difference later, or what shows that the data set is a cache."""
    entries = difference.forgotten(run, base)
    told = "; ".join(
        f"{path} was {was or 'absent'} and is {now or 'absent'} after loading" for path, was, now in entries[:3]
    )
    more = f"; and {len(entries) - 3} more" if len(entries) > 3 else ""
    return [f"not in the state, and without effect within these steps: {told}{more}"] if entries else []


def _remove(root: str, scratch: Path, runs: Sequence[RunTrace], two: Servers | None) -> None:
    """Remove all that a proof made, also where it was cut short."""
    if is_remote(root) and runs:
        with nullcontext(two) if two else servers() as (server, _):
            for run in runs:
                server(run.removal())
    elif not is_remote(root):
        shutil.rmtree(local_root(root), ignore_errors=True)
    shutil.rmtree(scratch, ignore_errors=True)


def _where(scratch: Path, root: str) -> str:
    return str(scratch) if root.startswith(str(scratch)) else f"{scratch} and {root}"
