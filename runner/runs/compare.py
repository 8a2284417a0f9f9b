"""The runs under a root side by side: the parameters in which they differ, and their objectives."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from runner.config.identity import flatten
from runner.errors import ConfigError
from runner.metrics import lines
from runner.run import drift
from runner.run.directory import RunDirectory
from runner.runs import listing
from runner.runs.listing import Facts, Overview, Selection, integer, number, of_each_run, overview

_MOST_COLUMNS = 8  # parameters in a table for people


@dataclass(frozen=True, slots=True)
class Goal:
    """What runs are compared by; ``mode`` is min or max."""

    metric: str
    mode: str

    def rank(self, value: float) -> float:
        """A sort key: smaller is better."""
        return -value if self.mode == "max" else value


@dataclass(frozen=True, slots=True)
class Candidate:
    """One run: its overview (with the best objective so far if it is not finished), its parameters by dotted key, and
    its objective over the steps.
    """

    line: Overview
    goal: Goal | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    curve: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs sorted by ``goal``, the objective that most of them have, the best first; then runs without a value for it.

    ``swept`` are the parameters in which the runs differ.
    """

    root: str
    goal: Goal | None
    swept: Sequence[str]
    runs: Sequence[Candidate]

    def ranked(self) -> list[Candidate]:
        """The runs that have a value for the goal."""
        return [run for run in self.runs if run.goal == self.goal and run.line.objective is not None]


def compare(root: str, selection: Selection) -> Comparison:
    """Read the selected runs. Raises ConfigError if there are none, StorageError for the root."""
    found = [run for run in of_each_run(root, _candidate, Candidate) if selection.takes(run.line)]
    if not found:
        raise ConfigError(f"none of the runs under {root} is selected by --status, --experiment and --match")
    goals = Counter(run.goal for run in found if run.goal is not None)
    goal = goals.most_common(1)[0][0] if goals else None

    def rank(run: Candidate) -> tuple[bool, float]:
        value = run.line.objective
        if goal is None or run.goal != goal or value is None:
            return True, 0.0
        return False, goal.rank(value)

    return Comparison(root, goal, _swept([run.parameters for run in found if run.parameters]), sorted(found, key=rank))


def plain(found: Comparison) -> dict[str, Any]:
    """The comparison as plain values, without the curves."""
    return {
        "root": found.root,
        "metric": found.goal.metric if found.goal else None,
        "mode": found.goal.mode if found.goal else None,
        "swept": list(found.swept),
        "runs": [
            {
                **asdict(run.line),
                "parameters": {key: run.parameters[key] for key in found.swept if key in run.parameters},
            }
            for run in found.runs
        ],
    }


def text(found: Comparison) -> str:
    """The comparison as a table, with a line that explains it."""
    shown = found.swept[:_MOST_COLUMNS]
    rows = [{**{key: parameter(run, key) for key in shown}, **asdict(run.line)} for run in found.runs]
    told = [listing.table(rows, ["run", "objective", "status", "step", *shown]), ""]
    told.append(f"{len(rows)} runs, best first by {title(found.goal)}.")
    if not found.swept:
        told.append("No parameter differs between them.")
    if len(shown) < len(found.swept):
        more = ", ".join(map(listing.cell, found.swept[len(shown) :]))
        told.append(f"They also differ in {more}: choose runs with --experiment or --match, or see --json.")
    return "\n".join(told)


def title(goal: Goal | None) -> str:
    """The goal in words."""
    return f"{listing.cell(goal.metric)} ({goal.mode})" if goal else "no objective: none has a metric for it"


def parameter(run: Candidate, key: str) -> str:
    """A parameter of a run as text; empty if the run has no such key."""
    return listing.value(run.parameters[key]) if key in run.parameters else ""


def _candidate(name: str, directory: RunDirectory) -> Candidate:
    facts = Facts.of(directory)
    line = overview(name, directory, facts)
    goal = _goal(facts.identity)
    if goal is None:
        return Candidate(line, None, flatten(facts.identity))
    told = ((integer(step), number(value)) for step, value in lines.curve(directory.location, goal.metric))
    curve = [(step, value) for step, value in told if step is not None and value is not None]
    if line.objective is None and curve:
        line = replace(line, objective=min((value for _, value in curve), key=goal.rank))
    return Candidate(line, goal, flatten(facts.identity), curve)


def _goal(identity: Mapping[str, Any]) -> Goal | None:
    told = identity.get("objective") or {}
    metric, mode = told.get("metric"), told.get("mode")
    return Goal(metric, mode) if isinstance(metric, str) and mode in ("min", "max") else None


def _swept(parameters: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values differ, in the order of the configuration. A key with the same values as an earlier one, as
    by an interpolation, is left out.
    """
    first, *others = parameters or [{}]
    differing = {difference.key for other in others for difference in drift.compare(first, other)}
    order = {key: None for each in parameters for key in each}
    chosen: dict[str, str] = {}
    for key in order:
        if key in differing:
            chosen.setdefault(repr([each.get(key) for each in parameters]), key)
    return [*chosen.values()]
