"""What surrounds the user's code in an attempt, held constant or changed, to see whether a difference comes from it.

A pin holds something constant; only runs under the same pins are compared. Clocks can also be ahead, and go faster: a
proof of a minute then sees that training uses an hour, a date or the minutes since the start. For the runner and,
unless pinned, for installed libraries all clocks stay true: heartbeats, commits, certificates and signed requests need
them. Data workers have the clock that their attempt began with, however they are started. Late clocks let attempts that
follow each other begin at the same time.
"""

import ctypes
import datetime
import gc
import itertools
import multiprocessing.spawn
import os
import random
import sys
import threading
import time
import timeit
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType, ModuleType
from typing import Any

import numpy as np

from runner.verify import source
from runner.verify.memory import is_users

_STEP_SECONDS = 211  # a step seems to take so long to clocks that are ahead
_PID = 4242
_NOW = 1_700_000_000  # the pinned time, from which each module that asks counts milliseconds
_MOST_CALLERS = 3  # lines for a verdict
# Functions that show the present time unless their argument at this position is another.
_TIME_ARGUMENT = {"localtime": 0, "gmtime": 0, "ctime": 0, "asctime": 0, "strftime": 1}
_true_time, _true_localtime, _datetime64 = time.time, time.localtime, np.datetime64
_true_clocks = time.clock_gettime, time.clock_gettime_ns

callers: list[str] = []  # lines of the user's code that asked for what is held constant, or read a clock that is ahead
_ahead = 0  # seconds; negative: late
_fast = False  # whether steps seem to take longer
step_seconds = 0  # all clocks of the training thread are ahead by so much more, also clocks with an arbitrary start
_training_thread = 0
_ticks: dict[str, Iterator[int]] | None = None  # module -> ticks of its pinned clocks


def pin(*pins: str, ahead: int = 0, late: int = 0) -> None:
    """Hold the ``_PINS`` of these names constant in this process. The user's clocks are ``ahead`` or ``late`` by so
    many seconds, also in processes that ``multiprocessing`` starts; clocks that are only late do not ``advance``.
    """
    global _ahead, _fast
    if ahead or late:
        _ahead, _fast = ahead - late, ahead != 0
        _replace_clocks()
        preparation = multiprocessing.spawn.get_preparation_data
        multiprocessing.spawn.get_preparation_data = lambda name: {**preparation(name), "clocks": _Ahead(_ahead)}
    for name in pins:
        _PINS[name]()


def advance(seconds: int = _STEP_SECONDS) -> None:
    """Move clocks that are ahead further, as if the last step had taken so long, for the calling thread alone."""
    global step_seconds, _training_thread
    _training_thread = threading.get_ident()
    step_seconds += seconds * _fast


