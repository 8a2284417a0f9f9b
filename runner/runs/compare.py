"""The runs under a root side by side: as a table, and as a picture of their learning curves and of the objective over
each parameter in which they differ.
"""

import io
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from runner.config.identity import flatten
from runner.errors import ConfigError
from runner.metrics import lines
from runner.run.drift import compare
from runner.run_facts import RunFacts, RunSummary, integer, map_runs, number
from runner.runs.listing import format_cell, format_setting, format_table
from runner.storage import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_COLUMNS = 8  # parameters in a table for people
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # of the best runs, safe for the colour-blind
_REST = "#bbbbbb"
_PANELS_PER_ROW, _MOST_PANELS = 3, 9
_FEW_POINTS = 8  # of a curve that gets dots
_MOST_NAMED = 10  # categories whose names fit under a panel
_WIDEST = 44  # characters of a run in the legend
_HUGE = 1e100  # matplotlib multiplies values, which must stay floats


@dataclass(frozen=True, slots=True)
class Objective:
    """The metric by which runs are compared; ``mode`` is min or max."""

    metric: str
    mode: str

    def rank(self, value: float) -> float:
        return -value if self.mode == "max" else value


@dataclass(frozen=True, slots=True)
class Candidate:
    """One run to compare."""

    summary: RunSummary  # with the best value so far if the run is not finished
    objective: Objective | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)  # by dotted key
    curve: Sequence[tuple[int, float]] = ()  # the objective over the steps
    metrics: Mapping[str, float | None] = field(default_factory=dict)  # of the result

    def parameter(self, key: str) -> str:
        return format_setting(self.parameters[key]) if key in self.parameters else ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs sorted by the objective that most of them have, the best first; then runs without a value for it."""

    root: str
    objective: Objective | None
    swept: Sequence[str]  # the parameters in which the runs differ
    runs: Sequence[Candidate]

    def ranked(self) -> list[Candidate]:
        return [run for run in self.runs if run.objective == self.objective and run.summary.objective is not None]

    @property
    def title(self) -> str:
        goal = self.objective
        return f"{format_cell(goal.metric)} ({goal.mode})" if goal else "no objective: none has a metric for it"

    def plain(self) -> dict[str, Any]:
        goal = asdict(self.objective) if self.objective else {"metric": None, "mode": None}
        runs = []
        for run in self.runs:
            parameters = {key: run.parameters[key] for key in self.swept if key in run.parameters}
            runs.append({**asdict(run.summary), "parameters": parameters})
        return {"root": self.root, **goal, "swept": list(self.swept), "runs": runs}


def compare_runs(root: str, selects: Callable[[RunSummary], bool]) -> Comparison:
    """Read the selected runs. Raises ConfigError if there are none, StorageError for the root."""
    runs = [run for run in map_runs(root, _candidate, Candidate) if selects(run.summary)]
    if not runs:
        raise ConfigError(f"none of the runs under {root} is selected by --status, --experiment and --match")
    objectives = Counter(run.objective for run in runs if run.objective is not None)
    objective = objectives.most_common(1)[0][0] if objectives else None

    def rank(run: Candidate) -> tuple[bool, float]:
        value = run.summary.objective
        if objective is None or run.objective != objective or value is None:
            return True, 0.0
        return False, objective.rank(value)

    parameters = [run.parameters for run in runs if run.parameters] or [{}]
    differing = {change.key for each in parameters[1:] for change in compare(parameters[0], each)}
    swept: dict[str, str] = {}  # one key of those with the same values, as by interpolation
    for key in dict.fromkeys(key for each in parameters for key in each if key in differing):
        swept.setdefault(repr([each.get(key) for each in parameters]), key)
    return Comparison(root, objective, [*swept.values()], sorted(runs, key=rank))


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
    metrics = (facts.result or {}).get("metrics", {})
    configured = facts.identity.get("objective") or {}
    metric, mode = configured.get("metric"), configured.get("mode")
    if not isinstance(metric, str) or mode not in ("min", "max"):
        return Candidate(summary, None, parameters, metrics=metrics)
    objective = Objective(metric, mode)
    points = ((integer(step), number(value)) for step, value in lines.curve(facts.directory.location, metric))
    curve = [(step, value) for step, value in points if step is not None and value is not None]
    if summary.objective is None and curve:
        summary = replace(summary, objective=min((value for _, value in curve), key=objective.rank))
    return Candidate(summary, objective, parameters, curve, metrics)


def draw(comparison: Comparison, target: str) -> None:
    """Write the picture as a PNG file to a path or URL. Raises ConfigError without matplotlib or values to draw."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        remedy = "pip install 'hydra-runner[compare]'"
        raise ConfigError(f"a picture needs matplotlib, which is not installed: {remedy} ({error})") from error
    runs = comparison.ranked()
    if not runs or comparison.objective is None:
        raise ConfigError(f"nothing to draw: no run under {comparison.root} has a value of its objective yet")
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of names in a script that no font has
        _figure(comparison, comparison.objective, runs).savefig(image, format="png", dpi=130)
    files.write(target, image.getvalue())


