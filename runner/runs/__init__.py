"""Commands that look at runs from outside. None needs torch or changes a run, except prune and export."""
