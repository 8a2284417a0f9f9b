"""Small sums with their answers, generated from a seed."""

import random
from collections.abc import Callable

from runner.errors import ConfigError
from runner.hashing import derive, int_digest

_ATTEMPTS = 2000  # a split with a tenth of all problems is missed by so many once in 10^91 times


class Arithmetic:
    """``{"prompt": "17+25=", "answer": "42"}``: ``terms`` whole numbers below ``largest``, joined by ``operators``.
    With ``reverse`` the answer begins with its last digit ("24"): a carry is known before the digit that needs it.

    Sample ``index`` is a function of (``seed``, ``index``). A problem whose hash is divisible by ``held_out`` belongs
    to the validation split, any other to the training split: the splits share no problem.
    """

    def __init__(
        self,
        *,
        split: str,
        size: int,
        seed: int = 0,
        terms: int = 2,
        largest: int = 100,
        operators: str = "+",
        held_out: int = 10,
        reverse: bool = False,
    ) -> None:
        if split not in ("train", "validation"):
            raise ConfigError(f"arithmetic has no split {split!r}; there are train and validation")
        if {*operators} - {*"+-*"} or not operators:
            raise ConfigError(f"data.*.operators={operators!r}: expected some of + - *")
        self._validation = split == "validation"
        self._size = size
        self._seed = seed
        self._terms, self._largest, self._operators = terms, largest, operators
        self._held_out, self._reverse = held_out, reverse
        self.fingerprint = f"{split} {size} {seed} {terms} {largest} {operators} {held_out}" + " reverse" * reverse

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, str]:
        draw = random.Random(derive("arithmetic", self._seed, index))
        return first_of_split(lambda _: self._problem(draw), self._held_out, self._validation)

    def _problem(self, draw: random.Random) -> dict[str, str]:
        numbers = [draw.randrange(self._largest) for _ in range(self._terms)]
        text, value = str(numbers[0]), [numbers[0]]
        for number in numbers[1:]:
            operator = draw.choice(self._operators)
            text += f"{operator}{number}"
            if operator == "*":
                value[-1] *= number
            else:
                value.append(number if operator == "+" else -number)
        return {"prompt": f"{text}=", "answer": str(sum(value))[:: -1 if self._reverse else 1]}


def first_of_split(problem: Callable[[int], dict[str, str]], held_out: int, validation: bool) -> dict[str, str]:
    """The first of ``problem(0)``, ``problem(1)``, ... that belongs to the split, by the hash of its prompt."""
    for number in range(_ATTEMPTS):
        drawn = problem(number)
        if (int_digest(drawn["prompt"].removesuffix("=").encode()) % held_out == 0) is validation:
            return drawn
    split = "validation" if validation else "training"
    raise ConfigError(
        f"none of {_ATTEMPTS} problems belongs to the {split} split with data.*.held_out={held_out}: there are too "
        "few problems. Use larger ones, or another held_out"
    )
