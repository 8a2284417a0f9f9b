"""What a thread of this process is doing, and where, for messages of other processes. Read from its stack frames."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import FrameType

import torch

# Waits for other processes; waits for its own writer thread; saves, restores or exports; does anything else.
WAITS, JOINS, SAVES, WORKS = "waits", "joins", "saves", "works"

_RUNNER = f"{Path(__file__).parents[1]}/"
_TORCH = f"{Path(torch.__file__).parent}/"
_STANDARD = f"{Path(os.__file__).parent}/"
_INSTALLED = ("/site-packages/", "/dist-packages/")
_EXCHANGES = (f"{_RUNNER}distributed/", f"{_TORCH}distributed/", f"{_TORCH}autograd/", f"{_TORCH}_tensor.py")
_WRITER = f"{_RUNNER}checkpoint/writer.py"
_STORES = tuple(
    f"{_RUNNER}{file}" for file in ("checkpoint/", "callbacks/saving.py", "storage/journals.py", "finish.py")
)


@dataclass(frozen=True, slots=True)
class Place:
    """``does`` is one of the four words above. ``line`` is a code line for people, outside of libraries if possible."""

    does: str
    line: str


def place(thread: int) -> Place:
    """The place of a thread of this process, by its ident."""
    frames = stack(thread)
    files = [frame.f_code.co_filename for frame in frames]
    inner = takewhile(lambda file: file.startswith((_TORCH, _EXCHANGES[0])), files)
    if any(file.startswith(_EXCHANGES) for file in inner):
        return Place(WAITS, _line(frames))
    if next((file for file in files if not _foreign(file)), "") == _WRITER:
        return Place(JOINS, _line(frames))
    return Place(SAVES if any(file.startswith(_STORES) for file in files) else WORKS, _line(frames))


def stack(thread: int) -> list[FrameType]:
    """The frames of a thread of this process, from the innermost on."""
    return [*_frames(sys._current_frames().get(thread))]


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _line(frames: list[FrameType]) -> str:
    """The innermost line outside of torch and the standard library."""
    frame = next((frame for frame in frames if not _foreign(frame.f_code.co_filename)), frames[0] if frames else None)
    if frame is None:
        return "an unknown place"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def _foreign(file: str) -> bool:
    standard = file.startswith((_STANDARD, "<frozen ")) and not any(part in file for part in _INSTALLED)
    return standard or file.startswith(_TORCH)
