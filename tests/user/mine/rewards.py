"""Rewards that an untrained model gets, too."""


def spread(prompt: str, completion: str, answer: str) -> tuple[float, bool]:
    """Something that differs from completion to completion."""
    return sum(completion.encode()) % 5 / 4, completion.startswith(answer[:1])


def now_and_then(prompt: str, completion: str, answer: str) -> tuple[float, bool]:
    """Equal for all completions of about half of the prompts."""
    return (spread(prompt, completion, answer)[0] if sum(prompt.encode()) % 2 else 0.0), False
