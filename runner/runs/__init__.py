"""Runs from outside: reads what their processes wrote, needs no torch, and changes nothing; but prune and export do."""
