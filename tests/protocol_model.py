"""The commit protocol as a state machine, small enough to look at every interleaving of several processes.

A *life* is one process of a run, from its start until it does nothing more. Any number of lives are under way at once,
as after a steal or while a stopped process is taken for dead. Each storage operation is one move; between any two moves
of one life every other life may do anything. All that is asked of the storage is what ``Location`` promises: an object
whose put returned can be read and is in every listing after it. It creates nothing exclusively and locks nothing.

A crash needs no move of its own: a life that is never moved again has crashed, and the invariants are checked in every
state, so every life crashes after every operation, and is stopped there for any time and continued, in all
combinations. A crash *during* an operation matters where it leaves something else than before or after it: a torn
manifest. How often that and other faults happen is bounded by the ``World``.

The search is breadth first, so the trace to a violation is a shortest one. Lives are interchangeable: a state holds
them in sorted order. What one life may do depends on the others only through the highest number that they claim, so
moves are computed once for each (life, objects, highest number).
"""

import gc
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar


class Commit(NamedTuple):
    """The name of a commit. ``take`` stands for the nonce: a step whose manifest failed is committed under another."""

    attempt: int
    step: int
    take: int = 0

    def __str__(self) -> str:
        return f"a{self.attempt}-s{self.step}" + "'" * self.take


NOTHING = Commit(0, 0)  # what a run from scratch begins with
Commits = frozenset[Commit]
EMPTY: Commits = frozenset()


class Claim(NamedTuple):
    """A claim's number, and which try of its process it was; processes are told apart by who holds it."""

    number: int
    trial: int


class Put(NamedTuple):
    """A request that the client gave up on and repeated, and that the server may still carry out. One of the three."""

    claim: Claim | None = None
    data: Commit | None = None
    manifest: Commit | None = None


class Objects(NamedTuple):
    """What lies in the storage, but for the claims."""

    data: Commits = EMPTY
    sealed: Commits = EMPTY  # whole manifests
    torn: Commits = EMPTY  # manifests that do not unseal
    rotten: Commits = EMPTY  # data of full size with other bytes: listed, but found bad when read

    def listed(self) -> Commits:
        """All names in ``commits/``."""
        return self.sealed | self.torn

    def sizes(self) -> Commits:
        """All names in ``data/``."""
        return self.data | self.rotten


class Life(NamedTuple):
    """One process: what it does next, and all that it remembers."""

    does: str = "start"
    trial: int = 0
    attempt: int = 0
    step: int = 0
    take: int = 0
    resumed: Commit = NOTHING
    made: int = 0
    todo: tuple[object, ...] = ()  # commits still to try, or listed, or what is still to be removed
    damaged: Commits = EMPTY  # commits it found bad when it resumed
    claims: tuple[Claim, ...] = ()  # its claims that are in the storage
    late: Put | None = None  # a put of its that timed out, and may come true at any time

    @property
    def claim(self) -> Claim:
        """The claim of its present try."""
        return Claim(self.attempt, self.trial)

    @property
    def commit(self) -> Commit:
        """The commit that it is making."""
        return Commit(self.attempt, self.step, self.take)

    @property
    def highest(self) -> int:
        """The highest number that it claims in the storage."""
        return self.claims[-1].number if self.claims else 0

    def then(self, does: str, **changes: object) -> "Life":
        """The same life, about to do something else."""
        return self._replace(does=does, **changes)  # type: ignore[arg-type]

    def ended(self) -> "Life":
        """It does nothing more. Only what it left behind matters, so that many states become one."""
        return Life("ended", claims=self.claims, late=self.late)


OWNS = frozenset({"list commits", "load", "put data", "put manifest", "check", "retain", "judge", "remove"})
RESUMED = OWNS - {"list commits", "load"}


class Move(NamedTuple):
    """A storage operation of one life with all that it changes at once."""

    label: str
    life: Life
    objects: Objects
    acknowledged: Commit | None = None
    fresh: bool = False  # it decided to start from scratch
    faults: int = 0
    late: int = 0

    def __str__(self) -> str:
        return self.label