def _figure(comparison: Comparison, objective: Objective, runs: Sequence[Candidate]) -> "Figure":
    from matplotlib.figure import Figure

    shown = comparison.swept[:_MOST_PANELS]
    rows = -(-len(shown) // _PANELS_PER_ROW)
    figure = Figure(figsize=(13, 5 + 3 * rows), layout="constrained")
    title = f"{_text(comparison.root)}: {len(runs)} runs by {_text(comparison.title)}"
    if hidden := len(comparison.swept) - len(shown):
        title += f"; {hidden} more parameters differ than are shown"
    figure.suptitle(title, x=0.01, ha="left")
    grid = figure.add_gridspec(2, height_ratios=[5, 3 * rows or 0.01])
    above, below = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    _draw_curves(above.add_subplot(), objective, runs, shown)
    for place, key in enumerate(shown, 1):
        _draw_panel(below.add_subplot(rows, _PANELS_PER_ROW, place), objective, runs, key)
    return figure


def _draw_curves(axes: "Axes", objective: Objective, runs: Sequence[Candidate], swept: Sequence[str]) -> None:
    """All learning curves, the best on top and in the legend."""
    curves = [[_bounded(value) for _, value in run.curve] for run in runs]
    for place, run in reversed([*enumerate(runs)]):
        label = legend(run, swept) if place < len(_COLOURS) else None
        dots = "o" if len(run.curve) < _FEW_POINTS else None
        steps = [step for step, _ in run.curve]
        axes.plot(steps, curves[place], color=_colour(place), label=label, marker=dots, markersize=4)
    axes.legend(*(part[::-1] for part in axes.get_legend_handles_labels()), loc="upper left", bbox_to_anchor=(1, 1))
    axes.set(xlabel="step", ylabel=_text(objective.metric))
    _scale(axes, objective, [value for curve in curves for value in curve])


def _draw_panel(axes: "Axes", objective: Objective, runs: Sequence[Candidate], key: str) -> None:
    """The objective over one parameter, by value where all are numbers. Worse runs than the axis has are at its end."""
    numbers = [value for run in runs if (value := number(run.parameters.get(key))) is not None]
    if len(numbers) == len(runs):
        places = [*map(_bounded, numbers)]
        axes.set_xscale("log" if _is_wide(places) else "linear")
    else:
        texts = [run.parameter(key) or "(absent)" for run in runs]
        names = sorted({*texts})
        places = [*map(names.index, texts)]
        labels = [_text(name.rpartition(".")[2] if key.endswith("_target_") else name, widest=18) for name in names]
        named = len(names) <= _MOST_NAMED
        axes.set_xticks(range(len(names)) if named else [], labels if named else [], rotation=20, ha="right")
    heights = [_bounded(run.summary.objective) for run in runs if run.summary.objective is not None]
    _scale(axes, objective, heights)
    bottom, top = axes.get_ylim()
    heights = [min(max(height, bottom), top) for height in heights]
    colours = [*map(_colour, range(len(runs)))]
    axes.scatter(places[::-1], heights[::-1], c=colours[::-1], clip_on=False, zorder=3)  # the best on top
    axes.set_title(_text(key), loc="left")


def _scale(axes: "Axes", objective: Objective, values: Sequence[float]) -> None:
    """An axis for the objective on which good runs can be told apart: without the worst twentieth of the values."""
    best_first = sorted(values, key=objective.rank)
    if not best_first:
        return
    low, high = sorted((best_first[0], best_first[(len(best_first) - 1) * 19 // 20]))
    if _is_wide([low, high]):
        axes.set_yscale("log")
        axes.set_ylim(low / 1.2, high * 1.2)
    else:
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)


def _is_wide(values: Sequence[float]) -> bool:
    """Whether positive values span so much that a logarithmic scale suits better."""
    return min(values) > 0 and max(values) > 30 * min(values)


def _bounded(value: float) -> float:
    return max(-_HUGE, min(value, _HUGE)) if abs(value) > 1 / _HUGE else 0.0


def legend(run: Candidate, swept: Sequence[str]) -> str:
    """The objective and the parameters that differ, by the last part of their keys where it is unique."""
    objective: Any = run.summary.objective
    leaf = {key: key.rpartition(".")[2] for key in swept}
    count = Counter(leaf.values())
    short = {key: leaf[key] if count[leaf[key]] == 1 else key for key in swept}
    parameters = ", ".join(f"{short[key]}={run.parameter(key)}" for key in swept if key in run.parameters)
    return f"{objective:.5g}  {_text(parameters or run.summary.run, widest=_WIDEST)}"


def _colour(place: int) -> str:
    return _COLOURS[place] if place < len(_COLOURS) else _REST


def _text(value: str, *, widest: int = 200) -> str:
    """A text of a run directory for matplotlib, which would render what is between dollars as a formula."""
    return format_cell(value, widest=widest).replace("$", r"\$")
