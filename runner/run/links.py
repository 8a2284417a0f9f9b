"""Links where others than ``Location`` write in a run directory: Hydra, its launchers and its sweepers follow any."""

import stat
from pathlib import Path

from runner.errors import ConfigError, printable
from runner.storage.location import is_remote, local_root

LOG = "runner.log"
_HYDRA = (".hydra", *(f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")))
_SWEEP = ("multirun.yaml", "optimization_results.yaml", "optuna.sqlite3", ".submitit")


def refuse_links(root: str, below: str, *, log: str = LOG) -> None:
    """Raise ConfigError where a file of theirs in the folder ``below`` a local ``root``, or the way to that folder, is
    a link or no file: what is written there would end elsewhere, or wait for ever.
    """
    if is_remote(root):
        return
    folder = Path(local_root(root))
    for name in filter(None, below.split("/")):
        folder /= name
        _refuse(folder)
    for name in (log, *_HYDRA, *_SWEEP):
        _refuse(folder / name)


def _refuse(path: Path) -> None:
    try:
        about = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISDIR(about.st_mode) or (stat.S_ISREG(about.st_mode) and about.st_nlink == 1):
        return
    kind = "a link" if stat.S_ISLNK(about.st_mode) or stat.S_ISREG(about.st_mode) else "no file"
    raise ConfigError(
        f"{printable(path)} is {kind}, and what is written there would end elsewhere. Everything below run.root must "
        "be there itself: remove it, or choose another run.root or run.name"
    )
