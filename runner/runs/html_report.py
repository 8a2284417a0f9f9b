"""A comparison as a picture (learning curves, and the objective over each parameter), and as one HTML file.

Only the best few runs are coloured, however many there are. Texts come from run directories: the picture renders none
as a formula, and the page escapes them, needs no network, and allows no script but its own.
"""

import base64
import io
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any

from runner.errors import ConfigError
from runner.hashing import sha256_digest
from runner.run_facts import number
from runner.runs.compare import Candidate, Comparison, Objective
from runner.runs.listing import format_cell
from runner.storage import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
_AXES_STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
}


def write(comparison: Comparison, *, png: str | None, html: str | None) -> None:
    """Write the picture, the page or both to paths or URLs, over existing files. Raises ConfigError if there is nothing
    to draw, or no matplotlib to draw with, and StorageError.
    """
    image = render_png(comparison)
    if png:
        files.write(png, image)
    if html:
        files.write(html, render_html(comparison, image).encode())


def render_png(comparison: Comparison) -> bytes:
    """The picture as a PNG file. Raises ConfigError without matplotlib, or if no run has a value of the objective."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            f"a picture needs matplotlib, which is not installed: pip install 'hydra-runner[compare]' ({error})"
        ) from error
    runs = [*map(_bounded, comparison.ranked())]
    if not runs or comparison.objective is None:
        raise ConfigError(f"nothing to draw: no run under {comparison.root} has a value of its objective yet")
    target = io.BytesIO()
    with matplotlib.rc_context(_AXES_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of names in a script that no font has
        _draw(comparison, comparison.objective, runs).savefig(target, format="png", dpi=130)
    return target.getvalue()


def _bounded(run: Candidate) -> Candidate:
    """The run with numbers that matplotlib can multiply without leaving the range of floats."""

    def bound(value: Any) -> Any:
        if number(value) is None:
            return value
        return max(-_HUGE, min(value, _HUGE)) if abs(value) > 1 / _HUGE else 0.0

    summary = replace(run.summary, objective=bound(run.summary.objective))
    parameters = {key: bound(value) for key, value in run.parameters.items()}
    return Candidate(summary, run.objective, parameters, [(step, bound(value)) for step, value in run.curve])


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
    for place, run in reversed([*enumerate(runs)]):
        best = place < len(_COLOURS)
        axes.plot(
            [step for step, _ in run.curve],
            [value for _, value in run.curve],
            color=_colour(place),
            alpha=1.0 if best else faint,
            linewidth=1.8 if best else 0.9,
            marker="o" if len(run.curve) < _FEW else None,
            markersize=4,
            zorder=3 if best else 2,
        )
    for place, run in enumerate(runs[: len(_COLOURS)]):
        axes.plot([], [], color=_colour(place), linewidth=1.8, label=legend(run, swept))
    if len(runs) > len(_COLOURS):
        axes.plot([], [], color=_REST, linewidth=0.9, label=f"{len(runs) - len(_COLOURS)} others")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1), frameon=False, title="best first", alignment="left")
    axes.set_xlabel("step")
    axes.set_ylabel(format_cell(objective.metric))
    _fit(axes, objective, [value for run in runs for _, value in run.curve])


def _scatter(axes: "Axes", objective: Objective, runs: Sequence[Candidate], key: str) -> None:
    """The objective of each run over one parameter: by value where all are numbers, else side by side. A triangle
    stands at the edge for a run beyond it.
    """
    numbers = [value for run in runs if (value := number(run.parameters.get(key))) is not None]
    positions = _place_numbers(axes, numbers) if len(numbers) == len(runs) else _place_categories(axes, runs, key)
    heights = [run.summary.objective for run in runs if run.summary.objective is not None]
    _fit(axes, objective, heights)
    bottom, top = axes.get_ylim()
    for place, (x, y) in reversed([*enumerate(zip(positions, heights, strict=True))]):
        best = place < len(_COLOURS)
        shown = min(max(y, bottom), top)
        axes.scatter(
            x,
            shown,
            color=_colour(place),
            marker="o" if shown == y else "^" if y > top else "v",
            s=32 if best else 18,
            alpha=1 if best else 0.5,
            linewidths=0,
            clip_on=False,
            zorder=3,
        )
    axes.set_title(format_cell(key))


def _place_numbers(axes: "Axes", values: Sequence[float]) -> Sequence[float]:
    """The horizontal position of each run: the value of its parameter."""
    if _spans_decades(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    if len({*values}) <= _FEW:
        axes.set_xticks(sorted({*values}), [f"{value:g}" for value in sorted({*values})])
    return values


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
img { max-width: 100%; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .8em; text-align: left; white-space: nowrap; border-bottom: 1px solid #e4e4e4; }
th { cursor: pointer; border-bottom: 2px solid #888; user-select: none; }
th[aria-sort=ascending]::after { content: " \\2191"; }
th[aria-sort=descending]::after { content: " \\2193"; }
td.number { text-align: right; }
tbody tr:hover { background: #f3f6fa; }
"""


def render_html(comparison: Comparison, png: bytes) -> str:
    """The page, with the picture in it and a table that can be sorted and searched."""
    digest = base64.b64encode(bytes.fromhex(sha256_digest(_SCRIPT.encode()))).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    columns = ["place", "run", "objective", "status", "step", *comparison.swept, "attempts", "last seen"]
    ranked = len(comparison.ranked())
    rows = "\n".join(
        _row(run, comparison, place if place <= ranked else None) for place, run in enumerate(comparison.runs, 1)
    )
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
{rows}
</tbody></table></div>
<script>{_SCRIPT}</script></body></html>
"""


def _row(run: Candidate, comparison: Comparison, place: int | None) -> str:
    summary = run.summary
    parameters = [
        value if number(value := run.parameters.get(key, "")) is not None else run.parameter(key)
        for key in comparison.swept
    ]
    values = [place, summary.run, summary.objective, summary.status, summary.step]
    return f"<tr>{''.join(map(_cell, [*values, *parameters, summary.attempts, summary.seen]))}</tr>"


def _cell(value: Any) -> str:
    if number(value) is None:
        return f"<td>{_text(value)}</td>"
    return f'<td class="number" data-value="{value}">{_text(value)}</td>'


def _text(value: Any) -> str:
    return escape(format_cell(value, widest=200))
