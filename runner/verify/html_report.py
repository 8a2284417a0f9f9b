"""A verdict as one HTML file without scripts and links: the loss curves, and a lane for each attempt."""

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from html import escape

from runner.errors import printable
from runner.storage import files
from runner.verify.campaign import summary
from runner.verify.execution import AttemptTrace, RunTrace
from runner.verify.verdict import Verdict

_WIDTH, _HEIGHT, _LEFT, _LANE = 1000, 300, 86, 26
_PALETTE = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # distinct for the colour-blind, too
_BASE = "#0072b2"
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222; }
h1 { font-size: 1.3em; } h2 { font-size: 1.05em; margin-top: 1.6em; }
.verdict { display: inline-block; color: white; padding: .1em .6em; border-radius: .3em; }
.pass { background: #1a7f37; } .fail { background: #b42318; }
pre { background: #f6f6f6; padding: .8em 1em; white-space: pre-wrap; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: #444; }
"""


def write(verdict: Verdict, path: str) -> Verdict:
    """Write the report to a path or URL; returns the verdict with that path. Raises StorageError."""
    named = replace(verdict, html=path)
    files.write(path, page(named).encode())
    return named


def page(verdict: Verdict) -> str:
    """The HTML of the report."""
    word = "PASS" if verdict.holds else "FAIL"
    command = escape(printable(shlex.join(verdict.command)))
    tried = "".join(f"<li>{escape(printable(line))}</li>" for line in verdict.tried)
    repetitions = f"<h2>Repetitions to find the cause</h2><ol>{tried}</ol>" if tried else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{word}: {command}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{_STYLE}</style></head><body>
<h1><span class="verdict {word.lower()}">{word}</span> {command}</h1>
<pre>{escape(verdict.text())}</pre>
<h2>Loss: undisturbed (broad, blue), and above it every attempt of the killed run</h2>
{_curves(verdict)}
<h2>Attempts</h2>
{_lanes(verdict)}
{repetitions}
</body></html>
"""


def _curves(verdict: Verdict) -> str:
    base = _losses(verdict.undisturbed.attempts[0])
    attempts = [*map(_losses, verdict.killed.attempts)]
    values = [loss for points in (base, *attempts) for _, loss in points if math.isfinite(loss)]
    if not values:
        return "<p>No step was done.</p>"
    low, high = min(values), max(values)
    scale = _Scale(verdict, low, high if high > low else low + 1)
    drawn = [scale.line(base, _BASE, 6, 0.35)]
    drawn += [scale.line(points, _colour(number), 1.5, 1.0) for number, points in enumerate(attempts)]
    return _picture(_HEIGHT + 40, scale.axes(), *drawn, _mark(verdict, scale, "first difference"))


def _losses(attempt: AttemptTrace) -> list[tuple[int, float]]:
    """Step and loss."""
    return [(event["step"], event["metrics"]["loss"]) for event in attempt.select("step") if "loss" in event["metrics"]]


def _lanes(verdict: Verdict) -> str:
    scale = _Scale(verdict, 0.0, 1.0)
    rows = [(verdict.undisturbed.attempts[0], _BASE, "undisturbed")]
    rows += [(attempt, _colour(n), f"attempt {n + 1}") for n, attempt in enumerate(verdict.killed.attempts)]
    height = _LANE * len(rows)
    drawn = [_lane(scale, number * _LANE, *row) for number, row in enumerate(rows)]
    return _picture(height + 30, *drawn, scale.ticks(height), _mark(verdict, scale, height=height))


def _picture(height: float, *drawn: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{"".join(drawn)}</svg>'


def _lane(scale: "_Scale", top: float, attempt: AttemptTrace, colour: str, name: str) -> str:
    start, end, middle = scale.x(attempt.first), scale.x(attempt.last), top + _LANE / 2
    size = f'x="{start:.1f}" y="{top + 6}" width="{max(end - start, 2):.1f}" height="{_LANE - 12}"'
    parts = [
        f"<title>{escape(summary(attempt))}</title>",
        f'<text x="0" y="{middle + 4}">{escape(name)}</text>',
        f'<rect {size} fill="{colour}" opacity=".75"/>',
    ]
    if attempt.killed:
        parts.append(f'<text x="{end + 3:.1f}" y="{middle + 5}">&#10007; {escape(attempt.killed)}</text>')
    return f"<g>{''.join(parts)}</g>"


def _mark(verdict: Verdict, scale: "_Scale", label: str = "", *, height: float = _HEIGHT) -> str:
    """A vertical line at the first difference."""
    if verdict.difference is None:
        return ""
    x = scale.x(verdict.difference.step)
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="#b42318" stroke-dasharray="4 3"/>'
    return f'{line}<text x="{x + 4:.1f}" y="12" fill="#b42318">{label}</text>'


class _Scale:
    """From steps and losses to pixels."""

    def __init__(self, verdict: Verdict, low: float, high: float) -> None:
        runs: Iterable[RunTrace] = (verdict.undisturbed, verdict.killed)
        self.steps = max((attempt.last for run in runs for attempt in run.attempts), default=0) or 1
        self.low, self.high = low, high

    def x(self, step: float) -> float:
        """Pixels from the left."""
        return _LEFT + (_WIDTH - _LEFT - 110) * step / self.steps

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return 10 + (_HEIGHT - 20) * (self.high - value) / (self.high - self.low)

    def line(self, points: Sequence[tuple[int, float]], colour: str, width: float, opacity: float) -> str:
        """A curve of (step, value), without values that are not finite."""
        places = " ".join(f"{self.x(step):.1f},{self.y(loss):.1f}" for step, loss in points if math.isfinite(loss))
        style = f'fill="none" stroke="{colour}" stroke-width="{width}" opacity="{opacity}" stroke-linejoin="round"'
        return f'<polyline points="{places}" {style}/>'

    def axes(self) -> str:
        """Horizontal lines with their values, and steps."""
        values = [self.low + (self.high - self.low) * part / 4 for part in range(5)]
        rows = "".join(
            f'<line x1="{_LEFT}" x2="{self.x(self.steps):.1f}" y1="{self.y(value):.1f}" y2="{self.y(value):.1f}" '
            f'stroke="#e4e4e4"/><text x="{_LEFT - 8}" y="{self.y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
            for value in values
        )
        return rows + self.ticks(_HEIGHT)

    def ticks(self, top: float) -> str:
        """Numbers of steps below a picture."""
        steps = sorted({round(self.steps * part / 8) for part in range(9)})
        marks = "".join(f'<text x="{self.x(s):.1f}" y="{top + 16}" text-anchor="middle">{s}</text>' for s in steps)
        return f'{marks}<text x="{self.x(self.steps) + 30:.1f}" y="{top + 16}">step</text>'


def _colour(number: int) -> str:
    return _PALETTE[number % len(_PALETTE)]
