"""Real run directories of which one file or value is another: no command waits, fails with a traceback, fills the
memory or the screen, or leaves the root, and the other runs are shown as ever.
"""

import json
import os
import random
import re
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from lives import Lives
from marks import quick_first, slow
from test_hostile import mutate

ESCAPE = "\x1b]0;title\x07\x9b31m\u202e"
COMMAND = ("experiment=smoke", "trainer.max_steps=20", "trainer.evaluate_every_steps=10", "checkpoint.every_steps=5")

# One file of each kind in a run directory, and its folders.
FILES = ("run.json", "config.yaml", "result.json", "attempts/*.lock", "attempts/*.beat", "attempts/*.end.json")
FILES += (
    "attempts/*.code.json",
    "attempts/*-????????????.json",
    "commits/*",
    "data/*",
    "ledger/plan*",
    "ledger/s*",
    "metrics/*",
)
FILES += ("tensorboard/*", "model.safetensors", "runner.log", ".hydra", ".hydra/config.yaml")
READ = ("run.json", "config.yaml", "ledger/s*")  # by every kind, the others by some
SOME = ("link", "fifo", "device", "folder", "sparse", "noise")
FOLDERS = ("attempts", "commits", "data", "ledger", "metrics", "tensorboard")


def device(path: Path) -> None:
    """A device that never ends, where a test may make one; else a FIFO."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        os.mkfifo(path)


def listening(path: Path) -> None:
    """A socket; its name may be longer than the system can bind."""
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        os.chdir(path.parent)
        server.bind(path.name)
        os.chdir(before)


def sparse(path: Path) -> None:
    """2 GiB of zeros, which take no room."""
    with path.open("wb") as file:
        file.truncate(2 << 30)


KINDS: dict[str, Callable[[Path], Any]] = {
    "link": lambda path: path.symlink_to("../../../../secret"),
    "loose link": lambda path: path.symlink_to("/nowhere/at/all"),
    "loop": lambda path: path.symlink_to(path.name),
    "zeros": lambda path: path.symlink_to("/dev/zero"),
    "fifo": os.mkfifo,
    "socket": listening,
    "device": device,
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "sparse": sparse,
    "deep": lambda path: path.write_bytes(b"[" * 100_000 + b"]" * 100_000),
    "noise": lambda path: path.write_bytes(random.Random(0).randbytes(3000)),
    "escapes": lambda path: path.write_text(ESCAPE),
}

YAMLS = {
    "base 60": "seed: " + "1:" * 300_000 + "1",
    "base 60, a float": "seed: " + "1:" * 300_000 + "1.5",
    "hexadecimal": "seed: 0x" + "f" * 100_000,
    "10**400": "optimizer: {lr: 1" + "0" * 400 + "}",
    "4300 digits": "optimizer: {lr: " + "9" * 4301 + "}",
    "binary": "seed: !!binary AAAA",
    "a set": "data: !!set {a, b}",
    "pairs": "data: !!omap [a: 1]",
    "a date": "seed: 2001-01-01",
    "a time": "model: {_target_: 2001-01-01 00:00:00}",
    "a section that is a number": "trainer: 5",
    "an objective that is a list": "objective: [1]",
    "90 levels": "model: " + "{a: " * 90 + "1" + "}" * 90,
    "escapes": json.dumps({"seed": ESCAPE, ESCAPE: {ESCAPE: [ESCAPE]}}),
    "odd keys": "{1: 2, null: 3, true: 4, 1.5: 5, .nan: 6, ? [a] : 7}",
    "numbers": "{optimizer: {lr: .inf, a: .nan, b: -1.0e+308, c: 5.0e-324}, seed: 1.0e+308}",
    "bombs": "a: &a [1, 1]\nb: &b [*a, *a]",
    "merged": "<<: {a: 1}",
}


def jsons(folder: Path, pattern: str, chance: random.Random) -> dict[str, str]:
    """Other values in a JSON file."""
    text = min(folder.glob(pattern)).read_text()
    found = [json.dumps(mutate(json.loads(text), chance)) for _ in range(6)]
    long = re.sub(r"(?<=: )[0-9.]+(?=[,\s}])", "9" * 5000, text)
    high = re.sub(r"(?<=: )[0-9.]+(?=[,\s}])", "1" + "0" * 400, text)
    words = re.sub(r'(?<=: )"[^"]*"', lambda _: json.dumps(ESCAPE), text)
    deep = re.sub(r'(?<=: )("[^"]*"|[0-9.]+)', "[" * 900 + "]" * 900, text)
    numbers = re.sub(r'(?<=: )("[^"]*"|[0-9.]+)', "1e308", text)
    found += [long, high, words, deep, numbers, re.sub(r'(?<=: )"[^"]*"', "1e999", text)]
    return {f"json {number}": content for number, content in enumerate(found)}


LEDGERS = {
    "a billion samples": b"1 0 999999999 0123456789abcdef\n",
    "many of a million": b"".join(b"%d 0 3999999 0123456789abcdef\n" % step for step in range(1, 5_000)),
    "far away": b"1 999999999999999990 999999999999999999 0123456789abcdef\n",
    "beyond 64 bits": b"1 9999999999999999990 9999999999999999999 0123456789abcdef\n",
    "long numbers": b"1 0 " + b"9" * 5000 + b" 0123456789abcdef\n",
    "backwards": b"9 0 63 0123456789abcdef\n1 64 127 0123456789abcdef\n",
    "escapes": ESCAPE.encode() + b"\n",
}
METRICS = {
    "1e308": b"".join(b'{"step": %d, "val/accuracy": %se308}\n' % (n, b"-1" if n % 2 else b"1") for n in range(9)),
    "tiny": b'{"step": 1, "val/accuracy": 5e-324}\n{"step": 2, "val/accuracy": 1e-320}\n',
    "other types": b'{"step": "1", "val/accuracy": [1]}\n[1]\n"val/accuracy"\n',
    "long": b'{"step": 1, "val/accuracy": 1' + b"0" * 400 + b"}\n",
    "no step": b'{"val/accuracy": 1}\n',
}


class Mutants:
    """Copies of a run under one root, each with one change."""

    def __init__(self, ordinary: Path, root: Path) -> None:
        self.ordinary, self.root = ordinary, root
        self.names: dict[str, str] = {}

    def copy(self, name: str) -> Path:
        """Data files are shared, because no command writes in them."""
        number = f"r{len(self.names):03d}"
        self.names[number] = name
        folder = self.root / "smoke" / number
        shutil.copytree(self.ordinary, folder, symlinks=True)
        return folder

    def replace(self, pattern: str, kind: str) -> None:
        folder = self.copy(f"{pattern}: {kind}")
        path = min(folder.glob(pattern))
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        KINDS[kind](path)

    def write(self, pattern: str, kinds: Mapping[str, str | bytes]) -> None:
        for kind, content in kinds.items():
            path = min(self.copy(f"{pattern}: {kind}").glob(pattern))
            path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))


def all_of(ordinary: Path, root: Path, *, unfinished: Path) -> Mutants:
    """Every file by every kind, and values."""
    chance, mutants = random.Random(14), Mutants(unfinished, root)
    mutants.write("metrics/*", METRICS)
    mutants.write("config.yaml", YAMLS)
    for pattern in ("run.json", "attempts/*.beat", "attempts/*-????????????.json"):
        mutants.write(pattern, jsons(unfinished, pattern, chance))
    mutants.ordinary = ordinary
    for pattern in ("result.json", "attempts/*.end.json"):
        mutants.write(pattern, jsons(ordinary, pattern, chance))
    header = min(ordinary.glob("ledger/s*")).read_bytes().partition(b"\n")[0] + b"\n"
    wide = re.sub(rb'"grouping": [0-9]+', b'"grouping": 999999999', header)
    mutants.write("ledger/s*", {kind: wide + content for kind, content in LEDGERS.items()})
    for pattern in (*FILES, *FOLDERS):
        for kind in KINDS if pattern in READ else SOME:
            mutants.replace(pattern, kind)
    claim = min(mutants.copy("thousands of claims of one number").glob("attempts/*.lock"))
    for number in range(3_000):  # three times as many as are read; each is a name and no more
        os.link(claim, claim.with_name(f"{7:06d}-{number:012x}.json"))
    return mutants


@pytest.fixture(scope="module")
def runs(life: Lives, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a finished run and an unfinished one."""
    root = tmp_path_factory.mktemp("strangers")
    for name, step in (("done", None), ("cut", 12)):
        life(*COMMAND, f"run.root={root}/runs", f"run.name={name}", step=step)
    return root / "runs"


