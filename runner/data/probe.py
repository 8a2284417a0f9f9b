"""Checks of a few samples before training: whether they are those of earlier attempts, and whether a sample depends on
its position alone.

Draws each sample twice, the second time in reverse order, and once more in a data worker. That shows hidden generators,
call counters and other hidden state; what changes only after more than a few calls is not found.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from runner import signals
from runner.data.fetch import Fetcher, location
from runner.data.sandbox import sandboxed
from runner.errors import DataError
from runner.hashing import hex_digest
from runner.rng import derive

Sketch = dict[str, list[list[Any]]]  # sample -> for each value in it: path, kind, and numbers that describe it

_SAMPLES = 4
_VALUES = 8  # of a sample that are remembered
_LONG = 32  # a list of more numbers is one value
_CLOSE = 1e-3  # floats may differ between processors, in the last bits


@dataclass(frozen=True, slots=True)
class Probe:
    """What a loader is asked for before the first batch: the digests of these samples."""

    indices: tuple[int, ...]


def indices(size: int) -> tuple[int, ...]:
    """A few samples, spread over the data set."""
    return tuple(sorted({(size - 1) * i // max(1, _SAMPLES - 1) for i in range(_SAMPLES)}))


def digests(fetcher: Fetcher, chosen: Sequence[int], *, label: str = "probe") -> list[str]:
    """A digest of each chosen sample, drawn with a seed for ``label``; of its error if it cannot be read."""
    return [digest(row) for row in _rows(fetcher, chosen, label=label)]


def sketch(fetcher: Fetcher) -> Sketch:
    """A description of a few samples, which a later attempt compares with its own. Plain values, some hundred bytes."""
    chosen = indices(len(fetcher.samples))
    return {
        str(index): [_described(path, value) for path, value in islice(leaves(row), _VALUES)]
        for index, row in zip(chosen, _rows(fetcher, chosen), strict=True)
        if not isinstance(row, _FailedRow)
    }


def differences(then: Sketch, now: Sketch) -> list[str]:
    """What differs between two sketches, in words. Floats are compared with a tolerance."""
    found = []
    for index in then.keys() & now.keys():
        for old, new in zip(then[index], now[index], strict=False):
            if not _alike(old, new):
                found.append(f"sample {index}{old[0]}: {_words(old)} then, {_words(new)} now")
        if len(then[index]) != len(now[index]):
            found.append(f"sample {index}: {len(then[index])} values then, {len(now[index])} now")
    return sorted(found)


def require_pure(fetcher: Fetcher) -> list[str]:
    """The digests of the probed samples. Raises DataError if a sample differs when it is drawn again."""
    chosen = indices(len(fetcher.samples))
    first = digests(fetcher, chosen)
    again = digests(fetcher, chosen[::-1])[::-1]
    other = _first_unequal(fetcher, first, again)
    if other:
        raise DataError(
            f"{other} is another one when it is drawn again with the same seed, so a resumed run "
            "would train on other data. It depends on something that the runner does not control: a generator of its "
            "own (np.random.default_rng(), random.Random(), torch.Generator()), a counter or cache that changes from "
            "call to call, the clock. Draw from python's, numpy's or torch's global generators, which are seeded for "
            "every sample, or make it depend on the index alone; runtime.audit=false turns this check off."
        )
    if fetcher.plan.randomness == "off":
        other = _first_unequal(fetcher, first, digests(fetcher, chosen, label="another"))
        if other:
            raise DataError(
                f"{other} draws random numbers, and data.randomness=off seeds none, so a resumed "
                "run would draw others. Use data.randomness=sample; runtime.audit=false turns this check off."
            )
    return first


def require_same_in_worker(fetcher: Fetcher, here: Sequence[str], there: Sequence[str]) -> None:
    """Raise DataError if a data worker found other samples than this process."""
    other = _first_unequal(fetcher, here, there)
    if other:
        raise DataError(
            f"{other} is another one in a data worker than in this process. It depends on the "
            "process: a generator seeded at import, the pid or worker number, hash() of a text or the order of a set, "
            "the number of threads, a file position shared after a fork. Make it depend on the index alone; "
            "runtime.audit=false turns this check off."
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


class _FailedRow(str):
    """In place of a sample, the kind of error; its wording may hold addresses."""


def _rows(fetcher: Fetcher, chosen: Sequence[int], *, label: str = "probe") -> list[Any]:
    rows: list[Any] = []
    with sandboxed(draws=True), signals.reading():
        for index in chosen:
            try:
                rows.append(fetcher.sample(index, derive(label, fetcher.plan.seed, index)))
            except Exception as error:  # training will meet it and say so, if it comes that far
                rows.append(_FailedRow(type(error).__qualname__))
    return rows


def digest(row: Any) -> str:
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
    except Exception:  # an open file, a lock: nothing to compare but its kind
        return type(value).__qualname__.encode()


def _array(value: Any) -> "np.ndarray[Any, Any] | None":
    """Tensors, arrays and pictures as an array on the host; None for what cannot be one."""
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


def _described(path: str, value: Any) -> list[Any]:
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


def _alike(old: Sequence[Any], new: Sequence[Any]) -> bool:
    if len(old) != 4 or len(new) != 4:
        return [*old] == [*new]
    scale = max(abs(old[2]) + abs(old[3]), abs(new[2]) + abs(new[3]), 1e-12)
    return [*old[:2]] == [*new[:2]] and all(abs(a - b) <= _CLOSE * scale for a, b in zip(old[2:], new[2:], strict=True))


def _words(described: Sequence[Any]) -> str:
    if len(described) == 4:
        return f"{described[1]} of magnitude {described[2]:.4g} +- {described[3]:.4g}"
    return " ".join(map(str, described[1:]))


def _first_unequal(fetcher: Fetcher, one: Sequence[str], other: Sequence[str]) -> str | None:
    """The first probed sample whose two digests differ, by name."""
    for index, here, there in zip(indices(len(fetcher.samples)), one, other, strict=True):
        if here != there:
            return f"{location(fetcher.samples, index)} of {type(fetcher.samples).__qualname__}"
    return None
