"""The map in the package's docstring, held against the code: layers, third-party imports, sizes."""

import ast
import functools
import re
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import runner
from runner.storage.backend import STORES

ROOT = Path(runner.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# Each third-party package enters through these rooms only. torch and numpy are the material of the whole house.
DOORS = {
    "hydra": {"config", "app", "build", "sweep", "__main__", "api"},
    "omegaconf": {"config", "app", "build", "sweep", "__main__", "api", "restore", "runs"},
    "hydra_plugins": {"sweep"},
    "optuna": {"sweep"},
    "fsspec": {"storage"},
    "safetensors": {"restore"},
    "torchdata": {"data"},
    "tensorboard": {"metrics"},
    "torch.utils.tensorboard": {"metrics"},
    "mlflow": {"metrics"},
    "trackio": {"metrics"},
    "wandb": {"metrics"},
    "xxhash": {"hashing"},
    "hashlib": {"hashing"},
    "yaml": {"run", "verify"},
    "tabulate": {"optimizers", "run", "runs", "sweep"},
    "tqdm": {"callbacks", "data", "shards"},
    "pyarrow": {"shards"},
    "pandas": {"api"},
    "sklearn": {"datasets"},
    "reasoning_gym": {"datasets"},
}


# Names of modules that stand in several packages, and why.
SHARED_MODULE_NAMES = {"__init__": "Python's name for a package", "__main__": "Python's name for what python -m runs"}
# Names of classes that stand in several modules, and why.
SHARED_CLASS_NAMES: dict[str, str] = {}


def layers() -> list[tuple[int, str, list[str]]]:
    """The map in the package's docstring: layer, package or module, and the modules of a package."""
    assert runner.__doc__
    text = re.sub(r"\n {7}(?! )", "  ", runner.__doc__.partition("\n\n   ")[2].join(["\n   ", ""]))
    entries = []
    for number, line in re.findall(r"^ {3}([0-9 ]{2}) {2}(.*)$", text, re.MULTILINE):
        for name, inner in re.findall(r"(\w+)/? ?(?:\((.*?)\))?(?: {2,}|$)", line):
            entries.append((int(number), name, re.findall(r"\w+", inner)))
    return entries


def floors() -> dict[str, int]:
    """Package or module -> layer."""
    return {name: layer for layer, name, _ in layers()}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef)]


def test_the_map_names_every_module_once() -> None:
    named = [name if not inner else f"{name}.{each}" for _, name, inner in layers() for each in inner or [""]]
    present = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES if path.stem != "__init__"]
    assert sorted(named) == sorted(present)


