"""Iterables as others write them: their side effects, their states, and what sticks in them."""

import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_iterable import N, OnDataset, mine, resumed, sample, step, stored, stream, uninterrupted
from torch.utils.data import IterableDataset, get_worker_info

from runner.errors import DataError


class Reader:
    """Reads on from a state that was loaded, in every pass until it is told a number of the pass."""

    def __init__(self) -> None:
        self.read, self.loaded = 0, 0

    def __iter__(self) -> Iterator[Any]:
        start = self.loaded
        for self.read, number in enumerate(mine()[start:], start + 1):
            yield sample(number)

    def set_number(self, number: int) -> None:
        self.loaded = 0


class Wrapper(IterableDataset[Any]):
    """Knows nothing of what sticks."""

    def __init__(self) -> None:
        self.reader = Reader()

    def __iter__(self) -> Iterator[Any]:
        yield from self.reader

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.reader.read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reader.loaded = state["read"]


class Deaf(Wrapper):
    """Keeps the number of the pass for itself."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class ByIterator:
    """The state is that of its iterator, and sticks in what that reads."""

    def __init__(self) -> None:
        self.reader = Reader()

    def __iter__(self) -> "ByIterator.Rows":
        return self.Rows(self.reader)

    class Rows:
        def __init__(self, reader: Reader) -> None:
            self.reader, self.rows = reader, None

        def __next__(self) -> Any:
            self.rows: Any = self.rows or iter(self.reader)
            return next(self.rows)

        def __iter__(self) -> Any:
            return self

        def state_dict(self) -> dict[str, Any]:
            return {"read": self.reader.read}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.reader.loaded = state["read"]


class Whole(Wrapper):
    """Tells what it wraps."""

    def set_epoch(self, epoch: int) -> None:
        self.reader.set_number(epoch)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Wrapper, Deaf, ByIterator])
def test_a_state_that_sticks_is_refused_at_the_start(kind: Any, workers: int) -> None:
    with pytest.raises(DataError, match=r"every further pass begins where that state was taken.*data\.replay=true"):
        step(stream(kind(), workers, audit=True))
    whole = uninterrupted(kind, workers, audit=True, replay=True)
    state = stored(stream(kind(), workers, audit=True, replay=True).state_dict())
    for one in whole[:4]:
        life = resumed(kind, state, workers, audit=True, replay=True)
        assert step(life) == one
        state = stored(life.state_dict())
    life = resumed(kind, state, workers, audit=True, replay=True)
    assert [step(life) for _ in whole[4:]] == whole[4:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Whole, OnDataset])
def test_checking_whether_a_state_sticks_changes_no_sample(kind: Any, workers: int) -> None:
    whole = uninterrupted(kind, workers)
    assert uninterrupted(kind, workers, audit=True) == whole
    life = stream(kind(), workers, audit=True)
    for _ in range(2):
        step(life)
    again = resumed(kind, stored(life.state_dict()), workers, audit=True)
    assert [step(again) for _ in whole[2:]] == whole[2:]


class Buffers(OnDataset):
    """Shuffles in a buffer that its state lacks."""

    def __iter__(self) -> Iterator[Any]:
        buffer = []
        for row in super().__iter__():
            buffer.append(row)
            if len(buffer) > 3:
                yield buffer.pop(random.randrange(4))
        yield from buffer


class Ahead(OnDataset):
    """Has each sample made before the one before it is asked for, and keeps a module."""

    def __init__(self) -> None:
        super().__init__()
        self.numpy = np

    def __iter__(self) -> Iterator[Any]:
        rows = super().__iter__()
        row = next(rows)
        for after in rows:
            yield row
            row = after
        yield row

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "read": self.read - 1}


@pytest.mark.parametrize("kind", [Buffers, Ahead])
def test_a_state_that_lacks_something_is_refused_at_the_start(kind: Any) -> None:
    with pytest.raises(DataError, match=r"yields other samples than those that followed.*data\.replay=true"):
        step(stream(kind(), audit=True))


def test_a_data_set_that_cannot_be_copied_is_not_probed() -> None:
    class Locked(OnDataset):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

    assert uninterrupted(Locked, 0, audit=True) == uninterrupted(OnDataset, 0)


class SharedOut:
    """Joins the shares of all workers where there is none, at the moment when it is asked for its iterator."""

    def __init__(self) -> None:
        self.sizes = [6, 4]

    def __iter__(self) -> "SharedOut.Rows":
        worker = get_worker_info()
        if worker is None:
            self.sizes[:] = [sum(self.sizes)]
        number = worker.id if worker is not None else 0
        start = sum(self.sizes[:number])
        return self.Rows(range(start, start + self.sizes[number]))

    class Rows:
        def __init__(self, numbers: range) -> None:
            self.numbers, self.read = numbers, 0

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            if self.read == len(self.numbers):
                raise StopIteration
            self.read += 1
            return sample(self.numbers[self.read - 1])

        def state_dict(self) -> dict[str, Any]:
            return {"read": self.read}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.read = state["read"]


@pytest.mark.parametrize("workers", [0, 2])
def test_looking_for_a_state_leaves_no_trace(workers: int) -> None:
    data = SharedOut()
    live = stream(data, workers, opened=False, audit=True)
    assert data.sizes == [6, 4]
    live.open()
    numbers = [int.from_bytes(line[:8], "little") for _ in range(3) for line in step(live)[0]]
    assert sorted(numbers) == [*range(N)]
    whole = uninterrupted(SharedOut, workers)
    life = stream(SharedOut(), workers)
    step(life)
    again = resumed(SharedOut, stored(life.state_dict()), workers)
    assert [step(again) for _ in whole[1:]] == whole[1:]


class OfNumpy(OnDataset):
    """Keeps its place in numbers and arrays of numpy, and minds their types."""

    def state_dict(self) -> dict[str, Any]:
        hashed = np.uint64(2**64 - 1) - np.uint64(self.read)
        nested = [np.bool_(True), (np.array(3), np.array([[1, 2]], dtype=np.int16), np.zeros((0, 2)))]
        times = {np.int64(5): np.datetime64("2026-11-25"), "half": np.float16(0.1), "nan": np.float64("nan")}
        return {"read": np.int64(self.read), "passes": np.float32(self.passes), "h": hashed, "n": nested, "t": times}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.read = 0
        self.resume, self.passes = state["read"], int(state["passes"]) - 1
        assert type(state["read"]) is np.int64
        assert type(state["passes"]) is np.float32
        assert state["h"] + np.uint64(state["read"]) == np.uint64(2**64 - 1)
        one, (zero, two, none) = state["n"]
        assert (type(one), zero.shape, two.tolist(), two.dtype, none.shape) == (np.bool_, (), [[1, 2]], "int16", (0, 2))
        assert state["t"][5] == np.datetime64("2026-11-25")
        assert type(state["t"]["half"]) is np.float16
        assert type(state["t"]["nan"]) is np.float64
        two += 1  # it is its own


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_may_hold_numpy_values(workers: int) -> None:
    whole = uninterrupted(OnDataset, workers)
    state, found = stored(stream(OfNumpy(), workers).state_dict()), []
    for _ in whole:
        life = resumed(OfNumpy, state, workers)
        found.append(step(life))
        state = stored(life.state_dict())
    assert found == whole


class Restless:
    """Shuffled anew whenever it is read, by the clock."""

    def __iter__(self) -> Iterator[Any]:
        rows = [*mine()]
        random.Random(time.perf_counter_ns()).shuffle(rows)
        return map(sample, rows)


def begun(times: int, make: Any) -> None:
    for _ in range(times):
        step(make())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_that_cannot_be_read_again_is_refused(workers: int) -> None:
    with pytest.raises(
        DataError, match=r"pass 0 begins with other samples when it is read again.*runtime\.audit=false"
    ):
        begun(20, lambda: stream(Restless(), workers, audit=True, replay=True))  # two orders may begin alike
    step(stream(Restless(), workers, replay=True))


def test_numpy_values_that_cannot_be_stored_are_refused() -> None:
    class Odd(OnDataset):
        def state_dict(self) -> dict[str, Any]:
            return {"a": np.array([lambda: 0])}

    with pytest.raises(DataError, match="its state_dict holds a ndarray, which cannot be saved"):
        step(stream(Odd()))


def test_large_data_is_not_copied_to_look_at_it() -> None:
    class Large(OnDataset):
        def __init__(self) -> None:
            super().__init__()
            self.rows = torch.zeros(20_000)

        def __iter__(self) -> Iterator[Any]:
            pointers.add(self.rows.data_ptr())
            return super().__iter__()

    pointers: set[int] = set()
    step(stream(Large(), audit=True))
    assert len(pointers) == 1
