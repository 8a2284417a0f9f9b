"""``python -m runner.runs list|compare``: all runs under a root, on a disk and on S3, also broken and hostile ones."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lives import Lives
from servers import Server

from runner.metrics import lines
from runner.runs.__main__ import main
from runner.runs.compare import compare_runs
from runner.storage import LocalLocation

COMMAND = ("experiment=smoke", "trainer.max_steps=20", "trainer.evaluate_every_steps=5", "runtime.num_threads=1")
HOSTILE = "<script>\x1b[31m"


@pytest.fixture(scope="module")
def root(life: Lives, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three finished runs with other learning rates, one that was killed, one that is worse by the other goal."""
    root = tmp_path_factory.mktemp("root")
    for rate in (0.001, 0.03, 3.0):
        assert life(*COMMAND, f"run.root={root}", f"optimizer.lr={rate}", f"run.name=lr{rate}").status == 0
    killed = (f"run.root={root}", "optimizer.lr=0.01", "run.name=killed", "checkpoint.every_steps=5")
    assert life(*COMMAND, *killed, step=17).status is None
    return root


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """The same, to be broken."""
    shutil.copytree(root, tmp_path / "root")
    return tmp_path / "root"


def rows(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """The names of the runs that ``list`` prints, in its order."""
    assert main(["list", "--json", *map(str, arguments)]) == 0
    return [row["run"].removeprefix("smoke/") for row in json.loads(capsys.readouterr().out)]


def test_runs_are_chosen_and_ordered(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rows(capsys, root) == ["killed", "lr0.001", "lr0.03", "lr3.0"]
    assert rows(capsys, root, "--status", "killed", "failed") == ["killed"]
    assert rows(capsys, root, "--match", "lr0", "--reverse") == ["lr0.03", "lr0.001"]
    assert rows(capsys, root, "--experiment", "smoke", "--status", "complete") == ["lr0.001", "lr0.03", "lr3.0"]
    assert rows(capsys, root, "--experiment", "digits") == []
    assert rows(capsys, root, "--sort", "age") == ["killed", "lr3.0", "lr0.03", "lr0.001"]
    assert rows(capsys, root, "--sort", "status")[0] == "killed"
    assert rows(capsys, root, "--sort", "step")[0] == "killed"
    rising = rows(capsys, root, "--sort", "objective")
    assert rising[-1] == "killed", "what has no value is last"
    assert rows(capsys, root, "--sort", "objective", "--reverse") == [*rising[2::-1], "killed"]


def test_names_are_shown_whole(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs of a sweep over many keys differ in the end of a long name, and other commands need it."""
    name = f"{','.join(f'model.key{number}=1' for number in range(9))},seed=1"
    (copy / "smoke/killed").rename(copy / "smoke" / name)
    for command in ("list", "compare"):
        assert main([command, str(copy)]) == 0
        assert f"smoke/{name} " in capsys.readouterr().out


def test_a_listing_reads_each_object_once_and_imports_no_torch(root: Path) -> None:
    program = (
        "import sys; opened = []\n"
        "sys.addaudithook(lambda event, what: opened.append(str(what[0])) if event == 'open' else None)\n"
        "from runner.runs.__main__ import main; main(['list', sys.argv[1], '--match', 'lr0.03'])\n"
        "print(*(path for path in opened if path.startswith(sys.argv[1] + '/smoke/lr0.03')))\n"
        "print(*{'torch', 'numpy', 'hydra', 'matplotlib'} & {*sys.modules})"
    )
    ended = subprocess.run([sys.executable, "-c", program, root], capture_output=True, text=True, check=True)
    *_, opened, imported = ended.stdout.split("\n")[:-1]
    names = sorted(re.sub(r"[0-9]+-[0-9a-f]{12}", "attempt", Path(path).name) for path in opened.split())
    assert names == ["attempt.beat", "attempt.end.json", "attempt.json", "config.yaml", "result.json", "run.json"]
    assert imported == ""


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("run.json", "{", "run.json is not JSON"),
        ("run.json", '{"format": 2}', "it has format 2, this version reads 1"),
        ("config.yaml", "a: [", "config.yaml cannot be read: while parsing"),
        ("config.yaml", "a: &a [1]\nb: *a", "an alias, which no stored configuration has"),
        ("config.yaml", "[" * 100_000, "more than 100 levels, which no stored configuration has"),
        ("config.yaml", "trainer: [1]", "config.yaml is not a configuration: trainer is not a mapping"),
        ("config.yaml", "seed: 2001-01-01", "timestamp, which no stored configuration has"),
        ("result.json", "[]", "result.json is not a JSON object"),
    ],
)
def test_a_broken_run_is_a_row_among_the_others(
    name: str, content: str, reason: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "smoke/lr0.03" / name).write_text(content)
    assert main(["list", str(copy), "--json"]) == 0
    found = {row["run"]: row for row in json.loads(capsys.readouterr().out)}
    status = found.pop("smoke/lr0.03")["status"]
    assert status.startswith("unreadable: ")
    assert reason in status
    assert str(copy) not in status
    assert {row["status"] for row in found.values()} == {"complete", "killed"}
    for command in ("list", "compare"):
        assert main([command, str(copy)]) == 0
        assert re.search(r"smoke/lr0.03 .*unreadable: ", capsys.readouterr().out)


def test_compare_shows_swept_values_best_first(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["metric"], found["mode"], found["swept"]) == ("val/accuracy", "max", ["optimizer.lr"])
    assert {run["run"]: run["parameters"]["optimizer.lr"] for run in found["runs"]} == {
        "smoke/lr0.001": 0.001,
        "smoke/lr0.03": 0.03,
        "smoke/lr3.0": 3.0,
        "smoke/killed": 0.01,
    }
    values = [run["objective"] for run in found["runs"]]
    assert values == sorted(values, reverse=True)
    assert None not in values, "of the killed one it is the best until its last checkpoint"
    assert main(["compare", str(root)]) == 0
    header, _, best, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "objective", "status", "step", "optimizer.lr"]
    assert best.split()[0] == found["runs"][0]["run"]


def test_comparing_respects_the_mode(copy: Path) -> None:
    by_accuracy = compare_runs(str(copy), bool)
    for config in copy.glob("smoke/*/config.yaml"):
        config.write_text(config.read_text().replace("val/accuracy\n  mode: max", "val/loss\n  mode: min"))
    by_loss = compare_runs(str(copy), bool)  # without results of that identity: by the curves
    values = [run["objective"] for run in by_loss["runs"]]
    assert len(values) == 4
    assert values == sorted(values)
    for run in by_loss["runs"]:
        curve = lines.curve(LocalLocation(copy / run["run"]), "val/loss")
        assert run["objective"] == min(value for _, value in curve if value is not None)
        assert [step for step, _ in curve] == [5, 10, 15, 20][: len(curve)]
    assert (by_accuracy["metric"], by_accuracy["mode"]) == ("val/accuracy", "max")


def test_a_parameter_that_only_repeats_another_is_no_column(copy: Path) -> None:
    for place, config in enumerate(sorted(copy.glob("smoke/*/config.yaml"))):
        config.write_text(config.read_text() + f"model: {{width: {place}}}\ntask: {{width: {place}}}\n")
    assert compare_runs(str(copy), bool)["swept"] == ["model.width", "optimizer.lr"]


def test_runs_of_another_goal_come_last(copy: Path) -> None:
    config = copy / "smoke/lr0.03/config.yaml"
    config.write_text(config.read_text().replace("val/accuracy\n  mode: max", "val/loss\n  mode: min"))
    found = compare_runs(str(copy), bool)
    assert found["runs"][-1]["run"] == "smoke/lr0.03"
    assert (found["metric"], len(found["runs"])) == ("val/accuracy", 4)


def test_a_root_without_a_selected_run_is_reported(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(root), "--match", "nowhere"]) == 2
    assert "--match" in capsys.readouterr().err


def test_texts_of_strangers_are_compared_escaped(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = copy / "smoke/lr0.03/config.yaml"
    config.write_text(config.read_text() + f"model: {{{json.dumps(HOSTILE)}: {json.dumps(HOSTILE)}}}\n")
    (copy / "smoke/killed/run.json").write_text(json.dumps({"format": HOSTILE}))
    assert main(["compare", str(copy)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert f"model.{HOSTILE}".replace("\x1b", "\\x1b") in shown


def test_runs_on_s3_are_listed_and_compared(
    s3: Server, life: Lives, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    root = f"{s3.url}/compared"
    for rate in (0.001, 0.03):
        command = (*COMMAND, f"run.root={root}", f"optimizer.lr={rate}", f"run.name=lr{rate}")
        assert life(*command, environment=s3.environment).status == 0
    import s3fs

    store = s3fs.S3FileSystem(**s3.options, skip_instance_cache=True)
    store.pipe_file("bucket/compared/smoke/broken/run.json", b"{")
    assert rows(capsys, root, "--sort", "status") == ["lr0.001", "lr0.03", "broken"]
    assert main(["compare", root]) == 0
    assert re.search(r"smoke/lr0.03 +[0-9.]+ +complete +20 +0.03\n", capsys.readouterr().out)


def test_runs_below_runs_are_listed(root: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of the experiment vision/base, whose runs are below the run base of the experiment vision."""
    shutil.copytree(root / "smoke/lr0.03", copy / "smoke/killed/base")
    shutil.copytree(root / "smoke/lr0.03", copy / "smoke/killed/attempts/base")
    shutil.copytree(root / "smoke/lr0.03", copy / "smoke/deep/attempts/base")
    assert rows(capsys, copy) == ["deep/attempts/base", "killed", "killed/base", "lr0.001", "lr0.03", "lr3.0"]
