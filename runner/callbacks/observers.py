"""Ready observers: traces of torch's profiler, and messages to a webhook. Neither changes what is computed."""

import json
import logging
import socket
from collections.abc import Mapping
from typing import Any
from urllib.request import Request, urlopen

from runner.callbacks.base import Loop, Observer, TrainingSetup
from runner.distributed.world import world
from runner.errors import Interrupted, printable, redacted
from runner.run.directory import RunDirectory

log = logging.getLogger("runner")


class Profiler(Observer):
    """Writes what torch.profiler measures in steps ``first`` to ``last`` to ``profile/`` of the run directory, for
    chrome://tracing or Perfetto. An attempt that begins within them measures the rest. ``options``: those of
    ``torch.profiler.profile``, such as ``with_stack``.
    """

    def __init__(self, first: int, last: int, **options: Any) -> None:
        self._first, self._last = first, last
        self._options = options
        self._profile: Any = None

    def on_step_start(self, loop: Loop) -> None:
        if self._profile is None and self._first <= loop.step + 1 <= self._last:
            from torch import profiler

            self._profile = profiler.profile(**self._options)
            self._profile.start()
            self._first = loop.step + 1

    def on_step(self, loop: Loop) -> None:
        if loop.step >= self._last or loop.stop is not None:
            self.on_end(loop)

    def on_end(self, loop: Loop) -> None:
        if self._profile is None:
            return
        profile, self._profile, self._last = self._profile, None, 0
        profile.stop()
        name = f"steps-{self._first}-{loop.step}-a{loop.attempt}-rank{world().rank}.json.gz"
        try:
            (loop.directory / "profile").mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(loop.directory / "profile" / name))
        except (OSError, RuntimeError) as error:
            log.warning("profile  not written: %s", printable(error))
            return
        log.info("profile  %s", loop.directory / "profile" / name)

    def on_error(self, error: Exception) -> None:
        if self._profile is not None:
            self._profile.stop()


class Webhook(Observer):
    """Posts JSON to a URL when an attempt ends: finished, failed or interrupted; a killed process cannot. The ``text``
    is what Slack, Mattermost and others show. A URL that cannot be reached within ``timeout`` seconds is a warning.
    """

    def __init__(self, url: str, timeout: float = 10.0) -> None:
        self._url, self._timeout = url, timeout
        self._facts: dict[str, Any] = {"host": socket.gethostname(), "attempt": None, "step": None}

    def on_command(self, directory: RunDirectory) -> None:
        self._facts |= {"run": directory.name, "url": directory.location.url}

    def on_build(self, setup: TrainingSetup) -> None:
        self._facts["attempt"] = setup.attempt

    def on_start(self, loop: Loop) -> None:
        self._facts["step"] = loop.step

    on_step = on_start

    def on_finish(self, directory: RunDirectory, result: Mapping[str, Any]) -> None:
        keys = ("step", "reason", "metrics", "objective", "seconds")
        self._post("finished", f"step {result['step']}", result={key: result[key] for key in keys})

    def on_error(self, error: Exception) -> None:
        status = "interrupted" if isinstance(error, Interrupted) else "failed"
        text = redacted(f"{type(error).__name__}: {error}")
        self._post(status, text.partition("\n")[0], error=text)

    def _post(self, status: str, text: str, **facts: Any) -> None:
        if world().rank:
            return
        body = {**self._facts, "status": status, "text": f"{self._facts.get('run')} {status}: {text}", **facts}
        request = Request(self._url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            urlopen(request, timeout=self._timeout).close()
        except Exception as error:  # whatever a server or a proxy does: the run has ended as it did
            log.warning("webhook  not sent: %s", printable(redacted(f"{type(error).__name__}: {error}")))
