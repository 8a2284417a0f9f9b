"""Pack documents of any length into rows of equal length: ahead of time if lengths are known, else while reading."""

import json
from collections import deque
from collections.abc import Iterator
from functools import cached_property
from io import BytesIO
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from runner.cache import LRUCache
from runner.errors import DataError
from runner.hashing import int_digest, json_digest
from runner.shards.tokens import RowLayout, checked_length
from runner.storage import files

_DOCUMENTS_HELD = 8


class Packed:
    """A map-style data set of rows over joined documents: sample i is the tokens [i * length, (i + 1) * length + 1) of
    all documents, with ``separator`` between them if it is given. Samples are int64 tensors of shape [length + 1].

    ``documents`` are a map-style data set of tokens: flat sequences, arrays or tensors of integers. ``lengths`` are
    their token counts, or the path of a .npy file of these counts. Only the documents of a sample are read. ``counts``
    and ``fingerprint`` exist if the documents have them. Raises DataError if a document has another length.
    """

    def __init__(self, documents: Any, lengths: ArrayLike | str, *, length: int, separator: int | None = None) -> None:
        self.documents = documents
        counts = _lengths(lengths)
        if len(counts) != len(documents):
            raise DataError(f"there are {len(documents)} documents and {len(counts)} lengths; count the tokens again")
        self._layout = RowLayout(counts, length=checked_length(length), separator=separator)
        if not self._layout.rows:
            raise DataError(f"{counts.sum()} tokens are too few for a sample of {length + 1}; give more tokens")
        self._recent: LRUCache[NDArray[np.int64]] = LRUCache(_DOCUMENTS_HELD)

    def __len__(self) -> int:
        return self._layout.rows

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.concatenate(self._layout.row(index, self._read)))

    @cached_property
    def counts(self) -> list[int]:
        """Samples that begin in each shard of the documents."""
        return self._layout.counts(np.cumsum([0, *self.documents.counts]).tolist())

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the samples."""
        facts = [self.documents.fingerprint, self._layout.length, self._layout.separator]
        return json_digest(facts, self._layout.lengths.astype("<i8").tobytes())

    def locate(self, index: int) -> str:
        """Documents and tokens of a sample, for messages."""
        spans = [(_name(self.documents, number), *span) for number, *span in self._layout.spans(index)]
        return " and ".join(f"{name}, tokens {start} to {stop}" for name, start, stop in spans)

    def hold(self, windows: int, window: int) -> None:
        """Keep enough documents in memory to read ``windows`` windows of ``window`` consecutive samples in turn."""
        per_window = 2 + window * len(self.documents) // len(self)
        self._recent.capacity = max(_DOCUMENTS_HELD, windows * per_window)
        if hasattr(self.documents, "hold"):
            self.documents.hold(windows, per_window)

    def _read(self, number: int, start: int, stop: int) -> NDArray[np.int64]:
        return self._recent.get(number, lambda: self._document(number))[start:stop]

    def _document(self, number: int) -> NDArray[np.int64]:
        tokens = _tokens(self.documents, number)
        if len(tokens) != (expected := self._layout.lengths[number]):
            raise DataError(
                f"{_name(self.documents, number)}: expected {expected} tokens, found {len(tokens)}. "
                "Count the tokens again for new runs; a run that began with these lengths needs the original documents"
            )
        return tokens


class PackingStream(IterableDataset[Tensor]):
    """An iterable data set of rows from documents whose lengths are unknown: int64 tensors of shape [length + 1] that
    overlap by one token.

    Each of W data workers packs every W-th document of the epoch's order, so the rows depend on W. The state, a
    position in the worker's order, is exact at any row. An incomplete row at the end of an epoch is dropped. One pass
    is one epoch; the next pass is the next epoch.
    """

    def __init__(
        self, documents: Any, *, length: int, separator: int | None = None, shuffle: bool = False, seed: int = 0
    ) -> None:
        self.documents = documents
        self.length = checked_length(length)
        self.separator = separator
        self.shuffle = shuffle
        self.seed = seed
        self._epoch = 0
        self._at = (0, 0)  # the next row's document in the order, and its offset in the document with its separator
        self._restored = False

    def set_epoch(self, epoch: int) -> None:
        """The next pass is over this epoch, from its beginning or from a restored position in it."""
        if epoch != self._epoch:
            self._epoch, self._at, self._restored = epoch, (0, 0), False

    def state_dict(self) -> dict[str, int]:
        """The position of the next row's first token."""
        return {"epoch": self._epoch, "document": self._at[0], "offset": self._at[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next pass begins at a saved position. Raises DataError for one outside of these documents."""
        if not 0 <= state["document"] <= len(self.documents) or state["offset"] < 0:
            raise DataError(f"the position {state} is not in these {len(self.documents)} documents; restore the data")
        self._epoch, self._at, self._restored = state["epoch"], (state["document"], state["offset"]), True

    def __iter__(self) -> Iterator[Tensor]:
        self._at = self._at if self._restored else (0, 0)
        self._restored = False
        worker = get_worker_info()
        order = self._order() if worker is None else self._order()[worker.id :: worker.num_workers]
        document, offset = self._at
        held: deque[NDArray[np.int64]] = deque()  # from ``document`` on
        while True:
            while sum(map(len, held)) - offset <= self.length:
                if document + len(held) >= len(order):
                    self._epoch, self._at = self._epoch + 1, (0, 0)
                    return
                held.append(self._document(order, document + len(held)))
            parts = [held[0][offset:], *islice(held, 1, None)]
            row = np.concatenate([part[: self.length + 1] for part in parts])[: self.length + 1]
            offset += self.length
            while offset >= len(held[0]):
                offset -= len(held.popleft())
                document += 1
            self._at = document, offset
            yield torch.from_numpy(row.copy())

    def _document(self, order: NDArray[np.int64], place: int) -> NDArray[np.int64]:
        number = int(order[place])
        tokens = _tokens(self.documents, number)
        if place and self.separator is not None:
            return np.concatenate([[self.separator], tokens])
        return tokens

    def _order(self) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(len(self.documents))
        key = int_digest(json.dumps([self.seed, self._epoch]).encode(), size=16)
        # Raw bits, because numpy may change what its generators make of them, but not the bits.
        return np.argsort(np.random.PCG64(key).random_raw(len(self.documents)), kind="stable")


def _lengths(counts: Any) -> NDArray[np.int64]:
    where = counts if isinstance(counts, str) else "the lengths of the documents"
    try:
        counts = np.load(BytesIO(files.read(counts)), allow_pickle=False) if where is counts else np.asarray(counts)
    except ValueError as error:
        raise DataError(f"{where}: not an array in numpy's format: {error}") from error
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or (counts.size and counts.min() < 0):
        raise DataError(f"{where}: expected a flat array of counts, found {counts.dtype} of shape {list(counts.shape)}")
    integers: NDArray[np.int64] = counts.astype(np.int64)
    return integers


def _tokens(documents: Any, number: int) -> NDArray[np.int64]:
    tokens = np.asarray(documents[number])
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        kind = f"{tokens.dtype} of shape {list(tokens.shape)}"
        raise DataError(f"{_name(documents, number)}: expected a flat sequence of integers, found {kind}")
    return tokens.astype(np.int64)


def _name(documents: Any, number: int) -> str:
    return f"document {number}" + (f" ({documents.locate(number)})" if hasattr(documents, "locate") else "")
