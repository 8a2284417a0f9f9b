"""Proofs by ``runner.verify``, above all of the small experiment of ``user``, in processes of shared fork servers."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.verify.execution import Servers
from runner.verify.options import Options, parse
from runner.verify.proof import Verdict, prove

USER = Path(__file__).parent / "user"
SMALL: dict[str, Any] = {"steps": 6, "kills": 1, "workers": (0,)}


class Judge:
    """The ``servers`` fork the attempts of all proofs."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers

    def __call__(self, *overrides: str, steps: int = 14, kills: int = 3, **options: Any) -> Verdict:
        """The verdict on the small experiment with overrides, and ``verify.*`` among them or as ``options``."""
        small = ("--config-dir", "conf", "experiment=broken", "trainer.evaluate_every_steps=4")
        parsed, command, _ = parse([*small, *overrides])
        return self.of(command, replace(parsed, steps=steps, kills=kills, **options))

    def of(self, command: Sequence[str], options: Options) -> Verdict:
        """The verdict on any command."""
        return prove(command, options, progress=print, servers=self.servers)


def node(key: str, target: str, **values: object) -> tuple[str, ...]:
    """Overrides that replace an object of the experiment. ``variant`` knows whether it is mended."""
    inner = "".join(f",{name}:{value}" for name, value in values.items())
    return f"~{key}", f"+{key}={{_target_:{target},mended:MENDED{inner}}}"


def variant(overrides: Sequence[str], *, mended: bool) -> list[str]:
    """The overrides for the broken experiment, or for the mended one."""
    folder = tempfile.gettempdir()
    return [each.replace("MENDED", str(mended).lower()).replace("FOLDER", folder) for each in overrides]
