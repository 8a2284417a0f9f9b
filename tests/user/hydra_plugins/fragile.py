"""A launcher that a user might have; Hydra finds it by this folder."""

from hydra._internal.core_plugins.basic_launcher import BasicLauncher


class Fragile(BasicLauncher):
    """Runs so many jobs of a launch, and fails."""

    def __init__(self, *, jobs):
        super().__init__()
        self.jobs = jobs

    def launch(self, job_overrides, initial_job_idx):
        if self.jobs:
            super().launch(job_overrides[: self.jobs], initial_job_idx)
        raise ConnectionError("the cluster is gone")
