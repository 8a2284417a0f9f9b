"""What callbacks are told of their attempt; observers of the configuration, which change nothing; the ready ones."""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from lives import Lives
from results import results

USER = Path(__file__).parent / "user"
COMMON = ("experiment=smoke", "trainer.max_steps=12", "checkpoint.every_steps=4", "runtime.num_threads=1")
PROFILER = "+observers.profiler={_target_: runner.callbacks.observers.Profiler, first: 3, last: 6}"


WATCHER = """
import gc

from runner.callbacks.base import Observer

class Watcher(Observer):
    def on_start(self, loop):
        print("place", loop.directory)
        print("garbage", gc.isenabled())  # it is not looked for while modules are imported
"""


@pytest.fixture
def posts() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The URL of a server on the loopback interface, and what was posted to it."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook", bodies
    server.shutdown()
    server.server_close()


def webhook(url: str) -> str:
    return f"+observers.hook={{_target_: runner.callbacks.observers.Webhook, url: '{url}'}}"


def test_a_callback_knows_directory_attempt_and_step(life: Lives, tmp_path: Path) -> None:
    command = (*COMMON, "+callbacks.place._target_=mine.callbacks.Place", f"run.root={tmp_path}", "run.name=r")
    first, second = life(*command, cwd=USER, step=6), life(*command, cwd=USER)
    run = tmp_path / "smoke/r"
    assert f"place build 1 {run}\n" in first.output
    assert f"place start 1 0 {run}\n" in first.output
    assert f"place start 2 4 {run}\n" in second.output


def test_a_remote_root_has_a_folder_of_this_machine(life: Lives, tmp_path: Path) -> None:
    """The folder that holds Hydra's own files."""
    (tmp_path / "watching.py").write_text(WATCHER)
    command = (*COMMON, "+observers.place._target_=watching.Watcher", "run.root=memory://here/runs", "run.name=r")
    ended = life(*command, cwd=tmp_path)
    folder = tmp_path / "outputs/remote/memory/here/runs/smoke/r"
    assert f"place {folder}\ngarbage True\n" in ended.output, ended.output
    assert (folder / "runner.log").exists()


def test_a_profile_changes_no_bit(life: Lives, tmp_path: Path) -> None:
    """An observer may come and go between attempts; killed within the steps, the next attempt measures the rest."""
    command, run = (*COMMON, f"run.root={tmp_path}"), tmp_path / "smoke/with"
    assert life(*command, "run.name=without").status == 0
    assert life(*command, PROFILER, "run.name=with", step=5).status is None
    assert life(*command, PROFILER, "run.name=with").status == 0
    assert not results(run).differences(results(tmp_path / "smoke/without"))
    assert "observer" not in "".join(results(run).parts)
    (trace,) = (run / "profile").iterdir()
    assert trace.name == "steps-5-6-a2-rank0.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert "aten::addmm" in names
    assert life("-m", *command, "run.name=with").status == 0


def test_a_webhook_is_told_of_every_end_but_a_kill(
    life: Lives, posts: tuple[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    url, bodies = posts
    command = (*COMMON, webhook(url), f"run.root={tmp_path}", "run.name=r")
    assert life(*command, step=6).status is None
    assert not bodies
    assert life(*command, step=10, send=15).status == 75
    assert life(*command).status == 0
    assert life("experiment=smoke", webhook(url), "+model.x=1", f"run.root={tmp_path}", "run.name=bad").status == 2
    interrupted, finished, failed = bodies
    assert (interrupted["status"], interrupted["step"], interrupted["attempt"]) == ("interrupted", 10, 2)
    assert (finished["status"], finished["step"], finished["attempt"]) == ("finished", 12, 3)
    assert finished["result"] == {key: results(tmp_path / "smoke/r").result[key] for key in ("step", "reason")} | {
        key: json.loads((tmp_path / "smoke/r/result.json").read_text())[key]
        for key in ("metrics", "objective", "seconds")
    }
    assert re.match("smoke/bad failed: ConfigError: model", failed["text"])
    assert finished["url"] == str(tmp_path / "smoke/r")


def test_a_webhook_that_nobody_hears_is_a_warning(life: Lives, tmp_path: Path) -> None:
    ended = life(*COMMON, webhook("http://127.0.0.1:9/secret"), f"run.root={tmp_path}")
    assert (ended.status, "webhook  not sent: URLError: " in ended.output) == (0, True), ended.output


def test_a_callback_is_no_observer(life: Lives, tmp_path: Path) -> None:
    ended = life(*COMMON, "+observers.x._target_=mine.callbacks.Place", f"run.root={tmp_path}", cwd=USER)
    assert (ended.status, "observers.x is a mine.callbacks.Place; expected" in ended.output) == (2, True), ended.output
