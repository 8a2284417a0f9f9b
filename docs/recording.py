"""Write ``session.svg``, the picture in README, from a real session: ``python docs/recording.py`` (extra ``docs``).

The first command is killed with SIGKILL as soon as it has trained for some seconds.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMAND = "python -m runner experiment=digits"
AUDIT = "python -m runner.runs audit outputs/digits/base"
PICTURE = Path(__file__).parent / "session.svg"
WIDTH = 118
STEP_BEFORE_KILL = 300
FONTS = re.compile(r"@font-face \{.*?\}\n?", re.DOTALL)  # from another server, which no viewer of a picture asks


def start(command: str, folder: Path) -> "subprocess.Popen[str]":
    words = [sys.executable, *command.split()[1:]]
    environment = os.environ | {"PYTHONPATH": str(PICTURE.parent.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def main() -> None:
    console = Console(record=True, width=WIDTH, file=StringIO())

    def prompt(command: str) -> None:
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))

    def show(output: str) -> None:
        for line in output.replace(name, "/home/me").splitlines():
            console.print(Text(line, overflow="ellipsis", no_wrap=True))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompt(COMMAND)
        process = start(COMMAND, folder)
        while not (points := [*folder.glob("outputs/digits/base/metrics/*.jsonl")]) or (
            f'"step": {STEP_BEFORE_KILL}' not in points[0].read_text()
        ):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        show(process.communicate()[0])
        console.print(Text("Killed", style="bold red"))
        for command in (COMMAND, AUDIT):
            prompt(command)
            show(start(command, folder).communicate()[0])
    picture = console.export_svg(title="Kill it anywhere, run the same command again")
    PICTURE.write_text(FONTS.sub("", picture))


if __name__ == "__main__":
    main()
