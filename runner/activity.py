"""What each thread is doing, for the watchdogs that judge whether a process hangs.

Knows nothing of watchdogs. A thread that declares nothing computes training steps.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

# "saves": writes or reads a checkpoint, or exports. "joins": waits for the commit thread of its own process.
# "evaluates": computes batches of an evaluation; "ends evaluation": does anything else in it.
# "reads again": reads samples of an iterable again to resume, which takes as long as it takes.
Activity = Literal["saves", "joins", "evaluates", "ends evaluation", "reads again"]

_activities: dict[int, list[Activity]] = {}  # by thread, the innermost last


@contextmanager
def doing(activity: Activity) -> Iterator[None]:
    """Within the block, or within the function it decorates, this thread does that. Blocks nest.

    Not for what happens in every step, and not in a generator that yields within the block.

        with doing("saves"):
            store.commit(snapshot)
    """
    ident = threading.get_ident()
    activities = _activities.setdefault(ident, [])
    activities.append(activity)
    try:
        yield
    finally:
        activities.pop()
        if not activities:
            _activities.pop(ident, None)


def activities(thread: int) -> tuple[Activity, ...]:
    """All that a thread, given by its ident, is doing: the innermost activity last. For any other thread to call."""
    return (*_activities.get(thread, ()),)
