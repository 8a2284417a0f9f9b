"""One run of a proof: its lives, and what they told."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from runner.storage.location import is_remote, local_root
from runner.verify.lives import Ended, Life, Servers

Event = dict[str, Any]

_COMPARED = ("step", "resumed")
# What every rank has to itself, and where it is put; ``state`` alone is compared to what a checkpoint holds.
_OF_EACH = {"batch": "batch", "generators": "generators", "gradients": "gradients", "state": "others"}


@dataclass(frozen=True, slots=True)
class Lived:
    """One life that has ended, and its record: events in the order in which they happened."""

    ended: Ended
    workers: int
    events: tuple[Event, ...]

    def of(self, kind: str) -> list[Event]:
        """The events of one kind."""
        return [event for event in self.events if event["event"] == kind]

    @property
    def first(self) -> int:
        """The step that it began after."""
        return next((event["step"] for event in self.of("resumed")), 0)

    @property
    def last(self) -> int:
        """The last step that it did."""
        return max((event["step"] for event in self.of("step")), default=self.first)

    @property
    def killed(self) -> str | None:
        """The moment at which it was killed, or one of its processes, if any was."""
        return next((event["moment"] for event in self.of("killed")), "?") if self.ended.status is None else None

    @property
    def victim(self) -> int | None:
        """The rank that was killed alone, if one was."""
        return self.ended.life.victim if self.ended.status is None and self.of("killed") else None


@dataclass(slots=True)
class Run:
    """The lives of one run, oldest first."""

    name: str
    lives: list[Lived] = field(default_factory=list)
    command: Life | None = None  # the one that was asked for last

    def steps(self) -> Iterator[tuple[int, Event]]:
        """Everything that was noted of steps and of states after loading: number of the life, event."""
        for number, life in enumerate(self.lives):
            yield from ((number, event) for event in life.events if event["event"] in _COMPARED)

    def removal(self) -> Life:
        """A life that removes what this run has in its storage."""
        assert self.command
        return replace(self.command, does="remove", kill=None, victim=None, pins=(), processes=1)

    @property
    def evidence(self) -> Event | None:
        """What it left behind; None unless it finished."""
        found = self.lives[-1].of("finished") if self.lives else []
        return found[-1] if found else None

    @property
    def failed(self) -> Ended | None:
        """The life that ended with an error, if one did."""
        return next((life.ended for life in self.lives if life.ended.status not in (0, None)), None)


@dataclass(frozen=True, slots=True)
class Stage:
    """Where runs are made: the user's ``command``, ``scratch`` for records, ``root`` for run directories, and two
    servers to live in. ``runs`` are all that were made, each of so many ``processes``; two evaluations are
    ``evaluations`` steps apart at most.
    """

    command: tuple[str, ...]
    scratch: Path
    root: str
    servers: Servers
    runs: list[Run]
    evaluations: int
    processes: int

    def live(self, run: Run, *more: str, workers: int, server: int = 0, **how: Any) -> Lived:
        """One more life of a run."""
        record = self.scratch / f"{run.name}-{len(run.lives) + 1}.jsonl"
        arguments = (
            *self.command,
            f"run.root={self.root}",
            f"run.name={run.name}",
            f"hydra.run.dir={self.scratch}/hydra/{run.name}",
            f"runtime.num_workers={workers}",
            *more,
        )
        if run not in self.runs:
            self.runs.append(run)
        life = Life(run.name, arguments, record, evaluations=self.evaluations, processes=self.processes, **how)
        run.command = life
        lived = Lived(self.servers[server](life), workers, _gathered(life.records))
        run.lives.append(lived)
        return lived

    def forget(self, *runs: Run) -> None:
        """Remove what is large of runs that are done: dumped states, and checkpoints on a disk."""
        for run in runs:
            for life in run.lives:
                dumped(life).unlink(missing_ok=True)
            if not is_remote(self.root):
                for folder in [*Path(local_root(self.root)).rglob(run.name)]:
                    shutil.rmtree(folder, ignore_errors=True)


def dumped(life: Lived) -> Path:
    """Where a life wrote the tensors of a state, if it was asked to."""
    record = life.ended.life.record
    return record.with_name(f"{record.name}.pt")


def _gathered(records: Sequence[Path]) -> tuple[Event, ...]:
    """What the first rank noted, with what the others had to themselves, and which of them was killed."""
    events, *others = map(_read, records)
    for rank, noted in enumerate(others, 1):
        told = {(event["event"], event["step"]): event for event in noted if event["event"] in _COMPARED}
        for event in events:
            if event["event"] in _COMPARED:
                _add(event, rank, told.get((event["event"], event["step"])))
    return (*events, *(event for noted in others for event in noted if event["event"] == "killed"))


def _add(event: Event, rank: int, other: Event | None) -> None:
    """Put the rank's own under names of its own. An event that it did not come to note is ``cut`` short."""
    if other is None:
        event["cut"] = True
        return
    for its, ours in _OF_EACH.items():
        found = {f"{path} (rank {rank})": value for path, value in other.get(its, {}).items()}
        event[ours] = event.get(ours, {}) | found


def _read(record: Path) -> tuple[Event, ...]:
    """The whole lines of a record."""
    text = record.read_bytes() if record.exists() else b""
    return tuple(map(json.loads, text[: text.rfind(b"\n") + 1].splitlines()))


def by_step(run: Run) -> dict[int, Event]:
    """The last that was noted of every step."""
    return {event["step"]: event for _, event in run.steps() if event["event"] == "step"}


def losses(run: Run) -> Sequence[tuple[int, int, float]]:
    """Life, step and loss of everything that was done."""
    return [
        (number, event["step"], event["metrics"]["loss"])
        for number, event in run.steps()
        if event["event"] == "step" and "loss" in event["metrics"]
    ]