@pytest.fixture(scope="module")
def looked(runs: Path) -> list[tuple[str, dict[str, Any]]]:
    """All commands on all mutants: what each was about, and how it ended."""
    assert (runs / "smoke/done/result.json").exists()
    assert not (runs / "smoke/cut/result.json").exists()
    root, secret = runs.with_name("mutants"), runs.with_name("secret")
    secret.write_text("secret")
    shutil.copytree(runs / "smoke/done", root / "smoke/good")
    mutants = all_of(runs / "smoke/done", root, unfinished=runs / "smoke/cut")
    nest(root / "deep", 1200)
    good, names = str(root / "smoke/good"), mutants.names
    request = {"root": str(root), "ordinary": str(runs), "good": good}
    told = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("onlookers.py"))],
        input=json.dumps({**request, "runs": [str(root / "smoke" / name) for name in names]}),
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"},
    )
    subprocess.run(["rm", "-r", str(root / "deep")], check=True)  # neither shutil nor pytest can remove it
    assert told.returncode == 0, told.stderr
    assert secret.read_text() == "secret"
    return [(names.get(Path(one["command"][1]).name, "the root"), one) for one in json.loads(told.stdout)]


def nest(folder: Path, depth: int) -> None:
    """Folders that are deeper than Python's stack."""
    folder.mkdir()
    here = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


