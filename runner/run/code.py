"""What code an attempt runs: the user's modules, the versions of packages, and the state of git repositories.

    attempts/000003-<nonce>.code.json      absent where the attempt runs the same code as the attempt before

A module is the user's if its file is outside the folders of installed packages; modules of the runner count where a
``_target_`` names them. Nothing here ends a run. Anyone may have written a record, so only texts are taken from it.
"""

import functools
import os
import platform
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from runner.config.secrets import hide_secrets
from runner.hashing import hex_digest
from runner.plain import parse_object
from runner.run import attempts
from runner.storage.location import Location

SUFFIX = "code.json"
GIT_SECONDS = 5.0

_LIMIT = 4 << 20  # bytes of a record that are read
_MOST_DIFF = 256 << 10  # bytes of the differences in one repository
_MOST_OF_FILE = 4 << 20  # bytes of a module that are hashed; compiled modules can be large
_MOST_FILES, _MOST_REPOSITORIES = 2000, 4
_WIDEST = 1000  # characters of a line of differences; longer lines hold data, and are cut
_PACKAGED = re.compile(r"[/\\](?:site|dist)-packages[/\\]")
_INFO = re.compile(r"([\w.]+)-([^-]+)(?:-.*)?\.(?:dist|egg)-info")
# The commit; changes of tracked files, without notebooks, whose outputs are no code, and files that hold secrets; and
# the modules, given as arguments, that are not tracked.
_SCRIPT = """
flags="--no-ext-diff --no-textconv --ignore-submodules=dirty"
echo "$(git rev-parse --verify -q HEAD)"
{
    git -c core.fsmonitor=false diff $flags HEAD -- . ':(exclude,glob)**/*.ipynb' ':(exclude,glob)**/.env*'
    [ $# = 0 ] || git ls-files -oz -- "$@" | xargs -0 -n 1 git diff $flags --no-index -- /dev/null
} | head -c """


@dataclass(frozen=True, slots=True)
class CodeRecord:
    """``files``: digest by the path of a module below its import folder; ``packages``: version by import name;
    ``commits`` and ``diffs``: of each repository, by its folder; without a diff where nothing is changed.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)
    commits: Mapping[str, str] = field(default_factory=dict)
    diffs: Mapping[str, str] = field(default_factory=dict)

    def edited(self, now: "CodeRecord") -> list[str]:
        """The files in both records whose contents differ. A new or removed module comes with a change of another."""
        return sorted(name for name, digest in self.files.items() if now.files.get(name, digest) != digest)


def read(location: Location, name: attempts.ClaimName) -> CodeRecord | None:
    """The record of one attempt; None if it has none."""
    raw = location.read(f"{name}.{SUFFIX}", limit=_LIMIT)
    if raw is None:
        return None
    record = parse_object(raw) or {}
    return CodeRecord(*(_texts(record.get(key)) for key in CodeRecord.__dataclass_fields__))


def newest(location: Location, *, below: int) -> CodeRecord | None:
    """The code of the newest attempt with a number below ``below`` that has a record."""
    files = {f"attempts/{entry.name}" for entry in location.list("attempts")}
    claims = [name for name in attempts.names(location) if name.number < below]
    with_code = [name for name in claims if f"{name}.{SUFFIX}" in files]
    return read(location, with_code[-1]) if with_code else None


def record(location: Location, name: attempts.ClaimName, code: CodeRecord) -> None:
    """Store the code of an attempt."""
    location.replace(f"{name}.{SUFFIX}", [attempts.encode(asdict(code))], durable=False)


def running(targets: Iterable[str]) -> CodeRecord:
    """The code of this process, once everything is built. ``targets`` are the ``_target_`` of the configuration.

    Waits for git, ``GIT_SECONDS`` at most; a repository that git cannot read by then is left out.
    """
    modules = dict([*_modules([*targets])][:_MOST_FILES])
    answers: dict[str, tuple[str, str]] = {}
    with suppress(OSError):  # no working directory, no shell
        files: dict[str, list[str]] = {top: [] for top in filter(None, [_repository(os.getcwd())])}
        for path in modules.values():
            if top := _repository(os.path.dirname(path)):
                files.setdefault(top, []).append(path)
        until = time.monotonic() + GIT_SECONDS
        for top, paths in [*files.items()][:_MOST_REPOSITORIES]:
            answers[top] = _git(top, paths, max(until - time.monotonic(), 0.0))
    commits = {top: commit for top, (commit, _) in answers.items()}
    diffs = {top: diff for top, (_, diff) in answers.items() if diff}
    digests = {name: _digest(path) for name, path in sorted(modules.items())}
    return CodeRecord(digests, _packages(), commits, diffs)


def is_installed(file: str) -> bool:
    """Whether a file lies in the standard library, the runner, or a folder into which packages are installed."""
    return _is_library(os.path.dirname(file))


@functools.cache
def _is_library(name: str) -> bool:
    folder = Path(name).resolve()
    libraries = Path(sysconfig.get_path("stdlib")), Path(__file__).parents[1]  # python's and the runner
    # By the path, and by what it links to: a virtual environment may be made of links.
    if _PACKAGED.search(f"{name}{os.sep}{folder}{os.sep}"):
        return True
    if any(folder.is_relative_to(each.resolve()) for each in libraries):
        return True
    return any(_has_distributions(each) for each in (folder, *folder.parents))  # of pip install --target


@functools.cache
def _has_distributions(folder: Path) -> bool:
    return any(folder.glob("*.dist-info"))


def _imported() -> Iterator[tuple[str, dict[str, Any]]]:
    """The names of all modules, and their attributes; no code of theirs is called."""
    for name, module in [*sys.modules.items()]:
        inner = vars(module) if isinstance(module, ModuleType) else {}
        if type(inner.get("__file__")) is str:
            yield name, inner


def _modules(targets: list[str]) -> Iterator[tuple[str, str]]:
    """The user's modules: the path of each below the folder that it is imported from, and its file."""
    for name, inner in _imported():
        file = inner["__file__"]
        if name.startswith("runner."):
            is_users = not _PACKAGED.search(file) and any(target.startswith(f"{name}.") for target in targets)
        else:
            is_users = not is_installed(file)
        if is_users:
            base = os.path.basename(file)
            stem, suffix = os.path.splitext(base)
            path = name.replace(".", "/") + ("/__init__" if stem == "__init__" else "")
            yield base if name == "__main__" else f"{path}{suffix}", file


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hex_digest(file.read(_MOST_OF_FILE))
    except OSError:
        return "unreadable"


