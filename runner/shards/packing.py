"""Rows of equal length from documents whose lengths are known beforehand."""

from functools import cached_property
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from runner.cache import LRUCache
from runner.errors import DataError
from runner.hashing import json_digest
from runner.shards.tokens import TokenRows
from runner.storage import files

_DOCUMENTS_HELD = 8


class Packed(TokenRows):
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
        super().__init__(counts, length=length, separator=separator)
        if not len(self):
            raise DataError(f"{counts.sum()} tokens are too few for a sample of {length + 1}; give more tokens")
        self._recent: LRUCache[NDArray[np.int64]] = LRUCache(_DOCUMENTS_HELD)

    @cached_property
    def counts(self) -> list[int]:
        """Samples that begin in each shard of the documents."""
        return self._counts(np.cumsum([0, *self.documents.counts]))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the samples."""
        facts = [self.documents.fingerprint, self._length, self._separator]
        return json_digest(facts, self._lengths.astype("<i8").tobytes())

    def hold(self, windows: int, window: int) -> None:
        """Keep enough documents in memory to read ``windows`` windows of ``window`` consecutive samples in turn."""
        per_window = 2 + window * len(self.documents) // len(self)
        self._recent.capacity = max(_DOCUMENTS_HELD, windows * per_window)
        if hasattr(self.documents, "hold"):
            self.documents.hold(windows, per_window)

    def _read(self, number: int, start: int, stop: int) -> NDArray[np.int64]:
        return self._recent.get(number, lambda: self._document(number))[start:stop]

    def _document(self, number: int) -> NDArray[np.int64]:
        tokens = np.asarray(self.documents[number])
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            kind = f"{tokens.dtype} of shape {list(tokens.shape)}"
            raise DataError(f"{self._name(number)}: expected a flat sequence of integers, found {kind}")
        if len(tokens) != (expected := self._lengths[number]):
            raise DataError(
                f"{self._name(number)}: expected {expected} tokens, found {len(tokens)}. "
                "Count the tokens again for new runs; a run that began with these lengths needs the original documents"
            )
        return tokens.astype(np.int64)

    def _name(self, number: int) -> str:
        locate = getattr(self.documents, "locate", None)
        return f"document {number}" + (f" ({locate(number)})" if locate else "")


def _lengths(counts: Any) -> NDArray[np.int64]:
    where = counts if isinstance(counts, str) else "the lengths of the documents"
    try:
        counts = np.load(BytesIO(files.read(counts)), allow_pickle=False) if where is counts else np.asarray(counts)
    except ValueError as error:
        raise DataError(f"{where}: not an array in numpy's format: {error}") from error
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or (counts.size and counts.min() < 0):
        raise DataError(f"{where}: expected a flat array of counts, found {counts.dtype} of shape {list(counts.shape)}")
    return np.asarray(counts, dtype=np.int64)
