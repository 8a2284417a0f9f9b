"""The data stream: every sample exactly once per epoch, whatever happened in between.

A sample and its randomness are pure functions of its position, so workers hold no state and a resume costs nothing.
From the permutation to the batch, for a map-style data set:

    order.py                  which sample is at each place of an epoch; the only module that decides the order
    plan.py                   a position is (epoch, place); which positions make the slices of a step
    stream.py                 hands out the slices of the next step, and moves the cursor when the step is done
    loader.py                 carries slices to worker processes and batches back
    fetch.py                  in a worker: indices and seeds of a slice, the samples, the collated batch
    probe.py                  before training: checks that a few samples depend on nothing but their position
    ledger.py                 after a step: records its samples, and checks the record of a whole run

An iterable has no index: ``iterable.py`` resumes it by its own state, with a weaker guarantee. ``mixture.py`` joins
data sets, and ``training_data.py`` builds the stream that a configuration asks for.
"""
