"""A byte-level transformer language model: pre-norm blocks, causal attention, tied embeddings."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Cache = list[tuple[Tensor, Tensor]]  # keys and values [B, heads, T, width / heads] of each layer


class GPT(nn.Module):
    """Bytes [B, T <= block_size] -> logits [B, T, vocabulary].

    With a ``cache`` (a list, empty at first) the tokens follow those of the calls before, and then come one at a time.
    """

    def __init__(
        self, *, block_size: int, layers: int, heads: int, width: int, dropout: float = 0.0, vocabulary: int = 256
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"model.width={width} is not divisible by model.heads={heads}")
        self.block_size = block_size
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(block_size, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.apply(_initialise)
        for name, parameter in self.named_parameters():
            if name.endswith(("project.weight", "feed_forward.2.weight")):
                # Residual branches add up: keep their sum at unit scale (Radford et al. 2019).
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers))
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        past = cache[0][0].shape[2] if cache else 0
        x = self.tokens(tokens) + self.positions(torch.arange(past, past + tokens.shape[1], device=tokens.device))
        x = self.dropout(x)
        for number, block in enumerate(self.blocks):
            x = block(x, cache, number)
        logits: Tensor = self.head(self.norm(x))
        return logits


class TransformerBlock(nn.Module):
    """Attention, then a feed-forward layer, each normalised before and added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads, dropout)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        x = x + self.attention(self.norm_attention(x), cache, layer)
        y: Tensor = x + self.feed_forward(self.norm_feed_forward(x))
        return y


class CausalAttention(nn.Module):
    """Multi-head attention of each position to itself and those before it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.rate = dropout
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        batch, length, width = x.shape
        query, key, value = self.query_key_value(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        past = False
        if cache is not None:
            if past := len(cache) > layer:
                key, value = torch.cat([cache[layer][0], key], 2), torch.cat([cache[layer][1], value], 2)
            cache[layer:] = [(key, value), *cache[layer + 1 :]]
        rate = self.rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=not past)
        y: Tensor = self.dropout(self.project(mixed.transpose(1, 2).reshape(batch, length, width)))
        return y


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
