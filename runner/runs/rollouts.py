"""The ledger beyond "every sample once": the rollouts of a task step by step, and the first difference of two runs."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from runner.data import ledger
from runner.data.ledger import LedgerLine, parse_rollouts
from runner.data.order import equal_runs
from runner.data.plan import Plan
from runner.errors import ConfigError
from runner.run.directory import RunDirectory
from runner.run_facts import RunFacts, refuse_unusable


def account(lines: Sequence[LedgerLine]) -> tuple[dict[str, Any] | None, list[str]]:
    """The number of samples whose rollouts were trained (and how many ``times``), dropped, or wait; and a message for
    each use that is a second or comes too early. None if there are no rollouts.
    """
    uses: list[tuple[int, int, str, int]] = []  # first and last position, what happened to them, in which step
    times: set[int] = set()
    for line in lines:
        if line.rollouts:
            _, trained, number, dropped = parse_rollouts(line.rollouts)
            uses += [(*span, "trained", line.step) for span in trained]
            uses += [(*span, "dropped", line.step) for span in dropped]
            times |= {number} if trained else set()
    if not any(line.rollouts for line in lines):
        return None, []
    uses.sort()
    ends = {line.step: line.last for line in lines}
    early = [use for use in uses if use[1] > ends[use[3]]]
    problems = [f"positions {a} to {b} were {use} in step {step}, before they were drawn" for a, b, use, step in early]
    begin = end = lines[0].first - 1
    counts, last = {"trained": 0, "dropped": 0}, ("", 0)
    for first, final, what, step in uses:
        if first <= end and last[1]:
            problems.append(
                f"positions {first} to {min(end, final)}: {last[0]} in step {last[1]}, {what} in step {step}"
            )
        counts[what] += max(0, final - max(first - 1, end))
        if final > end:
            end, last = final, (what, step)
    waiting = lines[-1].last - begin - sum(counts.values())
    return {**counts, "waiting": waiting, "times": sorted(times)}, problems


def _lines(directory: RunDirectory) -> tuple[list[LedgerLine], Plan | None]:
    """The lines that count of a run's ledger, and the plan of its data; None for an iterable."""
    location = directory.location
    segments = ledger.segments(location)
    if not segments:
        raise ConfigError(f"{location.url} has no ledger; nothing was trained in it yet, or by an older version")
    recipe = ledger.recipe(location, segments[-1].plan)
    with refuse_unusable(f"the ledger of {location.url}"):
        plan = None if recipe.get("kind") == "opaque" else Plan.of(recipe)
        facts = RunFacts(directory)
        return ledger.lineage(segments, committed=max(facts.step, facts.committed))[0], plan


def json_lines(directory: RunDirectory) -> Iterator[str]:
    """A line of JSON for each committed step: ``step``; ``first`` and ``last`` position; ``indices`` of the samples
    there in the data set (not for an iterable), of which those in ``substituted`` (position -> index) were replaced;
    and with rollouts their digest ``rollouts``, and the positions (ranges ``[first, last]``) ``trained``
    ``times`` times or ``dropped``.
    """
    lines, plan = _lines(directory)
    order = plan.order() if plan is not None else None
    for line in lines:
        values: dict[str, Any] = {"step": line.step, "first": line.first, "last": line.last}
        if plan is not None and order is not None:
            epochs, places = np.divmod(np.arange(line.first, line.last + 1), plan.epoch_size)
            values["indices"] = np.concatenate(
                [order(int(epochs[run.start]), places[run]) for run in equal_runs(epochs)]
            ).tolist()
        swaps = (text.replace(">", ":").split(":") for text in line.substitutions.split())
        values["substituted"] = {position: int(index) for position, _, index in swaps}
        if line.rollouts:
            digest, trained, times, dropped = parse_rollouts(line.rollouts)
            values |= {"rollouts": digest, "trained": trained, "times": times, "dropped": dropped}
        yield json.dumps(values) + "\n"


def first_difference(a: RunDirectory, b: RunDirectory) -> dict[str, Any]:
    """The first ``step`` that two runs trained on other data, with both lines of the ledger; None if there is none
    among the ``compared`` steps that both have.
    """
    pairs = [*zip(_lines(a)[0], _lines(b)[0], strict=False)]
    for first, second in pairs:
        if first != second:
            same = replace(first, rollouts=second.rollouts) == second
            kind = "the same samples with other rollouts" if same else "other samples"
            step = max(first.step, second.step)
            return {"step": step, "kind": kind, "a": str(first), "b": str(second), "compared": len(pairs)}
    return {"step": None, "kind": "", "a": "", "b": "", "compared": len(pairs)}


def format_difference(difference: dict[str, Any]) -> str:
    """The first difference as text."""
    if difference["step"] is None:
        return f"All {difference['compared']} steps that both runs have were trained on the same data."
    lines = f"  a  {difference['a']}\n  b  {difference['b']}"
    return f"step {difference['step']} is the first that differs: {difference['kind']}\n{lines}"
