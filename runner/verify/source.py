"""Lines of the user's own code: that change an object, call a function, raise an error, or reach outside.

Files that outlive a run, other processes, sockets and listings of folders are no memory of any object. An audit hook
sees them in the undisturbed run, and notes the line of the user's that asked.
"""

import functools
import inspect
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from types import FrameType
from typing import Any

from runner.verify.fingerprint import is_a, names_of_runs, type_name
from runner.verify.memory import is_users, modules_of, mro

Lines = tuple[str, int, int]  # file, first and last line of a class or a function

# Behind a name and its items and attributes: an assignment, or a method.
_ASSIGNED = r"(?:\[[^]]*\]|\.\w+)*(?:\.(?!get\()\w+\(|\s*(?::[^=]+)?(?:\*\*|//|>>|<<|[-+*/%@&|^])?=(?!=))"
_WHOLE = 10**6  # lines of a file
_MAKING = ("__init__", "state_dict", "load_state_dict", "get_extra_state", "set_extra_state")
_STORES = {"open": "the file", "os.listdir": "the folder", "os.scandir": "the folder", "glob.glob": "the listing"}
_OTHERS = {"subprocess.Popen": "the process", "os.system": "the process", "socket.connect": "the address"}
UNTRIED = ("the host name", "a timer with an interval of")  # no proof of a minute on one machine can change them
_EVENTS = {"socket.gethostname": UNTRIED[0], "timer": UNTRIED[1], "sqlite3.connect": "the database"}
_EVENTS |= _STORES | _OTHERS
_EVENTS |= {"os.remove": "the file", "os.rename": "the file"}


def sources(value: Any) -> list[Lines]:
    """The lines of the user's classes of an object; for a model, of the classes of its modules."""
    torch = sys.modules["torch"]
    values = modules_of(value).values() if is_a(value, torch.nn.Module) else [value]
    kinds = {id(kind): kind for each in values for kind in mro(type(each))}
    function = value.func if is_a(value, functools.partial) else value
    owners = [*kinds.values(), function]
    every = [_lines_of(owner) for owner in owners if is_users(getattr(owner, "__module__", None))]
    files = {lines[0]: (lines[0], 1, _WHOLE) for lines in every if lines}
    return [*filter(None, every), *files.values()]


def _lines_of(owner: Any) -> Lines | None:
    try:
        texts, first = inspect.getsourcelines(owner)
        return str(inspect.getsourcefile(owner)), first, first + len(texts) - 1
    except (OSError, TypeError):  # no source, or no code
        return None


def line_of(names: Iterable[str], own: Sequence[Lines], others: Sequence[Lines] = ()) -> str:
    """``file:line`` of the last line that changes the first possible name, in the object's ``own`` lines or in
    ``others``; else of a line with the name; else of the class. Methods that make or load an object come last.
    """
    names = [*names]
    if any(_best(name, own) for name in names[:-1]):  # elsewhere, the names of an object's parts may mean anything
        others = ()
    for name in names:
        line = _best(name, own) or _best(name, others) or _best(name, own, sure=False)
        if line:
            return line
    return f"{own[0][0]}:{own[0][1]}" if own else ""


def _best(name: str, spans: Sequence[Lines], *, sure: bool = True) -> str:
    """The line with a name in the first span that has it; ``sure``: a line that changes it."""
    for file, first, last in spans:
        best = max(_hits(name, file, first, last), default=None)
        if best and (best[:2] == (True, True) or not sure):
            return f"{file}:{best[-1]}"
    return ""


