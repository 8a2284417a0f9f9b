"""Prove that an experiment resumes exactly: in real processes, with real kills, to the bit. ``assert_resumes`` is for
the tests of whoever owns the experiment.
"""

from runner.verify.testing import assert_resumes

__all__ = ["assert_resumes"]
