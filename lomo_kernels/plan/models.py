"""What is trained: the paper's models in the shape of this library's demo, any sizes, any Hugging Face config."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..demo.model import ByteLlama, Config
from ..layers import linear_cross_entropy
from .blocks import blocks_of
from .simulate import default_dtype

#: LLaMA (arXiv 2302.13971); "llama-1b" is TinyLlama's shape (arXiv 2401.02385), with 4 heads of keys and values;
#: "llama-3.1-8b" is of arXiv 2407.21783.
SHAPES = {
    "llama-1b": Config(layers=22, d_model=2048, heads=32, kv_heads=4, ffn=5632, vocab=32000),
    "llama-7b": Config(layers=32, d_model=4096, heads=32, kv_heads=32, ffn=11008, vocab=32000),
    "llama-3.1-8b": Config(layers=32, d_model=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256),
    "llama-13b": Config(layers=40, d_model=5120, heads=40, kv_heads=40, ffn=13824, vocab=32000),
    "llama-30b": Config(layers=60, d_model=6656, heads=52, kv_heads=52, ffn=17920, vocab=32000),
    "llama-65b": Config(layers=80, d_model=8192, heads=64, kv_heads=64, ffn=22016, vocab=32000),
}

Build = Callable[[], nn.Module]
#: So many tokens' logits exist at a time; `FUSED`: blocks of logits, by `linear_cross_entropy`; None: all.
Chunk = int | str | None
FUSED = "fused"


class Model(NamedTuple):
    """A model that can be built with any number of blocks."""

    blocks: int
    build: Callable[[int, bool], Build]  # from the number of blocks, and whether each is a checkpoint
    loss: Callable[[int, int, Chunk], Callable[[Any], Tensor]]  # from batch, sequence, chunk: see `loss_of`
    longest: float = math.inf  # tokens of a sequence


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


def loss_of(batch: int, seq: int, chunk: Chunk = None) -> Callable[[ByteLlama], Tensor]:
    """The mean cross entropy of a batch of windows.

    Args:
        seq: tokens per window.
        chunk: so many tokens' logits exist at a time, and backward computes them again; see `Chunk`.
    """

    def loss(model: ByteLlama) -> Tensor:
        windows = torch.zeros(batch, seq + 1, dtype=torch.int64, device="cpu")
        if chunk is None:
            return model.loss(windows)
        return chunked_loss(model.hidden(windows[:, :-1]), model.head, windows[:, 1:], chunk)

    return loss


def chunked_loss(hidden: Tensor, head: Any, targets: Tensor, chunk: int | str) -> Tensor:
    """``F.cross_entropy(head(hidden), targets)``, with the logits of `chunk` tokens at a time; see `Chunk`.

    Args:
        hidden: [..., features], what the head reads.
        targets: int64 [...].
    """

    if isinstance(chunk, str):
        return linear_cross_entropy(hidden, head.weight, targets, linear_bias=head.bias).float()

    def part(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(head(x).float(), y, reduction="sum")

    parts = zip(hidden.flatten(0, -2).split(chunk), targets.flatten().split(chunk), strict=True)
    losses = [checkpoint(part, x, y, use_reentrant=False) for x, y in parts]
    return torch.stack(losses).sum() / targets.numel()


def of_shape(config: Config) -> Model:
    """`llama` with any number of blocks."""

    def build(blocks: int, checkpointing: bool) -> Build:
        shape = Config(blocks, config.d_model, config.heads, config.kv_heads, config.ffn, config.vocab)
        return llama(shape, checkpointing=checkpointing)

    return Model(config.layers, build, loss_of)


def of_transformers(name: str) -> Model:
    """A causal language model from its config, by transformers: a folder, a file or a name on the Hub. No weights.

    Raises:
        ImportError: transformers is not installed.
        OSError, ValueError: there is no such config, it is of no causal language model, or the model's blocks are not
            all alike.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

    try:
        config = AutoConfig.from_pretrained(name).get_text_config()
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error
    config.use_cache = False
    with torch.device("meta"):
        blocks = blocks_of(AutoModelForCausalLM.from_config(config))
    shapes = {tuple(param.shape for param in block.parameters()) for block in blocks}
    kinds = set(getattr(config, "layer_types", None) or ["attention"])
    if len(blocks) != config.num_hidden_layers or len(shapes) != 1 or len(kinds) != 1:
        raise ValueError("its blocks are not all alike, as those have to be of which few tell what many take")

    def build(blocks: int, checkpointing: bool) -> Build:
        shape = copy.deepcopy(config)
        shape.num_hidden_layers = blocks

        def built() -> nn.Module:
            model: Any = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
            if checkpointing:
                with warnings.catch_warnings():  # the new name is not in transformers 5.0
                    warnings.simplefilter("ignore", FutureWarning)
                    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            trained: nn.Module = model.train()
            return trained

        return built

    def loss(batch: int, seq: int, chunk: Chunk) -> Callable[[Any], Tensor]:
        def of(model: Any) -> Tensor:
            windows = torch.zeros(batch, seq + 1, dtype=torch.int64, device="cpu")
            head = model.get_output_embeddings()
            # It would read whether a row holds several sequences, and without values take it that it does.
            with patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None):
                hidden = model.get_decoder()(input_ids=windows[:, :-1]).last_hidden_state
            if chunk is not None:
                return chunked_loss(hidden, head, windows[:, 1:], chunk)
            return F.cross_entropy(head(hidden).flatten(0, 1).float(), windows[:, 1:].flatten())

        def told(model: Any) -> Tensor:
            try:
                return of(model)
            except RuntimeError as error:  # as where a shape depends on values
                raise NotImplementedError(f"{type(model).__name__} cannot be simulated: {error}") from error

        return told

    return Model(config.num_hidden_layers, build, loss, getattr(config, "max_position_embeddings", math.inf))
