"""Services outside: what is committed reaches them once, over any number of attempts and outages, and nothing waits."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from lives import Lives
from marks import slow
from results import losses, results
from servers import free_ports
from waiting import until

from runner.metrics.service import Point
from runner.metrics.trackers import MLflowWriter
from runner.metrics.writer import WriterContext
from runner.runs.__main__ import main
from runner.storage import open_location

USER = Path(__file__).parent / "user"
PAGE = Path(__file__).parent.parent / "docs/howto/logging.md"
COMMON = ("experiment=smoke", "trainer.max_steps=24", "metrics.every_steps=2", "checkpoint.every_steps=5")
NOWHERE = "http://127.0.0.1:9"


class Service:
    """A service on the loopback interface that keeps the points posted to it, or is out of order."""

    def __init__(self) -> None:
        self.points: list[dict[str, Any]] = []
        self.paths: set[str] = set()
        self.broken = False
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if not service.broken:
                    service.paths.add(self.path)
                    service.points += json.loads(body)
                self.send_response(500 if service.broken else 200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def losses(self) -> list[tuple[int, float]]:
        return [(point["step"], point["train/loss"]) for point in self.points if "train/loss" in point]


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A folder with the writer of the documentation."""
    block = re.search(r"```python\n(# poster.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    assert block
    assert len([line for line in block[1].splitlines() if line and line[0] != "#"]) <= 20
    (tmp_path / "poster.py").write_text(block[1])
    return tmp_path


def writer(url: str) -> str:
    return f"+metrics.writers.post={{_target_: poster.PostWriter, url: '{url}'}}"


def record(folder: Path, name: str = "post") -> dict[str, Any]:
    return json.loads((folder / f"writers/{name}.json").read_text())


def test_kills_and_resumes_are_one_run_with_each_point_once(life: Lives, service: Service, user: Path) -> None:
    """Never a point of a step that is not committed: the last checkpoint before a kill bounds what is there."""
    command, run = (*COMMON, writer(service.url), f"run.root={user}", "run.name=cut"), user / "smoke/cut"
    for step, committed in ((3, 0), (13, 10), (19, 15)):
        assert life(*command, cwd=user, step=step).status is None
        assert max([step for step, _ in service.losses], default=0) <= committed
    ended = life(*command, cwd=user)
    assert ended.status == 0, ended.output
    assert service.losses == losses(run)
    assert [step for step, _ in service.losses] == [*range(2, 25, 2)]
    assert record(run)["sent"] == 24
    assert service.paths == {f"/{record(run)['id']}"} == {f"/{json.loads((run / 'run.json').read_text())['id']}"}


def test_an_unreachable_service_changes_no_bit(life: Lives, user: Path) -> None:
    """Its client may draw random numbers, which are a part of the state; it is in another process."""
    command = (*COMMON, f"run.root={user}")
    assert life(*command, "run.name=without", cwd=user).status == 0
    ended = life(*command, writer(NOWHERE), "run.name=with", cwd=user)
    assert ended.status == 0, ended.output
    assert not results(user / "smoke/with").differences(results(user / "smoke/without"))
    assert "metrics.writers.post: URLError: " in ended.output
    assert (
        "not all points are sent yet: the next attempt sends them, or\n"
        f"  python -m runner.runs push {user}/smoke/with post\n" in ended.output
    )


def test_what_a_service_missed_is_sent_when_it_is_back(life: Lives, service: Service, user: Path) -> None:
    command, run = (*COMMON, writer(service.url), f"run.root={user}", "run.name=r"), user / "smoke/r"
    service.broken = True
    assert life(*command, cwd=user, step=13).status is None
    assert not service.points
    service.broken = False
    assert life(*command, cwd=user).status == 0
    assert service.losses == losses(run)


def test_a_finished_run_is_pushed_after_the_fact(
    life: Lives, service: Service, user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(user))
    run = user / "smoke/r"
    assert life(*COMMON, f"run.root={user}", "run.name=r", cwd=user).status == 0
    command = ["push", str(run), "post", "_target_=poster.PostWriter"]
    assert main([*command, f"url={NOWHERE}"]) == 1
    assert "The same command sends what is missing" in capsys.readouterr().err
    assert main([*command, f"url={service.url}"]) == 0
    assert service.losses == losses(run)
    assert main([*command, f"url={service.url}", "--json"]) == 0
    assert '"sent": 0' in capsys.readouterr().out
    assert main(["push", str(run), "mine"]) == 2
    assert "give _target_=... for mine; known by name alone: mlflow, " in capsys.readouterr().err
    assert main(["push", str(run), "post", "_target_=poster.urlopen"]) == 2


def test_a_service_writer_that_cannot_be_made_is_refused(life: Lives, user: Path) -> None:
    command = (*COMMON, f"run.root={user}", "run.name=r")
    ended = life(*command, "+metrics.writers.post={_target_: poster.PostWriter, uri: x}", cwd=user)
    assert (ended.status, "metrics.writers.post: poster:PostWriter: TypeError" in ended.output) == (2, True), (
        ended.output
    )
    ended = life(*command, writer(NOWHERE), "metrics.writers.lines=null", cwd=user)
    assert (ended.status, "metrics.writers.lines, which is null" in ended.output) == (2, True), ended.output


def test_mlflow_has_one_run_over_three_attempts(
    life: Lives, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the real package and its store in sqlite. What was sent and not noted is sent again, and is there once."""
    pytest.importorskip("mlflow")
    database, run = tmp_path / "mlflow.db", tmp_path / "smoke/r"
    uri = f"sqlite:///{database}"
    command = (*COMMON, "metrics=mlflow", f"metrics.writers.mlflow.tracking_uri={uri}", f"run.root={tmp_path}")
    for step in (7, 13):
        assert life(*command, "run.name=r", step=step).status is None
        until(lambda: (run / "writers/mlflow.json").exists() and record(run, "mlflow")["sent"] >= 4)
    (run / "writers/mlflow.json").write_text("{}")  # as if it had never been noted
    ended = life(*command, "run.name=r")
    assert ended.status == 0, ended.output
    assert main(["push", str(run), "mlflow", f"tracking_uri={uri}"]) == 0  # what took more than a few seconds
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, value from metrics where key = 'train/loss' order by step").fetchall()
        runs = connection.execute("select name, status from runs").fetchall()
        params = dict(connection.execute("select key, value from params").fetchall())
    connection.close()
    assert rows == losses(run)
    assert Counter(runs) == {("smoke/r", "FINISHED"): 1}
    assert params["optimizer.lr"] == "0.001"


def test_mlflow_takes_any_name_of_a_metric(tmp_path: Path) -> None:
    """It refuses acc@1, and with it every point of the call, forever."""
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    parameters = {"optimizer": {"groups": {"blocks.*": {"lr": 0.1}}}}
    context = WriterContext(open_location(str(tmp_path)), "smoke", "smoke/r", parameters, 1, 0, id="7")
    writer = MLflowWriter(context, uri)
    run = writer.open(None)
    values = {"val/acc@1": 0.5, "val/f1[macro]": 0.25, "/a//b": 1.0, "..": 2.0, "x" * 300: 3.0}
    writer.send([Point(1, 0.0, values)])
    data = mlflow.MlflowClient(uri).get_run(run).data
    assert data.metrics == {"val/acc_1": 0.5, "val/f1_macro_": 0.25, "a/b": 1.0, "_": 2.0, "x" * 250: 3.0}
    assert data.params == {"optimizer.groups.blocks._.lr": "0.1"}


@pytest.mark.slow
def test_a_server_of_mlflow_has_each_point_once(life: Lives, tmp_path: Path) -> None:
    """With the whole package, which is not in the development environment: its server on the loopback interface."""
    pytest.importorskip("flask")
    database, port = tmp_path / "mlflow.db", free_ports(1)
    uri = f"http://127.0.0.1:{port}"
    options = ("--backend-store-uri", f"sqlite:///{database}", "--port", str(port), "--workers", "1")
    command = (*COMMON, "metrics=mlflow", f"metrics.writers.mlflow.tracking_uri={uri}", f"run.root={tmp_path}")
    server = [sys.executable, "-m", "mlflow", "server", *options]
    with subprocess.Popen(
        server, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            until(lambda: answers(f"{uri}/health"))
            assert life(*command, "run.name=r", step=13).status is None
            assert life(*command, "run.name=r").status == 0
            assert main(["push", str(tmp_path / "smoke/r"), "mlflow", f"tracking_uri={uri}"]) == 0
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, value from metrics where key = 'train/loss' order by step").fetchall()
        runs = connection.execute("select name, status from runs").fetchall()
    connection.close()
    assert rows == losses(tmp_path / "smoke/r")
    assert runs == [("smoke/r", "FINISHED")]


def answers(url: str) -> bool:
    with suppress(OSError), urlopen(url, timeout=5):
        return True
    return False


@pytest.mark.parametrize("name", [slow("wandb"), slow("trackio")])
def test_other_trackers_have_each_point_once(name: str, life: Lives, tmp_path: Path) -> None:
    """With the real packages, which are not among those of the development environment: on this machine, offline."""
    pytest.importorskip(name)
    environment = {"TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    options = ("metrics.writers.wandb.mode=offline",) if name == "wandb" else ()
    command = (*COMMON, f"metrics={name}", *options, f"run.root={tmp_path}", "run.name=r")
    assert life(*command, cwd=tmp_path, environment=environment, step=13).status is None
    ended = life(*command, cwd=tmp_path, environment=environment)
    assert ended.status == 0, ended.output
    stored = stored_in_trackio(tmp_path / "trackio") if name == "trackio" else stored_offline(tmp_path / "wandb")
    assert sorted(stored) == losses(tmp_path / "smoke/r")


def stored_in_trackio(folder: Path) -> list[tuple[int, float]]:
    (database,) = folder.glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics").fetchall()
    connection.close()
    assert len({name for name, _, _ in rows}) == 1
    return [(step, json.loads(text)["train/loss"]) for _, step, text in rows if "train/loss" in json.loads(text)]


def stored_offline(folder: Path) -> list[tuple[int, float]]:
    """What `wandb sync` would send, of all folders that the attempts left behind."""
    from wandb.proto import wandb_internal_pb2

    datastore = pytest.importorskip("wandb.sdk.internal.datastore", reason="W&B reads its files elsewhere since 0.31")
    points, ids = [], set()
    for path in sorted(folder.glob("offline-run-*/run-*.wandb")):
        ids.add(path.stem)
        store = datastore.DataStore()
        store.open_for_scan(str(path))
        while data := store.scan_data():
            message = wandb_internal_pb2.Record()
            message.ParseFromString(data)
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in message.history.item}
            if "train/loss" in items:
                points.append((int(items["_step"]), json.loads(items["train/loss"])))
    assert len(ids) == 1
    return points
