"""Kill it anywhere, run the same command again, get the same result.

The house, top floor first. A module imports only from floors below its own (a folder is one room of its
floor, without cycles inside); each third-party package enters through one door. ``tests/test_architecture.py``
holds this picture against the code.

    8  __main__ (entry, exit statuses)     runs/ (looking at runs from outside)
    7  app (the Hydra application)
    6  experiment (composition root: config -> live objects -> one attempt)
    5  trainer (the loop, on one screen)
    4  callbacks/ (checkpoint, evaluate, best, early stopping, report, progress)
    3  state (what a resumed run is made of)   evaluation   run/ (directory, attempts, drift)
    2  checkpoint/ (tree, tensors, manifest, store)   data/ (order, fetch, stream)   datasets/
    1  storage/ (location, local, files)   config/   metrics/   models/   tasks/   topology   update   schedules
    0  errors   interval   signals   rng   task   distributed
"""

__version__ = "0.1.0"
