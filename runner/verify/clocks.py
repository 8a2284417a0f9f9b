"""Another time of day for the user's code: shows what a proof of a minute cannot see, an hour or a date in training.

Clocks that count from an arbitrary start (``time.monotonic``) stay. So do all clocks for the runner and for installed
libraries: heartbeats, commits, certificates and signed requests need the true time. Not reached: data workers that are
spawned, and C code such as ``numpy.datetime64("now")``.
"""

import ctypes
import datetime
import gc
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

_SHOWN_NOW = {"localtime": 0, "gmtime": 0, "ctime": 0, "asctime": 0, "strftime": 1}  # position of the time to show
_now, _now_ns = time.time, time.time_ns
_offset = 0


def shift(seconds: int) -> None:
    """Let the clocks that people read be ahead by so many seconds for the user's modules from now on."""
    global _offset
    _offset = seconds
    time.time, time.time_ns = _shifted_time, _shifted_time_ns
    for name, position in _SHOWN_NOW.items():
        setattr(time, name, _showing(getattr(time, name), position, as_struct=name in ("asctime", "strftime")))
    # In the type itself, which refuses ``setattr``: another type would be no ``datetime`` to pickle and to libraries.
    # ``today`` and ``date.today`` ask ``time.time``.
    attributes = gc.get_referents(datetime.datetime.__dict__)[0]
    attributes |= {"now": classmethod(_datetime_now), "utcnow": classmethod(_datetime_utcnow)}
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(datetime.datetime))


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


def _datetime_now(cls: Any, tz: Any = None) -> Any:
    return cls.fromtimestamp(_now() + _seconds(), tz)


def _datetime_utcnow(cls: Any) -> Any:
    return cls.fromtimestamp(_now() + _seconds(), datetime.timezone.utc).replace(tzinfo=None)


def _seconds() -> int:
    """By how much the clock is ahead for the code that asks."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        top = frame.f_globals.get("__name__", "").partition(".")[0]
        if frame.f_code.co_filename != __file__ and top not in sys.stdlib_module_names:
            libraries = ("site-packages", "dist-packages")
            return 0 if top == "runner" or any(each in frame.f_code.co_filename for each in libraries) else _offset
        frame = frame.f_back
    return 0
