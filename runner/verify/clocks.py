"""Another time of day for the user's code, which goes on faster: shows what a proof of a minute cannot see, an hour, a
date or minutes since the start in training.

For the runner and for installed libraries all clocks stay true: heartbeats, commits, certificates and signed requests
need them. Data workers have the clock that their attempt began with, however they are started.
"""

import ctypes
import datetime
import gc
import multiprocessing.spawn
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

import numpy as np

STEP_SECONDS = 211  # that a step seems to take
_SHOWN_NOW = {"localtime": 0, "gmtime": 0, "ctime": 0, "asctime": 0, "strftime": 1}  # position of the time to show
_PLACES = 3  # lines for a verdict
_FROM_START = ("monotonic", "perf_counter")  # clocks with an arbitrary start
_now, _now_ns = time.time, time.time_ns
_datetime64 = np.datetime64
asked: list[str] = []  # lines of the user's code that read a clock that is ahead
_offset = 0  # seconds
_step_offset = 0  # seconds more in the training thread, and of clocks with an arbitrary start
_training_thread = 0


def shift(seconds: int) -> None:
    """Let the clocks that people read be ahead by so many seconds for the user's modules from now on, in this process
    and in those that it starts by ``multiprocessing``.
    """
    global _offset
    _offset = seconds
    time.time, time.time_ns = _shifted_time, _shifted_time_ns
    for name, position in _SHOWN_NOW.items():
        setattr(time, name, _showing(getattr(time, name), position, as_struct=name in ("asctime", "strftime")))
    for name in _FROM_START:
        setattr(time, name, _from_start(getattr(time, name), 1))
        setattr(time, f"{name}_ns", _from_start(getattr(time, f"{name}_ns"), 10**9))
    # In the type itself, which refuses ``setattr``: another type would be no ``datetime`` to pickle and to libraries.
    # ``today`` and ``date.today`` ask ``time.time``.
    attributes = gc.get_referents(datetime.datetime.__dict__)[0]
    attributes |= {"now": classmethod(_datetime_now), "utcnow": classmethod(_datetime_utcnow)}
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(datetime.datetime))
    np.__class__ = _NumpyModule
    prepared = multiprocessing.spawn.get_preparation_data
    multiprocessing.spawn.get_preparation_data = lambda name: {**prepared(name), "clocks": _Shifted()}


def advance(seconds: int) -> None:
    """Let the same clocks, and those with an arbitrary start, be ahead by so much more in the calling thread, as if its
    last step had taken so long. Not in others, which may watch over it.
    """
    global _step_offset, _training_thread
    _training_thread = threading.get_ident()
    _step_offset += seconds


class _Shifted:
    """Shifts the clocks of a process that it is sent to."""

    def __reduce__(self) -> tuple[Callable[[int], None], tuple[int]]:
        return shift, (_offset,)


def _shifted_time() -> float:
    return _now() + _seconds()


def _shifted_time_ns() -> int:
    return _now_ns() + _seconds() * 10**9


def _showing(show: Callable[..., Any], position: int, *, as_struct: bool) -> Callable[..., Any]:
    """A function of ``time`` that shows the present time where none is passed at that position."""
    localtime = time.localtime

    def shown(*arguments: Any) -> Any:
        ahead = _seconds()
        if ahead and (len(arguments) <= position or arguments[position] is None):
            now = _now() + ahead
            arguments = (*arguments[:position], localtime(now) if as_struct else now)
        return show(*arguments)

    return shown


def _from_start(clock: Callable[[], Any], unit: int) -> Callable[[], Any]:
    """A clock with an arbitrary start. Python's own modules, which measure time-outs by it, read the true one."""

    def read() -> Any:
        frame = sys._getframe(1)
        if not _is_users(frame):
            return clock()
        _note(frame)
        return clock() + _of_thread() * unit

    return read


def _datetime_now(cls: Any, tz: Any = None) -> Any:
    return cls.fromtimestamp(_now() + _seconds(), tz)


def _datetime_utcnow(cls: Any) -> Any:
    return cls.fromtimestamp(_now() + _seconds(), datetime.timezone.utc).replace(tzinfo=None)


class _Datetime64Meta(type):
    """numpy's ``datetime64`` as the user's modules see it: only "now" and "today" are others."""

    def __call__(cls, *arguments: Any) -> Any:
        value = _datetime64(*arguments)
        if arguments[:1] in (("now",), ("today",)):
            value = _datetime64(int(_now() + _seconds()), "s").astype(value.dtype)
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


def _seconds() -> int:
    """By how much the clock is ahead for the code that asks."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename != __file__ and not _is_python(frame):
            if not _is_users(frame):
                return 0
            _note(frame)
            return _offset + _of_thread()
        frame = frame.f_back
    return 0


def _note(frame: FrameType) -> None:
    place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    if place not in asked and len(asked) < _PLACES:
        asked.append(place)


def _of_thread() -> int:
    return _step_offset if threading.get_ident() == _training_thread else 0


def _is_python(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in sys.stdlib_module_names


def _is_users(frame: FrameType) -> bool:
    libraries = "site-packages", "dist-packages"
    top = frame.f_globals.get("__name__", "").partition(".")[0]
    return not (top == "runner" or _is_python(frame) or any(each in frame.f_code.co_filename for each in libraries))
