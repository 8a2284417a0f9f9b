"""The run directory, the attempts at a run, and what happens when its configuration has changed.

Does not import torch: to find out that a run is finished must take no longer than to read three files.
"""
