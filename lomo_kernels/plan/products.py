"""How many floating-point operations the matrix products and the attention of a step take.

torch has formulas of its own operators (`torch.utils.flop_counter`). This module adds those of ours. They count what
runs: a norm may come from inner products of tokens, and a weight's product is formed once for its norm and once for
its update. Attention counts as if no mask left out a token. Other operations count as 0.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from ..composite import gram, tiled
from .recorder import Formulas


def formulas(device: str) -> Formulas:
    """Formulas by operator. `device`: the one whose kernels run, "cpu" or "cuda"."""
    ours, aten = torch.ops.lomo_kernels, torch.ops.aten
    return {
        **flop_registry,
        aten.addmm_: flop_registry[aten.addmm],
        aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
            aten._scaled_dot_product_flash_attention_backward
        ],
        ours.linear_update_: _update,
        ours.linear_sq_norm_: partial(_norm, device=device),
        ours._product_: _tile,
    }


def _update(weight: Tensor, inputs: list[Tensor], grad_outputs: list[Tensor], *ignored: Any, **_: Any) -> int:
    return sum(2 * x.numel() * gy.shape[-1] for x, gy in zip(inputs, grad_outputs, strict=True))


def _norm(slot: Tensor, inputs: list[Tensor], grad_outputs: list[Tensor], *ignored: Any, device: str, **_: Any) -> int:
    columns, rows = inputs[0].shape[-1], grad_outputs[0].shape[-1]
    tokens = inputs[0].numel() // max(columns, 1)
    if len(inputs) == 1 and _takes_inner_products(tokens, rows, columns, inputs[0].dtype, device):
        return tokens * tokens * (rows + columns)  # the products of tokens i <= j only
    return _update(slot, inputs, grad_outputs)


def _takes_inner_products(tokens: int, rows: int, columns: int, dtype: torch.dtype, device: str) -> bool:
    """Whether a norm is formed from inner products of tokens. It assumes that the estimate of the error allows them. A
    GPU is one of NVIDIA's, which multiply 16-bit factors with a float32 result."""
    if device == "cpu":
        return gram.is_cheaper(tokens, rows, columns)
    by_tiles = tiled.is_faster_on_gpu(tokens, dtype is not torch.float32)
    return not by_tiles and gram.is_cheaper_on_gpu(tokens, rows, columns)


def _tile(out: Tensor, grad_output: Tensor, *ignored: Any, **_: Any) -> int:
    return 2 * grad_output.shape[0] * out.numel()
