"""Group relative policy optimisation: reinforcement learning from rewards that are compared within a group.

Shao et al. 2024 (arXiv:2402.03300), with the token mean, the higher upper clip and the dynamic sampling of DAPO (Yu et
al. 2025, arXiv:2503.14476).
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from runner.checkpoint.tensor_file import bytes_of
from runner.errors import ConfigError, StateError
from runner.evaluation import evaluation_mode
from runner.hashing import checksum, derive, int_digest
from runner.rl.buffer import Buffer
from runner.rl.completion import Completion, padded
from runner.rl.generation import Sampling, generate, token_logprobs
from runner.task import Rollouts, Update

Prompt = tuple[int, str, str]  # position, text, answer
_TOLERANCE = 1e-6  # added to a standard deviation
_KL_GAIN, _KL_ERROR = 0.1, 0.2  # as in Ziegler et al. 2019, for the adaptive coefficient


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of a prompt, drawn in ``step`` by the weights of ``version``: the number of updates before.

    ``prompt`` int64 [P]; ``tokens`` int64 [G, T], of which ``lengths`` [G] count; ``logprobs`` float32 [G, T] when they
    were drawn; ``rewards`` float64 [G]. All on the CPU.
    """

    position: int
    step: int
    version: int
    prompt: Tensor
    tokens: Tensor
    logprobs: Tensor
    lengths: Tensor
    rewards: Tensor
    passed: int

    def digest(self) -> bytes:
        """Bytes that identify the samples and their rewards."""
        parts = (self.tokens, self.lengths, self.rewards)
        return f"{self.position} ".encode() + b"".join(part.numpy().tobytes() for part in parts)

    def advantages(self, *, scale: bool) -> Tensor:
        """A_i = r_i - mean(r), divided by the standard deviation of the group if ``scale`` (GRPO; without: Dr. GRPO,
        Liu et al. 2025, arXiv:2503.20783).
        """
        centred = self.rewards - self.rewards.mean()
        return centred / (self.rewards.std() + _TOLERANCE) if scale else centred


@dataclass(frozen=True, slots=True)
class ClippedLoss:
    """The loss of a token with the ratio q = p / p_old of its probabilities now and when it was drawn:

    - min(q A, clip(q, 1 - clip, 1 + clip_high) A) + beta KL - entropy H

    KL is estimated by p_ref / p - log(p_ref / p) - 1 (Schulman 2020, http://joschu.net/blog/kl-approx.html), and H is
    the entropy of the distribution from which the token is drawn.
    """

    _: KW_ONLY
    clip: float
    clip_high: float
    entropy: float

    def __call__(self, logprob: Tensor, entropy: Tensor, rows: "Rows", beta: float) -> dict[str, Tensor]:
        """The sums over all tokens of ``rows``; the arguments are of shape [B, T - 1]."""
        change, mask, zero = logprob - rows.old, rows.mask, torch.zeros_like(logprob)
        ratio, advantage = change.exp(), rows.advantages[:, None]
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip_high)
        kl = zero if rows.reference is None else (rows.reference - logprob).exp() - (rows.reference - logprob) - 1
        loss = -torch.minimum(ratio * advantage, clipped * advantage) + beta * kl
        if self.entropy:  # a gradient over all tokens of the vocabulary would be computed for nothing without it
            loss = loss - self.entropy * entropy
        outside = (clipped * advantage < ratio * advantage).float()
        values = {"loss": loss, "kl": kl, "entropy": entropy, "clip_fraction": outside}
        return {name: (value * mask).sum() for name, value in values.items()}


@dataclass(slots=True)
class Rows:
    """Samples to be trained together: tokens int64 [B, T]; float32 [B, T - 1]: the mask of the tokens that the
    policy wrote, its log-probabilities then, and the reference's; advantages float32 [B].
    """

    tokens: Tensor
    mask: Tensor
    old: Tensor
    advantages: Tensor
    reference: Tensor | None = None


