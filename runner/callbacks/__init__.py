"""What happens beside the steps. Callbacks get a record of the loop, never the trainer.

Their order is part of the design: the ledger and the guard, then evaluation and what judges it, then reports, and the
checkpoint last, so that a committed step has been evaluated and reported.
"""
