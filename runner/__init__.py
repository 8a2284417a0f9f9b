"""Kill it anywhere, run the same command again, get the same result.

All modules by layer, the highest first. A module imports only from lower layers; inside a folder, which is one
module here, there are no import cycles. Each third-party package is imported by as few modules as possible.
``tests/test_architecture.py`` checks the code against this picture.

   13  verify/ (the proof that an experiment resumes)
   12  __main__ (entry, exit statuses)
   11  sweep/ (survey, launcher, optuna)     runs/ (commands that look at runs)
   10  app (the Hydra application)
    9  job (configuration -> the run it names)     stop (a sweep's request to stop)
    8  experiment (one attempt at a run)
    7  introduction (the first lines printed)     finish (exported weights, the result)     wiring (callbacks)
    6  trainer (the training loop)     build (configuration -> live objects)     restore (checkpoint -> state)
    5  callbacks/ (guard, evaluate, report, progress, checkpoint)
    4  state (all that is restored)     evaluation     datasets/
    3  run/ (directory, attempts, records, heartbeat, drift, parent, links)     update     device
       checkpoint/ (tree, tensors, layout, shelves, sealing, manifest, snapshot, reading, opened, store, structure)
       data/ (order, plan, fetch, workers, engine, look, foreign, stream, ledger, proof)     metrics/
       (lines, curves, hparams)     shards/ (formats, manifest, scan, records, tokens, packing)
    2  distributed/ (world, team, watch, stall, layouts)     tasks/
    1  storage/ (location, local, remote, uploads, backend, requests, files)     average     signals     agreement
       config/ (schema, identity, environment, secrets, checks)     task (the interface)
    0  errors     interval     recent     seeds     rng     topology     schedules     models/     ranks     plain
       modes
"""

__version__ = "0.1.0"
