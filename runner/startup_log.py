"""The first lines on the screen: the run, the step from which it starts, the guarantee for its data, the device.

And the topology: hardware, library versions and threads, on which exact results depend besides the configuration. It is
recorded with every attempt, so that a resume under other conditions can say what changed.
"""

import logging
import os
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from runner.build import Parts
from runner.errors import printable
from runner.restore import Resumed
from runner.run.attempt_records import AttemptRecord
from runner.run.opening import OpenedRun

log = logging.getLogger("runner")

# A change of one of these may change float results; the other facts are recorded for people.
_BITWISE = (
    "python",
    "torch",
    "numpy",
    "machine",
    "cpu_capability",
    "threads",
    "device",
    "processes",
    "parallel",
    "compiled",
    "gpus",
    "cuda",
    "deterministic",
)


def topology(device: torch.device, processes: int, parallel: str, *, compiled: bool) -> dict[str, Any]:
    """The topology of a run's processes, as plain JSON values. Call it after threads and device were set."""
    on_cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "processes": processes,
        "parallel": parallel if processes > 1 else None,
        "compiled": compiled,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if on_cuda else [],
        "cuda": torch.version.cuda if on_cuda else None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "git": _git_revision(),
    }


def topology_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The changes since another attempt on which float results may depend, as ``name before -> now``."""
    before = {"processes": 1, "compiled": False, **before}
    return [f"{key} {before.get(key)} -> {now.get(key)}" for key in _BITWISE if before.get(key) != now.get(key)]


def _git_revision() -> str | None:
    """The revision of the working directory's repository, ``-dirty`` with uncommitted changes; None outside one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def log_start(
    opening: OpenedRun,
    parts: Parts,
    resumed: Resumed,
    *,
    before: AttemptRecord | None,
    number: int,
    here: dict[str, Any],
) -> None:
    """Print the lines, once per attempt. ``before`` is the previous attempt, ``here`` the topology of this process."""
    count = sum(parameter.numel() for parameter in parts.state.model.parameters())
    log.info("run      %s", opening.directory.location.url)
    log.info("attempt  %d, %s", number, _from_where(resumed, before))
    for line in resumed.unusable:
        log.warning("unused   %s", line)
    for line in resumed.unmatched:
        log.warning("weights  %s", printable(line))
    if opening.changes:
        log.info("changed  %s", ", ".join(f"{d.key} {d.saved!r} -> {d.now!r}" for d in opening.changes))
    then = before.claim.get("topology") if before is not None else None
    moved = topology_changes(then, here) if isinstance(then, dict) else []
    if moved:
        log.warning("moved    %s: same samples, but floats may differ in the last bits", printable(", ".join(moved)))
    log.info("data     %s", parts.state.stream.guarantee)
    if parts.parallelism.description:
        log.info("together %s; %s", parts.parallelism.description, _share(parts))
    log.info("device   %s, threads %d, data workers %d", here["device"], here["threads"], parts.state.stream.workers)
    log.info("model    %s parameters", f"{count:,}")


def _share(parts: Parts) -> str:
    """How many micro-batches and samples of a step each process gets."""
    plan = parts.plan
    assert plan is not None, "iterable data was refused"
    each = f"{plan.micro_batches} micro-batch" + "es" * (plan.micro_batches > 1)
    return f"each takes {each} of {'up to ' * bool(plan.max_tokens)}{plan.batch_size // plan.slices_per_step} samples"


def _from_where(resumed: Resumed, before: AttemptRecord | None) -> str:
    origin = resumed.origin
    if origin is not None:
        return printable(f"{'forked' if origin.start else 'weights'} from step {origin.step} of {origin.run}")
    if resumed.commit is None:
        if before is None:
            return "from scratch"
        return f"from scratch (attempt {before.number} was {before.outcome()} before its first checkpoint)"
    text = f"resumed from step {resumed.step} of attempt {resumed.commit.attempt}"
    reached = before.beat.get("step") if before is not None else None
    if before is not None and isinstance(reached, int) and reached > resumed.step:
        text += f"; attempt {before.number} was {before.outcome()} at step {reached} or later, "
        text += f"{reached - resumed.step} steps are done again"
    return text
