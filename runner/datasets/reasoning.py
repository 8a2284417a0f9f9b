"""Problems of the package reasoning-gym with their answers, generated from a seed."""

from importlib.metadata import version
from typing import Any

from runner.datasets.arithmetic import first_of_split
from runner.errors import ConfigError
from runner.hashing import derive, json_digest


class ReasoningGym:
    """``{"prompt": question, "answer": answer}`` of the task ``name``, such as ``basic_arithmetic``, with its options.

    Sample ``index`` is a function of (``seed``, ``index``), the options and the version of the package. The splits
    share no question, as in ``Arithmetic``: the package itself draws entry n of seed 1 as entry n + 1 of seed 0. Where
    several answers are right, a reward of your own can call the package's ``score_answer``.
    """

    def __init__(
        self, *, name: str, split: str, size: int, seed: int = 0, held_out: int = 10, end: str = "\n", **options: Any
    ) -> None:
        if split not in ("train", "validation"):
            raise ConfigError(f"reasoning-gym has no split {split!r}; there are train and validation")
        try:
            import reasoning_gym
        except ImportError as error:
            raise ConfigError("data.*.name needs reasoning-gym: pip install 'hydra-runner[reasoning]'") from error
        try:
            self._entries: Any = reasoning_gym.create_dataset(name, seed=0, **options)
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(f"reasoning-gym cannot make data.*.name={name} with {options}: {error}") from error
        self._name, self._size, self._seed, self._end = name, size, seed, end
        self._validation, self._held_out = split == "validation", held_out
        arguments = [split, size, seed, held_out, end, options, version("reasoning-gym")]
        self.fingerprint = f"{name} {json_digest(arguments, sort_keys=True)}"

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, str]:
        return first_of_split(lambda number: self._problem(index, number), self._held_out, self._validation)

    def _problem(self, index: int, number: int) -> dict[str, str]:
        entry = self._entries[derive(f"reasoning {self._name}", self._seed, index, number) >> 32]
        return {"prompt": entry["question"] + self._end, "answer": entry["answer"]}
