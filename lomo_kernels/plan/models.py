"""The models that the paper trains, in the shape that this library's demo has, and its losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..demo.model import ByteLlama, Config
from .simulate import default_dtype

#: LLaMA (arXiv 2302.13971); "llama-1b" is TinyLlama's shape (arXiv 2401.02385), with 4 heads of keys and values.
SHAPES = {
    "llama-1b": Config(layers=22, d_model=2048, heads=32, kv_heads=4, ffn=5632, vocab=32000),
    "llama-7b": Config(layers=32, d_model=4096, heads=32, kv_heads=32, ffn=11008, vocab=32000),
    "llama-13b": Config(layers=40, d_model=5120, heads=40, kv_heads=40, ffn=13824, vocab=32000),
    "llama-30b": Config(layers=60, d_model=6656, heads=52, kv_heads=52, ffn=17920, vocab=32000),
    "llama-65b": Config(layers=80, d_model=8192, heads=64, kv_heads=64, ffn=22016, vocab=32000),
}


def llama(
    config: Config, *, checkpointing: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], ByteLlama]:
    """A function that makes the model."""

    def build() -> ByteLlama:
        with default_dtype(dtype):
            model = ByteLlama(config)
        model.checkpoint_blocks = checkpointing
        return model

    return build


def loss_of(batch: int, seq: int, chunk: int | None = None) -> Callable[[ByteLlama], Tensor]:
    """The mean cross entropy of a batch of windows.

    Args:
        seq: tokens per window.
        chunk: so many tokens' logits exist at a time; backward computes them again. None: all.
    """

    def loss(model: ByteLlama) -> Tensor:
        windows = torch.zeros(batch, seq + 1, dtype=torch.int64)
        return model.loss(windows) if chunk is None else chunked_loss(model, windows, chunk)

    return loss


def chunked_loss(model: ByteLlama, windows: Tensor, chunk: int) -> Tensor:
    """`ByteLlama.loss` of int64 windows [batch, seq + 1], with the logits of `chunk` tokens at a time."""

    def part(x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model.head(x).float(), targets, reduction="sum")

    hidden, targets = model.hidden(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    losses = [checkpoint(part, x, y, use_reentrant=False) for x, y in parts]
    return torch.stack(losses).sum() / targets.numel()
