"""Lines of the user's own code: of what an object does, of what a stack comes from, and of what reaches outside.

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
Sources = list[Lines]

# Behind a name and its items and attributes: an assignment, or a method.
_ASSIGNED = r"(?:\[[^]]*\]|\.\w+)*(?:\.(?!get\()\w+\(|\s*(?::[^=]+)?(?:\*\*|//|>>|<<|[-+*/%@&|^])?=(?!=))"
_WHOLE = 10**6  # lines of a file
_MAKING = ("__init__", "state_dict", "load_state_dict", "get_extra_state", "set_extra_state")
_STORES = {"open": "the file", "os.listdir": "the folder", "os.scandir": "the folder", "glob.glob": "the listing"}
_OTHERS = {"subprocess.Popen": "the process", "os.system": "the process", "socket.connect": "the address"}
UNTRIED = ("the host name", "a timer with an interval of")  # what no proof of a minute on one machine can change
_WATCHED = {"socket.gethostname": UNTRIED[0], "timer": UNTRIED[1], "sqlite3.connect": "the database"}
_WATCHED |= _STORES | _OTHERS
_WATCHED |= {"os.remove": "the file", "os.rename": "the file"}


def sources(value: Any) -> Sources:
    """Where the user's classes of an object are, and for a model those of its modules."""
    torch = sys.modules["torch"]
    values = modules_of(value).values() if is_a(value, torch.nn.Module) else [value]
    kinds = {id(kind): kind for each in values for kind in mro(type(each))}
    function = value.func if is_a(value, functools.partial) else value
    owners = [*kinds.values(), function]
    places = [_place(owner) for owner in owners if is_users(getattr(owner, "__module__", None))]
    files = {place[0]: (place[0], 1, _WHOLE) for place in places if place}
    return [*filter(None, places), *files.values()]


def _place(owner: Any) -> Lines | None:
    try:
        lines, first = inspect.getsourcelines(owner)
        return str(inspect.getsourcefile(owner)), first, first + len(lines) - 1
    except (OSError, TypeError):  # no source, or no code
        return None


def line_of(names: Iterable[str], places: Sources, others: Sequence[Lines] = ()) -> str:
    """``file:line`` of the last line that changes the first possible one of these names, in ``places`` or in
    ``others``; else of a line with the name; else of the class. Methods that make or load an object come last.
    """
    names = [*names]
    if any(_best(name, places) for name in names[:-1]):  # the names of an object's parts may be those of anything
        others = ()
    for name in names:
        line = _best(name, places) or _best(name, others) or _best(name, places, sure=False)
        if line:
            return line
    return f"{places[0][0]}:{places[0][1]}" if places else ""


def _best(name: str, places: Sequence[Lines], *, sure: bool = True) -> str:
    """The line of a name in the first place that has it; ``sure``: that changes it."""
    for file, first, last in places:
        best = max(_hits(name, file, first, last), default=None)
        if best and (best[:2] == (True, True) or not sure):
            return f"{file}:{best[-1]}"
    return ""


def _hits(name: str, file: str, first: int, last: int) -> list[tuple[bool, bool, bool, int]]:
    """Lines with a name: whether they are in a function that neither makes nor loads an object, whether they change it,
    also by a call, whether they do so for its own sake, and not to return something, and their number.
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
    """``file:line`` of the innermost frame of the user's; empty if there is none, or if it only imports a module."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        if is_users(frame.f_globals.get("__name__")):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def of_error(error: BaseException | None) -> str:
    """The same for the frames that an error, or the error behind it, came through."""
    place = ""
    errors: set[int] = set()
    while error is not None and not place and id(error) not in errors:  # it may be behind itself
        errors.add(id(error))
        for frame, line in traceback.walk_tb(error.__traceback__):
            if is_users(frame.f_globals.get("__name__")):
                place = f"{frame.f_code.co_filename}:{line}"
        error = error.__cause__ or error.__context__
    return place


_OPEN = Path("/proc/self/fd")


def _written() -> Iterator[str]:
    """Files that this process has open to be written, but for those of the run."""
    for link in _OPEN.iterdir():
        with suppress(OSError, ValueError):
            file, facts = os.readlink(link), Path("/proc/self/fdinfo", link.name).read_text()
            flags = int(facts.partition("flags:")[2].split()[0], 8)
            own = any(name in file for name in ("/runner-verify-", *names_of_runs))
            if flags & (os.O_WRONLY | os.O_RDWR) and os.path.isfile(file) and not own:
                yield file


class Watch:
    """What the user's code reaches outside of the process, as ``what -> file:line``, until ``close``."""

    def __init__(self) -> None:
        self.reached: dict[str, str] = {}
        self._busy = False
        sys.addaudithook(self._hook)
        threading.Timer.start = _start  # type: ignore[assignment, method-assign]

    def lasting(self) -> dict[str, str]:
        """What was reached, with files that are open to be written, and last the files that are gone: these do not
        outlive the process.
        """
        for file in _written() if _OPEN.exists() else ():  # also by libraries in C, of which no hook hears
            self.reached.setdefault(f"the file {file}", "open")

        def gone(item: tuple[str, str]) -> bool:
            kind, _, file = item[0].partition("the file ")
            return not kind and not os.path.exists(file)

        return dict(sorted(self.reached.items(), key=gone))

    def close(self) -> None:
        """See no more; python has no way to take a hook away."""
        self._busy = True

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _WATCHED or self._busy:
            return
        self._busy = True
        try:
            what = _reached(event, arguments)
            place = what and of_stack(sys._getframe(1))
            if place:
                self.reached.setdefault(what, place)
        finally:
            self._busy = False


def _start(timer: threading.Timer) -> None:
    sys.audit("timer", timer.interval)
    threading.Thread.start(timer)


def _reached(event: str, arguments: tuple[Any, ...]) -> str:
    target = arguments[1] if event == "socket.connect" else arguments[0] if arguments else ""
    if event == "open":
        mode = arguments[1] if type(arguments[1]) is str else ""
        volatile = is_a(target, str) and target.startswith(("/proc/", "/sys/", "/dev/"))
        if type(target) is int or not (volatile or {*mode} & {*"wax+"}):
            return ""  # what is only read is the same for every run
    if is_a(target, PurePath):
        target = PurePath.__str__(target)
    if not is_a(target, str, bytes, tuple, int, float):
        target = type_name(type(target))
    return f"{_WATCHED[event]} {target if type(target) is str else repr(target)}".strip()
