"""The runs under a root side by side, as a table, as a picture (learning curves, and the objective over each parameter
in which they differ), and as one HTML file.

Texts come from run directories: the picture renders none as a formula, and the page escapes them, needs no network, and
allows no script but its own.
"""

import base64
import io
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Any

from runner.config.identity import flatten
from runner.errors import ConfigError
from runner.hashing import sha256_digest
from runner.metrics import lines
from runner.run.drift import compare
from runner.run_facts import RunFacts, RunSummary, integer, map_runs, number
from runner.runs.listing import format_cell, format_setting, format_table
from runner.storage import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_COLUMNS = 8  # parameters in a table for people
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # of the best; told apart by the colour-blind, too
_REST = "#9a9a9a"
_COLUMNS = 3
_CURVES_INCHES, _PANEL_INCHES = 5.0, 3.0
_MOST_PANELS = 9
_FEW = 8  # up to so many values all get a tick; up to so many points a curve gets dots
_MOST_NAMED = 10  # categories whose names fit under a panel
_HUGE = 1e100
_DECADES = 30.0  # a ratio from which on a scale is logarithmic
_WIDEST = 44  # characters of a run in the legend, of all names under a panel
_AXES_STYLE: dict[Any, Any] = {"axes.grid": True, "axes.axisbelow": True, "grid.color": "#e4e4e4", "font.size": 9}
_AXES_STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
_AXES_STYLE |= {"axes.titlesize": 10, "axes.titlelocation": "left"}


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


def write(comparison: Comparison, *, png: str | None, html: str | None) -> None:
    """Write the picture as a PNG file, the page or both to paths or URLs, over existing files."""
    try:
        import matplotlib
    except ImportError as error:
        remedy = "pip install 'hydra-runner[compare]'"
        raise ConfigError(f"a picture needs matplotlib, which is not installed: {remedy} ({error})") from error
    runs = comparison.ranked()
    if not runs or comparison.objective is None:
        raise ConfigError(f"nothing to draw: no run under {comparison.root} has a value of its objective yet")
    target = io.BytesIO()
    with matplotlib.rc_context(_AXES_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of names in a script that no font has
        _draw(comparison, comparison.objective, runs).savefig(target, format="png", dpi=130)
    image = target.getvalue()
    if png:
        files.write(png, image)
    if html:
        files.write(html, render_html(comparison, image).encode())


def _bounded(value: float) -> float:
    """A number that matplotlib can multiply without leaving the range of floats."""
    return max(-_HUGE, min(value, _HUGE)) if abs(value) > 1 / _HUGE else 0.0


def _draw(comparison: Comparison, objective: Objective, runs: Sequence[Candidate]) -> "Figure":
    from matplotlib.figure import Figure

    shown = comparison.swept[:_MOST_PANELS]
    rows = -(-len(shown) // _COLUMNS)
    figure = Figure(figsize=(13, _CURVES_INCHES + _PANEL_INCHES * rows), layout="constrained")
    title = f"{format_cell(comparison.root)}: {len(runs)} runs by {comparison.title}"
    if without := len(comparison.runs) - len(runs):
        title += f", {without} without it"
    if hidden := len(comparison.swept) - len(shown):
        title += f"; {hidden} more parameters differ than are shown"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    if not rows:
        _curves(figure.add_subplot(), objective, runs, shown)
        return figure
    grid = figure.add_gridspec(2, height_ratios=[_CURVES_INCHES, _PANEL_INCHES * rows])
    above, below = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    _curves(above.add_subplot(), objective, runs, shown)
    for place, key in enumerate(shown, 1):
        _scatter(below.add_subplot(rows, _COLUMNS, place), objective, runs, key)
    return figure


def _curves(axes: "Axes", objective: Objective, runs: Sequence[Candidate], swept: Sequence[str]) -> None:
    """All learning curves, the best on top; a curve of few points has dots."""
    faint = max(0.15, min(0.8, 15 / len(runs)))
    curves = [[_bounded(value) for _, value in run.curve] for run in runs]
    for place, run in reversed([*enumerate(runs)]):
        alpha, width, order = (1.0, 1.8, 3) if place < len(_COLOURS) else (faint, 0.9, 2)
        look: dict[str, Any] = {"color": _colour(place), "alpha": alpha, "linewidth": width, "zorder": order}
        dots = "o" if len(run.curve) < _FEW else None
        axes.plot([step for step, _ in run.curve], curves[place], marker=dots, markersize=4, **look)
    for place, run in enumerate(runs[: len(_COLOURS)]):
        axes.plot([], [], color=_colour(place), linewidth=1.8, label=legend(run, swept))
    if len(runs) > len(_COLOURS):
        axes.plot([], [], color=_REST, linewidth=0.9, label=f"{len(runs) - len(_COLOURS)} others")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1), frameon=False, title="best first", alignment="left")
    axes.set_xlabel("step")
    axes.set_ylabel(format_cell(objective.metric))
    _fit(axes, objective, [value for curve in curves for value in curve])


