"""Checks of a few samples before training: are they those of earlier attempts, and do they depend on more than their
positions?

Each sample is drawn twice, the second time in reverse order, and once more in a data worker. This shows hidden
generators, call counters and other hidden state, unless it changes only after more than a few calls.

The probe must leave no trace in the data set that workers get. A file that is opened at the first read would be shared
by all forked workers, position and all, and could not be sent to others. So with workers the probe reads a copy, or
reads in a process of its own.
"""

import io
import multiprocessing
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from copy import copy, deepcopy
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate
from torch.utils.data._utils import worker

from runner import signals
from runner.data.fetch import Fetcher, sample_name
from runner.data.loader import Loader, LoaderOptions
from runner.data.sandbox import changed_generators, sandboxed, seed_host, states
from runner.errors import DataError, RunnerError
from runner.hashing import derive, hex_digest

Sketch = dict[str, list[list[Any]]]  # sample -> for each value in it: path, kind, and numbers that describe it
Findings = tuple[Sketch, list[str] | None, frozenset[str], bool]

_SAMPLES = 4
_MAX_VALUES = 8  # values of a sample in a sketch
_LONG = 32  # a list of more numbers is one value
_TOLERANCE = 1e-3  # relative; the last bits of floats may differ between processors


def check_samples(
    fetcher: Fetcher, options: LoaderOptions, *, audit: bool, key: str = "data.train"
) -> tuple[Sketch, list[str] | None]:
    """The sketch and, with ``audit``, the digests of the probed samples. Raises DataError if one is impure.

    Sets ``generators`` and ``by_batch`` of the fetcher.
    """
    request = partial(_findings, audit=audit)
    if not options.num_workers:
        findings = request(fetcher)
    elif multiprocessing.get_context(options.start_method).get_start_method() != "fork":
        duplicate = copy(fetcher)  # gets the data set as workers do
        with suppress(Exception):  # if it cannot be pickled, the start of workers will report it
            duplicate.samples = pickle.loads(pickle.dumps(fetcher.samples))
        findings = request(duplicate)
    else:
        alone = LoaderOptions(1, start_method=options.start_method)
        with closing(Loader(fetcher, [request], alone, key=key)) as loader:
            findings = next(iter(loader))
    if isinstance(findings, RunnerError):
        raise findings
    description, digests, fetcher.generators, fetcher.by_batch = findings
    return description, digests


def _findings(fetcher: Fetcher, *, audit: bool) -> Findings | RunnerError:
    """The findings, or the error as a value: torch changes the message of an error that a worker raises."""
    worker._worker_info = None  # this process stands for the training process
    try:
        digests = require_pure(fetcher) if audit else None
        description = sketch(fetcher)
        if fetcher.plan.randomness != "off" and not fetcher.generators:
            others = sample_digests(fetcher, label="another")
            if others != (digests or sample_digests(fetcher)):  # a sample reads a state, or draws and restores it
                fetcher.generators = frozenset(states())
        return description, digests, fetcher.generators, _can_read_by_batch(fetcher)
    except RunnerError as error:
        return error


def _can_read_by_batch(fetcher: Fetcher) -> bool:
    """Whether the data set has ``__getitems__``, which returns the same samples, and its samples draw nothing."""
    read = getattr(fetcher.samples, "__getitems__", None)
    if not callable(read) or fetcher.generators:
        return False
    with sandboxed(draws=True), signals.reading(), suppress(Exception):  # then training reads one by one
        rows = [*read([*probe_indices(len(fetcher.samples))])]
        same = [*map(content_digest, rows)] == sample_digests(fetcher)
        return same and not changed_generators()
    return False


def sample_digests(
    fetcher: Fetcher, *, backwards: bool = False, label: str = "probe", drawn: list[bool] | None = None
) -> list[str]:
    """A digest of each probed sample, read with a seed for ``label``, or of its error. ``drawn``: which draw."""
    step = -1 if backwards else 1
    rows = _rows(fetcher, probe_indices(len(fetcher.samples))[::step], label=label, drawn=drawn)
    return [*map(content_digest, rows)][::step]