class State(NamedTuple):
    """Everything there is at a moment. Lives and objects are numbers in the tables of the model, which compare fast."""

    lives: tuple[int, ...]  # without those that ended
    floor: int  # the highest number that one of those claimed, if it is higher than any owned by those that live
    objects: int
    acknowledged: Commits
    faults: int
    late: int
    losses: int


T = TypeVar("T")


class Table(Generic[T]):
    """Things that are used again and again, each with a number."""

    def __init__(self) -> None:
        self._things: list[T] = []
        self._numbers: dict[T, int] = {}

    def number(self, thing: T) -> int:
        """The number of a thing; equal things have the same."""
        index = self._numbers.setdefault(thing, len(self._things))
        if index == len(self._things):
            self._things.append(thing)
        return index

    def __getitem__(self, number: int) -> T:
        return self._things[number]


@dataclass(frozen=True)
class World:
    """What may happen: how many lives, how many commits each makes, and how often something goes wrong."""

    lives: int = 2
    commits: int = 2
    tries: int = 2  # of one life to get a number
    faults: int = 1  # puts of a manifest that fail or die half-way, leaving a torn one
    retakes: bool = True  # whether a life whose manifest failed goes on, with another name for it
    answers: bool = False  # whether a put of a manifest may fail though it is there
    late: int = 0  # puts that time out, are repeated, and come true later
    losses: int = 0  # objects that are lost or rot once two commits were acknowledged
    before: int = 0  # commits that attempt 1 acknowledged, before it ended and all this began


@dataclass(frozen=True)
class Protocol:
    """The protocol, and every way of getting it wrong that the tests know."""

    lists_after_claiming: bool = True
    equal_claims_collide: bool = True
    claims_before_listing_commits: bool = True
    data_before_manifest: bool = True
    checks_after_commit: bool = True
    attempt_outranks_step: bool = True
    removes_manifest_first: bool = True
    removes_oldest_first: bool = True
    keeps: int = 2
    counts_only_sound: bool = True  # False: a kept commit is any listed one that was not found bad at the start
    respects_newer_attempts: bool = True  # False: retention keeps the newest commits of its own attempt only

    def rank(self, commit: Commit) -> tuple[int, ...]:
        """Newest is what ranks highest."""
        return commit if self.attempt_outranks_step else (commit.step, commit.attempt, commit.take)

    def newest_first(self, commits: Commits) -> tuple[Commit, ...]:
        """Commits in the order in which a resume tries them."""
        return tuple(sorted(commits, key=self.rank, reverse=True))


Broken = tuple[str, str] | None  # an invariant that does not hold, and why


class Violation(NamedTuple):
    """An invariant that does not hold, and the shortest way there."""

    invariant: str
    why: str
    trace: tuple[str, ...]

    def __str__(self) -> str:
        return "\n  ".join([f"{self.invariant}: {self.why}", *self.trace])


class Result(NamedTuple):
    """What a search found. Not ``complete`` if it reached its limit of states first."""

    states: int
    violation: Violation | None
    complete: bool


