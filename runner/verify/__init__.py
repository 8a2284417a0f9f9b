"""Prove that an experiment resumes exactly: in real processes, with real kills, to the bit.

From a command to a verdict:

    options.py         ``verify.*`` of the command; the rest is composed and checked before anything else starts
    proof.py           the undisturbed run, the killed run, their comparison, and the verdict (``page.py``: in HTML)
    campaign.py        how many steps the runs have, and at which moments the second one is killed
    execution.py       makes the attempts of a run, and reads their records
    fork_server.py     forks each attempt from a process that has imported everything
    recorder.py        in an attempt: records every step (values as in ``fingerprint.py``, objects as in ``memory.py``),
                       and kills the process at the requested moment
    difference.py      the first difference between two runs
    diagnosis.py       repeats the run with one thing after another held constant (``controls.py``), then puts memory of
                       one process into another (``suspects.py``), until the cause is known
    causes.py          the causes in words, with remedies (``source.py``: lines of the user's code)
"""

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.verify.execution import Servers

__all__ = ["assert_resumes"]


def assert_resumes(*command: str, servers: "Servers | None" = None, **options: Any) -> None:
    """Raise AssertionError with the verdict's text unless the experiment of a command resumes exactly.

    ``command`` are the arguments of ``python -m runner``; ``options`` are the keys ``verify.*``, without the prefix.
    Raises ConfigError at once for a command that cannot run. The pytest fixture ``assert_resumes`` does the same for
    many tests, faster: its ``servers``, in which everything is imported, serve the whole session.

        def test_my_experiment_resumes(assert_resumes):
            assert_resumes("experiment=mine", minutes=2)
    """
    from runner.verify.options import check, parse

    values = [f"verify.{name}={json.dumps(value, default=str)}" for name, value in options.items()]
    parsed, rest, _ = parse([*command, *values])
    if servers is None:
        check(rest)
    from runner.verify.proof import prove

    verdict = prove(rest, parsed, progress=lambda line: print(line, file=sys.stderr), servers=servers)
    if not verdict.holds:
        raise AssertionError(f"{' '.join(command)} does not resume exactly\n{verdict.text()}")
