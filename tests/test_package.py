"""What is built and installed: wheel, source distribution, version, and the JSON schema for editors."""

import json
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
    assert inside == package | configurations | {"runner/py.typed"}
    assert f"hydra_runner-{runner.__version__}.dist-info/licenses/LICENSE" in names


def test_every_version_is_the_version() -> None:
    for words in (["-m", "runner"], ["-c", "import sys; from runner.__main__ import console; sys.exit(console())"]):
        done = subprocess.run(
            [sys.executable, *words, "--version"], capture_output=True, text=True, check=True, cwd=REPOSITORY
        )
        assert done.stdout == f"hydra-runner {runner.__version__}\n"


def test_public_names_are_there() -> None:
    assert all(hasattr(runner, name) for name in runner.__all__)


def schema_errors(config: Any) -> list[str]:
    validator = pytest.importorskip("jsonschema").Draft7Validator(json_schema(CONF / "config.yaml"))
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(config)]


FILES = [CONF / "config.yaml", *CONF.glob("experiment/*.yaml"), *REPOSITORY.glob("tests/user/conf/experiment/*.yaml")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_schema_accepts_every_configuration(file: Path) -> None:
    assert not schema_errors(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({"trainer": {"max_stepps": 1}}, "trainer"),
        ({"trainer": {"precision": "fp8"}}, "trainer.precision"),
        ({"data": {"batch_size": "many"}}, "data.batch_size"),
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
