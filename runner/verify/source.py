"""Lines of the user's own code: that change an object, call a function, raise an error, or reach outside.

Files that outlive a run, other processes, sockets and listings of folders are no memory of any object. An audit hook
sees them in the undisturbed run, and notes the line of the user's that asked.
"""

import ctypes
import functools
import gc
import inspect
import linecache
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
_FOLDER = "the order of the folder"
_EVENTS = {"asked": "", "open": "the file", "os.remove": "the file", "os.rename": "the file"}
_EVENTS |= {"os.listdir": _FOLDER, "os.scandir": _FOLDER, "glob.glob": _FOLDER, "sqlite3.connect": "the database"}
_EVENTS |= {"subprocess.Popen": "the process", "os.system": "the process", "os.fork": "a process"}
_EVENTS |= {"socket.connect": "the address"}
# What the user's code asks by calls of functions of which no audit event tells.
_ASKED = {
    "the host name": ("socket.gethostname", "os.uname", "platform.node"),
    "uuid1, the time and the address of the machine": ("uuid.uuid1", "uuid.getnode"),
    "the pid": ("os.getpid", "os.getppid", "threading.get_native_id"),
    "the time and memory of the process": ("os.times", "resource.getrusage"),
    "the processors": ("os.cpu_count", "os.sched_getaffinity", "os.getloadavg"),
    "the free space of a disk": ("os.statvfs", "shutil.disk_usage"),
    "the garbage collector": ("gc.get_objects", "gc.get_count"),
    "a timer": ("threading.Timer.start",),
}
_TIMES = "the times of a file", [f"st_{letter}time{unit}" for letter in "amc" for unit in ("", "_ns")]
_VARIABLES = re.compile("SLURM_(?!RESTART)|PBS|LSB_|SGE_|SSH_|JOB|HOST|NODE")  # others belong to the command
# What no proof of a minute on one machine can change.
_UNTRIED = (*_ASKED, _TIMES[0], "the environment variable", "the file /proc/", "the file /sys/")
_UNTRIED += ("the state in the file", "the process", "a process", "the address", "the database")
_PATHS = ("", "os", "posixpath", "genericpath", "pathlib", "glob", "fnmatch", "platform", "uuid", "collections")
_DIRECT = ("asked", "os.listdir", "os.scandir", "glob.glob")
_VOLATILE = ("/proc/", "/sys/", "/dev/")
_IN_ANY_ORDER = re.compile(r"sort|\b(?:len|set|any|all)\(")


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
    """Notes what the user's code reaches outside of the process, as ``access -> file:line``."""

    def __init__(self) -> None:
        self.reached: dict[str, str] = {}
        self._busy = False
        self._read: set[str] = set()
        sys.addaudithook(self._hook)
        for words, names in _ASKED.items():
            for owner, _, name in (name.rpartition(".") for name in names):
                with suppress(ImportError, AttributeError):  # not every system has it
                    thing = pkgutil.resolve_name(owner)
                    setattr(thing, name, _noting(getattr(thing, name), words))
        read = type(os.environ).__getitem__

        def getitem(variables: Any, name: Any) -> Any:
            if _VARIABLES.search(str(name)):
                sys.audit("asked", f"the environment variable {name}")
            return read(variables, name)

        type(os.environ).__getitem__ = getitem  # type: ignore[method-assign]
        # In the type itself, which refuses ``setattr``, as it does in ``controls``.
        attributes = gc.get_referents(os.stat_result.__dict__)[0]
        attributes |= {name: property(_noting(attributes[name].__get__, _TIMES[0])) for name in _TIMES[1]}
        ctypes.pythonapi.PyType_Modified(ctypes.py_object(os.stat_result))

    def lasting(self) -> dict[str, str]:
        """The same with files that are open to be written. First come files that are written and read, whose state
        outlives the process; last the files that are gone, which do not.
        """
        for file in _written() if _OPEN.exists() else ():  # libraries in C open files without the hook
            self.reached.setdefault(f"the file {file}", "open")
        written = [(key, where) for key, where in self.reached.items() if key in self._read and os.path.exists(key[9:])]

        def gone(item: tuple[str, str]) -> bool:
            kind, _, file = item[0].partition("the file ")
            return not kind and not os.path.exists(file)

        return {f"the state in {key}": where for key, where in written} | dict(sorted(self.reached.items(), key=gone))

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS or self._busy:
            return
        self._busy = True  # what follows raises audit events of its own
        if event == "open" and {*str(arguments[1])} & {*"r+"} and not str(arguments[0]).startswith(_VOLATILE):
            self._read.add(f"the file {arguments[0]}")
        try:
            access, frame = _describe(event, arguments), sys._getframe(1)
            where = access and (event not in _DIRECT or _is_direct(frame)) and of_stack(frame)
            if where:
                self.reached.setdefault(access, where)
        finally:
            self._busy = False


def _is_direct(frame: FrameType | None) -> bool:
    """Whether the user's code asks, itself or by a function of paths, and not a library for it."""
    while frame is not None and frame.f_globals.get("__name__", "").removeprefix(__name__).partition(".")[0] in _PATHS:
        frame = frame.f_back
    return frame is not None and is_users(frame.f_globals.get("__name__"))


def _noting(function: Callable[..., Any], words: str) -> Callable[..., Any]:
    """The same function, of whose calls the hook hears."""

    @functools.wraps(function)
    def ask(*arguments: Any, **keywords: Any) -> Any:
        sys.audit("asked", words)
        return function(*arguments, **keywords)

    return ask


def untried(reached: Mapping[str, str]) -> list[str]:
    """What the user's code reaches that was the same in all runs of the proof, and may be other after a resume."""

    def matters(access: str, file: str, line: str) -> bool:
        ordered = access.startswith(_FOLDER) and not _IN_ANY_ORDER.search(linecache.getline(file, int(line)))
        return ordered or access.startswith(_UNTRIED)

    return [f"{access} ({where})" for access, where in reached.items() if matters(access, *where.rpartition(":")[::2])]


def _describe(event: str, arguments: tuple[Any, ...]) -> str:
    target = arguments[1] if event == "socket.connect" else arguments[0] if arguments else ""
    if event == "open":
        mode = arguments[1] if type(arguments[1]) is str else ""
        volatile = is_a(target, str) and target.startswith(_VOLATILE)
        if type(target) is int or not (volatile or {*mode} & {*"wax+"}):
            return ""  # a file that is only read is the same for every run
    if is_a(target, PurePath):
        target = PurePath.__str__(target)
    if not is_a(target, str, bytes, tuple, int, float):
        target = type_name(type(target))
    return f"{_EVENTS[event]} {target if type(target) is str else repr(target)}".strip()
