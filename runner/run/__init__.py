"""One run's place and life: its directory, its attempts, and what happens when the configuration drifts.

Imports nothing of torch: finding out that a run is finished must cost no more than reading three files.
"""
