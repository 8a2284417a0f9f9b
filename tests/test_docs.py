"""The pages in docs/: the site builds without a warning, and every command and file in them works as printed."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from runner.runs.__main__ import main as runs

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NAME = re.compile(r"^# (\S+\.(?:py|yaml))$", re.MULTILINE)
NUMBER = re.compile(r"\d+(\.\d+)?(e-\d+)?")
PAGES = [REPOSITORY / "README.md", *sorted(page for page in DOCS.rglob("*.md") if "```sh\n" in page.read_text())]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tutorial.html").is_file()


def test_the_page_of_keys_is_that_of_the_schema() -> None:
    made = runpy.run_path(str(DOCS / "configuration.py"))["page"]()
    assert made == (DOCS / "reference/configuration.md").read_text(), "run python docs/configuration.py"


def test_no_page_has_a_conflict_that_was_not_resolved() -> None:
    pages = [*DOCS.rglob("*.md"), *REPOSITORY.glob("*.md")]
    assert not [page for page in pages if re.search("^(<{7}|>{7}) ", page.read_text(), re.MULTILINE)]


def test_every_block_with_code_is_run() -> None:
    """Blocks of python and yaml are files with a name, so that the commands of their page use them."""
    for page in DOCS.rglob("*.md"):
        for kind, text in BLOCK.findall(page.read_text()):
            assert kind in ("sh", "output", "text") or NAME.search(text), (page, text)


@pytest.mark.campaign
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_works_as_printed(page: Path, tmp_path: Path) -> None:
    """In one empty folder, in the order of the page: files are written, commands succeed and print what is shown."""
    printed = ""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    for kind, text in BLOCK.findall(page.read_text()):
        if kind in ("python", "yaml"):
            write(text, tmp_path)
        elif kind == "sh" and "python3 -m venv" not in text:  # that is what continuous integration begins with
            done = subprocess.run(
                ["bash", "-e", "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            printed = f"{done.stdout}\n{done.stderr}"
            assert done.returncode == 0, f"{text}\n{printed}"
        elif kind == "output":
            assert not [line for line in numberless(text) if line not in "\n".join(numberless(printed))], printed


SHOWN = [
    (page, command)
    for page in DOCS.rglob("*.md")
    for kind, text in BLOCK.findall(page.read_text())
    for command in re.findall("^python -m runner (.+)$", text, re.MULTILINE)
    if kind == "text"
]


@pytest.mark.parametrize(("page", "command"), SHOWN, ids=lambda value: getattr(value, "stem", "command"))
def test_a_command_that_is_only_shown_composes(page: Path, command: str, tmp_path: Path) -> None:
    """It needs a service or a cluster, so the tests of these run it; here, its keys and values are real."""
    for kind, text in BLOCK.findall(page.read_text()):
        if kind == "yaml":
            write(text, tmp_path)
    words = [re.sub(",.*", "", word) if " " not in word else word for word in shlex.split(command) if word != "-m"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "WEBHOOK": "https://example.org"}
    done = subprocess.run(
        [sys.executable, "-m", "runner", *words, "--cfg", "all"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def write(text: str, folder: Path) -> None:
    """A block of code into the file that it names."""
    file = folder / NAME.search(text)[1]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def numberless(text: str) -> list[str]:
    return [" ".join(NUMBER.sub("N", line).split()) for line in text.splitlines()]


def test_the_job_for_kubernetes_fits_its_schema() -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    job = yaml.safe_load((DOCS / "recipes/kubernetes.yaml").read_text())
    validate(job, "1.31", strict=True)


def test_the_image_copies_what_the_package_is_built_from() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (DOCS / "recipes/Dockerfile").read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "runner", "conf"} == names
    assert all((REPOSITORY / name).exists() for name in names)


def test_the_page_of_commands_has_all_of_runs_with_real_options(capsys: pytest.CaptureFixture[str]) -> None:
    rows = re.findall(
        r"^\| `python -m runner\.runs (\w+)(.*)", (DOCS / "reference/commands.md").read_text(), re.MULTILINE
    )
    for name, rest in rows:
        with pytest.raises(SystemExit):
            runs([name, "--help"])
        options = re.findall(r"`(--[a-z]+)", rest)
        shown = capsys.readouterr().out
        assert all(option in shown for option in options), (name, options, shown)
    with pytest.raises(SystemExit):
        runs(["--help"])
    assert {name for name, _ in rows} == {*re.findall(r"^    ([a-z]+) ", capsys.readouterr().out, re.MULTILINE)}


@pytest.mark.parametrize(
    ("tool", "files"), [("hadolint", ["Dockerfile"]), ("shellcheck", ["slurm.sh", "slurm_array.sh", "../../.ci/run"])]
)
def test_the_tool_for_a_recipe_has_no_complaint(tool: str, files: list[str]) -> None:
    command = shutil.which(tool, path=str(Path(sys.executable).parent)) or pytest.skip(f"no {tool} in this environment")
    done = subprocess.run([command, *files], cwd=DOCS / "recipes", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_recipes_for_slurm_differ_in_the_seed_alone() -> None:
    """The recipe of an array runs on a real Slurm, in ``test_launchers.py``."""
    one, array = (
        [line for line in (DOCS / f"recipes/{name}.sh").read_text().splitlines() if not line.startswith("#")]
        for name in ("slurm", "slurm_array")
    )
    assert one == [line.replace(' "seed=$SLURM_ARRAY_TASK_ID"', "") for line in array]
