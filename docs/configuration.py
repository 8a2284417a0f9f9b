"""Write ``reference/configuration.md`` and ``conf/schema.json`` from ``conf/config.yaml`` and its comments:
``python docs/configuration.py``.
"""

import json
from itertools import groupby
from pathlib import Path

from runner.config.help import KeyHelp, entries, json_schema, values

PAGE = Path(__file__).parent / "reference/configuration.md"
SOURCE = Path(__file__).parent.parent / "conf/config.yaml"
HEAD = """# Configuration

All keys, with their defaults. `python -m runner --help KEY` prints the same for a key, and
`python -m runner experiment=NAME --cfg job` the composed configuration of an experiment. This page is made from
`conf/config.yaml` by `docs/configuration.py`.

Editors with a YAML language server complete and check keys, as the files of `conf/` do: run
`python -m runner schema > my_conf/schema.json`, and begin a file in `my_conf/experiment/`, after `# @package _global_`,
with the line `# yaml-language-server: $schema=../schema.json`.

`model`, `task`, `optimizer`, `scheduler` and the data sets are objects: `_target_` names a class or function, and the
other keys are its arguments.
"""
NOT_OURS = ("defaults", "hydra")


def page() -> str:
    keys = [entry for entry in entries(SOURCE.read_text()) if entry.key.split(".")[0] not in NOT_OURS]
    sections = groupby(keys, lambda entry: entry.key.split(".")[0])
    return HEAD + "".join(section(name, [*members]) for name, members in sections)


def section(name: str, members: list[KeyHelp]) -> str:
    head = [f"\n## `{name}`\n"]
    if len(members) > 1 and members[0].comment:
        head.append(f"{sentence(members[0].comment)}\n")
    rows = [row(entry) for entry in members if entry.key != name or len(members) == 1]
    return "\n".join([*head, "| key | default | meaning |", "|---|---|---|", *rows, ""])


def row(entry: KeyHelp) -> str:
    default = "required" if entry.default == "???" else f"`{entry.default}`" if entry.default else ""
    choices = [f"`{value}`" for value in values(entry.key)]
    meaning = sentence(entry.comment)
    if choices and not all(choice.strip("`") in meaning for choice in choices):
        meaning = f"{meaning} Values: {', '.join(choices)}.".strip()
    return f"| `{entry.key}` | {default} | {meaning} |".replace("|  |", "| |")


def sentence(comment: str) -> str:
    text = comment.replace("<", "\\<").replace("|", "\\|").replace("*", "\\*")
    return text[:1].upper() + text[1:] + ("." if text and text[-1] not in ".:" else "")


if __name__ == "__main__":
    PAGE.write_text(page())
    SOURCE.with_name("schema.json").write_text(json.dumps(json_schema(SOURCE), indent=1) + "\n")
