"""Every interleaving of the commit protocol keeps its invariants, and every known way of getting it wrong breaks one.

The searches of a default run are small. ``RUNNER_MODEL_STATES=4000000`` adds larger worlds, each up to that many
states; some 20,000 are visited in a second.
"""

import os

import pytest
from counts import count
from protocol_model import Model, Protocol, Result, World

LIMIT = int(os.environ.get("RUNNER_MODEL_STATES", "0"))

SMALL = {
    "two lives, two commits each": World(lives=2, commits=2),
    "three lives": World(lives=3, commits=1, tries=1, faults=0),
    "an answer is lost": World(lives=2, commits=1, tries=1, answers=True),
    "an answer is lost in a long life": World(lives=1, commits=3, faults=2, losses=1, answers=True),
    "an object is lost": World(lives=2, commits=1, tries=1, losses=1, before=1),
    "an object is lost in a long life": World(lives=1, commits=4, faults=2, losses=1),
    "a put comes true late": World(lives=2, commits=1, tries=1, late=1, before=2),
}
LARGE = {
    "three lives after another": World(lives=3, commits=1, tries=1, faults=0, before=2),
    "three tries to get a number": World(lives=3, commits=1, tries=3, faults=0),
    "an object is lost": World(lives=2, commits=2, losses=1),
    "an object is lost and a put comes true late": World(lives=2, commits=1, losses=1, late=1, before=1),
    "two puts come true late": World(lives=2, commits=2, late=2, faults=0),
    "three lives, two commits each, two torn manifests": World(lives=3, commits=2, faults=2),
}

# A mistake -> the world in which it shows, and the invariant that a shortest trace breaks.
MISTAKES = {
    "claims are not listed after claiming": (Protocol(lists_after_claiming=False), World(), "one owner"),
    "equal claims do not collide": (Protocol(equal_claims_collide=False), World(), "one owner"),
    "commits are listed before claiming": (Protocol(claims_before_listing_commits=False), World(lives=2), "I6"),
    "commits are listed before claiming, in a run under way": (
        Protocol(claims_before_listing_commits=False),
        World(before=1),
        "I3",
    ),
    "the manifest is written before the data": (Protocol(data_before_manifest=False), World(), "I1"),
    "claims are not listed after a commit": (Protocol(checks_after_commit=False), World(), "I3"),
    "the highest step is the newest": (Protocol(attempt_outranks_step=False), World(), "I5"),
    "data is removed before its manifest": (Protocol(removes_manifest_first=False), World(), "I1"),
    "the newest is removed first": (
        Protocol(removes_oldest_first=False),
        World(lives=3, commits=1, tries=1, faults=0, before=2),
        "I3",
    ),
    "one commit is kept": (Protocol(keeps=1), World(losses=1), "I7"),
    "what is not sound counts as kept": (Protocol(counts_only_sound=False), World(lives=1, losses=1), "I7"),
    "what is not sound counts as kept, torn by a superseded life": (
        Protocol(counts_only_sound=False),
        World(lives=2, commits=1, tries=1, losses=1, before=1, retakes=False),
        "I7",
    ),
    "retention has no regard to newer attempts": (Protocol(respects_newer_attempts=False), World(), "I5"),
}


def search(protocol: Protocol, world: World, limit: int | None = None) -> Result:
    outcome = Model(protocol, world).search(limit)
    count("model states", outcome.states)
    return outcome


@pytest.mark.parametrize("name", SMALL)
def test_the_protocol_keeps_its_invariants(name: str) -> None:
    outcome = search(Protocol(), SMALL[name])
    assert outcome.violation is None, str(outcome.violation)
    assert outcome.complete
    print(f"{name}: all {outcome.states:,} states")


@pytest.mark.skipif(not LIMIT, reason="RUNNER_MODEL_STATES says up to how many states")
@pytest.mark.parametrize("name", LARGE)
def test_the_protocol_keeps_its_invariants_in_larger_worlds(name: str) -> None:
    outcome = search(Protocol(), LARGE[name], LIMIT)
    assert outcome.violation is None, str(outcome.violation)
    print(f"{name}: {'all ' if outcome.complete else 'the first '}{outcome.states:,} states")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_breaks_an_invariant(name: str) -> None:
    protocol, world, invariant = MISTAKES[name]
    outcome = search(protocol, world)
    assert outcome.violation is not None, "the model does not see this mistake"
    assert outcome.violation.invariant == invariant, str(outcome.violation)
