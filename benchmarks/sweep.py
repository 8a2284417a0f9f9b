"""The price of a sweep that is done: the same ``-m`` command again, where all its runs are finished, and the list of
these runs.

    compose    plain Hydra on the same configurations, with a launcher that starts nothing: it composes every job once,
               to see whether it is legal
    no-op      plain Hydra, basic launcher, a task that returns at once: each job is composed once more to be launched
    runner     ``python -m runner -m experiment=smoke seed=range(0,N)``; fails where that imports torch or begins a run
    list       ``python -m runner.runs list``, ``--json``

The runs are one real run and copies of it that differ in the seed. Seconds are of CPU time, in which
other load on the machine shows least, and all take turns; figures are medians, ratios are of those, the spread is that
of the ratios within a turn.

    python -m benchmarks.sweep --runs 1000 --turns 3       # from the root of the repository; some minutes
"""

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import yaml
from tabulate import tabulate

from runner.config.identity import variant
from runner.run.directory import RunDirectory

ROOT = Path(__file__).parent.parent
SHORT = "trainer.max_steps=1"

PLAIN = """
import sys, hydra
from runner.app import CONFIGS  # makes the schema and the resolvers known
from hydra.core.plugins import Plugins
Plugins.instance()  # imports its plugins anew
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
if sys.argv.pop(1) == "compose":
    BasicLauncher.launch = lambda *_, **__: []
hydra.main(config_path=str(CONFIGS), config_name="config", version_base="1.3")(lambda config: None)()
"""
OURS = """
import sys
from runner.__main__ import main
status = main()
sys.exit(status or "torch" in sys.modules)
"""


def finished(root: Path, count: int) -> None:
    """Make that many finished runs."""
    seconds([sys.executable, "-m", "runner", *arguments(root, "seed=0")], "1 done")
    (real,) = (path.parent for path in root.glob("smoke/*/result.json"))
    first = RunDirectory.under(str(root), "smoke", real.name)
    identity = first.configuration() or {}
    result = {key: value for key, value in (first.result(identity) or {}).items() if key != "identity"}
    for seed in range(1, count):
        copy = RunDirectory.under(str(root), "smoke", variant([f"seed={seed}", SHORT]))
        folder = root / "smoke" / copy.variant
        shutil.copytree(real, folder)
        (folder / "config.yaml").write_text(yaml.safe_dump({**identity, "seed": seed}, sort_keys=False))
        copy.finish({**identity, "seed": seed}, result)


def arguments(root: Path, seeds: str) -> list[str]:
    return ["-m", "experiment=smoke", SHORT, seeds, f"run.root={root}"]


def seconds(command: list[str], said: str = "") -> float:
    """The CPU time of a command that has to say that."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if ended.returncode or said not in ended.stdout:
        sys.exit(f"{command} exited with {ended.returncode}:\n{ended.stdout[-3000:]}")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=3)
    parsed = parser.parse_args()
    seeds = f"seed=range(0,{parsed.runs})"
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary, "runs")
        finished(root, parsed.runs)

        def plain(kind: str) -> list[str]:
            return [sys.executable, "-c", PLAIN, kind, *arguments(Path(temporary, kind), seeds)]

        again = [sys.executable, "-c", OURS, *arguments(root, seeds)]
        listing = [sys.executable, "-m", "runner.runs", "list", str(root)]
        sides: dict[str, Callable[[], float]] = {
            "compose": lambda: seconds(plain("compose")),
            "no-op": lambda: seconds(plain("no-op")),
            "runner": lambda: seconds(again, f"{parsed.runs} done"),
            "list": lambda: seconds(listing, "seed=1,"),
            "list --json": lambda: seconds([*listing, "--json"], "seed=1,"),
        }
        turns = [{name: side() for name, side in sides.items()} for _ in range(parsed.turns)]
    base = median(turn["compose"] for turn in turns)
    rows = []
    for name in sides:
        took, ratios = median(turn[name] for turn in turns), sorted(turn[name] / turn["compose"] for turn in turns)
        rows.append([name, f"{took:.2f}", f"{took / base:.2f}", f"{ratios[0]:.2f} .. {ratios[-1]:.2f}"])
    print(tabulate(rows, ["case", "CPU s", "ratio", "spread"], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
