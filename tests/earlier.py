"""Make the runs of an earlier version that ``test_earlier.py`` resumes.

    git worktree add ../earlier COMMIT; python tests/earlier.py ../earlier EXPERIMENT

runs that version with an experiment whose result does not depend on the machine, and packs two runs: ``finished``, and
``cut``, which SIGKILL ended while it trained. ``exact`` is a plain one; ``programs`` has two optimizers and schedulers
by name, an average of some weights, weights of samples, several evaluation sets and a queue of samples that wait.
"""

import gzip
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ARCHIVES = {"exact": HERE / "earlier.tar.gz", "programs": HERE / "earlier_programs.tar.gz"}
USER = HERE / "user"
TORCH = "2.13"  # of the archives: with another, the states of optimizers and schedulers have other entries
CUT = 10  # the step after which the unfinished run is killed: its last checkpoint is older


def command(experiment: str, root: Path, name: str) -> tuple[str, ...]:
    """The command of a run, to be given in USER."""
    return "--config-dir", "conf", f"experiment={experiment}", f"run.root={root}", f"run.name={name}"


def extract(experiment: str, folder: Path) -> None:
    """Unpack the runs below ``folder``, which is then the ``run.root`` of both."""
    with tarfile.open(ARCHIVES[experiment]) as archive:
        archive.extractall(folder, filter="data")


def make(checkout: Path, experiment: str) -> None:
    """Run the version in a folder, and pack its runs."""
    with tempfile.TemporaryDirectory() as root:
        shutil.copytree(USER, f"{root}/user")  # the runs store the path
        for name, cut in (("finished", 0), ("cut", CUT)):
            environment = os.environ | {"PYTHONPATH": f"{checkout.resolve()}:{root}/user", "CUT": str(cut)}
            words = [sys.executable, "-m", "runner", *command(experiment, Path(root), name)]
            status = subprocess.run(words, env=environment, cwd=f"{root}/user", check=False).returncode
            assert status == (-signal.SIGKILL if cut else 0), f"{name} ended with {status}"
        memory = io.BytesIO()
        with tarfile.open(fileobj=memory, mode="w") as archive:
            archive.add(f"{root}/{experiment}", arcname=experiment)
    ARCHIVES[experiment].write_bytes(gzip.compress(memory.getvalue(), mtime=0))


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2])