def test_the_map_points_to_modules_that_exist() -> None:
    names = re.findall(r"``([a-z_/]+)``", runner.__doc__ or "")
    assert len(names) > 5
    assert not [name for name in names if not (ROOT / f"{name}.py").is_file()]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_lower_floors(path: Path) -> None:
    if path == ROOT / "__init__.py":
        return
    here = room(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "runner" and parts[1:] and parts[1] != here and parts[1] in floors():
            assert floors()[parts[1]] < floors()[here], f"{path} imports {name}"


def test_there_are_no_cycles_within_a_room() -> None:
    names = {".".join(("runner", *path.relative_to(ROOT).with_suffix("").parts)): path for path in MODULES}
    graph = {
        path: {names.get(name) or names.get(name.rpartition(".")[0]) for name in imports(path)} - {None, path}
        for path in MODULES
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize("package", DOORS)
def test_a_third_party_package_enters_through_its_doors(package: str) -> None:
    used = {room(path) for path in MODULES if any(f"{name}.".startswith(f"{package}.") for name in imports(path))}
    assert used <= DOORS[package]


def test_every_third_party_package_has_a_door() -> None:
    roots = {name.split(".")[0] for path in MODULES for name in imports(path)} - sys.stdlib_module_names
    assert roots - {"runner", "torch", "numpy"} == {name for name in DOORS if "." not in name} - {"hashlib"}


def test_the_readme_and_the_extras_have_every_store() -> None:
    before, _, _ = (ROOT.parent / "README.md").read_text().partition("keeps the whole run directory there")
    section = before.rpartition("\n\n")[2]
    extras = (ROOT.parent / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    for store in STORES:
        if store.extra:
            assert f"{store.protocols[0]}://" in section
            assert f"`{store.extra}`" in section
            assert f"\n{store.extra} = " in extras


def test_a_name_of_a_module_has_one_meaning() -> None:
    shared = {name for name, count in Counter(path.stem for path in MODULES).items() if count > 1}
    assert shared == SHARED_MODULE_NAMES.keys(), "rename one of each, or write the reason down"


def test_a_name_of_a_class_has_one_meaning() -> None:
    names = Counter(node.name for path in MODULES for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef))
    shared = {name for name, count in names.items() if count > 1}
    assert shared == SHARED_CLASS_NAMES.keys(), "rename one of each, or write the reason down"


def test_files_and_functions_stay_small() -> None:
    lengths = sorted(
        node.end_lineno - node.lineno + 1 for path in MODULES for node in functions(path) if node.end_lineno
    )
    assert max(len(path.read_text().splitlines()) for path in MODULES) <= 500
    assert lengths[len(lengths) // 2] < 10
    assert lengths[len(lengths) * 9 // 10] <= 35
    assert lengths[-1] <= 60


def test_every_module_and_public_thing_has_a_docstring() -> None:
    for path in MODULES:
        tree = parsed(path)
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and path.name != "schema.py"
            ):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def test_names_of_tests_are_short() -> None:
    names = [node.name for path in Path(__file__).parent.glob("test_*.py") for node in functions(path)]
    assert not [name for name in names if name.startswith("test_") and len(name) >= 60]


def foreign(tree: ast.Module) -> set[str]:
    """The names under which a file imports modules and classes that are not the runner's."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {
        alias.asname or alias.name
        for node in nodes
        for alias in node.names
        if not (node.module or "" if isinstance(node, ast.ImportFrom) else alias.name).startswith("runner")
    }


def private_writes(path: Path) -> list[str]:
    """The lines of a file that set a private attribute of another object or module, except of a foreign one."""
    tree = parsed(path)
    own, found = {"self", "cls"} | foreign(tree), []
    for node in ast.walk(tree):
        target, name = None, ""
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            target, name = ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "delattr", "patch", "object")):
            texts = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            if node.args and texts:
                target, name = ast.unparse(node.args[0]), texts[0].rpartition(".")[2]
        private = name.startswith("_") and not name.startswith("__")
        if private and target is not None and target.partition(".")[0] not in own:
            found.append(f"{path}:{node.lineno}: {target}.{name}")
    return found


@pytest.mark.parametrize("folder", [ROOT / "verify", Path(__file__).parent], ids=["verify", "tests"])
def test_nobody_sets_private_attributes_of_the_runner(folder: Path) -> None:
    """Who looks on or breaks something does so by the moments of ``callbacks.base`` and by public names."""
    assert [place for path in sorted(folder.rglob("*.py")) for place in private_writes(path)] == []


@pytest.mark.parametrize(
    ("code", "private"),
    [
        ("from runner import experiment\nexperiment._resume = None", True),
        ("from runner import experiment\nexperiment.finish = None", False),
        ("def f(trainer): trainer.a._step += 1", True),
        ("import random\nrandom._urandom = None", False),
        ("from runner import signals\nmonkeypatch.setattr(signals, '_stop_name', 'SIGTERM')", True),
        ("monkeypatch.setattr('runner.callbacks.saving._LONGEST_PAUSE', 0.0)", True),
        ("import s3fs\nmonkeypatch.setattr(s3fs.S3FileSystem, '_call_s3', None)", False),
        ("class C:\n def __init__(self): self._x = 1", False),
    ],
)
def test_a_private_write_is_found(code: str, private: bool, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(code)
    assert bool(private_writes(tmp_path / "code.py")) == private
