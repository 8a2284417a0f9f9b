"""Kill it anywhere, run the same command again, get the same result.

All modules by layer, the highest first. A module imports only from lower layers; within a package, which is in one
layer, there are no import cycles. Few modules import any given third-party package. ``tests/test_architecture.py``
checks the code against this map.

Where to look first: ``trainer`` (the loop), ``data/order`` and ``data/plan`` (which sample comes next), ``state`` (what
a resume restores), ``config/identity`` (which commands name the same run), ``callbacks/saving`` (when a checkpoint is
made), ``checkpoint/store`` (what a commit is, and which checkpoints are kept), ``app`` (from a SIGTERM to the exit),
``metrics/writer`` and ``metrics/service`` (a logger of your own; those for MLflow and W&B are in ``metrics/trackers``),
``verify/proof`` (from a command to a verdict).

   14  api
   13  verify/ (__main__, campaign, causes, controls, diagnosis, difference, execution, fingerprint, fork_server,
       memory, options, page, proof, recorder, source, suspects)
   12  __main__
   11  sweep/ (jobs, launcher, optuna)     runs/ (__main__, audit, checkpoints, compare, listing, push)
   10  app
    9  experiment
    8  restore
    7  trainer     build
    6  callbacks/ (base, dry, evaluate, observers, reporting, saving, unfreeze)
       rl/ (buffer, completion, generation, grpo, rewards)
    5  run_facts     state     evaluation
       datasets/ (arithmetic, digits, fashion_mnist, folds, images, reasoning, text)
    4  checkpoint/ (checkpoint, encoding, manifest, sharding, snapshot, store, structure, tensor_file)
       data/ (fetch, iterable, ledger, limits, loader, mixture, order, plan, probe, sandbox, stream, training_data,
       weights, workers)
       run/ (attempts, code, directory, opening, parent)
       shards/ (__main__, formats, packing, records, scan, tokens)     update     device
    3  distributed/ (communicator, outside, parallel, processes, watchdog, world)
       metrics/ (lines, service, tensorboard, trackers, writer)     tasks/ (adversarial, classification, language)
    2  signals     optimizers     config/ (composition, help, identity, schema, secrets)
    1  storage/ (backend, files, local, location, remote)     task
    0  errors     activity     cache     hashing     rng     schedules     plain
       models/ (convnet, gan, gpt, mlp)
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from runner.api import Run, table, train
    from runner.api import Run as open  # noqa: A004, N813

__all__ = ["Run", "__version__", "open", "table", "train"]

_API = {"Run": "Run", "open": "Run", "table": "table", "train": "train"}


def __getattr__(name: str) -> Any:
    """Import ``runner.api`` when one of its names is first used: the import takes a second."""
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from runner import api

    return getattr(api, _API[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
