"""Kill it anywhere, run the same command again, get the same result.

The house, top floor first. A module imports only from floors below its own (a folder is one room of its
floor, without cycles inside); each third-party package enters through one door. ``tests/test_architecture.py``
holds this picture against the code.

   13  verify/ (the proof that an experiment resumes)
   12  __main__ (entry, exit statuses)
   11  sweep/ (survey, launcher, optuna)     runs/ (looking at runs from outside)
   10  app (the Hydra application)
    9  job (configuration -> the run it means)     stop (a sweep's request)
    8  experiment (one attempt at a run)
    7  introduction (the first lines on the screen)     finish (exported weights, the result)     wiring (callbacks)
    6  trainer (the loop, on one screen)     build (configuration -> live objects)     restore (the way up)
    5  callbacks/ (guard, evaluate, report, progress, checkpoint)
    4  state (what a resumed run is made of)     evaluation     datasets/
    3  run/ (directory, attempts, records, heartbeat, drift, parent)
       checkpoint/ (tree, tensors, layout, shelves, sealing, manifest, snapshot, reading, opened, store, staging)
       data/ (order, plan, fetch, engine, stream, ledger, proof)     metrics/ (lines, curves, hparams)
       shards/ (manifest, scan, records, tokens, packing)     update
    2  distributed/ (world, team, watch, layouts)     tasks/
    1  storage/ (location, local, remote, uploads, backend, files)     config/ (schema, identity, checks)
       signals     agreement     task (the interface)
    0  errors     interval     recent     seeds     rng     topology     schedules     models/     ranks
"""

__version__ = "0.1.0"
