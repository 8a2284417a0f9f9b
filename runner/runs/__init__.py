"""Commands that look at runs from outside, by reading what their processes wrote.

None needs torch or changes a run, except prune, which removes checkpoints, and export, which reads weights.
"""