class GRPO(Completion):
    """One step draws ``samples`` completions of each prompt of its batch, and makes ``iterations`` updates on groups.

    Groups in which all rewards are equal teach nothing and are dropped (not with ``keep_equal``). With ``groups``, a
    step trains this many, the oldest; others wait for the next step, up to ``max_age`` updates, and a step with fewer
    makes no update. With ``staleness`` k the groups of step s are trained in step s + k at the earliest, and are drawn
    in a thread beside the training of their step, by a copy of the weights before it: asynchronous in time, and not in
    the results. Samples that do not end are not trained (unless ``keep_unended``), but compared.

    ``kl`` is the coefficient of the divergence from the reference, the weights with which the run began. With
    ``kl_target`` it adapts after each step: beta (1 + 0.1 clip(KL / target - 1, -0.2, 0.2)) (Ziegler et al. 2019,
    arXiv:1909.08593). All groups that wait, the coefficient and the counts are state.

    A completion is a function of weights, prompt, ``seed``, the prompt's position and the number of the sample. For
    speed, prompts of equal length among ``together`` consecutive prompts are completed at once.
    """

    def __init__(
        self,
        *,
        seed: int,
        samples: int = 8,
        temperature: float = 1.0,
        top_p: float = 1.0,
        together: int = 1,
        iterations: int = 2,
        clip: float = 0.2,
        clip_high: float | None = None,
        kl: float = 0.01,
        kl_target: float | None = None,
        entropy: float = 0.0,
        scale: bool = True,
        groups: int | None = None,
        max_age: int = 4,
        keep_equal: bool = False,
        keep_unended: bool = False,
        staleness: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not isinstance(staleness, int) or staleness < 0:
            raise ConfigError(
                f"task.staleness={staleness}: expected a number of steps, 0 or more. Samples drawn by whatever "
                "weights are newest when a generator happens to be ready depend on the speed of machines, and no "
                "resume, and no second run, could draw them again"
            )
        if samples < 2 or iterations < 1 or together < 1 or temperature <= 0:
            raise ConfigError(
                f"task.samples={samples}, iterations={iterations}, together={together}, temperature={temperature}: "
                "expected at least 2, 1 and 1, and more than 0"
            )
        self.seed, self.samples, self.together, self.iterations = seed, samples, together, iterations
        self.sampling = Sampling(self.greedy.max_tokens, self.greedy.stop, temperature, top_p)
        self.objective = ClippedLoss(clip=clip, clip_high=clip if clip_high is None else clip_high, entropy=entropy)
        self.needs_reference = bool(kl)
        self.kl, self.kl_target = kl, kl_target
        self.scale, self.groups, self.max_age, self.staleness = scale, groups, max_age, staleness
        self.keep_equal, self.keep_unended = keep_equal, keep_unended
        self.step = self.version = 0
        self.waiting = Buffer(Group)
        self._drawer: nn.Module | None = None
        self._digest: str | None = None

    def state_dict(self) -> dict[str, Any]:
        counts = {"step": self.step, "version": self.version, "kl": self.kl}
        return {**counts, "waiting": self.waiting.state_dict(), "reference": self._reference_digest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["reference"] != self._reference_digest():
            raise StateError(
                f"the reference model is {self._reference_digest()} now, and the run began with {state['reference']}: "
                "its parent's weights have changed. Restore the parent, or start a new run with run.name=..."
            )
        self.step, self.version, self.kl = state["step"], state["version"], state["kl"]
        self.waiting.load_state_dict(state["waiting"])

    def optimization_step(
        self, model: nn.Module, micro_batches: Iterable[tuple[float, Any]], update: Update
    ) -> dict[str, Tensor]:
        prompts: list[Prompt] = []
        pieces = 0
        for pieces, (_, batch) in enumerate(micro_batches, 1):  # noqa: B007
            prompts += zip(update.positions(), batch["prompt"], batch["answer"], strict=True)
        self.step += 1
        firsts = update.gather(prompts[0][0])
        rank, size = firsts.index(prompts[0][0]), len(firsts)
        draw = partial(self._draw, prompts, update.autocast, self.version)
        train = partial(self._train, model, update, slice(rank, None, size), pieces)
        if self.staleness:
            with ThreadPoolExecutor(1, thread_name_prefix="rollouts") as thread:
                future = thread.submit(draw, self._copy(model))
                metrics, trained, old = train()
            added, dropped = self._add(update.gather(future.result()))
        else:
            with evaluation_mode(model):
                added, dropped = self._add(update.gather(draw(model)))
            metrics, trained, old = train()
        digest = int_digest(b"".join(group.digest() for group in added))
        self.rollouts = Rollouts(digest, [group.position for group in trained], self.iterations, [*dropped, *old])
        return {**metrics, **self._measured(added, size, metrics["loss"].device)}

    def key(self, position: int, number: int) -> int:
        """The seed of the generator of a sample."""
        return derive("rollout", self.seed, position, number)

    def _reference_digest(self) -> str | None:
        if self._digest is None and self.reference is not None:
            self._digest = _checksum(self.reference)
        return self._digest

    def _copy(self, model: nn.Module) -> nn.Module:
        """A copy of the model with its present weights, which training does not change."""
        if self._drawer is None:
            self._drawer = copy.deepcopy(model).requires_grad_(False).eval()
        self._drawer.load_state_dict(model.state_dict())
        return self._drawer

    def _draw(
        self,
        prompts: Sequence[Prompt],
        autocast: Callable[[], AbstractContextManager[Any]],
        version: int,
        model: nn.Module,
    ) -> list[Group]:
        """The groups of these prompts. May run while training changes everything but the step and this model."""
        groups: list[Group] = []
        for _, consecutive in groupby(prompts, key=lambda prompt: prompt[0] // self.together):
            block = [*consecutive]
            if len(block) != self.together:
                raise ConfigError(
                    f"task.together={self.together}: only {len(block)} of these prompts, at positions {block[0][0]} to "
                    f"{block[-1][0]}, are in one micro-batch; it must divide the samples of a micro-batch"
                )
            encoded = [(position, self.tokenizer.encode(text), text, answer) for position, text, answer in block]
            with autocast():
                for length in sorted({len(tokens) for _, tokens, *_ in encoded}):
                    groups += self._groups([each for each in encoded if len(each[1]) == length], version, model)
        return groups

    def _groups(
        self, prompts: Sequence[tuple[int, list[int], str, str]], version: int, model: nn.Module
    ) -> Iterable[Group]:
        """The groups of prompts of one length."""
        device = next(model.parameters()).device
        texts = torch.tensor([tokens for _, tokens, *_ in prompts])
        keys = [self.key(position, number) for position, *_ in prompts for number in range(self.samples)]
        completions = generate(model, texts.repeat_interleave(self.samples, 0).to(device), keys, self.sampling)
        words = self.texts(completions)
        for number, (position, _, text, answer) in enumerate(prompts):
            rows = slice(number * self.samples, (number + 1) * self.samples)
            results = [self.reward(text, completion, answer) for completion in words[rows]]
            yield Group(
                position,
                self.step,
                version,
                texts[number],
                completions.tokens[rows].cpu(),
                completions.logprobs[rows].cpu(),
                completions.lengths[rows].cpu(),
                torch.tensor([reward for reward, _ in results], dtype=torch.float64),
                sum(correct for _, correct in results),
            )

    def _add(self, shares: Sequence[Sequence[Group]]) -> tuple[list[Group], list[int]]:
        """Put the groups of all processes into the queue; returns them in the order of their positions, and the
        positions of groups that were dropped because all of their rewards are equal.
        """
        groups = sorted((group for share in shares for group in share), key=lambda group: group.position)
        equal = [group for group in groups if group.rewards.min() == group.rewards.max() and not self.keep_equal]
        dropped = {group.position for group in equal}
        self.waiting.extend([group for group in groups if group.position not in dropped])
        return groups, [*dropped]

    def _next(self) -> tuple[list[Group], list[int]]:
        """The groups that this step trains, and the positions of groups that have become too old."""
        oldest = self.version - self.max_age - self.staleness
        old = self.waiting.remove(lambda group: group.version < oldest)
        due = sum(group.step + self.staleness <= self.step for group in self.waiting)  # these are the first
        count = due if self.groups is None else self.groups * (due >= self.groups)
        return self.waiting.take(count), [group.position for group in old]

    def _train(
        self, model: nn.Module, update: Update, share: slice, pieces: int
    ) -> tuple[dict[str, Tensor], list[Group], list[int]]:
        """Make the updates of this step; returns their metrics, the trained groups, and the positions that are too old.

        This process trains its ``share`` of the samples, in ``pieces`` micro-batches. Losses are means over the tokens
        of all samples of the step (DAPO, eq. 12).
        """
        device = next(model.parameters()).device
        groups, old = self._next()
        samples = [sample for group in groups for sample in self._samples(group)]
        tokens = sum(length for *_, length in samples)
        sums = {"loss": torch.zeros((), device=device)}
        if tokens == 0:
            return sums, groups, old
        own = samples[share]
        cut = -(-len(own) // pieces) or 1
        batches = [self._rows(own[first : first + cut], device) for first in range(0, len(own), cut)]
        if self.reference is not None:
            with torch.no_grad(), update.autocast():
                for rows in batches:
                    rows.reference = token_logprobs(self.reference, rows.tokens, self.sampling.temperature)[0]
        for _ in range(self.iterations):
            total = torch.zeros((), device=device)
            for rows in batches:
                with update.autocast():
                    logprobs = token_logprobs(model, rows.tokens, self.sampling.temperature)
                    values = self.objective(*logprobs, rows, self.kl)
                update.backward(values["loss"] / tokens)
                total += values["loss"].detach() / tokens
                for name, value in values.items():
                    mean = value.detach() / (tokens * self.iterations)
                    sums[name] = sums[name] + mean if name in sums else mean
            sums |= update.step(total)
        self.version += 1
        if self.kl_target is not None:
            error = math.fsum(update.gather(float(sums.get("kl", 0.0)))) / self.kl_target - 1
            self.kl *= 1 + _KL_GAIN * max(-_KL_ERROR, min(_KL_ERROR, error))
        return sums, groups, old

    def _samples(self, group: Group) -> Iterator[tuple[Group, int, float, int]]:
        """The samples of a group that are trained: their group, number, advantage and length."""
        for number, advantage in enumerate(group.advantages(scale=self.scale).tolist()):
            length = int(group.lengths[number])
            if self.keep_unended or group.tokens[number, length - 1] == self.sampling.stop:
                yield group, number, advantage, length

    def _rows(self, samples: Sequence[tuple[Group, int, float, int]], device: torch.device) -> Rows:
        texts = [torch.cat([group.prompt, group.tokens[number, :length]]) for group, number, _, length in samples]
        tokens, mask = padded(texts, [len(group.prompt) for group, *_ in samples])
        old = torch.zeros_like(mask)
        old[mask.bool()] = torch.cat([group.logprobs[number, :length] for group, number, _, length in samples])
        advantages = torch.tensor([advantage for *_, advantage, _ in samples], dtype=torch.float32)
        return Rows(tokens.to(device), mask.to(device), old.to(device), advantages.to(device))

    def _measured(self, groups: Sequence[Group], size: int, device: torch.device) -> dict[str, Tensor]:
        """Metrics of the groups of all processes, in equal shares of ``size`` processes, since metrics are added up."""
        count, lengths = len(groups) * self.samples, sum(int(group.lengths.sum()) for group in groups)
        values = {
            "reward": math.fsum(float(group.rewards.sum()) for group in groups) / count,
            "pass_rate": sum(group.passed for group in groups) / count,
            "length": lengths / count,
            "tokens": lengths,
            "kl_coefficient": self.kl,
            "waiting": len(self.waiting),
        }
        return {name: torch.tensor(value / size, device=device) for name, value in values.items()}


def _checksum(model: nn.Module) -> str:
    """A digest of the weights by name."""
    weights = model.state_dict().items()
    return checksum(*(piece for name, value in weights for piece in (name.encode(), bytes_of(value.detach().cpu()))))
