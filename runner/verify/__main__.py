"""``python -m runner.verify experiment=mine``: prove that this experiment resumes exactly, or name what does not."""

import signal
import sys
from collections.abc import Sequence

from runner.errors import RunnerError, show
from runner.verify.options import check, parse

_USAGE = """\
python -m runner.verify experiment=NAME [KEY=VALUE ...] [verify.KEY=VALUE ...] [--json]

Runs the experiment once undisturbed and once with SIGKILLs and SIGTERMs, and compares the two bit for bit.
  verify.steps=N          optimizer steps (default: 100, or fewer if these take more than 20 seconds of training)
  verify.minutes=N        end within so many minutes, with fewer steps and kills if necessary
  verify.kills=N          number of kills and stops (default: 9, one of each kind)
  verify.moments=[A,B]    kinds of kills, taken in turn; committed, save, loaded, border (of an epoch),
                          evaluation, step, clock (at any time); by SIGTERM: stop (in a step), evaluating
  verify.workers=[0,2]    numbers of data workers; the attempts alternate between them
  verify.processes=N      run every attempt in N processes, as torchrun does; some kills hit only one of them
  verify.root=PATH|URL    where to make the runs (default: a temporary folder); they are removed afterwards
  verify.html=FILE        write a page with cause, remedy, the loss of both runs and all attempts
  verify.seed=N           choose other moments for the kills
  verify.ignore=[A,B]     metrics that may differ, such as gigabytes of memory; metrics of time are recognised
  verify.keep=true        do not remove the runs
Exit status: 0 it resumes exactly, 1 it does not, 2 configuration error, 130 Ctrl-C."""
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one proof; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or {"-h", "--help"} & {*words}:
        show(_USAGE)
        return 0 if words else 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up, as after Ctrl-C
    try:
        options, command, as_json = parse(words)
        check(command)
        from runner.storage import files
        from runner.verify.page import page
        from runner.verify.proof import prove

        verdict = prove(command, options, progress=lambda line: print(line, file=sys.stderr, flush=True))
        if options.html:
            files.write(options.html, page(verdict).encode())
    except RunnerError as error:
        print(error, file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("interrupted; nothing is left behind", file=sys.stderr)
        return _INTERRUPTED
    show(verdict.json() if as_json else verdict.text())
    return 0 if verdict.holds else 1


if __name__ == "__main__":
    sys.exit(main())
