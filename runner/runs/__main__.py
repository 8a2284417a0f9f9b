"""``python -m runner.runs``: commands that look at runs, remove old checkpoints, export weights, send metrics."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from runner.errors import RunnerError, printable
from runner.run.directory import RunDirectory
from runner.run_facts import RunSummary, refuse_unusable
from runner.runs import compare, listing


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status, as listed in ``runner.errors``."""
    parsed = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = parsed.command
    runs = [getattr(parsed, name) for name in ("run", "other") if name in parsed]
    try:
        with refuse_unusable(" or ".join(runs) or parsed.root):
            return command(parsed)
    except RunnerError as error:
        print(error, file=sys.stderr)
        return error.status
    except BrokenPipeError:  # the reader of the pipe has closed it
        return 0


def _parser() -> argparse.ArgumentParser:
    description = "Look at runs, remove old checkpoints, export weights, send metrics."
    parser = argparse.ArgumentParser(prog="python -m runner.runs", description=description)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Callable[[argparse.Namespace], int], text: str, *, run: str | None = None) -> Any:
        """Add a command for one run, or for all under a root; returns the function that adds an option to it."""
        # The root first: after --status it would count as a status.
        command = commands.add_parser(name, help=text, usage=None if run else "%(prog)s [root] [options]")
        command.set_defaults(command=function)
        option = command.add_argument
        option("--json", action="store_true", help="print JSON, for programs")
        store = "an option of fsspec for a remote store, as below run.storage_options; may be given several times"
        option("--storage-option", metavar="KEY=VALUE", action="append", default=[], help=store)
        if run:
            option("run", help=run)
            return option
        option("root", nargs="?", default="outputs", help="their run.root (default: outputs)")
        states = f"only runs with one of these statuses: {', '.join(listing.STATES)}"
        option("--status", nargs="+", choices=listing.STATES, metavar="STATUS", help=states)
        option("--experiment", metavar="NAME", help="only runs of this experiment")
        option("--match", metavar="TEXT", help="only runs whose name contains this text")
        return option

    option = add("list", _list, "all runs under a root, one line each")
    option("--sort", choices=listing.SORTS, default="name", help="sort by this column (default: name)")
    option("--reverse", action="store_true", help="in descending order")
    add("compare", _compare, "the parameters in which the runs differ, and their objective")
    _add_commands_for_runs(add)
    return parser


def _add_commands_for_runs(add: Callable[..., Any]) -> None:
    run = "its directory, for example outputs/digits/base"
    option = add("show", _show, "one run: configuration, attempts, checkpoints, result", run=run)
    option("--code", action="store_true", help="also what code each attempt ran: files, packages, commit, changes")
    option = add("audit", _audit, "whether each sample was used exactly once per epoch; exit status 1 if not", run=run)
    option("--jsonl", metavar="FILE", help="also write what each step was trained on, a line of JSON each (see docs)")
    option = add("prune", _prune, "show which checkpoints are not needed; with --yes, remove them", run=run)
    option("--last", type=int, default=2, metavar="N", help="keep the N newest (default and minimum: 2)")
    option("--every-steps", type=int, metavar="N", help="keep a checkpoint at every multiple of N steps")
    option("--best", type=int, default=1, metavar="N", help="keep the N best by the objective (default: 1)")
    option("--yes", action="store_true", help="remove them; without --yes nothing is changed")
    option = add("diff", _diff, "how the configurations, the code and the results of two runs differ", run=run)
    option("other", help="the directory of another run")
    option("--ledger", action="store_true", help="the first step that they trained on other data; exit status 1 if any")
    option = add("push", _push, "send the metrics of a run to a service outside, such as mlflow", run=run)
    option("writer", help="mlflow, wandb, trackio; or a name, with _target_=my_module.MyWriter")
    option("settings", nargs="*", metavar="KEY=VALUE", help="its settings, such as tracking_uri=http://...")
    run = "its directory; append @best or @STEP for another checkpoint than the newest"
    option = add("export", _export, "the weights of a checkpoint as a plain safetensors file", run=run)
    option("target", help="the file to write, a path or URL; with --hf, a folder")
    option("--hf", action="store_true", help="a folder for from_pretrained of transformers, diffusers or PEFT")
    option("--force", action="store_true", help="overwrite the target")


def _list(parsed: argparse.Namespace) -> int:
    runs = listing.sort_runs(
        listing.list_runs(parsed.root, _selection(parsed), _options(parsed)), parsed.sort, reverse=parsed.reverse
    )
    return _print(parsed, [asdict(run) for run in runs], lambda _: listing.format_runs(runs))


def _compare(parsed: argparse.Namespace) -> int:
    comparison = compare.compare_runs(parsed.root, _selection(parsed), _options(parsed))
    return _print(parsed, comparison, compare.format_comparison)


def _show(parsed: argparse.Namespace) -> int:
    run = listing.details(_directory(parsed), with_code=parsed.code)
    return _print(parsed, run, listing.format_details)


def _diff(parsed: argparse.Namespace) -> int:
    a, b = _directory(parsed), RunDirectory.at(parsed.other, _options(parsed))
    if not parsed.ledger:
        return _print(parsed, listing.diff(a, b), listing.format_diff)
    from runner.runs.audit import first_difference, format_difference

    difference = first_difference(a, b)
    _print(parsed, difference, format_difference)
    return 0 if difference["step"] is None else 1


def _audit(parsed: argparse.Namespace) -> int:
    from runner.runs import audit

    directory = _directory(parsed)
    values = audit.audit(directory)
    if parsed.jsonl:
        from runner.runs.audit import json_lines
        from runner.storage import files

        files.write(parsed.jsonl, "".join(json_lines(directory)).encode())
    _print(parsed, values, audit.format_audit)
    return 0 if values["holds"] else 1


def _prune(parsed: argparse.Namespace) -> int:
    from runner.runs.checkpoints import format_prune, prune

    keep = {"last": parsed.last, "every_steps": parsed.every_steps, "best": parsed.best}
    rows = prune(_directory(parsed), **keep, remove=parsed.yes)
    return _print(parsed, rows, lambda _: format_prune(rows, removed=parsed.yes))


def _export(parsed: argparse.Namespace) -> int:
    from runner.runs.checkpoints import export, export_pretrained

    write, content = (export_pretrained, "{files} files") if parsed.hf else (export, "sha256 {sha256}")
    values = write(parsed.run, parsed.target, force=parsed.force, options=_options(parsed))
    return _print(parsed, values, f"step {{step}} of {{run}}: {{bytes}} bytes, {content}".format_map)


def _push(parsed: argparse.Namespace) -> int:
    from runner.runs.push import push

    report = push(parsed.run, parsed.writer, parsed.settings, _options(parsed))
    return _print(parsed, report, "{sent} points sent; {writer} has all up to step {step}".format_map)


def _directory(parsed: argparse.Namespace) -> RunDirectory:
    return RunDirectory.at(parsed.run, _options(parsed))


def _options(parsed: argparse.Namespace) -> dict[str, Any]:
    return dict(map(listing.setting, parsed.storage_option))


def _selection(parsed: argparse.Namespace) -> Callable[[RunSummary], bool]:
    """Which runs to show. Only the name of an unreadable run is known."""
    return lambda run: (
        (parsed.status is None or run.state in parsed.status)
        and (parsed.experiment is None or run.experiment == parsed.experiment)
        and (parsed.match is None or parsed.match in run.run)
    )


def _print(parsed: argparse.Namespace, values: Any, format_text: Callable[[Any], str]) -> int:
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
