"""What is built and installed: wheel, source distribution, version, and the JSON schema for editors."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import runner
from runner.config.help import json_schema

REPOSITORY = Path(__file__).parent.parent
CONF = REPOSITORY / "conf"


def built(source: Path, folder: Path, kind: str) -> Path:
    """The wheel or the sdist of a source tree, built as pip does, but without the network."""
    code = f"import os, sys, hatchling.build as b; os.chdir(sys.argv[1]); print(b.build_{kind}(sys.argv[2]))"
    done = subprocess.run([sys.executable, "-c", code, source, folder], check=True, capture_output=True, text=True)
    return folder / done.stdout.split()[-1]


def test_a_wheel_of_the_sdist_has_the_package_and_no_more(tmp_path: Path) -> None:
    with tarfile.open(built(REPOSITORY, tmp_path, "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("hydra_runner-*/")
    names = zipfile.ZipFile(built(source, tmp_path, "wheel")).namelist()
    inside = {name for name in names if ".dist-info/" not in name}
    package = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "runner").rglob("*.py")}
    configurations = {f"runner/{path.relative_to(REPOSITORY)}" for path in CONF.rglob("*") if path.is_file()}
    assert inside == package | configurations | {"runner/py.typed", "pytest_hydra_runner.py"}
    assert f"hydra_runner-{runner.__version__}.dist-info/licenses/LICENSE" in names


def test_every_version_is_the_version() -> None:
    for words in (["-m", "runner"], ["-c", "import sys; from runner.__main__ import console; sys.exit(console())"]):
        done = subprocess.run(
            [sys.executable, *words, "--version"], capture_output=True, text=True, check=True, cwd=REPOSITORY
        )
        assert done.stdout == f"hydra-runner {runner.__version__}\n"


def test_public_names_are_there() -> None:
    assert all(hasattr(runner, name) for name in runner.__all__)


def schema_errors(config: Any, schema: Any = None) -> list[str]:
    schema = schema or json_schema(CONF / "config.yaml")
    validator = pytest.importorskip("jsonschema").Draft7Validator(schema)
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(config)]


def test_the_stored_schema_is_what_the_command_prints() -> None:
    command = [sys.executable, "-m", "runner", "schema"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert (CONF / "schema.json").read_text() == done.stdout


def test_a_shell_completes_what_is_in_the_users_folder(tmp_path: Path) -> None:
    (tmp_path / "my_conf/experiment").mkdir(parents=True)
    (tmp_path / "my_conf/experiment/mine.yaml").write_text("# @package _global_\n")
    line = "hydra-runner --config-dir my_conf experiment=mi"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COMP_LINE": line, "COMP_POINT": str(len(line))}
    command = [sys.executable, "-m", "runner", "-sc", "query=bash"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    assert done.stdout == "experiment=mine\n"


def test_a_reader_of_the_help_may_leave_early() -> None:
    """As ``head`` does."""
    command = [sys.executable, "-m", "runner", "--help"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.wait(), process.stderr.read()) == (0, "")


WITH_SCHEMA = [path for folder in (".", "data", "experiment", "metrics") for path in CONF.glob(f"{folder}/*.yaml")]


@pytest.mark.parametrize("file", WITH_SCHEMA, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_an_editor_finds_the_schema_and_accepts_each_file(file: Path) -> None:
    line = re.search(r"^# yaml-language-server: \$schema=(\S+?)(?:#/(\S+))?$", file.read_text(), re.MULTILINE)
    assert line is not None
    schema = json.loads((file.parent / line[1]).read_text())
    for name in line[2].split("/") if line[2] else ():
        schema = schema[name]
    assert not schema_errors(yaml.safe_load(file.read_text()), schema)


@pytest.mark.parametrize("file", [*REPOSITORY.glob("tests/user/conf/experiment/*.yaml")], ids=lambda file: file.stem)
def test_the_schema_accepts_experiments_of_users(file: Path) -> None:
    assert not schema_errors(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({"trainer": {"max_stepps": 1}}, "trainer"),
        ({"trainer": {"precision": "fp8"}}, "trainer.precision"),
        ({"data": {"batch_size": "many"}}, "data.batch_size"),
        ({"runtime": {"num_workers": "many"}}, "runtime.num_workers"),
        ({"runtime": {"num_workers": -1}}, "runtime.num_workers"),
        ({"trainr": {}}, ""),
    ],
)
def test_the_schema_refuses_a_mistake(config: Any, where: str) -> None:
    (error,) = schema_errors(config)
    assert error.startswith(f"{where}:")


def test_the_schema_explains_keys_and_allows_interpolations() -> None:
    schema = json_schema(CONF / "config.yaml")
    assert "batch_size" in schema["properties"]["data"]["properties"]
    assert "samples per optimizer step" in json.dumps(schema)
    assert not schema_errors({"trainer": {"max_steps": "${params.steps}"}, "hydra": {}, "defaults": []})
    assert not any(schema_errors({"runtime": {"num_workers": value}}) for value in (0, 4, "auto", "${params.workers}"))
