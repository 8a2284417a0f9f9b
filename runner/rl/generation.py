"""Completions of prompts, sampled with a key-value cache.

Each sample has a key, and draws from a random generator of its own. Only samples of one prompt, or of prompts of one
length where a caller says so, are computed together: as matrices of one shape give the same bits, a completion is a
function of (weights, prompt, key), whatever else is generated before, after or in other processes.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runner.checkpoint.sharding import is_distributed
from runner.errors import ConfigError
from runner.tasks.language import logits_of

_ONE = 1 << 40  # probabilities are summed as integers: torch has no deterministic sum of floats along a row on CUDA


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. ``temperature`` 0 takes the most probable token; ``top_p`` keeps the most probable tokens
    whose probabilities add up to this value (Holtzman et al. 2020, arXiv:1904.09751). A completion ends with the token
    ``stop``, or after ``max_tokens``.
    """

    max_tokens: int
    stop: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Completions:
    """Tokens int64 [B, T], of which ``lengths`` [B] count (the stop token included), and their log-probabilities
    float32 [B, T] at the temperature, not cut at ``top_p``; zero after the end. T is the longest length.
    """

    tokens: Tensor
    logprobs: Tensor
    lengths: Tensor


class Decoder:
    """Calls a model token by token. A ``forward`` that takes ``cache`` (a list, empty at first: ``runner.models.gpt``)
    or ``past_key_values`` (Hugging Face) sees each token once; any other is given the whole text again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._keywords = {"cache", "past_key_values"} & {*inspect.signature(model.forward).parameters}
        self._cache: Any = []
        self._text: Tensor | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits [B, V] after ``tokens`` [B, T], which follow the tokens of the calls before."""
        if "cache" in self._keywords:
            return logits_of(self._model(tokens, cache=self._cache))[:, -1]
        if "past_key_values" in self._keywords:
            output = self._model(input_ids=tokens, past_key_values=self._cache or None, use_cache=True)
            self._cache = output.past_key_values
            return logits_of(output)[:, -1]
        self._text = tokens if self._text is None else torch.cat([self._text, tokens], 1)
        return logits_of(self._model(self._text))[:, -1]


@torch.no_grad()
def generate(model: nn.Module, prompts: Tensor, keys: Sequence[int], sampling: Sampling) -> Completions:
    """Complete each row of ``prompts`` [B, P], with the randomness of its key. The model is in evaluation mode."""
    if is_distributed(next(model.parameters())):
        reason = "processes decode different numbers of tokens"
        raise ConfigError(f"runtime.parallel=fsdp cannot generate: {reason}; use ddp")
    rows, device = len(prompts), prompts.device
    noise = torch.stack([_uniform(key, sampling.max_tokens) for key in keys]).to(device)
    tokens, logprobs = [], []
    lengths, running = torch.zeros(rows, dtype=torch.long, device=device), torch.ones(rows, dtype=torch.bool).to(device)
    decode, following = Decoder(model), prompts
    for number in range(sampling.max_tokens):
        logprob = (decode(following).float() / (sampling.temperature or 1.0)).log_softmax(-1)
        token = _draw(logprob, noise[:, number], sampling.top_p) if sampling.temperature else logprob.argmax(-1)
        token = torch.where(running, token, sampling.stop)
        tokens.append(token)
        logprobs.append(logprob.gather(1, token[:, None])[:, 0] * running)
        lengths += running
        running &= token != sampling.stop
        if not running.any():
            break
        following = token[:, None]
    return Completions(torch.stack(tokens, 1), torch.stack(logprobs, 1), lengths)


def _uniform(key: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1) of a generator that no other sample uses."""
    return torch.rand(count, generator=torch.Generator().manual_seed(key), dtype=torch.float64)


def _draw(logprobs: Tensor, noise: Tensor, top_p: float) -> Tensor:
    """A token [B] for each row of log-probabilities [B, V], by the inverse of the cumulative distribution."""
    weights, order = (logprobs.exp().double() * _ONE).long(), None
    if top_p < 1:
        weights, order = weights.sort(dim=-1, descending=True, stable=True)
        before = weights.cumsum(-1) - weights
        weights = torch.where(before < int(top_p * _ONE), weights, 0)
    sums = weights.cumsum(-1)
    goal = (noise[:, None] * sums[:, -1:]).long()
    token = torch.searchsorted(sums, goal, right=True)
    return (token if order is None else order.gather(1, token))[:, 0]


def token_logprobs(model: nn.Module, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The log-probability of each token of [B, T] after the first, and the entropy of the distribution from which it is
    drawn: float32 [B, T - 1] both. Rows may be padded at their end.
    """
    logprobs = (logits_of(model(tokens))[:, :-1].float() / temperature).log_softmax(-1)
    return logprobs.gather(2, tokens[:, 1:, None])[..., 0], -(logprobs.exp() * logprobs).sum(-1)
