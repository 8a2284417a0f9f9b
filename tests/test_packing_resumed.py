"""Packing documents whose lengths nobody knows, cut and gone on with: through the tier of iterables."""

import random
from typing import Any

import pytest
import torch

from runner.data.iterable import BatchOptions, IterableStream
from runner.data.loader import LoaderOptions
from runner.shards.packing import PackingStream

LENGTHS = [random.Random(0).randint(0, 40) for _ in range(30)]
DOCUMENTS = [[100 * number + token for token in range(length)] for number, length in enumerate(LENGTHS)]


def stream(workers: int) -> IterableStream:
    return IterableStream(
        PackingStream(DOCUMENTS, length=7, separator=-1, shuffle=True, seed=3),
        BatchOptions(seed=1, batch_size=4, randomness="sample"),
        micro_batches=1,
        loading=LoaderOptions(workers),
        device=torch.device("cpu"),
    )


def rows(live: IterableStream, steps: int) -> list[Any]:
    found = []
    for _ in range(steps):
        for _, batch in live.step():
            found.append(batch.tolist())
        live.advance()
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cut_after_any_step_changes_no_row(workers: int) -> None:
    whole = stream(workers)
    whole.open()
    expected = rows(whole, 40)
    assert whole.epochs >= 1
    done, state = 0, None
    for steps in (1, 6, 1, 15, 1, 9, 7):
        live = stream(workers)
        live.load_state_dict(state) if state else live.open()
        assert rows(live, steps) == expected[done : done + steps]
        state, done = live.state_dict(), done + steps


def test_a_pass_has_every_document_once() -> None:
    live = stream(0)
    live.open()
    tokens: list[int] = []
    while live.epochs == 0:
        (batch,) = rows(live, 1)
        tokens += [token for row in batch for token in row[:-1] if token >= 0]
    known = [token for document in DOCUMENTS for token in document]
    assert len(tokens) == len({*tokens})
    assert {*tokens} <= {*known}
    assert len(known) - len(tokens) <= 7  # the rest at the end