class _Ahead(int):
    """A process that unpickles these seconds has clocks that are ahead by them."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[()], None]:
        return partial(pin, ahead=int(self)), (), None


def _pin_pid() -> None:
    def getpid() -> int:
        _note_caller(sys._getframe(1))
        return _PID

    os.getpid = getpid


def _pin_time() -> None:
    """Each call of a module reads a little later time than its last call, in every attempt alike."""
    global _ticks
    _ticks = defaultdict(itertools.count)
    _replace_clocks()


def _pin_entropy() -> None:
    """Entropy of the system, which seeds generators that are made without a seed. Each module and rank has its own."""
    draws: dict[str, Iterator[int]] = defaultdict(itertools.count)
    rank, seed = os.environ.get("RANK", "0"), random.Random.seed

    def label() -> str:
        frame = _caller()
        _note_caller(frame)
        return f"{rank} {_name(frame)} {next(draws[_name(frame)])}"

    def urandom(size: int) -> bytes:
        return random.Random(label()).randbytes(size)

    def seeded(self: random.Random, a: Any = None, version: int = 2) -> None:
        seed(self, label() if a is None else a, version)

    os.urandom = urandom
    random._urandom = urandom  # type: ignore[attr-defined]  # SystemRandom's name for it
    random.Random.seed = seeded  # type: ignore[method-assign]


_PINS = {"pid": _pin_pid, "time": _pin_time, "entropy": _pin_entropy, "gc": gc.disable}


def _replace_clocks() -> None:
    for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time"):
        setattr(time, name, _clock(getattr(time, name), 1, of_day=name == "time"))
        setattr(time, f"{name}_ns", _clock(getattr(time, f"{name}_ns"), 10**9, of_day=name == "time"))
    for true, unit in zip(_true_clocks, (1, 10**9), strict=True):
        setattr(time, true.__name__, _clock(true, unit))
    timeit.default_timer = time.perf_counter
    for name, position in _TIME_ARGUMENT.items():
        as_struct = name in ("asctime", "strftime")
        setattr(time, name, _with_present_time(getattr(time, name), position, as_struct=as_struct))
    # In the type itself, which refuses ``setattr``: another type would be no ``datetime`` to pickle and to libraries.
    # ``today`` and ``date.today`` ask ``time.time``.
    attributes = gc.get_referents(datetime.datetime.__dict__)[0]
    attributes |= {"now": classmethod(_datetime_now), "utcnow": classmethod(_datetime_utcnow)}
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(datetime.datetime))
    np.__class__ = _NumpyModule  # a property asks who reads it: libraries must keep the true type


def _clock(clock: Callable[..., Any], unit: int, *, of_day: bool | None = None) -> Callable[..., Any]:
    """A clock of the day, or with an arbitrary start, by which python's own modules measure time-outs, unshifted; None
    for a function that reads the clock of a number.
    """

    def read(*number: int) -> Any:
        shows_day = number == (time.CLOCK_REALTIME,) if of_day is None else of_day
        return _time_for(clock(*number), _caller() if of_day else sys._getframe(1), unit, of_day=shows_day)

    return read


def _time_for(true: Any, frame: FrameType | None, unit: int = 1, *, of_day: bool = True) -> Any:
    """The time that a clock, with ``unit`` units in a second, shows to the code of ``frame``."""
    if frame is None or _is_python(frame) or _name(frame).startswith("runner."):
        return true
    if _ticks is not None:
        _note_caller(frame)
        return type(true)(_NOW * unit + next(_ticks[_name(frame)]) * unit / 1000)
    if not _is_users(frame):
        return true
    if _fast:
        _note_caller(frame)
    more = step_seconds if threading.get_ident() == _training_thread else 0
    return true + unit * ((_ahead if of_day else 0) + more)


def _with_present_time(show: Callable[..., Any], position: int, *, as_struct: bool) -> Callable[..., Any]:
    """A function of ``time`` that shows the present time where none is passed at that position."""

    def show_now(*arguments: Any) -> Any:
        if len(arguments) <= position or arguments[position] is None:
            now = _time_for(_true_time(), _caller())
            arguments = (*arguments[:position], _true_localtime(now) if as_struct else now)
        return show(*arguments)

    return show_now


def _datetime_now(cls: Any, tz: Any = None) -> Any:
    return cls.fromtimestamp(_time_for(_true_time(), _caller()), tz)


def _datetime_utcnow(cls: Any) -> Any:
    return cls.fromtimestamp(_time_for(_true_time(), _caller()), datetime.timezone.utc).replace(tzinfo=None)


class _Datetime64Meta(type):
    """numpy's ``datetime64`` as the user's modules see it: with another "now" and "today"."""

    def __call__(cls, *arguments: Any) -> Any:
        value = _datetime64(*arguments)
        if arguments[:1] in (("now",), ("today",)):
            value = _datetime64(int(_time_for(_true_time(), _caller())), "s").astype(value.dtype)
        return value

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _datetime64)

    def __subclasscheck__(cls, kind: Any) -> bool:
        return issubclass(kind, _datetime64)


class _Datetime64(metaclass=_Datetime64Meta):
    dtype = np.dtype(_datetime64)  # numpy takes anything with one where it expects a dtype


class _NumpyModule(ModuleType):
    @property
    def datetime64(self) -> Any:
        return _Datetime64 if _is_users(sys._getframe(1)) else _datetime64


def _caller() -> FrameType | None:
    """The first frame beyond this module and python's own library."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename == __file__ or _is_python(frame)):
        frame = frame.f_back
    return frame


def _name(frame: FrameType | None) -> str:
    """Module and file of the code of a frame, as a key: two scripts may both be the module ``__main__``."""
    return f"{frame.f_globals.get('__name__', '')} {frame.f_code.co_filename}" if frame else ""


def _is_python(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in sys.stdlib_module_names


def _is_users(frame: FrameType | None) -> bool:
    return frame is not None and is_users(frame.f_globals.get("__name__"))


def _note_caller(frame: FrameType | None) -> None:
    """Note the user's line that called a frame."""
    line = source.of_stack(frame)
    if line and line not in callers and len(callers) < _MOST_CALLERS:
        callers.append(line)
