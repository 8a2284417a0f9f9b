"""Supervised fine-tuning on prompts with their answers, and the evaluation of a model's completions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from runner.evaluation import evaluation_mode
from runner.rl.generation import Completions, Sampling, generate, token_logprobs
from runner.task import Task

Batch = Mapping[str, Sequence[str]]
Reward = Callable[[str, str, str], tuple[float, bool]]


class Tokenizer(Protocol):
    """A tokenizer, such as one of Hugging Face."""

    def encode(self, text: str, /) -> list[int]: ...

    def decode(self, tokens: list[int], /) -> str: ...


class Bytes:
    """Each byte of the text in UTF-8 is a token."""

    def encode(self, text: str, /) -> list[int]:
        """Numbers from 0 to 255."""
        return [*text.encode()]

    def decode(self, tokens: list[int], /) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        return bytes(tokens).decode(errors="replace")


class Completion(Task):
    """Batches are mappings with the texts ``prompt`` and ``answer`` of each sample; the model maps tokens [B, T] to
    logits [B, T, V]. The loss is the cross-entropy of the answer's tokens, the stop token at its end included.

    Evaluation reports this loss, completes each prompt greedily, and reports the mean ``reward``, ``pass_at_1`` (the
    share of completions that the reward calls correct), their ``length`` in tokens, and how the model completes the
    prompts ``show``.
    """

    def __init__(
        self,
        *,
        reward: Reward,
        max_tokens: int,
        stop: int = 10,
        tokenizer: Tokenizer | None = None,
        show: Sequence[str] = (),
    ) -> None:
        self.reward = reward
        self.tokenizer = tokenizer or Bytes()
        self.show = show
        self.greedy = Sampling(max_tokens, stop, temperature=0.0)

    def training_step(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        prompts = [*map(self.tokenizer.encode, batch["prompt"])]
        answers = [[*self.tokenizer.encode(answer), self.greedy.stop] for answer in batch["answer"]]
        rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
        starts = [len(prompt) for prompt in prompts]
        tokens, mask = (each.to(_device(model)) for each in padded(rows, starts))
        return {"loss": -(token_logprobs(model, tokens)[0] * mask).sum() / mask.sum()}

    def evaluation_step(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        results, device = [], _device(model)
        for row, text, length in self._complete(model, batch["prompt"]):
            results.append([*self.reward(batch["prompt"][row], text, batch["answer"][row]), length])
        means = torch.tensor(results, dtype=torch.float64, device=device).mean(0)
        loss = Completion.training_step(self, model, batch)["loss"]
        return {"loss": loss, **dict(zip(("reward", "pass_at_1", "length"), means, strict=True))}

    def evaluation_end(self, model: nn.Module, metrics: dict[str, float]) -> Mapping[str, float | str]:
        texts = {row: text for row, text, _ in self._complete(model, self.show)}
        samples = "\n".join(f"{prompt}{texts[row]!r}" for row, prompt in enumerate(self.show))
        return {**metrics, "samples": samples} if samples else metrics

    def texts(self, completions: Completions) -> list[str]:
        """The texts of completions, stop tokens included."""
        pairs = zip(completions.tokens.tolist(), completions.lengths.tolist(), strict=True)
        return [self.tokenizer.decode(tokens[:length]) for tokens, length in pairs]

    def _complete(self, model: nn.Module, prompts: Sequence[str]) -> Iterator[tuple[int, str, int]]:
        """The greedy completion of each prompt: the prompt's number, the text, and its length in tokens. Prompts of one
        length are completed together.
        """
        encoded = [self.tokenizer.encode(prompt) for prompt in prompts]
        for length in sorted({*map(len, encoded)}):
            rows = [row for row, tokens in enumerate(encoded) if len(tokens) == length]
            text = torch.tensor([encoded[row] for row in rows], device=_device(model))
            with evaluation_mode(model):
                completions = generate(model, text, [0] * len(rows), self.greedy)
            yield from zip(rows, self.texts(completions), completions.lengths.tolist(), strict=True)


def padded(rows: Sequence[Tensor], starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Texts of different lengths as one tensor [B, T], padded with zeros, and a mask float32 [B, T - 1] of the tokens
    from ``starts`` on, shifted by one as log-probabilities are.
    """
    tokens = nn.utils.rnn.pad_sequence([*rows], batch_first=True)
    position = torch.arange(1, tokens.shape[1])
    ends = torch.tensor([[len(row)] for row in rows])
    return tokens, ((position >= torch.tensor(starts)[:, None]) & (position < ends)).float()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
