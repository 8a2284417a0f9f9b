"""A program that ends a run from outside, where C code holds Python's global lock and no thread of the run can act.

Its arguments are the pid of the run and the seconds for which the run may be silent; the run writes to this program's
input now and then. SIGABRT makes the run print the stacks of its threads (``faulthandler``) and die. The time for which
the run was stopped by a signal does not count.
"""

import os
import resource
import select
import signal
import sys

_LOOK_SECONDS = 1.0
_DIE_SECONDS = 10.0


def main(pid: int, limit: float) -> None:
    """Return when the run has ended, or was ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to the whole process group; they are for the run
    silent = 0.0
    while os.getppid() == pid and silent <= limit:
        if select.select([0], [], [], _LOOK_SECONDS)[0]:
            if not os.read(0, 1 << 12):
                return
            silent = 0.0
        elif not _stopped(pid):
            silent += _LOOK_SECONDS
    if os.getppid() != pid:
        return
    if sys.stderr is not None:
        reason = f"no step for {silent:.0f} s (runtime.timeout), and C code keeps all threads but its own from running."
        remedy = "If a step needs that long, set a longer runtime.timeout."
        print(f"{reason} {remedy} The same command continues from the last checkpoint.", file=sys.stderr, flush=True)
    if hasattr(resource, "prlimit"):
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
    os.kill(pid, signal.SIGABRT)
    select.select([0], [], [], _DIE_SECONDS)
    if os.getppid() == pid:
        os.kill(pid, signal.SIGKILL)


def _stopped(pid: int) -> bool:
    try:  # as ``watchdog.process_state``, which this program, run by its path without site-packages, cannot import
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "Tt"
    except OSError:  # this system has no /proc
        return False


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
