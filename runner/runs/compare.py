"""The runs under a root side by side: the parameters in which they differ, and their objective."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from runner.config.identity import compare, flatten
from runner.errors import ConfigError
from runner.metrics import lines
from runner.run_facts import RunFacts, RunSummary, map_runs, number
from runner.runs.listing import format_cell, format_setting, format_table

_MOST_COLUMNS = 8  # parameters in a table for people


class _Objective(NamedTuple):
    metric: str
    mode: str  # min or max

    def rank(self, value: float) -> float:
        return -value if self.mode == "max" else value


@dataclass(frozen=True, slots=True)
class _Candidate:
    summary: RunSummary  # an unfinished run has its best value so far
    objective: _Objective | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)  # dotted key -> value
    metrics: Mapping[str, float | None] = field(default_factory=dict)  # tag -> value in the result


def compare_runs(
    root: str, selects: Callable[[RunSummary], bool], options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The selected ``runs``, as plain values: first those with the objective that most of them have (``metric`` and
    ``mode``, or None), the best first. Each has the ``parameters`` among ``swept``, the keys in which they differ, and
    the ``metrics`` of its result. Raises ConfigError if there are no runs, StorageError for the root.
    """
    runs = [run for run in map_runs(root, _candidate, _Candidate, options) if selects(run.summary)]
    if not runs:
        raise ConfigError(f"none of the runs under {root} is selected by --status, --experiment and --match")
    objectives = Counter(run.objective for run in runs if run.objective is not None)
    objective = objectives.most_common(1)[0][0] if objectives else None

    def rank(run: _Candidate) -> tuple[bool, float]:
        value = run.summary.objective
        if objective is None or run.objective != objective or value is None:
            return True, 0.0
        return False, objective.rank(value)

    parameters = [run.parameters for run in runs if run.parameters] or [{}]
    differing = {change.key for each in parameters[1:] for change in compare(parameters[0], each)}
    by_values: dict[str, str] = {}  # only the first of keys with the same values, as interpolation makes them
    for key in dict.fromkeys(key for each in parameters for key in each if key in differing):
        by_values.setdefault(repr([each.get(key) for each in parameters]), key)
    swept = [*by_values.values()]
    rows = []
    for run in sorted(runs, key=rank):
        values = {key: run.parameters[key] for key in swept if key in run.parameters}
        rows.append({**asdict(run.summary), "parameters": values, "metrics": run.metrics})
    metric, mode = objective or (None, None)
    return {"root": root, "metric": metric, "mode": mode, "swept": swept, "runs": rows}


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """The values of ``compare_runs`` as a table, with a line that explains it."""
    swept, metric = comparison["swept"], comparison["metric"]
    columns = swept[:_MOST_COLUMNS]
    rows = [{**{k: format_setting(v) for k, v in run["parameters"].items()}, **run} for run in comparison["runs"]]
    goal = f"{format_cell(metric)} ({comparison['mode']})" if metric else "no objective: none has a metric for it"
    text = [format_table(rows, ["run", "objective", "status", "step", *columns]), ""]
    text.append(f"{len(rows)} runs, best first by {goal}.")
    if not swept:
        text.append("No parameter differs between them.")
    if len(columns) < len(swept):
        more = ", ".join(map(format_cell, swept[len(columns) :]))
        text.append(f"They also differ in {more}: choose runs with --experiment or --match, or see --json.")
    return "\n".join(text)


def _candidate(path: str, facts: RunFacts) -> _Candidate:
    summary, parameters = facts.summary(path), flatten(facts.identity)
    metrics = (facts.result or {}).get("metrics", {})
    configured = facts.identity.get("objective") or {}
    metric, mode = configured.get("metric"), configured.get("mode")
    if not isinstance(metric, str) or mode not in ("min", "max"):
        return _Candidate(summary, None, parameters, metrics)
    objective = _Objective(metric, mode)
    if summary.objective is None:
        values = [number(value) for _, value in lines.curve(facts.directory.location, metric)]
        best = min((value for value in values if value is not None), key=objective.rank, default=None)
        summary = replace(summary, objective=best)
    return _Candidate(summary, objective, parameters, metrics)
