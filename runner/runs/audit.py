"""Whether a run used every sample exactly once per epoch, from its ledger."""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import groupby
from typing import Any

from runner.data import ledger
from runner.data.ledger import LedgerReport, check_exactly_once
from runner.data.plan import Plan
from runner.errors import ConfigError
from runner.run.directory import RunDirectory
from runner.run_facts import RunFacts, refuse_unusable
from runner.runs.listing import format_table
from runner.runs.rollouts import account


def audit(directory: RunDirectory) -> tuple[LedgerReport, dict[str, Any]]:
    """The report of the check, and the same as plain values. Raises ConfigError for a run without a ledger."""
    location = directory.location
    segments = ledger.segments(location)
    if not segments:
        raise ConfigError(f"{location.url} has no ledger; nothing was trained in it yet, or by an older version")
    plans = [segment.plan for segment in segments if segment.plan]
    recipe = ledger.recipe(location, plans[-1] if plans else "")
    facts, indexed = RunFacts(directory), recipe.get("kind") != "opaque"
    with refuse_unusable(f"the ledger of {location.url}"):
        plan, committed = Plan.of(recipe) if indexed else None, max(facts.step, facts.committed)
        report = check_exactly_once(segments, plan, begun=facts.start, committed=committed)
    if len({*plans}) > 1:
        report.problems.append(f"{len({*plans})} plans of the data are in one ledger; judged by the newest")
    rollouts, problems = account(ledger.lineage(segments, committed=committed)[0])
    report.problems.extend(problems)
    attempts = len({segment.attempt for segment in segments})
    damaged = [segment.damage for segment in segments if segment.damage]
    weighted = bool(plan is not None and plan.weights)
    values = {"run": directory.name, **asdict(report), "holds": report.holds, "weighted": weighted}
    return report, {**values, "attempts": attempts, "indexed": indexed, "damaged": damaged, "rollouts": rollouts}


def format_audit(audit: Mapping[str, Any]) -> str:
    """The values of the audit as text."""
    text = [f"{audit['run']}: {audit['steps']} steps, {audit['positions']} samples, {audit['attempts']} attempts\n"]
    if audit["indexed"]:
        columns = ["source"] * ("source" in audit["epochs"][0]) if audit["epochs"] else []
        columns += ["epoch", "seen", "repeated", "missed", "substituted", "whole"]
        rows = []  # one for each range of epochs that differ in nothing but their number
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
    text += audit["damaged"]  # no problem where those steps were done again
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
