"""A comparison as a picture: learning curves, and the objective against each parameter. The one door of matplotlib.

However many runs there are, a few of them have colours: the best. Texts come from run directories, so none is taken
for a formula.
"""

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runner.errors import ConfigError
from runner.runs import screen
from runner.runs.compare import Candidate, Comparison, Goal, parameter, title
from runner.runs.overview import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # of the best; told apart by the colour-blind, too
_REST = "#9a9a9a"
_COLUMNS = 3
_MOST_PANELS = 9
_MOST_NAMED = 10  # categories whose names fit under a panel
_DECADES = 30.0  # a ratio from which on a scale is logarithmic
_WIDEST = 52  # characters of a run in the legend
_STYLE: dict[Any, Any] = {
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


def png(found: Comparison) -> bytes:
    """The picture as a PNG file. Raises ConfigError without matplotlib, or where no run has a value to be shown."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"a picture needs matplotlib, which is not installed: pip install 'hydra-runner[compare]' ({error})"
        ) from error
    runs = found.ranked()
    if not runs or found.goal is None:
        raise ConfigError(f"nothing to draw: no run under {found.root} has a value of its objective yet")
    shown = found.swept[:_MOST_PANELS]
    rows = -(-len(shown) // _COLUMNS)
    target = io.BytesIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of names in a script that no font has
        figure = Figure(figsize=(13, 5 + 3.2 * rows), layout="constrained")
        grid = figure.add_gridspec(1 + rows, _COLUMNS, height_ratios=[5, *[3.2] * rows])
        _curves(figure.add_subplot(grid[0, :]), found.goal, runs)
        for place, key in enumerate(shown):
            row, column = divmod(place, _COLUMNS)
            _scatter(figure.add_subplot(grid[1 + row, column]), found.goal, runs, key)
        figure.suptitle(_headline(found, runs), x=0.01, ha="left", fontsize=11)
        figure.savefig(target, format="png", dpi=130, metadata={"Software": None})
    return target.getvalue()


def _headline(found: Comparison, runs: Sequence[Candidate]) -> str:
    text = f"{screen.cell(found.root)}: {len(runs)} runs by {title(found.goal)}"
    without = len(found.runs) - len(runs)
    text += f", {without} without it" if without else ""
    hidden = len(found.swept) - _MOST_PANELS
    return text + (f"; {hidden} more parameters differ than are shown" if hidden > 0 else "")


def _curves(axes: "Axes", goal: Goal, runs: Sequence[Candidate]) -> None:
    """All learning curves, the best on top; a curve of one point is a dot."""
    faint = max(0.12, min(0.7, 12 / len(runs)))
    for place, run in reversed([*enumerate(runs)]):
        steps, values = [step for step, _ in run.curve], [value for _, value in run.curve]
        best = place < len(_COLOURS)
        axes.plot(
            steps,
            values,
            color=_colour(place),
            alpha=1.0 if best else faint,
            linewidth=1.8 if best else 0.9,
            marker="o" if len(run.curve) < 3 else None,
            markersize=4,
            zorder=3 + len(runs) - place if best else 2,
        )
    for place, run in enumerate(runs[: len(_COLOURS)]):
        axes.plot([], [], color=_colour(place), linewidth=1.8, label=_legend(run))
    if len(runs) > len(_COLOURS):
        axes.plot([], [], color=_REST, linewidth=0.9, label=f"{len(runs) - len(_COLOURS)} others")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, title="best first", alignment="left")
    axes.set_xlabel("step")
    axes.set_ylabel(screen.cell(goal.metric))
    _fit(axes, goal, [value for run in runs for _, value in run.curve])


def _scatter(axes: "Axes", goal: Goal, runs: Sequence[Candidate], key: str) -> None:
    """The objective of each run over one parameter: by value where all are numbers, else side by side."""
    numbers = [number(run.parameters.get(key)) for run in runs]
    known = [value for value in numbers if value is not None]
    positions: Sequence[float] = known
    if len(known) == len(runs):
        if min(known) > 0 and max(known) / min(known) >= _DECADES:
            axes.set_xscale("log")
    else:
        positions = _categories(axes, runs, key)
    heights = [run.line.objective for run in runs if run.line.objective is not None]
    for place, (x, y) in reversed([*enumerate(zip(positions, heights, strict=True))]):
        best = place < len(_COLOURS)
        axes.scatter(
            x, y, color=_colour(place), s=30 if best else 16, alpha=1 if best else 0.45, linewidths=0, zorder=3
        )
    axes.set_title(screen.cell(key))
    _fit(axes, goal, heights)


def _categories(axes: "Axes", runs: Sequence[Candidate], key: str) -> list[float]:
    """Where each run stands; numbers come before texts. Runs of one category stand a little apart."""
    texts = [parameter(run, key) or "(absent)" for run in runs]
    values = {text: run.parameters.get(key) for text, run in zip(texts, runs, strict=True)}
    names = sorted(values, key=lambda text: (number(values[text]) is None, number(values[text]) or 0.0, text))
    if len(names) <= _MOST_NAMED:
        turned = sum(map(len, names)) > 30
        labels = [screen.cell(name, widest=18) for name in names]
        axes.set_xticks(range(len(names)), labels, rotation=20 if turned else 0, ha="right" if turned else "center")
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(names)} values")
    axes.set_xlim(-0.6, len(names) - 0.4)
    seats = {name: place for place, name in enumerate(names)}
    return [seats[text] + 0.3 * ((place * 0.618) % 1 - 0.5) for place, text in enumerate(texts)]


def _fit(axes: "Axes", goal: Goal, values: Sequence[float]) -> None:
    """A scale on which good runs can be told apart: logarithmic over decades; those that went astray leave it."""
    if not values:
        return
    known = sorted(values)
    lowest, highest = known[0], known[-1]
    low, high = known[len(known) // 20], known[-1 - len(known) // 20]
    if goal.mode == "min":
        low = lowest
    else:
        high = highest
    if low > 0 and high / low >= _DECADES:
        axes.set_yscale("log")
        return
    margin = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    bottom = low - margin if low - lowest > high - low else lowest - margin
    top = high + margin if highest - high > high - low else highest + margin
    axes.set_ylim(bottom, top)


def _legend(run: Candidate) -> str:
    objective: Any = run.line.objective
    name = screen.cell(run.line.run)
    return f"{objective:.5g}  {name if len(name) <= _WIDEST else '...' + name[3 - _WIDEST :]}"


def _colour(place: int) -> str:
    return _COLOURS[place] if place < len(_COLOURS) else _REST
