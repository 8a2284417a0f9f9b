"""The look at a few samples before training, which must leave no trace in the data set that workers get: a file that is
opened at the first read would be shared by all forked ones, position and all, and cannot be sent to others.
"""

import multiprocessing
import pickle
import traceback
from contextlib import suppress
from copy import copy
from multiprocessing.connection import Connection

import torch

from runner import signals
from runner.data.fetch import Fetcher
from runner.data.loader import LoaderOptions
from runner.data.probe import Sketch, require_pure, sketch
from runner.data.workers import Workers, explained, start_worker
from runner.errors import DataError, RunnerError

Seen = tuple[Sketch, list[str] | None]

_POLL_SECONDS = 0.1
_EXIT_SECONDS = 2.0


def look(fetcher: Fetcher, loading: LoaderOptions, *, audit: bool, key: str = "data.train") -> Seen:
    """The sketch of the data, and with ``audit`` the digests of the probed samples. Raises DataError if they change."""
    if not loading.num_workers:
        return _seen(fetcher, audit)
    workers = Workers(loading.start_method)
    if workers.get_start_method() != "fork":
        return _seen(_as_sent(fetcher), audit)
    answer = None
    try:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        with ours, theirs:
            process = workers.Process(target=_answer, args=(fetcher, audit, theirs), daemon=True)
            process.start()
            theirs.close()
            with signals.reading():
                while not ours.poll(_POLL_SECONDS) and process.is_alive():
                    pass
                with suppress(EOFError):
                    answer = ours.recv() if ours.poll() else None
            process.join(_EXIT_SECONDS)
        answer = answer or DataError(f"{key}: {workers.death()}")
    except OSError as error:
        answer = DataError(f"{key}: {workers.unstarted(error)}")
    finally:
        workers.close()
    if isinstance(answer, RunnerError):
        raise answer
    seen: Seen = answer
    return seen


def _seen(fetcher: Fetcher, audit: bool) -> Seen:
    return sketch(fetcher), require_pure(fetcher) if audit else None


def _as_sent(fetcher: Fetcher) -> Fetcher:
    """With the data set as workers get it. Whether it can be sent is told when they start."""
    other = copy(fetcher)
    with suppress(Exception):
        other.samples = pickle.loads(pickle.dumps(fetcher.samples))
    return other


def _answer(fetcher: Fetcher, audit: bool, theirs: Connection) -> None:
    """The process that looks; it is like a data worker."""
    start_worker(0)
    torch.set_num_threads(1)  # the threads of more were lost in the fork
    answer: Seen | RunnerError
    try:
        answer = _seen(fetcher, audit)
    except RunnerError as error:
        answer = error
    except Exception as error:
        traceback.print_exc()
        answer = DataError(explained(error))
    theirs.send(answer)
