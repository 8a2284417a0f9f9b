"""The next byte of a text."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runner.errors import ConfigError
from runner.task import Task


class LanguageModeling(Task):
    """Batches are bytes of shape [B, T + 1]; the model maps [B, T] to logits of shape [B, T, 256], or to
    an output of transformers that has them.

    Evaluation reports ``bits_per_byte`` and a text of ``sample_bytes`` bytes that continues from ``prompt``.
    """

    def __init__(self, *, prompt: str = "\n", sample_bytes: int = 256, temperature: float = 0.8) -> None:
        if not prompt:
            raise ConfigError('task.prompt is empty: a text needs something to continue from, for example "\\n"')
        self.prompt = prompt
        self.sample_bytes = sample_bytes
        self.temperature = temperature

    def training_step(self, model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        tokens = batch.long()
        logits = logits_of(model(tokens[:, :-1]))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())}

    def evaluation_end(self, model: nn.Module, metrics: dict[str, float]) -> Mapping[str, float | str]:
        report: dict[str, float | str] = {**metrics, "bits_per_byte": metrics["loss"] / math.log(2)}
        if self.sample_bytes:
            report["sample"] = self._sample(model)
        return report

    def _sample(self, model: nn.Module) -> str:
        device = next(model.parameters()).device
        window = getattr(model, "block_size", 128)
        text = torch.tensor([list(self.prompt.encode())], device=device)
        for _ in range(self.sample_bytes):
            logits = logits_of(model(text[:, -window:]))[:, -1] / self.temperature
            text = torch.cat([text, torch.multinomial(logits.softmax(-1), 1)], dim=1)
        return bytes(text[0].tolist()).decode(errors="replace")


def logits_of(output: Any) -> Tensor:
    """The logits in the output of a model: itself, or its attribute of that name."""
    logits: Tensor = getattr(output, "logits", output)
    return logits
