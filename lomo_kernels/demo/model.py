"""A small decoder in the shape of Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Config:
    """Sizes of a model over bytes.

    Raises:
        ValueError: sizes that do not fit together, in words of the command line.
    """

    layers: int
    d_model: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int = 256

    def __post_init__(self) -> None:
        if self.d_model % self.heads:
            raise ValueError(f"--heads {self.heads} does not divide --d-model {self.d_model}")
        if self.d_model // self.heads % 2:
            raise ValueError(
                f"--d-model {self.d_model} over --heads {self.heads} is {self.d_model // self.heads} numbers per head, "
                "and rotary positions need an even number"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"--kv-heads {self.kv_heads} does not divide --heads {self.heads}")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads


def rotary_angles(seq: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """Angle of position t in plane i: t / 10000^(2i / head_dim), float32 [seq, head_dim / 2]."""
    planes = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    positions = torch.arange(seq, dtype=torch.float32, device=device)
    return torch.outer(positions, 10000.0 ** (-planes / head_dim))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (first half, second half) of heads. x [batch, heads, seq, head_dim]; cos, sin its last two."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        kv_width = config.kv_heads * config.head_dim
        self.query = nn.Linear(config.d_model, config.d_model, bias=False)
        self.key = nn.Linear(config.d_model, kv_width, bias=False)
        self.value = nn.Linear(config.d_model, kv_width, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x and the result [batch, seq, d_model]; cos, sin [seq, head_dim]."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)  # [batch, heads, seq, head_dim]
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(
            rotate(q, cos, sin),
            rotate(k, cos, sin),
            v,
            is_causal=True,
            enable_gqa=self.config.kv_heads != self.config.heads,
        )
        return cast(torch.Tensor, self.out(mixed.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.ffn, bias=False)
        self.up = nn.Linear(config.d_model, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x and the result [batch, seq, d_model]."""
        return cast(torch.Tensor, self.down(F.silu(self.gate(x)) * self.up(x)))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=1e-5)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=1e-5)
        self.ffn = FeedForward(config)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x and the result [batch, seq, d_model]."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return cast(torch.Tensor, x + self.ffn(self.ffn_norm(x)))


class ByteLlama(nn.Module):
    """Next-byte model: int64 [batch, seq] to logits [batch, seq, vocab] in the weights' dtype."""

    def __init__(self, config: Config, *, seed: int = 0) -> None:
        """Weights are N(0, 0.02), those that write to the residual stream narrower by sqrt(2 * layers), norms 1.

        `checkpoint_blocks` set to True makes backward compute each block's activations again instead of keeping them.
        """
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False
        self.embedding = nn.Embedding(config.vocab, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.d_model, eps=1e-5)
        self.head = nn.Linear(config.d_model, config.vocab, bias=False)
        # A GPU's tensors take a GPU's generator; simulated ones take any.
        on_gpu = self.head.weight.is_cuda and torch.cuda.is_available()
        generator = torch.Generator("cuda" if on_gpu else "cpu").manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes = name.endswith(("attention.out.weight", "ffn.down.weight"))
                std = 0.02 / (2 * config.layers) ** 0.5 if writes else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.head(self.hidden(tokens)))

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the head reads, [batch, seq, d_model]."""
        x = self.embedding(tokens)
        angles = rotary_angles(tokens.shape[1], self.config.head_dim, x.device).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin)
        return cast(torch.Tensor, self.norm(x))

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy in nats per byte, a float32 scalar, of windows int64 [batch, seq + 1]."""
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
