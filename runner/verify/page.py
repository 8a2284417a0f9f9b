"""A verdict as one HTML file without scripts and links: the report, all attempts, and how the cause was found."""

import shlex
from collections.abc import Iterable
from html import escape

from runner.errors import printable
from runner.verify.campaign import summary
from runner.verify.proof import Verdict

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 1.5em auto; max-width: 760px; padding: 0 1em; color: #222; }
h1 { font-size: 1.3em; } h2 { font-size: 1.05em; margin-top: 1.6em; }
.verdict { color: white; padding: .1em .5em; border-radius: .3em; background: #1a7f37; } .fail { background: #b42318; }
code, pre, li { overflow-wrap: anywhere; } pre { background: #f6f6f6; padding: .8em 1em; white-space: pre-wrap; }
"""


def page(verdict: Verdict) -> str:
    """The HTML of a verdict."""
    word, says = ("PASS", "resumes exactly") if verdict.holds else ("FAIL", "does not resume exactly")
    command = escape(printable(shlex.join(verdict.command)))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{word}: {command}</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{_STYLE}</style></head><body>
<h1><span class="verdict {word.lower()}">{word}</span> This experiment {says}.</h1>
<p><code>{command}</code></p>
<pre>{escape(verdict.text())}</pre>
<h2>Attempts of the run with kills</h2>{_list(map(summary, verdict.killed.attempts))}
<h2>How the cause was found</h2>{_list(verdict.tried)}
</body></html>
"""


def _list(lines: Iterable[str]) -> str:
    return f"<ol>{''.join(f'<li>{escape(printable(line))}</li>' for line in lines)}</ol>"
