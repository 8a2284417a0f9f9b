"""A stream that knows its position: every sample exactly once per epoch, whatever happened in between.

The sample and the randomness at a position are pure functions, so workers hold no state and a resume costs nothing:

    index at (epoch, place)      = order(seed, epoch)(place)
    randomness at (epoch, place) = hash(seed, epoch, place)

    order, windows, mixture, budget     which sample stands where: shuffled, in shards, of several sources, by length
    plan                                which positions make which step
    fetch, generators, engine           from positions to batches, in workers or here
    stream, held_out                    training batches with a cursor; passes over evaluation data
    opaque, passes                      the weaker tier: iterables that know their own place
    probe                               a look at the samples before training
    ledger, digest, proof               what was trained on, and what that proves
    training                            from a configuration and a data set to the stream
"""
