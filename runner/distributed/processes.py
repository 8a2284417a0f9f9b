"""The team of several processes: how they connect, exchange values, and end together when one fails. Small JSON values
go through a key-value store; tensors, and the values of every step, through torch's process groups.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroup, Store, TCPStore

from runner import signals
from runner.distributed.communicator import Communicator, StepReport, Team
from runner.distributed.watchdog import MAIN, Failure, Watchdog
from runner.distributed.world import Rendezvous, World
from runner.errors import ConfigError, RunnerError

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0001, 0.02  # seconds between two polls of the store
_SHORT_BYTES = 256  # the size of the longest value that is broadcast over a process group


class PeerFailed(RunnerError):
    """Another process of the run failed and prints why; this process ends with the same exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class Channel(Communicator):
    """The communicator over a key-value store. Keys are made from the number of the exchange, and removed once all
    ranks have read them. Raises PeerFailed once another process has failed.
    """

    def __init__(self, store: Store, world: World, watch: Watchdog, *, thread: str) -> None:
        self.rank = world.rank
        self.size = world.size
        self._store = store
        self._watch = watch
        self._thread = thread  # the name of the thread that uses this channel
        self._slow_rank: int | None = None  # this process is waiting for it
        self._number = 0  # the number of the last exchange

    def gather(self, value: Any) -> list[Any] | None:
        names = self._names()
        if self.rank:
            self._store.set(names[self.rank], json.dumps(value))
            return None
        values = [value]
        for rank, name in enumerate(names[1:], 1):
            values.append(self._read(name, rank))
            self._store.delete_key(name)
        return values

    def broadcast(self, value: Any) -> Any:
        name = self._names()[0]
        if self.rank == 0:
            self._store.set(name, json.dumps(value))
            return value
        value = self._read(name, 0)
        if self._store.add(f"{name}/read", 1) == self.size - 1:  # the last reader cleans up
            self._store.delete_key(name)
            self._store.delete_key(f"{name}/read")
        return value

    def describe_wait(self) -> str:
        rank = self.rank if self._slow_rank is None else self._slow_rank
        return self._watch.whereabouts(rank, self._thread)

    def _names(self) -> Sequence[str]:
        self._watch.note_exchange(self._thread)
        self._number += 1
        return [f"{self._number}/{rank}" for rank in range(self.size)]

    def _read(self, name: str, rank: int) -> Any:
        pause, self._slow_rank = _SHORTEST_PAUSE, rank
        while not self._store.check([name]):
            _raise_if_failed(self._watch)
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)
        self._slow_rank = None
        return json.loads(self._store.get(name))


class GroupChannel(Channel):
    """The channel of the training thread. It broadcasts short values over a process group, in a tenth of the time."""

    def __init__(self, store: Store, world: World, watch: Watchdog, group: ProcessGroup) -> None:
        super().__init__(store, world, watch, thread=MAIN)
        self._group = group

    def broadcast(self, value: Any) -> Any:
        self._watch.note_exchange(MAIN)
        text = json.dumps(value).encode() if self.rank == 0 else b""
        text = text if len(text) <= _SHORT_BYTES else b""  # a longer value follows over the store
        buffer = torch.frombuffer(bytearray(text.ljust(_SHORT_BYTES, b"\0")), dtype=torch.uint8)
        dist.broadcast(buffer, 0, group=self._group)
        text = buffer.numpy().tobytes().rstrip(b"\0")
        return json.loads(text) if text else super().broadcast(value)


def _raise_if_failed(watch: Watchdog) -> None:
    if watch.failure is not None:
        raise PeerFailed(watch.failure.message, watch.failure.status)


_CONSEQUENCE_SECONDS = 3.0  # wait after an error, in case another process has failed and caused it
_READ_SECONDS = 1.5  # rank 0 serves the store this long after its failure, for the others to read the reason
_NANOSECONDS = 10**9