class Model:
    """All that can happen in a world under a protocol."""

    def __init__(self, protocol: Protocol, world: World) -> None:
        self.protocol = protocol
        self.world = world
        self._lives: Table[Life] = Table()
        self._objects: Table[Objects] = Table()
        self._moves: dict[tuple[int, int, int], list[tuple[Move, int, int]]] = {}
        self._sound: set[tuple[int, Commits, bool]] = set()

    def search(self, limit: int | None = None) -> Result:
        """Visit every state, or ``limit`` of them, or as many as it takes to find a violation."""
        gc.disable()  # it would look through millions of tuples again and again, and nothing here is a cycle
        try:
            return self._search(limit)
        finally:
            gc.enable()

    def _search(self, limit: int | None) -> Result:
        first = self._first()
        cause: dict[State, State | None] = {first: None}
        queue = deque([first])
        while queue:
            state = queue.popleft()
            for label, successor, broken in self.successors(state):
                if successor in cause and not broken:
                    continue
                broken = broken or self.broken(successor)
                if broken:
                    trace = tuple(str(move) for move in (*self._trace(state, cause), label))
                    return Result(len(cause), Violation(*broken, trace), complete=False)
                if len(cause) == limit:
                    return Result(len(cause), None, complete=False)
                cause[successor] = state
                queue.append(successor)
        return Result(len(cause), None, complete=True)

    def _first(self) -> State:
        lives = (self._lives.number(Life()),) * self.world.lives
        before = frozenset(Commit(1, 1 + step) for step in range(self.world.before))
        objects = self._objects.number(Objects(data=before, sealed=before))
        return State(lives, int(bool(before)), objects, before, self.world.faults, self.world.late, self.world.losses)

    def successors(self, state: State) -> Iterator[tuple[Move, State, Broken]]:
        """Each state that one move, one late put or one loss leads to; and what is wrong with the move itself."""
        lives, floor, objects, acknowledged, faults, late, losses = state
        for index, number in enumerate(lives):
            if index and number == lives[index - 1]:
                continue  # equal lives have equal moves
            others = lives[:index] + lives[index + 1 :]
            rival = max([floor, *[self._lives[other].highest for other in others]])
            for move, life, left in self.moves(number, objects, rival):
                if move.faults > faults or move.late > late:
                    continue
                acked = acknowledged | {move.acknowledged} if move.acknowledged else acknowledged
                broken = None
                if move.fresh and acknowledged:
                    broken = "I6", "a life starts from scratch although a commit was acknowledged"
                after = (left, acked, faults - move.faults, late - move.late, losses)
                if move.life.does == "ended" and not move.life.late:
                    yield move, State(others, self._floor(others, max(floor, move.life.highest)), *after), broken
                else:
                    remaining = tuple(sorted((*others, life)))
                    yield move, State(remaining, self._floor(remaining, floor), *after), broken
        if losses and len(acknowledged) >= 2:
            for loss in _losses(self._objects[objects]):
                yield loss, state._replace(objects=self._objects.number(loss.objects), losses=losses - 1), None

    def _floor(self, lives: tuple[int, ...], highest: int) -> int:
        """``highest``, the highest number claimed by a life that ended, or 0 where it makes no difference any more: an
        owner's claim stays, and one below it changes no comparison.
        """
        owners = (self._lives[number] for number in lives if highest)
        return 0 if any(life.does in OWNS and life.attempt >= highest for life in owners) else highest

    def moves(self, life: int, objects: int, rival: int) -> list[tuple[Move, int, int]]:
        """What a life may do next, while the highest number that another life claims is ``rival``."""
        key = (life, objects, rival)
        if key not in self._moves:
            name = _name(self._lives[life])
            self._moves[key] = [
                (
                    move._replace(label=f"{name} {move.label}"),
                    self._lives.number(move.life),
                    self._objects.number(move.objects),
                )
                for move in self._found(self._lives[life], self._objects[objects], rival)
            ]
        return self._moves[key]

    def _found(self, life: Life, objects: Objects, rival: int) -> Iterator[Move]:
        if life.does != "ended":
            yield from ACTIONS[life.does](self, life, objects, rival)
        if life.late:
            yield _lands(life, objects)
        elif self.world.late:
            yield from _times_out(life, objects)

    def _trace(self, state: State, cause: dict[State, State | None]) -> Iterator[Move]:
        """The moves that lead to a state. They are not kept while searching, but found again."""
        before = cause[state]
        if before is not None:
            yield from self._trace(before, cause)
            yield next(move for move, successor, _ in self.successors(before) if successor == state)

    # What a life does, one storage operation each. Claiming.

    def _start(self, life: Life, objects: Objects, rival: int) -> Iterator[Move]:
        number = max(rival, *(claim.number for claim in life.claims), 0) + 1
        todo = () if self.protocol.claims_before_listing_commits else self.protocol.newest_first(objects.sealed)
        yield Move(f"lists claims, wants number {number}", life.then("claim", attempt=number, todo=todo), objects)

    def _claim(self, life: Life, objects: Objects, rival: int) -> Iterator[Move]:
        claims = tuple(sorted({*life.claims, life.claim}))
        next_ = "confirm" if self.protocol.lists_after_claiming else self._owner()
        yield Move(f"puts a claim of {life.attempt}", life.then(next_, claims=claims), objects)

    def _confirm(self, life: Life, objects: Objects, rival: int) -> Iterator[Move]:
        highest = max(rival, *(claim.number for claim in life.claims if claim != life.claim), 0)
        lost = highest >= life.attempt if self.protocol.equal_claims_collide else highest > life.attempt
        if lost:
            yield Move(f"lists claims, there is another one of {highest}", life.then("withdraw"), objects)
        else:
            yield Move(f"lists claims, owns {life.attempt}", life.then(self._owner()), objects)

    def _withdraw(self, life: Life, objects: Objects, rival: int) -> Iterator[Move]:
        left = life._replace(claims=tuple(claim for claim in life.claims if claim != life.claim))
        again = left.trial + 1 < self.world.tries
        after = left.then("start", trial=left.trial + 1, attempt=0, todo=()) if again else left.ended()
        yield Move(f"removes its claim of {life.attempt}", after, objects)

    def _owner(self) -> str:
        return "list commits" if self.protocol.claims_before_listing_commits else "load"

    # Resuming.

    def _list_commits(self, life: Life, objects: Objects, rival: int) -> Iterator[Move]:
        # A torn manifest is read and passed over; a life that finds a sealed one never starts from scratch.
        commits = self.protocol.newest_first(objects.sealed)
        damaged = EMPTY
        if not self.protocol.counts_only_sound:
            newest = self.protocol.rank(commits[0]) if commits else ()
            damaged = frozenset(commit for commit in objects.torn if self.protocol.rank(commit) > newest)
        if commits:
            yield Move(f"lists commits: {_text(commits)}", life.then("load", todo=commits, damaged=damaged), objects)
        else:
            after = life.then(self._begins(), step=1, damaged=damaged)
            yield Move("lists commits, finds none and starts from scratch", after, objects, fresh=True)

    def _load(self, life: Life, objects: Objects, rival: int) -> Iterator[Move]:
        if not life.todo:
            if self.protocol.claims_before_listing_commits:
                yield Move("has no commit left to try and stops", life.ended(), objects)
            else:
                yield Move("starts from scratch", life.then(self._begins(), step=1), objects, fresh=True)
            return
        commit, *older = life.todo
        assert isinstance(commit, Commit)
        if commit in objects.sealed and commit in objects.data:
            after = life.then(self._begins(), step=commit.step + 1, resumed=commit, todo=())
            yield Move(f"resumes from {commit}", after, objects)
        else:
            damaged = EMPTY if self.protocol.counts_only_sound else life.damaged | {commit}
            yield Move(f"cannot load {commit}", life._replace(todo=tuple(older), damaged=damaged), objects)

    # Committing.

    def _put_data(self, life: Life, objects: Objects, rival: int) -> Iterator[Move]:
        next_ = "put manifest" if self.protocol.data_before_manifest else "check"
        stored = objects._replace(data=objects.data | {life.commit})
        yield Move(f"puts the data of {life.commit}", life.then(next_), stored)

    def _put_manifest(self, life: Life, objects: Objects, rival: int) -> Iterator[Move]:
        next_ = "check" if self.protocol.data_before_manifest else "put data"
        sealed = objects._replace(sealed=objects.sealed | {life.commit}, torn=objects.torn - {life.commit})
        yield Move(f"puts the manifest of {life.commit}", life.then(next_), sealed)
        if life.commit not in objects.sealed:
            torn = objects._replace(torn=objects.torn | {life.commit})
            yield Move(f"dies and leaves a torn manifest of {life.commit}", life.ended(), torn, faults=1)
            if self.world.retakes and self.world.answers:
                # Its answer is lost, or it is sent once more before the next: the life goes on without it.
                again = life.then(self._begins(), take=life.take + 1)
                yield Move(f"puts the manifest of {life.commit} and takes it for failed", again, sealed, faults=1)
            if self.world.retakes:
                again = life.then(self._begins(), take=life.take + 1)
                yield Move(f"fails to put the manifest of {life.commit}, which is torn", again, torn, faults=1)

    def _check(self, life: Life, objects: Objects, rival: int) -> Iterator[Move]:
        if self.protocol.checks_after_commit and rival > life.attempt:
            yield Move(f"lists claims, is superseded by {rival} and stops", life.ended(), objects)
        else:
            after = life.then("retain", made=life.made + 1)
            yield Move(f"acknowledges {life.commit}", after, objects, acknowledged=life.commit)

    def _begins(self) -> str:
        return "put data" if self.protocol.data_before_manifest else "put manifest"

    # Removing what is no longer needed.

    def _retain(self, life: Life, objects: Objects, rival: int) -> Iterator[Move]:
        commits = self.protocol.newest_first(objects.listed())
        yield Move(f"lists commits: {_text(commits)}", life.then("judge", todo=commits), objects)

    def _judge(self, life: Life, objects: Objects, rival: int) -> Iterator[Move]:
        superfluous = []
        sound = 0
        for commit in life.todo:
            assert isinstance(commit, Commit)
            foreign = commit.attempt != life.attempt and not self.protocol.respects_newer_attempts
            if sound >= self.protocol.keeps or foreign:
                superfluous.append(commit)
            elif not self.protocol.counts_only_sound:
                sound += commit not in life.damaged
            else:
                sound += commit in objects.sealed and commit in objects.sizes()
        if self.protocol.removes_oldest_first:
            superfluous.reverse()
        kinds = ("manifest", "data") if self.protocol.removes_manifest_first else ("data", "manifest")
        todo = [(kind, commit) for commit in superfluous for kind in kinds]
        halves = (commit for commit in sorted(objects.sizes()) if commit.attempt < life.attempt)
        todo += [("data", commit) for commit in halves if commit not in life.todo]
        after = life.then("remove", todo=tuple(todo)) if todo else self._next(life)
        yield Move(f"lists data, has {len(todo)} objects to remove", after, objects)

    def _remove(self, life: Life, objects: Objects, rival: int) -> Iterator[Move]:
        (kind, commit), *others = life.todo  # type: ignore[misc]
        if kind == "manifest":
            left = objects._replace(sealed=objects.sealed - {commit}, torn=objects.torn - {commit})
        else:
            left = objects._replace(data=objects.data - {commit}, rotten=objects.rotten - {commit})
        after = life._replace(todo=tuple(others)) if others else self._next(life)
        yield Move(f"removes the {kind} of {commit}", after, left)

    def _next(self, life: Life) -> Life:
        if life.made == self.world.commits:
            return life.ended()
        return life.then(self._begins(), step=life.step + 1, take=0, todo=())

    # What must hold in every state.

    def broken(self, state: State) -> Broken:
        """The first invariant that does not hold, and why."""
        intact = state.losses == self.world.losses
        violation = self._lives_broken(state) if intact else None
        key = (state.objects, state.acknowledged, intact)
        if not violation and key not in self._sound:
            check = self._objects_broken if intact else _loss_broken
            violation = check(self._objects[state.objects], state.acknowledged)
            if not violation:
                self._sound.add(key)
        return violation

    def _lives_broken(self, state: State) -> Broken:
        owners = [life for life in map(self._lives.__getitem__, state.lives) if life.does in OWNS]
        numbers = sorted(life.attempt for life in owners)
        if len(set(numbers)) < len(numbers):
            return "one owner", f"two lives own one number; those that live own {numbers}"
        for life in owners:
            if life.does in RESUMED:
                for commit in state.acknowledged:
                    if commit > life.resumed and commit.attempt < life.attempt:
                        return "I3", f"{commit} is acknowledged, attempt {life.attempt} resumed from {life.resumed}"
        return None

    def _objects_broken(self, objects: Objects, acknowledged: Commits) -> Broken:
        loadable = objects.sealed & objects.data
        newest = max(objects.sealed, default=NOTHING).attempt
        for commit in objects.sealed - objects.data:
            # A superseded writer may leave a manifest without data, which a newer attempt outranks; so may a late put
            # that brings a removed manifest back, below those that were kept.
            outranked = self.world.late and sum(other > commit for other in loadable) >= 2
            if (commit in acknowledged or commit.attempt == newest) and not outranked:
                return "I1", f"the manifest of {commit} is there, its data is not"
        first = max(loadable, key=self.protocol.rank, default=NOTHING)
        if acknowledged and first < max(acknowledged):
            return "I5", f"{max(acknowledged)} is acknowledged, and a resume would begin at {first}"
        return None


