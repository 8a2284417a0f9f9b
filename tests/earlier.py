"""Make the runs of an earlier version that ``test_earlier.py`` resumes.

    git worktree add ../earlier COMMIT; python tests/earlier.py ../earlier

runs that version with the experiment ``exact``, whose result does not depend on the machine, and packs two runs into
``earlier.tar.gz``: ``finished``, and ``cut``, which SIGKILL ended while it trained.
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
ARCHIVE = HERE / "earlier.tar.gz"
USER = HERE / "user"
EXPERIMENT = ("--config-dir", "conf", "experiment=exact")  # to be run in USER
CUT = 10  # the step after which the unfinished run is killed: its last checkpoint is older


def extract(folder: Path) -> None:
    """Unpack the runs below ``folder``, which is then the ``run.root`` of both."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")


def make(checkout: Path) -> None:
    """Run the version in a folder, and pack its runs."""
    with tempfile.TemporaryDirectory() as root:
        shutil.copytree(USER, f"{root}/user")  # the runs store the path
        for name, cut in (("finished", 0), ("cut", CUT)):
            environment = os.environ | {"PYTHONPATH": f"{checkout.resolve()}:{root}/user", "CUT": str(cut)}
            command = [sys.executable, "-m", "runner", *EXPERIMENT, f"run.root={root}", f"run.name={name}"]
            status = subprocess.run(command, env=environment, cwd=f"{root}/user", check=False).returncode
            assert status == (-signal.SIGKILL if cut else 0), f"{name} ended with {status}"
        memory = io.BytesIO()
        with tarfile.open(fileobj=memory, mode="w") as archive:
            archive.add(f"{root}/exact", arcname="exact")
    ARCHIVE.write_bytes(gzip.compress(memory.getvalue(), mtime=0))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
