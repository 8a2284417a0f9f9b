"""When an evaluation is due."""

from runner.callbacks.evaluate import Interval


def test_steps_are_due_at_every_multiple_and_nowhere_else() -> None:
    interval = Interval(steps=3)
    assert [step for step in range(1, 11) if interval.due(step)] == [3, 6, 9]


def test_epochs_are_due_after_the_step_that_finishes_one() -> None:
    interval = Interval(epochs=2)
    counts = [(0, 0), (0, 1), (1, 2), (2, 2), (2, 3), (3, 4), (0, 9)]
    due = [interval.due(7, epochs_before=before, epochs=after) for before, after in counts]
    assert due == [False, False, True, False, False, True, True]


def test_a_step_longer_than_many_epochs_is_due_once() -> None:
    assert Interval(epochs=2).due(1, epochs_before=0, epochs=9)


def test_whichever_comes_first_is_due() -> None:
    interval = Interval(steps=10, epochs=1)
    assert interval.due(10)
    assert interval.due(7, epochs_before=0, epochs=1)
    assert not interval.due(7, epochs_before=1, epochs=1)


def test_an_interval_of_none_is_never_due() -> None:
    assert not any(Interval().due(step, epochs_before=0, epochs=step) for step in range(1, 100))


def test_steps_and_epochs_are_the_same_for_a_resumed_interval() -> None:
    """Twelve steps of 7 samples in epochs of 10, once with one object and once with a new one before each step."""

    def due(step: int, interval: Interval) -> bool:
        return interval.due(step, epochs_before=(step - 1) * 7 // 10, epochs=step * 7 // 10)

    kept = Interval(steps=5, epochs=2)
    uninterrupted = [due(step, kept) for step in range(1, 13)]
    assert uninterrupted == [due(step, Interval(steps=5, epochs=2)) for step in range(1, 13)]
