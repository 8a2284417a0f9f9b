"""Checks of a few samples before training: are they the samples of earlier attempts, and does a sample depend on its
position alone?

Each sample is drawn twice, the second time in reverse order, and once more in a data worker. This shows hidden
generators, call counters and other hidden state, unless it changes only after more than a few calls.

The probe must leave no trace in the data set that workers get. A file that is opened at the first read would be shared
by all forked workers, position and all, and could not be sent to others. So with workers the probe reads a copy, or
reads in a process of its own.
"""

import multiprocessing
import pickle
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from runner import signals
from runner.data.fetch import FetchedBatch, Fetcher, sample_name
from runner.data.loader import LoaderOptions
from runner.data.plan import Slice
from runner.data.sandbox import sandboxed
from runner.data.workers import WorkerContext, start_worker, with_remedy
from runner.errors import DataError, RunnerError
from runner.hashing import derive, hex_digest

Sketch = dict[str, list[list[Any]]]  # sample -> for each value in it: path, kind, and numbers that describe it
Findings = tuple[Sketch, list[str] | None]

_SAMPLES = 4
_MAX_VALUES = 8  # of a sample, in a sketch
_LONG = 32  # a list of more numbers is one value
_TOLERANCE = 1e-3  # relative; the last bits of floats may differ between processors
_POLL_SECONDS = 0.1
_EXIT_SECONDS = 2.0


def examine(fetcher: Fetcher, options: LoaderOptions, *, audit: bool, key: str = "data.train") -> Findings:
    """The sketch of the data and, with ``audit``, the digests of the probed samples. Raises DataError if a sample
    differs when it is drawn again.
    """
    if not options.num_workers:
        return _findings(fetcher, audit)
    workers = WorkerContext(options.start_method)
    if workers.get_start_method() != "fork":
        return _findings(_as_sent(fetcher), audit)
    answer = None
    try:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        with receiver, sender:
            process = workers.Process(target=_examine_in_process, args=(fetcher, audit, sender), daemon=True)
            process.start()
            sender.close()
            with signals.reading():
                while not receiver.poll(_POLL_SECONDS) and process.is_alive():
                    pass
                with suppress(EOFError):
                    answer = receiver.recv() if receiver.poll() else None
            process.join(_EXIT_SECONDS)
        answer = answer or DataError(f"{key}: {workers.death()}")
    except OSError as error:
        answer = DataError(f"{key}: {workers.start_failure(error)}")
    finally:
        workers.close()
    if isinstance(answer, RunnerError):
        raise answer
    findings: Findings = answer
    return findings


def _findings(fetcher: Fetcher, audit: bool) -> Findings:
    return sketch(fetcher), require_pure(fetcher) if audit else None


def _as_sent(fetcher: Fetcher) -> Fetcher:
    """The fetcher with a copy of the data set, as workers get it. If it cannot be sent, their start will fail."""
    other = copy(fetcher)
    with suppress(Exception):
        other.samples = pickle.loads(pickle.dumps(fetcher.samples))
    return other


def _examine_in_process(fetcher: Fetcher, audit: bool, sender: Connection) -> None:
    """The process that probes; it is like a data worker."""
    start_worker(0)
    torch.set_num_threads(1)  # other threads were lost in the fork
    answer: Findings | RunnerError
    try:
        answer = _findings(fetcher, audit)
    except RunnerError as error:
        answer = error
    except Exception as error:
        traceback.print_exc()
        answer = DataError(with_remedy(error))
    sender.send(answer)


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """What a worker is asked for before the first batch: the digests of these samples."""

    indices: tuple[int, ...]


