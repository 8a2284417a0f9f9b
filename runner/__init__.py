"""Kill it anywhere, run the same command again, get the same result.

All modules by layer, the highest first. A module imports only from lower layers; within a package, which is in one
layer, there are no import cycles. Few modules import any given third-party package. ``tests/test_architecture.py``
checks the code against this map.

   13  verify/ (__main__, campaign, causes, diagnosis, difference, execution, fingerprint, fork_server, memory,
       options, pins, proof, proof_report, recorder, verdict)
   12  __main__
   11  runs/ (__main__, audit, compare, export, html_report, listing, prune, show, watch)
   10  app
    9  experiment     sweep/ (jobs, launcher, optuna, survey)
    8  run_spec     finish     startup_log     assembly
    7  trainer     build     restore
    6  callbacks/ (base, evaluate, guards, progress, reporting, saving)
    5  run_facts     state     evaluation     datasets/ (digits, fashion_mnist, images, text)
    4  checkpoint/ (background_writer, checkpoint, encoding, manifest, reading, retention, sharding, snapshot,
       store, structure, tensor_file)
       data/ (evaluation_data, exactly_once, fetch, iterable, iterable_stream, ledger, loader, mixture, order,
       plan, probe, sandbox, stream, training_data, workers)
       run/ (attempt_records, attempts, directory, drift, opening, parent)
       shards/ (__main__, formats, packing, records, scan, shard_manifest, tokens)
       update     device
    3  distributed/ (communicator, joining, outside, parallel, processes, stacks, stall, team,
       watchdog, world)
       metrics/ (lines, tensorboard, writer)     stop_request     tasks/ (classification, language)
    2  storage/ (backend, files, local, location, remote, stores)
       config/ (checks, environment, identity, schema, secrets)
    1  signals     average     task
    0  errors     activity     cache     hashing     interval     rng     seeds     schedules     plain     modes
       models/ (convnet, gpt, mlp)
"""

__version__ = "0.1.0"
