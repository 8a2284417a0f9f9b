"""A comparison as one HTML file that needs no network. Whatever comes from run directories is escaped, and the page
allows itself no script but its own.
"""

import base64
import hashlib
from html import escape
from typing import Any

from runner.runs import picture, screen
from runner.runs.compare import Candidate, Comparison, parameter, title
from runner.runs.overview import number
from runner.storage import files

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


def write(found: Comparison, *, png: str | None, html: str | None) -> None:
    """Write the picture, the page or both to paths or URLs, over what is there. Raises ConfigError where there is
    nothing to draw or nothing to draw with, StorageError.
    """
    image = picture.png(found)
    if png:
        files.write(png, image)
    if html:
        files.write(html, page(found, image).encode())


def page(found: Comparison, png: bytes) -> str:
    """The page, with the picture in it and a table that can be sorted and searched."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    columns = ["place", "run", "objective", "status", "step", *found.swept, "attempts", "last seen"]
    ranked = len(found.ranked())
    rows = "\n".join(_row(run, found, place if place <= ranked else None) for place, run in enumerate(found.runs, 1))
    name, goal = _text(found.root), _text(title(found.goal))
    image = base64.b64encode(png).decode()
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta http-equiv="Content-Security-Policy" content="{policy}">
<style>{_STYLE}</style></head><body>
<h1>{name}</h1>
<p>{len(found.runs)} runs, best first by {goal}. A click on a column sorts by it.</p>
<img alt="Learning curves, and {goal} against each parameter" src="data:image/png;base64,{image}">
<p><input type="search" placeholder="only rows with this text" aria-label="only rows with this text"></p>
<div><table><thead><tr>{"".join(f"<th>{_text(column)}</th>" for column in columns)}</tr></thead><tbody>
{rows}
</tbody></table></div>
<script>{_SCRIPT}</script></body></html>
"""


def _row(run: Candidate, found: Comparison, place: int | None) -> str:
    line = run.line
    parameters = [run.parameters.get(key, "") for key in found.swept]
    cells = [_cell(place), _cell(line.run), _cell(line.objective), _cell(line.status), _cell(line.step)]
    cells += [
        _cell(value if number(value) is not None else parameter(run, key))
        for key, value in zip(found.swept, parameters, strict=True)
    ]
    cells += [_cell(line.attempts), _cell(line.seen)]
    return f"<tr>{''.join(cells)}</tr>"


def _cell(value: Any) -> str:
    if number(value) is None:
        return f"<td>{_text(value)}</td>"
    return f'<td class="number" data-value="{value}">{_text(value)}</td>'


def _text(value: Any) -> str:
    return escape(screen.cell(value, widest=200))
