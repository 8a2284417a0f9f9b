"""Models of Hugging Face, made from a configuration, with adapters or without, and a task that has a tokenizer."""

from typing import Any

import torch
from torch import nn

from runner.task import Metrics, Task

TEXT = "".join(map(chr, range(97, 123)))


def gpt2(adapters: bool = False, wrapped: bool = False) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    if adapters:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    return Wrapped(model) if wrapped else model


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.inner(*arguments, **keywords)


class Letters:
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        return (torch.arange(8) + index) % 30


class Language(Task):
    def __init__(self) -> None:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast

        words = {letter: number for number, letter in enumerate([*TEXT, "[UNK]"])}
        inner = Tokenizer(WordLevel(words, unk_token="[UNK]"))
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")

    def training_step(self, model: nn.Module, batch: Any) -> Metrics:
        return {"loss": model(input_ids=batch, labels=batch).loss}
