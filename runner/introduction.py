"""The first lines on the screen: what is run, where, from which step, with what guarantee, on what."""

import logging
from typing import Any

from runner import topology
from runner.build import Parts
from runner.errors import printable
from runner.restore import Resumed
from runner.run.opening import Opening
from runner.run.records import Record

log = logging.getLogger("runner")


def introduce(
    opening: Opening, parts: Parts, resumed: Resumed, *, before: Record | None, number: int, here: dict[str, Any]
) -> None:
    """Print the lines, once per attempt. ``before`` is the previous attempt, ``here`` the topology of this process."""
    count = sum(parameter.numel() for parameter in parts.state.model.parameters())
    log.info("run      %s", opening.directory.location.url)
    log.info("attempt  %d, %s", number, _from_where(resumed, before))
    for line in resumed.unusable:
        log.warning("unused   %s", line)
    if opening.drift:
        log.info("changed  %s", ", ".join(f"{d.key} {d.saved!r} -> {d.now!r}" for d in opening.drift))
    then = before.claim.get("topology") if before is not None else None
    moved = topology.differences(then, here) if isinstance(then, dict) else []
    if moved:
        log.warning("moved    %s: same samples, but floats may differ in the last bits", printable(", ".join(moved)))
    log.info("data     %s", parts.state.stream.guarantee)
    if parts.layout.told:
        log.info("together %s; %s", parts.layout.told, _share(parts))
    log.info("device   %s, threads %d, data workers %d", here["device"], here["threads"], parts.state.stream.workers)
    log.info("model    %s parameters", f"{count:,}")


def _share(parts: Parts) -> str:
    """How many micro-batches and samples of a step each process gets."""
    plan = parts.plan
    assert plan is not None, "iterable data was refused"
    each = f"{plan.micro_batches} micro-batch" + "es" * (plan.micro_batches > 1)
    return f"each takes {each} of {'up to ' * bool(plan.max_tokens)}{plan.batch_size // plan.slices_per_step} samples"


def _from_where(resumed: Resumed, before: Record | None) -> str:
    origin = resumed.origin
    if origin is not None:
        what = "forked" if origin.begun else "weights"
        return printable(f"{what} from step {origin.step} of {origin.run}")
    if resumed.commit is None:
        told = f"attempt {before.number} was {before.outcome()} before its first checkpoint" if before else ""
        return f"from scratch ({told})" if told else "from scratch"
    text = f"resumed from step {resumed.step} of attempt {resumed.commit.attempt}"
    reached = before.beat.get("step") if before is not None else None
    if before is not None and isinstance(reached, int) and reached > resumed.step:
        text += f"; attempt {before.number} was {before.outcome()} at step {reached} or later, "
        text += f"{reached - resumed.step} steps are done again"
    return text
