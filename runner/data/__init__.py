"""A stream that knows its position: every sample exactly once per epoch, whatever happened in between.

The sample and the randomness at a position are pure functions, so workers hold no state and a resume costs nothing:

    index at (epoch, place)      = permutation(seed, epoch)(place)
    randomness at (epoch, place) = hash(seed, epoch, place)
"""
