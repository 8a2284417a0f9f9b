"""The runs under a root side by side: the parameters in which they differ, and their objectives."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from runner.config.identity import flatten
from runner.errors import ConfigError
from runner.metrics import lines
from runner.run.opening import compare
from runner.run_facts import RunFacts, RunSummary, integer, map_runs, number
from runner.runs.listing import Selection, format_cell, format_setting, format_table

_MOST_COLUMNS = 8  # parameters in a table for people


@dataclass(frozen=True, slots=True)
class Objective:
    """The metric by which runs are compared; ``mode`` is min or max."""

    metric: str
    mode: str

    def rank(self, value: float) -> float:
        """A sort key: smaller is better."""
        return -value if self.mode == "max" else value


@dataclass(frozen=True, slots=True)
class Candidate:
    """One run: its summary (with the best value so far if it is not finished), its parameters by dotted key, and its
    objective over the steps.
    """

    summary: RunSummary
    objective: Objective | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    curve: Sequence[tuple[int, float]] = ()

    def parameter(self, key: str) -> str:
        """A parameter as text; empty if the run has no such key."""
        return format_setting(self.parameters[key]) if key in self.parameters else ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs sorted by the objective that most of them have, the best first; then runs without a value for it.

    ``swept`` are the parameters in which the runs differ.
    """

    root: str
    objective: Objective | None
    swept: Sequence[str]
    runs: Sequence[Candidate]

    def ranked(self) -> list[Candidate]:
        """The runs that have a value for the objective."""
        return [run for run in self.runs if run.objective == self.objective and run.summary.objective is not None]

    @property
    def title(self) -> str:
        """The objective in words."""
        goal = self.objective
        return f"{format_cell(goal.metric)} ({goal.mode})" if goal else "no objective: none has a metric for it"

    def plain(self) -> dict[str, Any]:
        """The comparison as plain values, without the curves."""
        return {
            "root": self.root,
            "metric": self.objective.metric if self.objective else None,
            "mode": self.objective.mode if self.objective else None,
            "swept": list(self.swept),
            "runs": [
                {
                    **asdict(run.summary),
                    "parameters": {key: run.parameters[key] for key in self.swept if key in run.parameters},
                }
                for run in self.runs
            ],
        }


def compare_runs(root: str, selection: Selection) -> Comparison:
    """Read the selected runs. Raises ConfigError if there are none, StorageError for the root."""
    runs = [run for run in map_runs(root, _candidate, Candidate) if selection.includes(run.summary)]
    if not runs:
        raise ConfigError(f"none of the runs under {root} is selected by --status, --experiment and --match")
    objectives = Counter(run.objective for run in runs if run.objective is not None)
    objective = objectives.most_common(1)[0][0] if objectives else None

    def rank(run: Candidate) -> tuple[bool, float]:
        value = run.summary.objective
        if objective is None or run.objective != objective or value is None:
            return True, 0.0
        return False, objective.rank(value)

    swept = _swept([run.parameters for run in runs if run.parameters])
    return Comparison(root, objective, swept, sorted(runs, key=rank))


def format_comparison(comparison: Comparison) -> str:
    """The comparison as a table, with a line that explains it."""
    swept, shown = comparison.swept, comparison.swept[:_MOST_COLUMNS]
    rows = [{**{key: run.parameter(key) for key in shown}, **asdict(run.summary)} for run in comparison.runs]
    text = [format_table(rows, ["run", "objective", "status", "step", *shown]), ""]
    text.append(f"{len(rows)} runs, best first by {comparison.title}.")
    if not swept:
        text.append("No parameter differs between them.")
    if len(shown) < len(swept):
        more = ", ".join(map(format_cell, swept[len(shown) :]))
        text.append(f"They also differ in {more}: choose runs with --experiment or --match, or see --json.")
    return "\n".join(text)


def _candidate(path: str, facts: RunFacts) -> Candidate:
    summary, parameters = facts.summary(path), flatten(facts.identity)
    configured = facts.identity.get("objective") or {}
    metric, mode = configured.get("metric"), configured.get("mode")
    if not isinstance(metric, str) or mode not in ("min", "max"):
        return Candidate(summary, None, parameters)
    objective = Objective(metric, mode)
    points = ((integer(step), number(value)) for step, value in lines.curve(facts.directory.location, metric))
    curve = [(step, value) for step, value in points if step is not None and value is not None]
    if summary.objective is None and curve:
        summary = replace(summary, objective=min((value for _, value in curve), key=objective.rank))
    return Candidate(summary, objective, parameters, curve)


def _swept(parameters: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values differ, in the order of the configuration. A key with the same values as an earlier one, as
    by an interpolation, is left out.
    """
    first, *others = parameters or [{}]
    differing = {change.key for other in others for change in compare(first, other)}
    chosen: dict[str, str] = {}
    for key in dict.fromkeys(key for each in parameters for key in each):
        if key in differing:
            chosen.setdefault(repr([each.get(key) for each in parameters]), key)
    return [*chosen.values()]
