"""Rewards that can be computed. A reward is a function ``(prompt, completion, answer) -> (reward, correct)`` of texts:
``completion`` is the model's text, up to the stop token; ``correct`` counts as passed in ``pass_at_1``.
"""

import re


class Answer:
    """``format`` for a completion that ``pattern`` matches as a whole, and ``correct`` more if the first group (or the
    whole match) is the right answer. Nothing for a completion that did not end.
    """

    def __init__(self, *, pattern: str = r"(-?[0-9]+)\n", correct: float = 1.0, format: float = 0.1) -> None:  # noqa: A002
        self._pattern = re.compile(pattern)
        self._correct = correct
        self._format = format

    def __call__(self, prompt: str, completion: str, answer: str) -> tuple[float, bool]:
        match = self._pattern.fullmatch(completion)
        if match is None:
            return 0.0, False
        correct = match[match.lastindex or 0] == answer
        return self._format + self._correct * correct, correct
