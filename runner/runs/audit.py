"""The ledger of a run as a proof: whether every sample was used exactly once per epoch, what became of the rollouts of
a task, the data of each step, and the first difference between two runs.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any

import numpy as np

from runner.data import ledger
from runner.data.ledger import LedgerLine, Segment, check_exactly_once, parse_rollouts
from runner.data.order import equal_runs
from runner.data.plan import Plan
from runner.errors import ConfigError
from runner.run.directory import RunDirectory
from runner.run_facts import RunFacts, refuse_unusable
from runner.runs.listing import format_table


def audit(directory: RunDirectory) -> dict[str, Any]:
    """The verdict as plain values: the fields of ``LedgerReport``, whether it ``holds``, and more for ``format_audit``.
    Raises ConfigError for a run without a ledger.
    """
    segments, plan, begun, committed = _read(directory)
    with refuse_unusable(f"the ledger of {directory.location.url}"):
        report = check_exactly_once(segments, plan, begun=begun, committed=committed)
    plans = {segment.plan_digest for segment in segments if segment.plan_digest}
    if len(plans) > 1:
        report.problems.append(f"{len(plans)} plans of the data are in one ledger; judged by the newest")
    rollouts, problems = account(ledger.lineage(segments, committed=committed)[0])
    report.problems.extend(problems)
    return {
        "run": directory.name,
        **asdict(report),
        "holds": report.holds,
        "weighted": bool(plan and plan.weights),
        "attempts": len({segment.attempt for segment in segments}),
        "indexed": plan is not None,
        "damaged": [segment.damage for segment in segments if segment.damage],
        "rollouts": rollouts,
    }


def _read(directory: RunDirectory) -> tuple[list[Segment], Plan | None, int, int]:
    """The ledger of a run, the newest plan of its data (None for an iterable), and the steps after which it began and
    up to which it is committed.
    """
    location, facts = directory.location, RunFacts(directory)
    segments = ledger.read_segments(location)
    if not segments:
        raise ConfigError(f"{location.url} has no ledger; nothing was trained in it yet, or by an older version")
    digests = [segment.plan_digest for segment in segments if segment.plan_digest]
    recipe = ledger.read_recipe(location, digests[-1] if digests else "")
    with refuse_unusable(f"the ledger of {location.url}"):
        plan = None if recipe.get("kind") == "opaque" else Plan.of(recipe)
    return segments, plan, facts.start, max(facts.step, facts.committed)


def _lines(directory: RunDirectory) -> tuple[list[LedgerLine], Plan | None]:
    """The lines of a run's ledger that count, and the plan."""
    segments, plan, _, committed = _read(directory)
    return ledger.lineage(segments, committed=committed)[0], plan


def format_audit(audit: Mapping[str, Any]) -> str:
    """The values of the audit as text."""
    attempts = f"{audit['attempts']} attempt{'s' * (audit['attempts'] != 1)}"
    text = [f"{audit['run']}: {audit['steps']} steps, {audit['positions']} samples, {attempts}\n"]
    if audit["indexed"]:
        columns = ["source"] * ("source" in audit["epochs"][0]) if audit["epochs"] else []
        columns += ["epoch", "seen", "repeated", "missed", "substituted", "whole"]
        rows = []  # a row for each range of epochs that differ in nothing but their number
        for _, alike in groupby(audit["epochs"], key=lambda row: {**row, "epoch": None}):
            epochs = [*alike]
            first, last = epochs[0], epochs[-1]
            rows.append({**first, "epoch": f"{first['epoch']} to {last['epoch']}"} if len(epochs) > 1 else first)
        text.append(format_table(rows, columns))
    else:
        text.append("The data is an iterable: which samples it yielded, repeated or left out is not known here.")
    steps, samples, differing = audit["again"].values()
    text.append(f"\nDone again after kills: {steps} steps, {samples} samples, {differing} differing.")
    if rollouts := audit.get("rollouts"):
        times = " or ".join(map(str, rollouts["times"])) or "no"
        used = f"of {rollouts['trained']} samples trained, each {times} times; of {rollouts['dropped']} dropped"
        text.append(f"Rollouts: {used}; of {rollouts['waiting']} waiting.")
    text += audit["damaged"]  # these are no problem if their steps were done again
    if audit["problems"]:
        return "\n".join([*text, *audit["problems"]])
    if not audit["indexed"]:
        text.append("No step differed when done again.")
    else:
        whole = any(row["whole"] for row in audit["epochs"])
        unknown = " None is whole yet: nothing was repeated, and what will be missed is not known."
        often = "as often as data.weights say" if audit["weighted"] else "once"
        text.append(f"Every sample exactly {often} in every whole epoch.{'' if whole else unknown}")
    return "\n".join(text)


def account(lines: Sequence[LedgerLine]) -> tuple[dict[str, Any] | None, list[str]]:
    """The number of samples whose rollouts were trained (and how many ``times``), dropped, or wait; and a message for
    each use that comes too early or is a second use. None if there are no rollouts.
    """
    uses: list[tuple[int, int, str, int]] = []  # first and last position, how they were used, in which step
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


def json_lines(directory: RunDirectory) -> Iterator[str]:
    """A line of JSON for each committed step: ``step``; ``first`` and ``last`` position; ``indices`` of the samples
    there in the data set (not for an iterable); ``substituted``, the indices used instead at some positions;
    and with rollouts their digest ``rollouts``, and the positions (ranges ``[first, last]``) ``trained``
    ``times`` times or ``dropped``.
    """
    lines, plan = _lines(directory)
    order = plan.order() if plan is not None else None
    for line in lines:
        values: dict[str, Any] = {"step": line.step, "first": line.first, "last": line.last}
        if plan is not None and order is not None:
            epochs, places = np.divmod(np.arange(line.first, line.last + 1), plan.epoch_size)
            pieces = [order(int(epochs[run.start]), places[run]) for run in equal_runs(epochs)]
            values["indices"] = np.concatenate(pieces).tolist()
        substitutions = (text.replace(">", ":").split(":") for text in line.substitutions.split())
        values["substituted"] = {position: int(index) for position, _, index in substitutions}
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
