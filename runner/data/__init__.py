"""The data stream: every sample exactly once per epoch, whatever happened in between.

The sample and its randomness are pure functions of the position, so workers hold no state and a resume costs nothing:

    index at (epoch, place)      = order(seed, epoch)(place)
    randomness at (epoch, place) = hash(seed, epoch, place)

    order, windows, mixture, budget     which sample stands where: shuffled, in shards, of several sources, by length
    plan                                which positions make which step
    fetch, generators, engine           from positions to batches, in workers or here
    stream, held_out                    training batches with a cursor; passes over evaluation data
    opaque, passes, foreign             iterables, which resume by their own state: a weaker guarantee
    probe                               checks of a few samples before training
    ledger, digest, proof               what was trained on, and what that proves
    training                            from a configuration and a data set to the stream
"""
