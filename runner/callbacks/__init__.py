"""Everything that happens besides optimizer steps. Callbacks get a record of the loop, never the trainer.

Their order matters: first the ledger and the check for a finite loss, then evaluation and what depends on it, then
reports, and the checkpoint last, so that a committed step has been evaluated and reported.
"""
