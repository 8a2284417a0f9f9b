"""Prove that an experiment resumes exactly: in real processes, with real kills, to the bit."""

import sys
from typing import Any

__all__ = ["assert_resumes"]


def assert_resumes(*command: str, **options: Any) -> None:
    """Raise AssertionError with the verdict's text unless the experiment of a command resumes exactly.

    ``command`` are the arguments of ``python -m runner``; ``options`` are those of ``verify.*``, without the prefix.

        def test_my_experiment_resumes():
            assert_resumes("experiment=mine", kills=5)
    """
    from runner.verify.options import parse
    from runner.verify.proof import prove

    parsed, rest, _ = parse([*command, *(f"verify.{name}={_text(value)}" for name, value in options.items())])
    verdict = prove(rest, parsed, progress=lambda line: print(line, file=sys.stderr))
    if not verdict.holds:
        raise AssertionError(f"{' '.join(command)} does not resume exactly\n{verdict.text()}")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str([*value]) if isinstance(value, list | tuple) else str(value)
