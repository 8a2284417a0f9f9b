"""A verdict as one HTML file without scripts and links: the loss curves, and a lane for each attempt."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from html import escape

from runner.errors import printable
from runner.storage import files
from runner.verify.campaign import summary
from runner.verify.execution import AttemptTrace
from runner.verify.verdict import Verdict

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _LANE = 1000, 300, 86, 110, 26  # pixels of the pictures, and of their margins
_BASE = "#0072b2"
_PALETTE = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # distinct for the colour-blind, too
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
    verdict = replace(verdict, html=path)
    files.write(path, page(verdict).encode())
    return verdict


def page(verdict: Verdict) -> str:
    """The HTML of the report."""
    word = "PASS" if verdict.holds else "FAIL"
    command = escape(printable(shlex.join(verdict.command)))
    tried = "".join(f"<li>{escape(printable(line))}</li>" for line in verdict.tried)
    repetitions = f"<h2>Repetitions to find the cause</h2><ol>{tried}</ol>" if tried else ""
    pictures = _Pictures(verdict)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{word}: {command}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{_STYLE}</style></head><body>
<h1><span class="verdict {word.lower()}">{word}</span> {command}</h1>
<pre>{escape(verdict.text())}</pre>
<h2>Loss: undisturbed (broad, blue), and above it every attempt of the killed run</h2>
{pictures.curves()}
<h2>Attempts</h2>
{pictures.lanes()}
{repetitions}
</body></html>
"""


class _Pictures:
    """The drawings, which share one axis of steps. ``rows`` are attempts with colour and name."""

    def __init__(self, verdict: Verdict) -> None:
        self._difference = verdict.difference
        self._rows = [(verdict.undisturbed.attempts[0], _BASE, "undisturbed")]
        self._rows += [
            (attempt, _PALETTE[number % len(_PALETTE)], f"attempt {number + 1}")
            for number, attempt in enumerate(verdict.killed.attempts)
        ]
        self._steps = max((attempt.last for attempt, _, _ in self._rows), default=0) or 1

    def curves(self) -> str:
        """Losses by step. Values that are not finite are left out."""
        curves = [
            [
                (event["step"], loss)
                for event in attempt.select("step")
                if math.isfinite(loss := _loss(event["metrics"]))
            ]
            for attempt, _, _ in self._rows
        ]
        values = [loss for points in curves for _, loss in points]
        if not values:
            return "<p>No step was done.</p>"
        low, high = min(values), max(values)
        high = high if high > low else low + 1

        def y(value: float) -> float:
            return 10 + (_HEIGHT - 20) * (high - value) / (high - low)

        drawn = []
        for value in (low + (high - low) * part / 4 for part in range(5)):
            ends = f'x1="{_LEFT}" x2="{self._x(self._steps):.1f}" y1="{y(value):.1f}" y2="{y(value):.1f}"'
            text = f'<text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
            drawn.append(f'<line {ends} stroke="#e4e4e4"/>{text}')
        for number, ((_, colour, _), points) in enumerate(zip(self._rows, curves, strict=True)):
            width, opacity = (1.5, 1) if number else (6, 0.35)
            places = " ".join(f"{self._x(step):.1f},{y(loss):.1f}" for step, loss in points)
            style = f'fill="none" stroke="{colour}" stroke-width="{width}" opacity="{opacity}" stroke-linejoin="round"'
            drawn.append(f'<polyline points="{places}" {style}/>')
        return self._picture(_HEIGHT, drawn, label="first difference")

    def lanes(self) -> str:
        """The steps of each attempt, and its end."""
        lanes = [self._lane(number * _LANE, *row) for number, row in enumerate(self._rows)]
        return self._picture(_LANE * len(self._rows), lanes)

    def _lane(self, top: float, attempt: AttemptTrace, colour: str, name: str) -> str:
        start, end = self._x(attempt.first), self._x(attempt.last)
        size = f'x="{start:.1f}" y="{top + 6}" width="{max(end - start, 2):.1f}" height="{_LANE - 12}"'
        text = f'<text x="0" y="{top + _LANE / 2 + 4}">{escape(name)}</text>'
        bar = f'<rect {size} fill="{colour}" opacity=".75"/>'
        kill = f"&#10007; {escape(attempt.killed)}" if attempt.killed else ""
        end_text = f'<text x="{end + 3:.1f}" y="{top + _LANE / 2 + 5}">{kill}</text>'
        return f"<g><title>{escape(summary(attempt))}</title>{text}{bar}{end_text}</g>"

    def _picture(self, height: float, drawn: Sequence[str], *, label: str = "") -> str:
        """A drawing with the numbers of steps below it, and a vertical line at the first difference."""
        steps = sorted({round(self._steps * part / 8) for part in range(9)})
        ticks = [f'<text x="{self._x(s):.1f}" y="{height + 16}" text-anchor="middle">{s}</text>' for s in steps]
        ticks.append(f'<text x="{self._x(self._steps) + 30:.1f}" y="{height + 16}">step</text>')
        if self._difference is not None:
            x = self._x(self._difference.step)
            line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="#b42318" stroke-dasharray="4 3"/>'
            ticks.append(f'{line}<text x="{x + 4:.1f}" y="12" fill="#b42318">{label}</text>')
        return f'<svg viewBox="0 0 {_WIDTH} {height + 30}" role="img">{"".join([*drawn, *ticks])}</svg>'

    def _x(self, step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / self._steps


def _loss(metrics: dict[str, float]) -> float:
    return metrics.get("loss", math.nan)