@pytest.mark.slow
def test_no_run_of_a_stranger_ends_a_command(looked: list[tuple[str, dict[str, Any]]]) -> None:
    bad = [(name, one["command"], one["status"]) for name, one in looked if one["status"] not in (0, 1, 2, 4, 5)]
    assert not bad, f"{len(bad)}: {bad[:3]}"


@pytest.mark.slow
def test_no_run_of_a_stranger_reaches_the_terminal(looked: list[tuple[str, dict[str, Any]]]) -> None:
    control = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]")
    assert not [(name, one["command"]) for name, one in looked if control.search(one["out"])]
    assert not [(name, one["command"]) for name, one in looked if len(one["out"]) > 100_000 and name != "the root"]


@pytest.mark.slow
def test_no_run_of_a_stranger_hides_another(looked: list[tuple[str, dict[str, Any]]]) -> None:
    of_root = [one for name, one in looked if name == "the root"]
    assert {one["command"][0] for one in of_root} == {"list", "compare"}
    for one in of_root:
        assert one["status"] == 0
        assert "smoke/good" in one["out"], one["command"]
        assert one["out"].count("smoke/r") >= 200, one["command"]


def start(life: Lives, root: Path, *more: str, name: str = "r") -> tuple[int | None, str]:
    """The status and the output of the command that continues with a run; a limit instead of waiting forever."""
    ended = life(*COMMAND, f"run.root={root}", f"run.name={name}", *more, after=120)
    assert "Traceback" not in ended.output
    return ended.status, ended.output


def hard(path: Path) -> None:
    """Another name of a file outside."""
    os.link(next(folder for folder in path.parents if folder.name == "runs").with_name("victim"), path)


LINKS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "log": ("runner.log", lambda path: path.symlink_to("../../../victim")),
    "log that is not there": ("runner.log", lambda path: path.symlink_to("../../../new")),
    "log by another name": ("runner.log", hard),
    "log that waits": ("runner.log", os.mkfifo),
    "hydra": (".hydra", lambda path: path.symlink_to("../../../outside")),
    "hydra's file": (".hydra/overrides.yaml", lambda path: path.symlink_to("../../../../victim")),
    "hydra's file by another name": (".hydra/config.yaml", hard),
    "hydra's file that waits": (".hydra/hydra.yaml", os.mkfifo),
}


