"""A verdict as one HTML file without scripts and links: cause and remedy, the loss of both runs, and all attempts."""

import math
import shlex
from collections.abc import Sequence
from html import escape

from runner.errors import printable
from runner.verify.campaign import summary
from runner.verify.difference import FirstDifference
from runner.verify.execution import RunTrace
from runner.verify.proof import Verdict

_WIDTH, _HEIGHT, _LEFT, _RIGHT = 480, 220, 52, 14  # pixels of the picture, and its margins
_PARTS = 4  # into which each axis is divided
_RUNS = (("#0072b2", 5, "without kills"), ("#d55e00", 1.5, "with kills"))  # distinct for the colour-blind, too
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 1.5em auto; max-width: 720px; padding: 0 1em; color: #222; }
h1 { font-size: 1.3em; } h2 { font-size: 1.05em; margin-top: 1.6em; }
.verdict { color: white; padding: .1em .5em; border-radius: .3em; background: #1a7f37; } .fail { background: #b42318; }
code, dd, li { overflow-wrap: anywhere; } dt { font-weight: bold; } dd { margin: 0 0 .6em; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: #444; }
"""


def page(verdict: Verdict) -> str:
    """The HTML of a verdict."""
    word, says = ("PASS", "resumes exactly") if verdict.holds else ("FAIL", "does not resume exactly")
    command = _text(shlex.join(verdict.command))
    rows = "".join(f"<dt>{label}</dt><dd>{_text(text)}</dd>" for label, text in verdict.rows())
    tried = "".join(f"<li>{_text(line)}</li>" for line in verdict.tried)
    search = f"<details><summary>How the cause was found</summary><ol>{tried}</ol></details>" if tried else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{word}: {command}</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{_STYLE}</style></head><body>
<h1><span class="verdict {word.lower()}">{word}</span> This experiment {says}.</h1>
<dl>{rows}</dl>
<p><code>{command}</code></p>
<h2>Loss</h2>
{_curves([verdict.undisturbed, verdict.killed], verdict.difference)}
<h2>Attempts of the run with kills</h2>
<ol>{"".join(f"<li>{summary(attempt)}</li>" for attempt in verdict.killed.attempts)}</ol>
{search}
</body></html>
"""


def _text(text: str) -> str:
    return escape(printable(text)).replace("\n", "<br>")


def _curves(runs: Sequence[RunTrace], difference: FirstDifference | None) -> str:
    """The losses of runs by step, a line for each over all its attempts. Values that are not finite are left out."""
    curves = [
        {step: float(event["metrics"].get("loss", math.nan)) for step, event in sorted(run.by_step().items())}
        for run in runs
    ]
    values = [loss for curve in curves for loss in curve.values() if math.isfinite(loss)]
    if not values:
        return "<p>No step was done.</p>"
    low, high, last = min(values), max(values), max(map(max, filter(None, curves)))
    high = high if high > low else low + 1

    def x(step: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last, 1)

    def y(loss: float) -> float:
        return round(24 + (_HEIGHT - 34) * (high - loss) / (high - low), 1)

    shapes = []
    for part in range(_PARTS + 1):
        loss, step = low + (high - low) * part / _PARTS, round(last * part / _PARTS)
        shapes.append(f'<line x1="{_LEFT}" x2="{x(last)}" y1="{y(loss)}" y2="{y(loss)}" stroke="#e4e4e4"/>')
        shapes.append(f'<text x="{_LEFT - 6}" y="{y(loss) + 4}" text-anchor="end">{loss:.3g}</text>')
        shapes.append(f'<text x="{x(step)}" y="{_HEIGHT + 8}" text-anchor="middle">{step}</text>')
    shapes.append(f'<text x="{x(last / 2)}" y="{_HEIGHT + 24}" text-anchor="middle">step</text>')
    for number, (curve, (colour, width, name)) in enumerate(zip(curves, _RUNS, strict=True)):
        points = " ".join(f"{x(step)},{y(loss)}" for step, loss in curve.items() if math.isfinite(loss))
        style = f'stroke="{colour}" stroke-width="{width}" opacity="{0.9 if number else 0.4}"'
        shapes.append(f'<polyline points="{points}" fill="none" stroke-linejoin="round" {style}/>')
        shapes.append(f'<text x="{_LEFT + 110 * number}" y="12" style="fill: {colour}">{name}</text>')
    if difference is not None:
        where = f'x1="{x(difference.step)}" x2="{x(difference.step)}" y1="16" y2="{_HEIGHT - 10}"'
        shapes.append(f'<line {where} stroke="#b42318" stroke-dasharray="4 3"/>')
        shapes.append(f'<text x="{_WIDTH}" y="12" text-anchor="end" style="fill: #b42318">┆ first difference</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 30}" role="img">{"".join(shapes)}</svg>'
