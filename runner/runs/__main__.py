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

_USAGE = "%(prog)s [root] [options]"  # the root first: after --status it would count as a status
_Add = Callable[..., Any]  # adds a command; returns the function that adds an option to it


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

    def add(name: str, function: Callable[[argparse.Namespace], int], text: str, **options: Any) -> Any:
        command = commands.add_parser(name, help=text, **options)
        command.set_defaults(command=function)
        command.add_argument("--json", action="store_true", help="print JSON, for programs")
        return command.add_argument

    _add_commands_for_roots(add)
    _add_commands_for_runs(add)
    return parser


def _add_commands_for_roots(add: _Add) -> None:
    """The commands for all runs under a root."""
    list_option = add("list", _list, "all runs under a root, one line each", usage=_USAGE)
    compare_option = add(
        "compare", _compare, "the parameters in which the runs differ, and their objective", usage=_USAGE
    )
    watch_option = add("watch", _watch, "the list, updated until Ctrl-C", usage=_USAGE)
    for option in (list_option, compare_option, watch_option):
        option("root", nargs="?", default="outputs", help="their run.root (default: outputs)")
        states = f"only runs with one of these statuses: {', '.join(listing.STATES)}"
        option("--status", nargs="+", choices=listing.STATES, metavar="STATUS", help=states)
        option("--experiment", metavar="NAME", help="only runs of this experiment")
        option("--match", metavar="TEXT", help="only runs whose name contains this text")
    list_option("--sort", choices=listing.SORTS, default="name", help="sort by this column (default: name)")
    list_option("--reverse", action="store_true", help="in descending order")
    compare_option("--png", metavar="FILE", help="draw learning curves, and the objective over each parameter")
    compare_option("--html", metavar="FILE", help="the picture with a sortable table, as one HTML file")
    interval = "between two updates (default: 5)"
    watch_option("--interval", type=float, default=5.0, metavar="SECONDS", help=interval)


def _add_commands_for_runs(add: _Add) -> None:
    """The commands for one run, or two."""
    show_option = add("show", _show, "one run: configuration, attempts, checkpoints, result")
    audit_help = "whether each sample was used exactly once per epoch; exit status 1 if not"
    audit_option = add("audit", _audit, audit_help)
    prune_option = add("prune", _prune, "show which checkpoints are not needed; with --yes, remove them")
    for option in (show_option, audit_option, prune_option):
        option("run", help="its directory, for example outputs/digits/base")
    prune_option("--last", type=int, default=2, metavar="N", help="keep the N newest (default and minimum: 2)")
    prune_option("--every-steps", type=int, metavar="N", help="keep a checkpoint at every multiple of N steps")
    prune_option("--best", type=int, default=1, metavar="N", help="keep the N best by the objective (default: 1)")
    prune_option("--yes", action="store_true", help="remove them; without --yes nothing is changed")
    diff_option = add("diff", _diff, "how the configurations and the results of two runs differ")
    diff_option("a", metavar="run", help="a directory, for example outputs/digits/base")
    diff_option("b", metavar="other", help="the directory of another run")
    export_option = add("export", _export, "the weights of a checkpoint as a plain safetensors file")
    export_option("run", help="its directory; append @best or @STEP for another checkpoint than the newest")
    export_option("target", help="the file to write, a path or URL")
    export_option("--force", action="store_true", help="overwrite the target")


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
