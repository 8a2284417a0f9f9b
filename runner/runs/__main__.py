"""``python -m runner.runs list|show|diff|compare|watch|audit|prune|export``: look at runs, remove old checkpoints,
export weights.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from runner.errors import RunnerError, printable
from runner.run.directory import RunDirectory
from runner.run_facts import refuse_unusable
from runner.runs import compare, listing, show

_USAGE = "%(prog)s [root] [options]"  # the root first: after --status it would be taken for one more status
_Commands = Any  # argparse's type for subcommands is private


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status, as listed in ``runner.errors``."""
    parsed = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        with refuse_unusable(getattr(parsed, "run", "what was looked at")):
            return command(parsed)
    except RunnerError as error:
        print(error, file=sys.stderr)
        return error.status
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runner.runs", description="Look at runs, remove old checkpoints, export weights."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_commands_for_roots(commands)
    _add_commands_for_runs(commands)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser


def _add_commands_for_roots(commands: _Commands) -> None:
    """The commands for all runs under a root."""
    listed = commands.add_parser("list", usage=_USAGE, help="all runs under a root, one line each")
    listed.set_defaults(command=_list)
    compared = commands.add_parser(
        "compare", usage=_USAGE, help="the parameters in which the runs differ, and their objective"
    )
    compared.add_argument("--png", metavar="FILE", help="draw learning curves, and the objective over each parameter")
    compared.add_argument("--html", metavar="FILE", help="the same with a sortable table, as one HTML file")
    compared.set_defaults(command=_compare)
    watched = commands.add_parser("watch", usage=_USAGE, help="the list, updated until Ctrl-C")
    watched.add_argument(
        "--interval", type=float, default=5.0, metavar="SECONDS", help="between two updates (default: 5)"
    )
    watched.set_defaults(command=_watch)
    for each in (listed, compared, watched):
        each.add_argument("root", nargs="?", default="outputs", help="their run.root (default: outputs)")
        each.add_argument(
            "--status",
            nargs="+",
            choices=listing.STATES,
            metavar="STATUS",
            help=f"only runs with one of these statuses: {', '.join(listing.STATES)}",
        )
        each.add_argument("--experiment", metavar="NAME", help="only runs of this experiment")
        each.add_argument("--match", metavar="TEXT", help="only runs whose name contains this text")
    listed.add_argument("--sort", choices=listing.SORTS, default="name", help="sort by this column (default: name)")
    listed.add_argument("--reverse", action="store_true", help="in descending order")


def _add_commands_for_runs(commands: _Commands) -> None:
    """The commands for one run, or two."""
    showing = commands.add_parser("show", help="one run: configuration, attempts, checkpoints, result")
    showing.set_defaults(command=_show)
    differing = commands.add_parser("diff", help="how the configurations and the results of two runs differ")
    differing.set_defaults(command=_diff)
    auditing = commands.add_parser(
        "audit", help="whether each sample was used exactly once per epoch; exit status 1 if not"
    )
    auditing.set_defaults(command=_audit)
    pruning = commands.add_parser("prune", help="show which checkpoints are not needed; with --yes, remove them")
    pruning.add_argument("--last", type=int, default=2, metavar="N", help="keep the N newest (default and minimum: 2)")
    pruning.add_argument("--every-steps", type=int, metavar="N", help="keep one at every multiple of N steps")
    pruning.add_argument(
        "--best", type=int, default=1, metavar="N", help="keep the N best by the objective (default: 1)"
    )
    pruning.add_argument("--yes", action="store_true", help="remove them; without --yes nothing is changed")
    pruning.set_defaults(command=_prune)
    for each in (showing, auditing, pruning):
        each.add_argument("run", help="its directory, for example outputs/digits/base")
    differing.add_argument("a", metavar="run", help="a directory, for example outputs/digits/base")
    differing.add_argument("b", metavar="other", help="the directory of another")
    exporting = commands.add_parser("export", help="the weights of a checkpoint as a plain safetensors file")
    exporting.add_argument("run", help="its directory; append @best or @STEP for another checkpoint than the newest")
    exporting.add_argument("target", help="the file to write, a path or URL")
    exporting.add_argument("--force", action="store_true", help="overwrite the target")
    exporting.set_defaults(command=_export)


def _list(parsed: argparse.Namespace) -> int:
    runs = listing.sort_runs(listing.list_runs(parsed.root, _selection(parsed)), parsed.sort, reverse=parsed.reverse)
    return _print(parsed, [asdict(run) for run in runs], lambda _: listing.format_runs(runs))


def _watch(parsed: argparse.Namespace) -> int:
    from runner.runs.watch import watch

    watch(lambda: listing.list_runs(parsed.root, _selection(parsed)), interval=parsed.interval, as_json=parsed.json)
    return 0


def _compare(parsed: argparse.Namespace) -> int:
    comparison = compare.compare_runs(parsed.root, _selection(parsed))
    if parsed.png or parsed.html:
        from runner.runs import html_report

        html_report.write(comparison, png=parsed.png, html=parsed.html)
    return _print(parsed, comparison.plain(), lambda _: compare.format_comparison(comparison))


def _show(parsed: argparse.Namespace) -> int:
    return _print(parsed, show.details(RunDirectory.at(parsed.run)), show.format_details)


def _diff(parsed: argparse.Namespace) -> int:
    return _print(parsed, show.diff(RunDirectory.at(parsed.a), RunDirectory.at(parsed.b)), show.format_diff)


def _audit(parsed: argparse.Namespace) -> int:
    from runner.runs import audit

    proof, values = audit.audit(RunDirectory.at(parsed.run))
    _print(parsed, values, audit.format_audit)
    return 0 if proof.holds else 1


def _prune(parsed: argparse.Namespace) -> int:
    from runner.runs import prune

    rows = prune.prune(
        RunDirectory.at(parsed.run),
        last=parsed.last,
        every_steps=parsed.every_steps,
        best=parsed.best,
        remove=parsed.yes,
    )
    return _print(parsed, rows, lambda _: prune.format_prune(rows, removed=parsed.yes))


def _export(parsed: argparse.Namespace) -> int:
    from runner.runs import export

    return _print(parsed, export.export(parsed.run, parsed.target, force=parsed.force), export.format_export)


def _selection(parsed: argparse.Namespace) -> listing.Selection:
    return listing.Selection(parsed.status, parsed.experiment, parsed.match)


def _print(parsed: argparse.Namespace, values: Any, format_text: Callable[[Any], str]) -> int:
    """Print plain values as JSON for a program, or as text for a person."""
    print(json.dumps(_strict(values), indent=1) if parsed.json else printable(format_text(values)))
    return 0


def _strict(value: Any) -> Any:
    """``value`` with texts in place of NaN and infinity, which a configuration may have and JSON has not."""
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [*map(_strict, value)]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