def _scatter(axes: "Axes", objective: Objective, runs: Sequence[Candidate], key: str) -> None:
    """The objective over one parameter, by value where all are numbers; a triangle at the edge is a run beyond it."""
    positions = [_bounded(value) for run in runs if (value := number(run.parameters.get(key))) is not None]
    if len(positions) < len(runs):
        positions = _place_categories(axes, runs, key)
    else:
        if _spans_decades(positions):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        if len({*positions}) <= _FEW:
            axes.set_xticks(sorted({*positions}), [f"{value:g}" for value in sorted({*positions})])
    heights = [_bounded(run.summary.objective) for run in runs if run.summary.objective is not None]
    _fit(axes, objective, heights)
    bottom, top = axes.get_ylim()
    for place, (x, y) in reversed([*enumerate(zip(positions, heights, strict=True))]):
        size, alpha = (32, 1.0) if place < len(_COLOURS) else (18, 0.5)
        look: dict[str, Any] = {"color": _colour(place), "s": size, "alpha": alpha, "linewidths": 0, "zorder": 3}
        shown = min(max(y, bottom), top)
        axes.scatter(x, shown, marker="o" if shown == y else "^" if y > top else "v", clip_on=False, **look)
    axes.set_title(format_cell(key))


def _place_categories(axes: "Axes", runs: Sequence[Candidate], key: str) -> list[float]:
    """The horizontal position of each run: its category, numbers before texts, and a little apart within one."""
    texts = [run.parameter(key) or "(absent)" for run in runs]
    values = {text: run.parameters.get(key) for text, run in zip(texts, runs, strict=True)}
    names = sorted(values, key=lambda text: (number(values[text]) is None, number(values[text]) or 0.0, text))
    if len(names) <= _MOST_NAMED:
        leaves = [name.rpartition(".")[2] if key.endswith("_target_") else name for name in names]
        turned = sum(map(len, leaves)) > _WIDEST
        labels = [format_cell(name, widest=18) for name in leaves]
        axes.set_xticks(range(len(names)), labels, rotation=20 if turned else 0, ha="right" if turned else "center")
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(names)} values")
    axes.set_xlim(-0.6, len(names) - 0.4)
    seats = {name: place for place, name in enumerate(names)}
    return [seats[text] + 0.3 * ((place * 0.618) % 1 - 0.5) for place, text in enumerate(texts)]


def _fit(axes: "Axes", objective: Objective, values: Sequence[float]) -> None:
    """Choose a scale that separates the good runs: logarithmic if values span decades, without the worst outliers."""
    from matplotlib.ticker import LogLocator

    if not values:
        return
    ordered = sorted(values)
    few = len(ordered) // 20
    low, high = (ordered[0], ordered[-1 - few]) if objective.mode == "min" else (ordered[few], ordered[-1])
    if ordered[-1] - high <= high - low:
        high = ordered[-1]
    if low - ordered[0] <= high - low:
        low = ordered[0]
    if _spans_decades([low, high]):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_ylim(low / 1.2, high * 1.2)
    else:
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)


