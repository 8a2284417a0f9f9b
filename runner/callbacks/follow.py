"""Saving on ranks other than 0: they copy and commit the same steps as rank 0, and decide nothing."""

from collections.abc import Callable, Collection

from runner.agreement import led
from runner.callbacks.base import Callback, Loop
from runner.callbacks.checkpoint import Order
from runner.callbacks.saving import Hooks, Job, Saves
from runner.checkpoint.store import CheckpointStore
from runner.checkpoint.writer import Follower
from runner.ranks import Ranks


class FollowCheckpoint(Callback):
    """Does what ``SaveCheckpoint`` on rank 0 decides, at the same steps.

    A copy that could not be written is kept until rank 0 decides whether to try again: an error on one rank is an error
    of all ranks, and rank 0 decides what follows.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        attempt: int,
        background: bool,
        ranks: Ranks,
        weights: Callable[[], Collection[str]] = tuple,
    ) -> None:
        hooks = Hooks(lambda step: {}, lambda: None, lambda: None, lambda commit: None, lambda: None)
        self.saves = Saves(store, hooks, attempt=attempt, ranks=ranks, weights=weights)
        self.ranks = ranks
        self.background = background
        self._writer: Follower[Job] = Follower(self._commit, lambda: int(store.ranks.broadcast(None)))

    def on_start(self, loop: Loop) -> None:
        self.saves.check(loop)
        self._act(loop)

    def on_step(self, loop: Loop) -> None:
        while (order := self._act(loop)) and order["more"]:
            pass

    def on_end(self, loop: Loop) -> None:
        self._writer.wait()
        while self._act(loop):
            self._writer.wait()

    def act(self, loop: Loop, order: Order | None) -> None:
        """Do what was decided."""
        if order is None:
            return
        for step in order["drop"]:
            self.saves.rooms.append(self._writer.take(step).staging)
        again = order["again"]
        job = self.saves.stage(loop, exact=order["exact"]) if again is None else self._writer.take(again)
        self._writer.put(job.step, job)
        if not self.background:
            self._writer.wait()
            led(self.ranks, lambda: None)  # what the first rank makes of it

    def close(self) -> None:
        """Finish the commit in flight, if there is one."""
        self._writer.close(5.0)

    def _act(self, loop: Loop) -> Order | None:
        order: Order | None = led(self.ranks, lambda: None)
        self.act(loop, order)
        return order

    def _commit(self, job: Job) -> None:
        self.saves.settle(self.saves.commit(job))
