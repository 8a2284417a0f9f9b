"""``python -m runner.runs list|show|audit|prune|export``: look at runs, thin out their checkpoints, take weights."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from tabulate import tabulate

from runner.errors import RunnerError, printable
from runner.run.directory import RunDirectory
from runner.runs.audit import audit
from runner.runs.overview import details, find, overview


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status, as listed in ``runner.errors``."""
    parsed = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        return command(parsed)
    except RunnerError as error:
        print(error, file=sys.stderr)
        return error.status
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m runner.runs", description="Look at runs and use them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="all runs under a root, one line each")
    listing.add_argument("root", nargs="?", default="outputs", help="the run.root of the runs (default: outputs)")
    listing.set_defaults(command=_list)
    showing = commands.add_parser("show", help="one run: configuration, attempts, checkpoints, result")
    showing.add_argument("run", help="its directory, for example outputs/digits/base")
    showing.set_defaults(command=_show)
    auditing = commands.add_parser("audit", help="which samples were seen, repeated and missed; status 1 if any were")
    auditing.add_argument("run", help="its directory, for example outputs/digits/base")
    auditing.set_defaults(command=_audit)
    pruning = commands.add_parser("prune", help="which checkpoints would be kept and removed; with --yes, remove them")
    pruning.add_argument("run", help="its directory, for example outputs/digits/base")
    pruning.add_argument("--last", type=int, default=2, metavar="N", help="keep the newest (default and least: 2)")
    pruning.add_argument("--every-steps", type=int, metavar="N", help="keep one of every multiple of so many steps")
    pruning.add_argument("--best", type=int, default=1, metavar="N", help="keep the best by the objective (default: 1)")
    pruning.add_argument("--yes", action="store_true", help="remove; without it nothing is changed")
    pruning.set_defaults(command=_prune)
    exporting = commands.add_parser("export", help="the weights of a checkpoint as a plain safetensors file")
    exporting.add_argument("run", help="its directory; outputs/digits/base@best, ...@100: not the newest checkpoint")
    exporting.add_argument("target", help="the file to write, a path or URL")
    exporting.add_argument("--force", action="store_true", help="overwrite the target")
    exporting.set_defaults(command=_export)
    for each in (listing, showing, auditing, pruning, exporting):
        each.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser


def _list(parsed: argparse.Namespace) -> int:
    rows = [asdict(overview(run)) for run in find(parsed.root)]
    if parsed.json:
        print(json.dumps(rows, indent=1))
    else:
        print(_table(rows, ["run", "status", "step", "max_steps", "objective", "attempts", "seen", "host"]))
    return 0


def _show(parsed: argparse.Namespace) -> int:
    found = details(RunDirectory.at(parsed.run))
    if parsed.json:
        print(json.dumps(found, indent=1))
        return 0
    facts = [(key, found[key]) for key in ("run", "url", "status", "step", "max_steps", "objective")]
    facts += [(key, found["record"].get(key)) for key in ("created", "parent")]
    print(tabulate([(key, _cell(value)) for key, value in facts if value is not None], tablefmt="plain"))
    print(
        "\nattempts\n"
        + _table(found["attempts"], ["attempt", "outcome", "started", "resumed", "step", "committed", "host", "reason"])
    )
    print("\ncheckpoints, newest first\n" + _table(found["checkpoints"], ["step", "attempt", "nonce"]))
    return 0


def _audit(parsed: argparse.Namespace) -> int:
    proof, found = audit(RunDirectory.at(parsed.run))
    if parsed.json:
        print(json.dumps(found, indent=1))
        return 0 if proof.holds else 1
    print(f"{found['run']}: {found['steps']} steps, {found['positions']} samples, {found['attempts']} attempts\n")
    if found["indexed"]:
        columns = ["source"] * ("source" in found["epochs"][0]) if found["epochs"] else []
        print(_table(found["epochs"], [*columns, "epoch", "seen", "repeated", "missed", "substituted", "whole"]))
    else:
        print("The data is an iterable, which alone knows what it gave: nothing is said of samples seen or missed.")
    steps, samples, differing = found["again"].values()
    print(f"\nDone again after kills: {steps} steps, {samples} samples, {differing} differing.")
    good = (
        "Every sample exactly once in every whole epoch." if found["indexed"] else "No step differed when done again."
    )
    for line in found["damaged"]:  # no problem where those steps were done again
        print(printable(line))
    print("\n".join(map(printable, found["problems"])) or good)
    return 0 if proof.holds else 1


def _prune(parsed: argparse.Namespace) -> int:
    from runner.runs.prune import prune  # imports torch

    rows = prune(
        RunDirectory.at(parsed.run),
        last=parsed.last,
        every_steps=parsed.every_steps,
        best=parsed.best,
        remove=parsed.yes,
    )
    if parsed.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(_table(rows, ["commit", "step", "objective", "size", "keep", "why"]))
    gone = [row["size"] for row in rows if not row["keep"]]
    would = "Removed" if parsed.yes else "Nothing was changed. --yes would remove"
    print(f"\n{would} {len(gone)} of {len(rows)} checkpoints, {sum(gone) / 1e6:.1f} MB.")
    return 0


def _export(parsed: argparse.Namespace) -> int:
    from runner.runs.export import export  # imports torch

    found = export(parsed.run, parsed.target, force=parsed.force)
    if parsed.json:
        print(json.dumps(found, indent=1))
    else:
        print(f"step {found['step']} of {printable(found['run'])}: {found['bytes']} bytes, sha256 {found['sha256']}")
    return 0


def _table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    return tabulate(cells, headers=columns, disable_numparse=True)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else printable(value).partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