def _spans_decades(values: Sequence[float]) -> bool:
    """Whether a logarithmic scale suits better: the median is nearer to the geometric than to the arithmetic mean."""
    low, middle, high = min(values), sorted(values)[len(values) // 2], max(values)
    if low <= 0 or high / low < _DECADES:
        return False
    return len(values) == 2 or middle < ((low * high) ** 0.5 * (low + high) / 2) ** 0.5


def legend(run: Candidate, swept: Sequence[str]) -> str:
    """The objective and the parameters that differ; a full name would be too long, and mostly equal for all runs."""
    objective: Any = run.summary.objective
    leaf = {key: key.rpartition(".")[2] for key in swept}
    count = Counter(leaf.values())
    short = {key: leaf[key] if count[leaf[key]] == 1 else key for key in swept}
    parameters = ", ".join(f"{short[key]}={run.parameter(key)}" for key in swept if key in run.parameters)
    return f"{objective:.5g}  {format_cell(parameters or run.summary.run, widest=_WIDEST)}"


def _colour(place: int) -> str:
    return _COLOURS[place] if place < len(_COLOURS) else _REST


_SCRIPT = """
document.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
  const body = document.querySelector("tbody"), up = head.ariaSort !== "ascending";
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => {
    if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
    const order = key(a) - key(b);
    return (up ? 1 : -1) * (Number.isNaN(order) ? key(a).localeCompare(key(b)) : order);
  };
  document.querySelectorAll("th").forEach(other => other.ariaSort = "none");
  head.ariaSort = up ? "ascending" : "descending";
  body.append(...[...body.rows].sort(compare));
}));
document.querySelector("input").addEventListener("input", event => {
  for (const row of document.querySelectorAll("tbody tr")) row.hidden = !row.textContent.includes(event.target.value);
});
"""
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1300px; padding: 0 1em; color: #222; }
h1 { font-size: 1.3em; overflow-wrap: anywhere; }
img { max-width: 100%; } div { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .8em; text-align: left; white-space: nowrap; border-bottom: 1px solid #e4e4e4; }
th { cursor: pointer; border-bottom: 2px solid #888; user-select: none; }
th[aria-sort=ascending]::after { content: " \\2191"; } th[aria-sort=descending]::after { content: " \\2193"; }
td.number { text-align: right; }
tbody tr:hover { background: #f3f6fa; }
"""


def render_html(comparison: Comparison, png: bytes) -> str:
    """The page, with the picture in it and a table that can be sorted and searched."""
    digest = base64.b64encode(bytes.fromhex(sha256_digest(_SCRIPT.encode()))).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    columns = ["place", "run", "objective", "status", "step", *comparison.swept, "attempts", "last seen"]
    ranked = len(comparison.ranked())
    rows = []
    for place, run in enumerate(comparison.runs, 1):
        summary, settings = run.summary, run.parameters
        values = [place if place <= ranked else None, summary.run, summary.objective, summary.status, summary.step]
        for key in comparison.swept:
            values += [settings[key] if number(settings.get(key)) is not None else run.parameter(key)]
        rows.append(f"<tr>{''.join(map(_cell, [*values, summary.attempts, summary.seen]))}</tr>\n")
    name, objective = _text(comparison.root), _text(comparison.title)
    image = base64.b64encode(png).decode()
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta http-equiv="Content-Security-Policy" content="{policy}">
<style>{_STYLE}</style></head><body>
<h1>{name}</h1>
<p>{len(comparison.runs)} runs, best first by {objective}. A click on a column sorts by it.</p>
<img alt="Learning curves, and {objective} against each parameter" src="data:image/png;base64,{image}">
<p><input type="search" placeholder="only rows with this text" aria-label="only rows with this text"></p>
<div><table><thead><tr>{"".join(f"<th>{_text(column)}</th>" for column in columns)}</tr></thead><tbody>
{"".join(rows)}
</tbody></table></div>
<script>{_SCRIPT}</script></body></html>
"""


def _cell(value: Any) -> str:
    attributes = "" if number(value) is None else f' class="number" data-value="{value}"'
    return f"<td{attributes}>{_text(value)}</td>"


def _text(value: Any) -> str:
    return escape(format_cell(value, widest=200))