class ProbedDataset(Dataset[Any]):
    """A fetcher that also answers a ``ProbeRequest``."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher

    def __getitem__(self, request: Slice | ProbeRequest) -> FetchedBatch | list[str]:
        if isinstance(request, ProbeRequest):
            return sample_digests(self._fetcher, request.indices)
        return self._fetcher[request]


def indices(size: int) -> tuple[int, ...]:
    """A few samples, spread over the data set."""
    return tuple(sorted({(size - 1) * i // (_SAMPLES - 1) for i in range(_SAMPLES)}))


def sample_digests(fetcher: Fetcher, chosen: Sequence[int], *, label: str = "probe") -> list[str]:
    """A digest of each chosen sample, drawn with a seed for ``label``; of its error if it cannot be read."""
    return [content_digest(row) for row in _rows(fetcher, chosen, label=label)]


def sketch(fetcher: Fetcher) -> Sketch:
    """A description of a few samples, which later attempts compare with theirs. Plain values, some hundred bytes."""
    chosen = indices(len(fetcher.samples))
    return {
        str(index): [_describe(path, value) for path, value in islice(leaves(row), _MAX_VALUES)]
        for index, row in zip(chosen, _rows(fetcher, chosen), strict=True)
        if not isinstance(row, _ReadError)
    }


def differences(then: Sketch, now: Sketch) -> list[str]:
    """Messages on what differs between two sketches. Floats are compared with a tolerance."""
    messages = []
    for index in then.keys() & now.keys():
        for old, new in zip(then[index], now[index], strict=False):
            if not _close(old, new):
                messages.append(f"sample {index}{old[0]}: {_text(old)} then, {_text(new)} now")
        if len(then[index]) != len(now[index]):
            messages.append(f"sample {index}: {len(then[index])} values then, {len(now[index])} now")
    return sorted(messages)


def require_pure(fetcher: Fetcher) -> list[str]:
    """The digests of the probed samples. Raises DataError if a sample differs when it is drawn again."""
    chosen = indices(len(fetcher.samples))
    digests = sample_digests(fetcher, chosen)
    name = _first_difference(fetcher, digests, sample_digests(fetcher, chosen[::-1])[::-1])
    if name:
        raise DataError(
            f"{name} is different when it is drawn again with the same seed, so a resumed run "
            "would train on other data. It depends on something that the runner does not control: a generator of its "
            "own (np.random.default_rng(), random.Random(), torch.Generator()), a counter or cache that changes from "
            "call to call, the clock. Draw from python's, numpy's or torch's global generators, which are seeded for "
            "every sample, or make it depend on the index alone; runtime.audit=false turns this check off.",
            kind="sample-changed",
        )
    if fetcher.plan.randomness == "off":
        name = _first_difference(fetcher, digests, sample_digests(fetcher, chosen, label="another"))
        if name:
            raise DataError(
                f"{name} draws random numbers, and data.randomness=off seeds none, so a resumed "
                "run would draw others. Use data.randomness=sample; runtime.audit=false turns this check off.",
                kind="randomness-off",
            )
    return digests


def require_same_in_worker(fetcher: Fetcher, here: Sequence[str], in_worker: Sequence[str]) -> None:
    """Raise DataError if a data worker read other samples than this process."""
    name = _first_difference(fetcher, here, in_worker)
    if name:
        raise DataError(
            f"{name} is different in a data worker than in this process. It depends on the "
            "process: a generator seeded at import, the pid or worker number, hash() of a text or the order of a set, "
            "the number of threads, a file position shared after a fork. Make it depend on the index alone; "
            "runtime.audit=false turns this check off.",
            kind="sample-per-process",
        )


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value inside a sample, with its path."""
    if isinstance(value, Mapping):
        for key in value:
            yield from leaves(value[key], f"{path}[{key!r}]")
    elif isinstance(value, np.ndarray) and value.dtype.hasobject:
        yield from leaves(value.tolist(), path)
    elif isinstance(value, tuple | list):
        if len(value) > _LONG and all(type(item) in (int, float) for item in value):  # tokens, say
            yield path, np.asarray(value)
            return
        for number, item in enumerate(value):
            yield from leaves(item, f"{path}[{number}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from leaves(getattr(value, field.name), f"{path}.{field.name}")
    else:
        yield path, value


class _ReadError(str):
    """In place of a sample, the type of the error; its message may contain addresses."""


def _rows(fetcher: Fetcher, chosen: Sequence[int], *, label: str = "probe") -> list[Any]:
    rows: list[Any] = []
    with sandboxed(draws=True), signals.reading():
        for index in chosen:
            try:
                rows.append(fetcher.sample(index, derive(label, fetcher.plan.seed, index)))
            except Exception as error:  # training will report it, if it comes that far
                rows.append(_ReadError(type(error).__qualname__))
    return rows


def content_digest(row: Any) -> str:
    """A digest of everything in a sample."""
    return hex_digest(*(piece for path, value in leaves(row) for piece in (path.encode(), _bytes(value))))


def _bytes(value: Any) -> bytes:
    array = _array(value)
    if array is not None:
        return str((array.dtype, array.shape)).encode() + array.tobytes()
    if isinstance(value, set | frozenset):
        return repr(sorted(map(repr, value))).encode()
    if isinstance(value, str | bytes | int | float | bool | None):
        return repr(value).encode()
    try:
        return pickle.dumps(value)
    except Exception:  # of an open file or a lock only the type can be compared
        return type(value).__qualname__.encode()


def _array(value: Any) -> "np.ndarray[Any, Any] | None":
    """Tensors, arrays and pictures as an array on the host; None for other values."""
    try:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            value = (value if value.layout is torch.strided else value.to_dense()).resolve_conj().resolve_neg()
            value = value.float() if value.dtype.is_floating_point and value.dtype.itemsize <= 2 else value
        if isinstance(value, torch.Tensor | np.ndarray | np.generic) or hasattr(value, "__array_interface__"):
            array = np.asarray(value)
            return None if array.dtype.hasobject else array
    except (TypeError, RuntimeError):
        pass
    return None


def _describe(path: str, value: Any) -> list[Any]:
    """[path, kind, digest] of an exact value, [path, kind, mean, deviation] of floats."""
    array = _array(value)
    if array is None and isinstance(value, float):
        array = np.asarray(value)
    if array is not None and array.dtype.kind in "fc":
        finite = np.abs(array[np.isfinite(array)]).astype(np.float64)
        mean, deviation = (float(finite.mean()), float(finite.std())) if finite.size else (0.0, 0.0)
        return [path, f"{array.dtype}{[*array.shape]}", mean, deviation]
    kind = f"{array.dtype}{[*array.shape]}" if array is not None else type(value).__name__
    if isinstance(value, str | int) and len(str(value)) <= 16:
        return [path, kind, str(value)]
    if array is None and not isinstance(value, str | bytes | int):
        return [path, kind]
    return [path, kind, hex_digest(_bytes(value))]


def _close(old: Sequence[Any], new: Sequence[Any]) -> bool:
    if len(old) != 4 or len(new) != 4:
        return [*old] == [*new]
    scale = max(abs(old[2]) + abs(old[3]), abs(new[2]) + abs(new[3]), 1e-12)
    return [*old[:2]] == [*new[:2]] and all(
        abs(a - b) <= _TOLERANCE * scale for a, b in zip(old[2:], new[2:], strict=True)
    )


def _text(described: Sequence[Any]) -> str:
    if len(described) == 4:
        return f"{described[1]} of magnitude {described[2]:.4g} +- {described[3]:.4g}"
    return " ".join(map(str, described[1:]))


def _first_difference(fetcher: Fetcher, digests: Sequence[str], others: Sequence[str]) -> str | None:
    """The name of the first probed sample with two digests."""
    for index, digest, other in zip(indices(len(fetcher.samples)), digests, others, strict=True):
        if digest != other:
            return f"{sample_name(fetcher.samples, index)} of {type(fetcher.samples).__qualname__}"
    return None
