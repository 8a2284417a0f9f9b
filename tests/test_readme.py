"""The commands in the README work in an empty folder, from a clone and from an installed wheel."""

import html
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def python(arguments: str, cwd: Path, path: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """``python ...`` as README writes it."""
    command = [sys.executable, *shlex.split(arguments, comments=True)]
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel, unpacked, and nothing of the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", str(REPOSITORY), *options], check=True)
    (built,) = folder.glob("hydra_runner-*.whl")
    zipfile.ZipFile(built).extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_the_two_files_of_a_user_run_and_resume_from_a_wheel(wheel: Path, tmp_path: Path) -> None:
    """Pasted as they stand, with the comments that name them."""
    named = ((re.search(r"^# (mine\.py|my_conf/\S+)$", text, re.MULTILINE), text) for _, text in BLOCKS)
    files = {match[1]: text for match, text in named if match}
    assert [*files] == ["mine.py", "my_conf/experiment/mine.yaml"]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (commands,) = (text for _, text in BLOCKS if "--config-dir my_conf" in text)
    arguments = commands.splitlines()[0].replace("hydra-runner", "-m runner", 1)  # the wheel is only unpacked
    first = python(arguments, tmp_path, wheel)
    assert first.returncode == 0, first.stderr
    assert "finished step 400 (max_epochs), val/loss" in first.stdout
    assert python(arguments, tmp_path, wheel).stdout.splitlines()[0] == first.stdout.splitlines()[-3]


def test_the_wheel_brings_its_configurations(wheel: Path, tmp_path: Path) -> None:
    ended = python("-m runner experiment=smoke trainer.max_steps=2", tmp_path, wheel)
    assert ended.returncode == 0, ended.stderr
    assert list((tmp_path / "outputs/smoke").iterdir())


@pytest.mark.slow
def test_configurations_on_the_search_path_are_found(tmp_path: Path) -> None:
    experiment = tmp_path / "elsewhere/experiment/mine.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text((REPOSITORY / "conf/experiment/smoke.yaml").read_text())
    ended = python(
        f"-m runner hydra.searchpath=[file://{tmp_path}/elsewhere] experiment=mine trainer.max_steps=1", tmp_path
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_the_screen_shown_is_the_screen(tmp_path: Path) -> None:
    """The lines of README's picture that do not depend on the moment of the kill."""
    shown = html.unescape(re.sub("<[^>]*>", " ", (REPOSITORY / "docs/session.svg").read_text())).replace("\xa0", " ")
    shown = " ".join(shown.split())
    ended = python("-m runner experiment=digits trainer.max_steps=1 scheduler.warmup_steps=0", tmp_path)
    lines = [" ".join(line.split()) for line in ended.stdout.splitlines()[1:3]]
    assert len(lines) == 2
    assert all(line in shown for line in lines), shown
    assert "Every sample exactly once in every whole epoch." in shown


def test_the_commands_are_those_that_ci_and_newcomers_use() -> None:
    commands = [text.strip() for kind, text in BLOCKS if kind == "sh" and "venv" in text]
    assert [command.rpartition(" && ")[2] for command in commands] == [
        ".venv/bin/python -m runner experiment=digits",
        ".venv/bin/python -m pytest",
    ]
    assert "pytest$" in (REPOSITORY / ".ci/run").read_text()


def test_readme_stays_short() -> None:
    assert len(README.splitlines()) < 110


def test_every_key_that_a_page_names_exists() -> None:
    """In README and docs/, whose table of all keys is a page of its own."""
    table = (REPOSITORY / "docs/reference/configuration.md").read_text()
    pages = [page.read_text() for page in REPOSITORY.glob("docs/**/*.md")] + [README]
    groups = r"(?:trainer|runtime|checkpoint|run|(?<!runner\.)(?<!mine\.)data)"
    keys = {key for page in pages for key in re.findall(rf"\b{groups}\.[a-z_]+", page)}
    keys = {key for key in keys if not key.endswith((".json", ".py", ".md", ".mixture"))}
    assert {"run.on_drift", "data.max_tokens", "trainer.ema_decay"} <= keys
    assert not [key for key in keys if f"| `{key}`" not in table]
