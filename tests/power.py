"""Power cuts: records the system calls of a local location, and builds every disk that a power cut may leave behind.

The model promises no more than POSIX: a write is on the disk once its file was synced, a name once its folder was
synced, also in folders that another program made (as Hydra makes the run's). Until then each write and each name may or
may not have reached the disk, independently, and a write may have left garbage in some sectors.
"""

import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

SECTOR = 512
ALL = 64  # crash states of one moment up to which all are made; of more, a sample of SAMPLE
SAMPLE = 24

Event = tuple[Any, ...]
_RECORDED = ("open", "close", "write", "fsync", "link", "replace", "rename", "unlink", "remove", "mkdir")
_NOT_MODELLED = ("pwrite", "writev", "pwritev", "truncate", "ftruncate", "sendfile", "rmdir", "symlink", "renames")


class RecordingOs:
    """``os`` for ``runner.storage.local``. ``forget`` makes it a mutant: ``file`` or ``folder`` are never synced."""

    def __init__(self, root: Path, *, forget: str = "") -> None:
        self.events: list[Event] = []
        self._root = root
        self._forget = forget
        self._descriptors: dict[int, tuple[str, int]] = {}  # -> name, inode; no inode for a folder
        self._known = {""}
        self._inodes = 0
        self._lock = threading.Lock()

    def others_make(self, path: Path) -> None:
        """Make a folder and its parents as another program would, without a sync."""
        path.mkdir(parents=True, exist_ok=True)
        self._name(path / "x")

    def note(self, *event: Any) -> None:
        """Add an event that is no system call."""
        self.events.append(event)

    def __getattr__(self, attribute: str) -> Any:
        call = getattr(os, attribute)
        if attribute in _NOT_MODELLED:
            raise AssertionError(f"the model has no os.{attribute}; teach it")
        if attribute not in _RECORDED:
            return call

        def recorded(*arguments: Any, **keywords: Any) -> Any:
            with self._lock:
                if attribute == "unlink" and not os.path.lexists(arguments[0]):
                    return call(*arguments, **keywords)
                result = call(*arguments, **keywords)
                getattr(self, f"_{attribute}")(result, *arguments)
            return result

        return recorded

    def _open(self, descriptor: int, path: Any, flags: int, mode: int = 0) -> None:
        if flags & os.O_DIRECTORY and not Path(path).is_relative_to(self._root):
            self._descriptors[descriptor] = ("..", 0)  # a folder above the model's root, which was always there
            return
        name = self._name(path)
        if flags & os.O_DIRECTORY:
            self._descriptors[descriptor] = (name, 0)
        elif flags & os.O_CREAT:
            assert flags & os.O_EXCL, "the model knows new files only"
            self._inodes += 1
            self._descriptors[descriptor] = (name, self._inodes)
            self.events.append(("name", name, self._inodes))

    def _close(self, _: None, descriptor: int) -> None:
        self._descriptors.pop(descriptor, None)

    def _write(self, count: int, descriptor: int, data: Any) -> None:
        self.events.append(("write", self._descriptors[descriptor][1], bytes(data[:count])))

    def _fsync(self, _: None, descriptor: int) -> None:
        name, inode = self._descriptors[descriptor]
        if name == "..":
            return
        if not inode:  # other programs make folders unrecorded; this syncs the ones present now
            for entry in os.scandir(self._root / name):
                if entry.is_dir():
                    self._name(f"{entry.path}/x")
        if inode and self._forget != "file":
            self.events.append(("sync file", inode))
        if not inode and self._forget != "folder":
            self.events.append(("sync folder", name))

    def _link(self, _: None, source: Any, target: Any) -> None:
        self.events.append(("link", self._name(source), self._name(target)))

    def _replace(self, _: None, source: Any, target: Any) -> None:
        self.events.append(("rename", self._name(source), self._name(target)))

    _rename = _replace

    def _unlink(self, _: None, path: Any) -> None:
        self.events.append(("unname", self._name(path)))

    _remove = _unlink

    def _mkdir(self, _: None, path: Any, mode: int = 0) -> None:
        self._name(f"{path}/x")

    def _name(self, path: Any) -> str:
        """The path below the root; folders on the way that were made since the last look are noted."""
        name = os.path.relpath(path, self._root)
        name = "" if name == "." else name
        assert not name.startswith(".."), f"{path} is outside"
        parents = [str(parent) for parent in Path(name).parents if str(parent) != "."]
        for folder in reversed(parents):
            if folder not in self._known:
                self._known.add(folder)
                self.events.append(("folder", folder))
        return name


