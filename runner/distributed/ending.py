"""How a watchdog ends this process, whose training thread cannot end it any more."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

GRACE_SECONDS = 10.0


def end(message: str, status: int, last_words: Callable[[str], None], *, who: str = "this process") -> NoReturn:
    """Have the last words said, print the message, and end the process and its children at once."""
    words = threading.Thread(target=_say, args=[last_words, message], daemon=True)
    words.start()
    words.join(GRACE_SECONDS)  # what hangs may be the storage
    print(f"{who} ends: {message}", file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():  # data workers, which might notice late or never
        child.kill()
    os._exit(status)


def _say(last_words: Callable[[str], None], message: str) -> None:
    with suppress(Exception):
        last_words(message)