def probe_indices(size: int) -> tuple[int, ...]:
    """A few samples, spread over the data set."""
    return tuple(sorted({(size - 1) * i // (_SAMPLES - 1) for i in range(_SAMPLES)}))


def sketch(fetcher: Fetcher) -> Sketch:
    """A description of a few samples, which later attempts compare with theirs. Plain values, some hundred bytes."""
    probed = probe_indices(len(fetcher.samples))
    return {
        str(index): [_describe(path, value) for path, value in islice(leaves(row), _MAX_VALUES)]
        for index, row in zip(probed, _rows(fetcher, probed), strict=True)
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
    first, again = list[bool](), list[bool]()
    digests = sample_digests(fetcher, drawn=first)
    require_equal(fetcher, digests, sample_digests(fetcher, backwards=True, drawn=again), "sample-changed")
    if sum(first) > 1 and not any(again):  # a single draw may be that of a file that is opened at the first read
        require_equal(fetcher, digests, [""] * len(digests), "sample-remembered")
    if fetcher.plan.randomness == "off":
        require_equal(fetcher, digests, sample_digests(fetcher, label="another"), "randomness-off")
    _require_pure_collate(fetcher)
    return digests


def _require_pure_collate(fetcher: Fetcher) -> None:
    """Raise DataError if a copy of a user's collate function makes another batch of the same samples."""
    if fetcher.collate is default_collate:
        return
    batches = list[str]()
    with suppress(Exception):  # it cannot be copied, or has no batch of these samples
        collate = deepcopy(fetcher.collate)
        rows = _rows(fetcher, probe_indices(len(fetcher.samples)))
        for _ in range(2):
            with sandboxed(draws=True), signals.reading():
                seed_host(0)  # a data worker has no fixed state
                batches.append(content_digest(collate(deepcopy(rows))))
    if len(set(batches)) > 1:
        raise DataError(f"the collate function {_IMPURE['collate-changed']}{_OFF}", kind="collate-changed")


_OFF = "; runtime.audit=false turns this check off."
_IMPURE = {
    "collate-changed": (
        "makes another batch of the same samples when it is called again with the same seed, so a resumed run would "
        "train on other data. Draw from python's, numpy's or torch's global generators, which are seeded for every "
        "batch, in place of a generator of its own (for collators of transformers: seed=None)"
    ),
    "sample-changed": (
        "is different when it is drawn again with the same seed, so a resumed run would train on other data. It "
        "depends on something that the runner does not control: a generator of its own (np.random.default_rng(), "
        "random.Random(), torch.Generator()), a counter, cache or buffer that changes from call to call, the clock. "
        "Draw from python's, numpy's or torch's global generators, which are seeded for every sample, or make it "
        "depend on the index alone"
    ),
    "sample-remembered": (
        "draws random numbers when it is read first, and is remembered from then on, so a resumed run would draw "
        "others. Remember what was read, and draw anew in every call"
    ),
    "randomness-off": (
        "draws random numbers, and data.randomness=off seeds none, so a resumed run would draw others. Use "
        "data.randomness=sample"
    ),
    "sample-per-process": (
        "is different in a data worker than in this process. It depends on the process: a generator seeded at import, "
        "the pid or worker number, hash() of a text or the order of a set, the number of threads, a file position "
        "shared after a fork. Make it depend on the index alone"
    ),
}


def require_equal(fetcher: Fetcher, digests: Sequence[str], others: Sequence[str], kind: str) -> None:
    """Raise DataError of a ``kind`` that names the first probed sample with two digests."""
    for index, digest, other in zip(probe_indices(len(fetcher.samples)), digests, others, strict=True):
        if digest != other:
            name = f"{sample_name(fetcher.samples, index)} of {type(fetcher.samples).__qualname__}"
            raise DataError(f"{name} {_IMPURE[kind]}{_OFF}", kind=kind)


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
    """The type of an error, in place of the sample. Not the message, which may contain addresses."""


def _rows(
    fetcher: Fetcher, indices: Sequence[int], *, label: str = "probe", drawn: list[bool] | None = None
) -> list[Any]:
    """The samples. Adds the generators that they draw from to those of the fetcher."""
    rows: list[Any] = []
    seeded: dict[str, Any] = {}

    def seed(key: int) -> None:
        seed_host(key)
        seeded.update(states())

    with sandboxed(draws=True), signals.reading():
        for index in indices:
            try:
                rows.append(fetcher.sample(index, derive(label, fetcher.plan.seed, index), seed))
            except Exception as error:  # training will report it, if it gets there
                rows.append(_ReadError(type(error).__qualname__))
            changed = changed_generators(seeded)
            fetcher.generators |= changed
            if drawn is not None:
                drawn.append(bool(changed))
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
        pickled = io.BytesIO()
        _ContentPickler(pickled).dump(value)
        return pickled.getvalue()
    except Exception:  # for open files and locks, only the type can be compared
        return type(value).__qualname__.encode()


class _ContentPickler(pickle.Pickler):
    """Tensors inside other objects, such as graphs, by their content: torch pickles their addresses, too."""

    def persistent_id(self, obj: Any) -> bytes | None:
        return _bytes(obj) if isinstance(obj, torch.Tensor) and _array(obj) is not None else None


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
    limit = _TOLERANCE * max(abs(old[2]) + abs(old[3]), abs(new[2]) + abs(new[3]), 1e-12)
    return [*old[:2]] == [*new[:2]] and abs(old[2] - new[2]) <= limit and abs(old[3] - new[3]) <= limit


def _text(described: Sequence[Any]) -> str:
    if len(described) == 4:
        return f"{described[1]} of magnitude {described[2]:.4g} +- {described[3]:.4g}"
    return " ".join(map(str, described[1:]))


def hash_content(value: Any, content: Any) -> None:
    """Update the hash ``content`` with a batch: tensors, arrays and plain values by content, other values by type.

    The ledger holds these digests, so they must not change; ``content_digest`` serves comparisons within a
    process and sees more types.
    """
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        content.update(f"{value.dtype}{[*value.shape]}".encode())
        content.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        content.update(f"{value.dtype}{[*value.shape]}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        hash_content([*value.items()], content)
    elif isinstance(value, list | tuple):
        content.update(f"({len(value)}".encode())
        for item in value:
            hash_content(item, content)
    else:
        plain = value is None or isinstance(value, str | bytes | int | float | complex)
        content.update(f"{type(value).__qualname__}{value!r};".encode() if plain else type(value).__qualname__.encode())