def _packages() -> dict[str, str]:
    """The version of every installed package that is imported, by its import name; and the version of Python."""
    versions: dict[str, str] = {}
    names: dict[str, str] = {}
    for folder in sys.path:
        with suppress(OSError):
            for match in filter(None, map(_INFO.fullmatch, os.listdir(folder or "."))):
                versions.setdefault(re.sub(r"[-_.]+", "_", match[1]).lower(), match[2])
    for name, inner in _imported():
        if "." not in name and _PACKAGED.search(inner["__file__"]):
            version = versions.get(name.lower(), inner.get("__version__"))
            if type(version) is str:
                names[name] = version
    return {"python": platform.python_version(), **dict(sorted(names.items()))}


@functools.cache
def _repository(folder: str) -> str | None:
    """The folder of the repository, or submodule, that a folder belongs to."""
    if os.path.exists(os.path.join(folder, ".git")):
        return folder
    above = os.path.dirname(folder)
    return None if above == folder else _repository(above)


def _git(top: str, files: list[str], seconds: float) -> tuple[str, str]:
    """The commit of a repository and its differences, both empty if git does not answer in time."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    process = subprocess.Popen(
        ["sh", "-c", f"{_SCRIPT}{_MOST_DIFF}", "git", *files],
        cwd=top,
        env=environment | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a group of its own, so that the kill below ends git, too, and not only the shell
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "", ""
    commit, _, diff = output.decode(errors="replace").partition("\n")
    lines = [line if len(line) <= _WIDEST else f"{line[:_WIDEST]}..." for line in diff.split("\n")]
    cut = "\n(cut off here)\n" if len(diff.encode()) >= _MOST_DIFF else ""
    return commit, hide_secrets("\n".join(lines)) + cut


def _texts(value: Any) -> dict[str, str]:
    pairs = value.items() if isinstance(value, dict) else ()
    return {key: text for key, text in pairs if isinstance(text, str)}
