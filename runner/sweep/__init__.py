"""Sweeps that can be killed: run the same command again, and what is done is skipped, what was cut goes on."""