def _loss_broken(objects: Objects, acknowledged: Commits) -> Broken:
    if objects.sealed & objects.data:
        return None
    return "I7", f"{len(acknowledged)} commits were acknowledged, one object was lost, and nothing is loadable"


Action = Callable[[Model, Life, Objects, int], Iterator[Move]]
ACTIONS: dict[str, Action] = {
    "start": Model._start,
    "claim": Model._claim,
    "confirm": Model._confirm,
    "withdraw": Model._withdraw,
    "list commits": Model._list_commits,
    "load": Model._load,
    "put data": Model._put_data,
    "put manifest": Model._put_manifest,
    "check": Model._check,
    "retain": Model._retain,
    "judge": Model._judge,
    "remove": Model._remove,
}


def _times_out(life: Life, objects: Objects) -> Iterator[Move]:
    """The put that is due is sent, nothing is heard of it, and it will be repeated."""
    sent = {
        "claim": Put(claim=life.claim),
        "put data": Put(data=life.commit),
        "put manifest": Put(manifest=life.commit),
    }.get(life.does)
    if sent:
        yield Move("times out with its put", life._replace(late=sent), objects, late=1)


def _lands(life: Life, objects: Objects) -> Move:
    """A put that timed out comes true."""
    assert life.late
    claim, data, manifest = life.late
    landed = life._replace(late=None)
    if claim:
        landed = landed._replace(claims=tuple(sorted({*life.claims, claim})))
    elif data:
        objects = objects._replace(data=objects.data | {data})
    elif manifest:
        objects = objects._replace(sealed=objects.sealed | {manifest}, torn=objects.torn - {manifest})
    return Move(f"sees its late put come true: {claim or data or manifest}", landed, objects)


def _losses(objects: Objects) -> Iterator[Move]:
    for commit in objects.data:
        left = objects.data - {commit}
        yield Move(f"the data of {commit} is lost", Life(), objects._replace(data=left))
        rotten = objects.rotten | {commit}
        yield Move(f"the data of {commit} rots", Life(), objects._replace(data=left, rotten=rotten))
    for commit in objects.sealed:
        left = objects.sealed - {commit}
        yield Move(f"the manifest of {commit} is lost", Life(), objects._replace(sealed=left))
        torn = objects.torn | {commit}
        yield Move(f"the manifest of {commit} rots", Life(), objects._replace(sealed=left, torn=torn))


def _name(life: Life) -> str:
    return f"attempt {life.attempt}" if life.does in OWNS else "a new process"


def _text(commits: tuple[Commit, ...]) -> str:
    return ", ".join(str(commit) for commit in commits) or "none"