@dataclass
class Disk:
    """The synced contents of a disk, and the writes and changes of names since the last sync."""

    contents: dict[int, bytes] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)  # 0 for a folder
    writes: list[tuple[int, int, bytes]] = field(default_factory=list)  # (inode, offset, data)
    changes: list[list[tuple[str, int | None]]] = field(default_factory=list)  # together or not at all; None: gone

    def apply(self, event: Event) -> None:
        """Apply one recorded event."""
        match event:
            case ("name", name, inode):
                self.changes.append([(name, inode)])
            case ("folder", name):
                self.changes.append([(name, 0)])
            case ("unname", name):
                self.changes.append([(name, None)])
            case ("link", source, target):
                self.changes.append([(target, self._current()[source])])
            case ("rename", source, target):
                self.changes.append([(target, self._current()[source]), (source, None)])
            case ("write", inode, data):
                end = max((at + len(old) for number, at, old in self.writes if number == inode), default=0)
                self.writes.append((inode, max(end, len(self.contents.get(inode, b""))), data))
            case ("sync file", inode):
                self._sync_file(inode)
            case ("sync folder", folder):
                self._sync_folder(folder)

    def _sync_file(self, inode: int) -> None:
        for number, at, data in self.writes:
            if number == inode:
                self.contents[inode] = _written(self.contents.get(inode, b""), at, data)
        self.writes = [write for write in self.writes if write[0] != inode]

    def _sync_folder(self, folder: str) -> None:
        here = [change for change in self.changes if _folder(change[0][0]) == folder]
        self.names = _renamed(self.names, here)
        self.changes = [change for change in self.changes if _folder(change[0][0]) != folder]

    def after_a_cut(self, chance: random.Random) -> Iterator[dict[str, bytes]]:
        """The files, by name, that a disk may hold after a power cut: all possibilities, or a sample."""
        options = [("dropped", "kept", "trashed", "zeros")] * len(self.writes) + [("dropped", "kept")] * len(
            self.changes
        )
        if prod(map(len, options)) <= ALL:
            chosen: Any = product(*options)
        else:
            drawn = [[chance.choice(option) for option in options] for _ in range(SAMPLE)]
            named = [[chance.choice(option) for option in options[: len(self.writes)]] for _ in range(SAMPLE)]
            kept = ["kept"] * len(self.changes)
            chosen = [["dropped"] * len(options), ["kept"] * len(options), *drawn, *(some + kept for some in named)]
        for fates in chosen:
            yield self._found(fates[: len(self.writes)], fates[len(self.writes) :], chance)

    def _found(self, writes: Any, changes: Any, chance: random.Random) -> dict[str, bytes]:
        contents = dict(self.contents)
        for (inode, at, data), fate in zip(self.writes, writes, strict=True):
            if fate != "dropped":
                data = {"kept": data, "zeros": bytes(len(data)), "trashed": _trashed(data, chance)}[fate]
                contents[inode] = _written(contents.get(inode, b""), at, data)
        kept = [change for change, fate in zip(self.changes, changes, strict=True) if fate == "kept"]
        names = _renamed(self.names, kept)
        return {
            name: contents.get(inode, b"")
            for name, inode in names.items()
            if inode and all(str(parent) in (".", *names) for parent in Path(name).parents)
        }

    def _current(self) -> dict[str, int]:
        return _renamed(self.names, self.changes)


def crash_states(events: list[Event], seed: int = 0) -> Iterator[tuple[int, dict[str, bytes]]]:
    """(events so far, files by name) for a cut after every event, in all ways or in a seeded sample of them."""
    disk, chance = Disk(), random.Random(seed)
    for number, event in enumerate(events, 1):
        disk.apply(event)
        for files in disk.after_a_cut(chance):
            yield number, files


def _renamed(names: dict[str, int], changes: list[list[tuple[str, int | None]]]) -> dict[str, int]:
    names_after = dict(names)
    for change in changes:
        for name, inode in change:
            if inode is None:
                names_after.pop(name, None)
            else:
                names_after[name] = inode
    return names_after


def _written(old: bytes, at: int, data: bytes) -> bytes:
    return old[:at].ljust(at, b"\0") + data + old[at + len(data) :]


def _trashed(data: bytes, chance: random.Random) -> bytes:
    sectors = [data[at : at + SECTOR] for at in range(0, len(data), SECTOR)]
    some = {chance.randrange(len(sectors)), chance.randrange(len(sectors))} if sectors else set()
    return b"".join(chance.randbytes(len(s)) if place in some else s for place, s in enumerate(sectors))


def _folder(name: str) -> str:
    return name.rpartition("/")[0]
