"""The proof as one line of a test."""

import sys
from typing import Any


def assert_resumes(*command: str, **options: Any) -> None:
    """Fail with the verdict's text unless the experiment of this command resumes exactly.

    ``command`` are the words that ``python -m runner`` gets; ``options`` are those of ``verify.*``, without the prefix.

        def test_my_experiment_resumes():
            assert_resumes("experiment=mine", kills=5)
    """
    from runner.verify.options import parse
    from runner.verify.proof import prove

    given = [f"verify.{name}={_written(value)}" for name, value in options.items()]
    parsed, rest, _ = parse([*command, *given])
    verdict = prove(rest, parsed, tell=lambda line: print(line, file=sys.stderr))
    if not verdict.holds:
        raise AssertionError(f"{' '.join(command)} does not resume exactly\n{verdict.text()}")


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str([*value]) if isinstance(value, list | tuple) else str(value)
