"""Sweeps that finish: the same ``-m`` command again does what is missing, on any of Hydra's launchers."""