@pytest.fixture
def place(runs: Path, tmp_path: Path) -> Path:
    """A root with an unfinished run, and what is beside the root."""
    shutil.copytree(runs / "smoke/cut", tmp_path / "runs/smoke/r")
    (tmp_path / "outside").mkdir()
    (tmp_path / "victim").write_text("mine")
    return tmp_path


def untouched(place: Path) -> bool:
    return (place / "victim").read_text() == "mine" and sorted(os.listdir(place)) == ["outside", "runs", "victim"]


@pytest.mark.parametrize("kind", quick_first(LINKS, "log", "hydra", "hydra's file that waits"))
def test_links_that_hydra_would_write_through_are_refused(kind: str, place: Path, life: Lives) -> None:
    name, make = LINKS[kind]
    path = place / "runs/smoke/r" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    make(path)
    for more in ((), (f"hydra.run.dir={place}/runs/smoke/r",)):
        status, output = start(life, place / "runs", *more)
        assert (status, f"runs/smoke/r/{name} is" in output) == (2, True), output
    assert untouched(place)
    assert not os.listdir(place / "outside")


@pytest.mark.parametrize("name", ["smoke", "smoke/r"])
def test_a_folder_of_runs_that_is_a_link_is_refused(name: str, place: Path, life: Lives) -> None:
    shutil.rmtree(place / "runs/smoke")
    (place / "runs" / name).parent.mkdir(exist_ok=True)
    (place / "runs" / name).symlink_to(place / "outside")
    status, output = start(life, place / "runs")
    assert (status, f"runs/{name} is a link" in output) == (2, True), output
    assert untouched(place)
    assert not os.listdir(place / "outside")


def test_a_root_that_is_a_link_is_the_user_s_own(place: Path, life: Lives) -> None:
    (place / "runs").rename(place / "disk")
    (place / "runs").symlink_to("disk")
    assert start(life, place / "runs")[0] == 0


def test_a_sweep_refuses_links_and_does_the_other_jobs(place: Path, life: Lives) -> None:
    (place / "runs/smoke/r/runner.log").unlink(missing_ok=True)
    (place / "runs/smoke/r/runner.log").symlink_to(place / "victim")
    status, output = start(life, place / "runs", "-m", name="r,other")
    assert (status, "runner.log is a link" in output) == (2, True), output
    assert (place / "runs/smoke/other/result.json").exists()
    (place / "runs/smoke/multirun.yaml").unlink()
    (place / "runs/smoke/multirun.yaml").symlink_to(place / "victim")
    status, output = start(life, place / "runs", "-m", name="other")
    assert (status, "multirun.yaml is a link" in output) == (2, True), output
    assert untouched(place)


def test_a_result_without_all_its_values_is_reported(runs: Path, tmp_path: Path, life: Lives) -> None:
    shutil.copytree(runs / "smoke/done", tmp_path / "smoke/r")
    path = tmp_path / "smoke/r/result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**result, "reason": ESCAPE, "objective": {"value": 0.5, "step": ESCAPE}}))
    status, output = start(life, tmp_path)
    assert (status, "best     None 0.5 at step" in output, ESCAPE in output) == (0, True, False), output
    del result["reason"]
    path.write_text(json.dumps(result))
    assert start(life, tmp_path)[0] == 0


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("run.json", "fifo"),
        slow("config.yaml", "device"),
        slow("attempts/*.lock", "fifo"),
        slow("attempts/*.beat", "socket"),
        ("attempts", "link"),
        slow("commits", "fifo"),
        ("data/*", "fifo"),
        slow("metrics", "link"),
        ("metrics/*", "sparse"),
        slow("ledger/*", "fifo"),
        slow("tensorboard", "link"),
    ],
)
def test_a_run_of_a_stranger_is_gone_on_with_or_refused(pattern: str, kind: str, place: Path, life: Lives) -> None:
    mutants = Mutants(place / "runs/smoke/r", place / "runs")
    mutants.replace(pattern, kind)
    status, output = start(life, place / "runs", name="r000")
    assert status in (0, 1, 2, 5), output
    assert untouched(place)
    assert not os.listdir(place / "outside")