def _hits(name: str, file: str, first: int, last: int) -> list[tuple[bool, bool, bool, int]]:
    """For each line with a name: whether it is in a function that neither makes nor loads an object, whether it changes
    the name's value, also by a call, whether it does so without returning a result, and its number.
    """
    word = re.compile(rf"\b{re.escape(name)}\b")
    change = re.compile(rf"\b{re.escape(name)}\b(?:[\"']\])?(?:{_ASSIGNED})")
    try:
        lines = Path(file).read_text().splitlines()[first - 1 : last]
    except OSError:
        return []
    hits, method = [], ""
    for number, line in enumerate(lines, first):
        head = re.match(r"\s*(?:async )?def (\w+)", line)
        method = head[1] if head else method
        if word.search(line):
            changes = bool(change.search(line))
            alone = changes and not line.lstrip().startswith("return ")
            hits.append((line[:1].isspace() and method not in _MAKING, changes, alone, number))
    return hits


def of_stack(frame: FrameType | None) -> str:
    """``file:line`` of the innermost frame in the user's code; empty if there is none, or if that imports a module."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        if is_users(frame.f_globals.get("__name__")):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def of_error(error: BaseException | None) -> str:
    """The same for the frames that an error, or the error behind it, came through."""
    where = ""
    errors: set[int] = set()
    while error is not None and not where and id(error) not in errors:  # causes of errors may form a circle
        errors.add(id(error))
        for frame, line in traceback.walk_tb(error.__traceback__):
            if is_users(frame.f_globals.get("__name__")):
                where = f"{frame.f_code.co_filename}:{line}"
        error = error.__cause__ or error.__context__
    return where


_OPEN = Path("/proc/self/fd")


def _written() -> Iterator[str]:
    """Files that this process has open to be written, without the run's own files."""
    for link in _OPEN.iterdir():
        with suppress(OSError, ValueError):
            file, facts = os.readlink(link), Path("/proc/self/fdinfo", link.name).read_text()
            flags = int(facts.partition("flags:")[2].split()[0], 8)
            own = any(name in file for name in ("/runner-verify-", *names_of_runs))
            if flags & (os.O_WRONLY | os.O_RDWR) and os.path.isfile(file) and not own:
                yield file


class OutsideAccess:
    """Notes what the user's code reaches outside of the process, as ``access -> file:line``, until ``close``."""

    def __init__(self) -> None:
        self.reached: dict[str, str] = {}
        self._busy = False
        sys.addaudithook(self._hook)
        threading.Timer.start = _start  # type: ignore[assignment, method-assign]

    def lasting(self) -> dict[str, str]:
        """The same with files that are open to be written, and last the files that are gone: these do not outlive the
        process.
        """
        for file in _written() if _OPEN.exists() else ():  # libraries in C open files without the hook
            self.reached.setdefault(f"the file {file}", "open")

        def gone(item: tuple[str, str]) -> bool:
            kind, _, file = item[0].partition("the file ")
            return not kind and not os.path.exists(file)

        return dict(sorted(self.reached.items(), key=gone))

    def close(self) -> None:
        """Note no more; python cannot remove an audit hook."""
        self._busy = True

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS or self._busy:
            return
        self._busy = True
        try:
            access = _describe(event, arguments)
            where = access and of_stack(sys._getframe(1))
            if where:
                self.reached.setdefault(access, where)
        finally:
            self._busy = False


def _start(timer: threading.Timer) -> None:
    sys.audit("timer", timer.interval)
    threading.Thread.start(timer)


def _describe(event: str, arguments: tuple[Any, ...]) -> str:
    target = arguments[1] if event == "socket.connect" else arguments[0] if arguments else ""
    if event == "open":
        mode = arguments[1] if type(arguments[1]) is str else ""
        volatile = is_a(target, str) and target.startswith(("/proc/", "/sys/", "/dev/"))
        if type(target) is int or not (volatile or {*mode} & {*"wax+"}):
            return ""  # a file that is only read is the same for every run
    if is_a(target, PurePath):
        target = PurePath.__str__(target)
    if not is_a(target, str, bytes, tuple, int, float):
        target = type_name(type(target))
    return f"{_EVENTS[event]} {target if type(target) is str else repr(target)}".strip()
