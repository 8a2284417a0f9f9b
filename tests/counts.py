"""How much was tried: tests count, and one command adds up.

    export RUNNER_COUNTS=counts.jsonl; python -m pytest -m ""; python tests/counts.py

Each count is one line of JSON, appended with a single write, so that test processes side by side can share the file.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

VARIABLE = "RUNNER_COUNTS"

MEANINGS = {
    "kill points": "storage operations at which a process was killed",
    "kills": "SIGKILLs of a whole process group, each followed by a resume",
    "faults": "storage operations that were made to fail",
    "corruptions": "objects damaged, each in one way, that a resume then met",
    "crash states": "states of a disk after a power loss that a resume then met",
    "model states": "states of the protocol model that were visited",
}


def count(name: str, number: int = 1) -> None:
    """Note that ``number`` more of something were tried; does nothing unless RUNNER_COUNTS names a file."""
    if name not in MEANINGS:
        raise ValueError(f"{name!r} is not counted; there are {', '.join(MEANINGS)}")
    path = os.environ.get(VARIABLE)
    if path:
        with open(path, "ab", buffering=0) as file:
            file.write(json.dumps({"count": name, "number": number}).encode() + b"\n")


def totals(path: Path) -> Counter[str]:
    """All counts in a file, added up by name."""
    numbers: Counter[str] = Counter()
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        numbers[entry["count"]] += entry["number"]
    return numbers


def table(numbers: Counter[str]) -> str:
    """The counts as a table in Markdown; what was not tried is there with 0."""
    lines = ["| count | number | what it counts |", "|---|---:|---|"]
    lines += [f"| {name} | {numbers[name]:,} | {meaning} |" for name, meaning in MEANINGS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    if VARIABLE not in os.environ:
        sys.exit(f"{VARIABLE} names no file. Run the tests with it, then this:\n{(__doc__ or '').splitlines()[2]}")
    print(table(totals(Path(os.environ[VARIABLE]))))