class ProcessTeam(Team):
    """A team of several processes."""

    stop: str | None = None
    watch: Watchdog  # type: ignore[assignment]

    def __init__(self, world: World, rendezvous: Rendezvous, *, timeout: float, patience: float) -> None:
        super().__init__(timeout=timeout, patience=patience)
        self.world = world
        self.rendezvous = rendezvous
        self._server: Store | None = None
        if world.rank == 0 and not rendezvous.launcher_serves:
            self._server = self._connect(serve=True)
        self._watch_store = self._store("watch")
        self.watch = Watchdog(self._store("watch"), world, timeout=timeout, patience=patience)
        self._channels: dict[str, Channel] = {}
        self.comm = self.channel(MAIN)
        self._group: dist.ProcessGroup | None = None

    def channel(self, name: str) -> Communicator:
        if name not in self._channels:  # a channel counts its exchanges; a second attempt continues the count
            self._channels[name] = Channel(self._store(name), self.world, self.watch, thread=name)
        return self._channels[name]

    def begin(self, device: torch.device) -> None:
        if self._group is not None:
            return
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        store, rank, size = self._store("group"), self.world.rank, self.world.size
        timeout = timedelta(seconds=10 * self._timeout)  # the watchdog acts earlier, and names the process at fault
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        self._group = dist.new_group(backend="gloo") if cuda else dist.group.WORLD
        assert self._group is not None
        self.comm = GroupChannel(self._store("group channel"), self.world, self.watch, self._group)

    def exchange(self, report: StepReport) -> StepReport:
        names = crc32(",".join(report.metrics).encode()) >> 8  # 24 bits, so that the sum of squares fits into 64 bits
        elapsed = 0 if self.world.rank else round(report.elapsed * _NANOSECONDS)
        digest = report.digest - (report.digest >> 63 << 64)  # the same bits as a signed number
        sums = self._sums([digest, len(report.substitutions), elapsed, names, names**2, *_stop_flags()])
        digest, length, elapsed, names, squares, *flags = sums
        self.stop = self.stop or _signal(flags)
        substitutions = ""
        if length:  # in the order of their positions
            all_substitutions = "".join(self.comm.gather(report.substitutions) or []).split()
            all_substitutions.sort(key=lambda substitution: int(substitution.partition(":")[0]))
            substitutions = self.comm.broadcast("".join(f" {substitution}" for substitution in all_substitutions))
        # Equal on all ranks if and only if the mean of the squares is the square of the mean.
        metrics = report.metrics if squares * self.world.size == names**2 else self.union(report.metrics)
        return StepReport(digest % 2**64, substitutions, elapsed / _NANOSECONDS, tuple(metrics))

    def poll(self) -> str | None:
        self.stop = self.stop or _signal(self._sums(_stop_flags()))
        return self.stop

    def sum_tensors(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not values:
            return values
        sums = torch.stack([value.detach().double() for value in values.values()])
        dist.all_reduce(sums)
        return {name: total.to(value.dtype) for (name, value), total in zip(values.items(), sums, strict=True)}

    def all_gather(self, value: Any) -> list[Any]:
        values = [None] * self.world.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def blame_peer(self) -> Iterator[None]:
        try:
            yield
        except RunnerError:
            raise
        except RuntimeError:  # maybe a collective whose peer has died
            if self.watch.wait(_CONSEQUENCE_SECONDS):
                _raise_if_failed(self.watch)
            raise

    def leave(self) -> None:
        """End without an error, all processes together. Rank 0 goes last, because it may serve the store."""
        self.watch.disarm()
        self._say_left()  # before beats end, which the neighbour would take for a death
        self.comm.gather(None)  # on rank 0 this waits for all others
        self.watch.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def fail(self, error: BaseException) -> Failure:
        """End all other processes; returns the failure that they report, which may be another's earlier failure."""
        status = error.status if isinstance(error, RunnerError) else 1
        own = Failure(self.world.rank, status, f"{type(error).__name__}: {error}", printed=True)
        failure = self.watch.failure or self.watch.fail(own)
        self._say_left()
        if self._server is not None:
            time.sleep(_READ_SECONDS)
        return failure

    def _say_left(self) -> None:
        with suppress(RuntimeError):
            self._watch_store.set(f"left/{self.world.rank}", "")

    def _sums(self, numbers: Sequence[int]) -> list[int]:
        self.watch.note_exchange(MAIN, training=True)
        sums = torch.tensor(numbers)
        dist.all_reduce(sums, group=self._group)
        self.watch.note_exchange(MAIN)
        return [*map(int, sums.tolist())]

    def _store(self, name: str) -> Store:
        """A connection for one thread: a thread that waits for an answer would block others on the same connection."""
        return PrefixStore(f"runner/{self.rendezvous.restart}/{name}", self._connect())

    def _connect(self, *, serve: bool = False) -> Store:
        host, port, timeout = self.rendezvous.host, self.rendezvous.port, timedelta(seconds=self._timeout)
        try:
            return TCPStore(host, port, is_master=serve, wait_for_workers=False, timeout=timeout)
        except RuntimeError as error:
            task = f"{'keep' if serve else 'reach'} the store of the processes at {host}:{port}"
            raise ConfigError(f"cannot {task}: {str(error).splitlines()[0]}") from error


@contextmanager
def process_team(world: World, rendezvous: Rendezvous, *, timeout: float, patience: float) -> Iterator[ProcessTeam]:
    """Within the block, a member of the team. An error is raised with its text in one process only, which prints it."""
    team = ProcessTeam(world, rendezvous, timeout=timeout, patience=patience)
    try:
        with team.blame_peer():
            yield team
    except BaseException as error:
        if isinstance(error, RunnerError) and error.agreed:
            team.leave()
            if world.rank == 0:
                raise
            raise PeerFailed("", error.status) from None
        failure = team.fail(error)
        if failure.printed and failure.rank == world.rank:
            raise
        # A single rank prints the reason, and not the rank at fault, which may be gone.
        prints = not failure.printed and world.rank == (1 if failure.rank == 0 else 0)
        raise PeerFailed(failure.message if prints else "", failure.status) from None
    team.leave()


def _stop_flags() -> list[int]:
    name = signals.received()
    return [int(number.name == name) for number in signals.STOP_SIGNALS]


def _signal(counts: Sequence[int]) -> str | None:
    return next((number.name for number, count in zip(signals.STOP_SIGNALS, counts, strict=True) if count), None)
