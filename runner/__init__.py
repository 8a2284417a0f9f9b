"""Kill it anywhere, run the same command again, get the same result.

The house, top floor first. A module imports only from floors below its own (a folder is one room of its
floor, without cycles inside); each third-party package enters through one door. ``tests/test_architecture.py``
holds this picture against the code.

   12  verify/ (the proof that an experiment resumes)
   11  __main__ (entry, exit statuses)
   10  sweep/ (survey, launcher, optuna)     runs/ (looking at runs from outside)
    9  app (the Hydra application)
    8  job (configuration -> the run it means)     stop (a sweep's request)
    7  experiment (one attempt at a run)
    6  introduction (the first lines on the screen)     finish (exported weights, the result)
    5  trainer (the loop, on one screen)     build (configuration -> live objects)     restore (the way up)
    4  callbacks/ (guard, evaluate, report, progress, checkpoint)
    3  state (what a resumed run is made of)     evaluation     datasets/
    2  run/ (directory, attempts, records, heartbeat, drift, parent)
       checkpoint/ (tree, tensors, layout, shelves, sealing, manifest, snapshot, reading, opened, store, staging)
       data/ (order, plan, fetch, engine, stream, ledger, proof)     metrics/ (lines, curves, hparams)
       shards/ (manifest, scan, records, tokens, packing)
    1  storage/ (location, local, remote, uploads, backend, files)     config/ (schema, identity, checks)
       signals     distributed     agreement     update     tasks/
    0  errors     interval     recent     seeds     rng     ranks     task     topology     schedules     models/
"""

__version__ = "0.1.0"
