"""Learning rate schedules in closed form, so that their state is a step count."""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(
    optimizer: Optimizer, *, total_steps: int | None, warmup_steps: int = 0, final_ratio: float = 0.0
) -> LambdaLR:
    """Linear warm-up to the optimizer's rate, then half a cosine down to ``final_ratio`` of it at ``total_steps``."""
    if total_steps is None:
        raise ValueError(
            "the steps of the run are unknown; set trainer.max_steps, or scheduler.total_steps to the steps of the run"
        )
    return LambdaLR(optimizer, partial(_ratio, total=total_steps, warmup=warmup_steps, final=final_ratio))


def _ratio(step: int, *, total: int, warmup: int, final: float) -> float:
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
