"""Lines of text and of JSON."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from runner.shards import blocks
from runner.shards.blocks import Block
from runner.storage import files


class Lines:
    """A record is a line that ends with LF or CRLF. A compressed shard cannot be read from the middle, so it is one
    block: to read one record decompresses all of it. Prefer many small compressed shards to a large one.
    """

    keeps_blank = True

    def blocks(self, path: str, size: int) -> Iterator[Block]:
        """A block ends at the last line end of every ``BLOCK_BYTES``, or of more where a line is longer."""
        packed = files.is_compressed(path)
        start, total = 0, 0
        for data in _whole_lines(path):
            records = self._count(data)
            total += records
            yield Block(start, 0 if packed else records)
            start += 0 if packed else len(data)
        if packed:
            yield Block(0, total)

    def read(self, path: str, start: int, stop: int) -> Sequence[bytes]:
        """The lines of a block, without their ends."""
        data = files.read(path) if files.is_compressed(path) else files.read_range(path, start, stop)
        lines = data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        return lines if self.keeps_blank else [line for line in lines if line.strip()]

    def decode(self, raw: bytes) -> Any:
        """The text of a line."""
        return raw.removesuffix(b"\r").decode()

    def _count(self, data: bytes) -> int:
        if self.keeps_blank:
            return data.count(b"\n") + (not data.endswith(b"\n"))
        return sum(map(bool, map(bytes.strip, data.split(b"\n"))))


class JsonLines(Lines):
    """A record is a line of JSON; blank lines are none."""

    keeps_blank = False

    def decode(self, raw: bytes) -> Any:
        """The value that a line stands for."""
        return json.loads(str(raw, "utf-8"))


def _whole_lines(path: str) -> Iterator[bytes]:
    begun: list[bytes] = []  # pieces of a line whose end is not read yet; joined only once, even if it is long
    for piece in files.pieces(path, blocks.BLOCK_BYTES):
        cut = piece.rfind(b"\n") + 1
        if cut:
            yield b"".join([*begun, piece[:cut]])
            begun = []
        if cut < len(piece):
            begun.append(piece[cut:])
    if begun:
        yield b"".join(begun)
