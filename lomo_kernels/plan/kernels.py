"""What a GPU would run and allocate, where torch has other kernels for the CPU, whose device simulated tensors have.

torch's CPU builds cannot simulate CUDA tensors: its autograd engine asks for a device that is not linked in. Only where
torch chooses by device does that make a difference: attention, RMSNorm, and what operators take for themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from ..composite import tiled
from .recorder import Workspaces

_torch_attention = F.scaled_dot_product_attention


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` as CUDA runs it on 16-bit tensors (FlashAttention 2, which reads grouped heads
    in place): query, key, value, output and a float32 number per token and head are kept for backward. float32 tensors
    go to torch's CPU kernel, which keeps the same.

    Raises:
        NotImplementedError: a mask is given, or the head is not a multiple of 8 wide.
        ValueError: the heads of keys do not divide those of queries.
    """
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"attention: {key.shape[1]} heads of keys do not divide {query.shape[1]} of queries")
    if query.dtype is torch.float32:
        return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None or query.shape[-1] % 8:
        raise NotImplementedError(
            f"simulated attention: attn_mask is {'None' if attn_mask is None else 'given'}, the head is "
            f"{query.shape[-1]} wide, expected no mask (is_causal or full attention) and a multiple of 8"
        )
    output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, scale=scale
    )[0]
    return output


def unfused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(query key^T) value as transformers 4.29 (May 2023) had it for LLaMA: the softmax in float32."""
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    if is_causal:
        lowest = torch.tensor(torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
        mask = lowest.expand(query.shape[2], key.shape[2]).triu(1)
        scores = torch.max(scores + mask, lowest)
    return torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ value


class _RMSNorm(torch.autograd.Function):
    """Allocates and keeps what CUDA's `_fused_rms_norm` does. Its numbers are none: only for simulated tensors."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None) -> Tensor:
        rstd = torch.empty(*input.shape[:-1], 1, dtype=torch.float32, device=input.device)
        ctx.save_for_backward(input, weight, rstd)
        return torch.empty_like(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, _ = ctx.saved_tensors
        of_weight = ctx.needs_input_grad[1]
        return torch.empty_like(input), torch.empty_like(weight) if of_weight else None


def fused_rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`F.rms_norm` as CUDA runs it: one kernel, which keeps its input and a float32 number per token."""
    output: Tensor = _RMSNorm.apply(input, weight)
    return output


def unfused_rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """As transformers 4.29 had it for LLaMA: the variance in float32."""
    variance = input.to(torch.float32).pow(2).mean(-1, keepdim=True)
    normal = (input * torch.rsqrt(variance + (eps or 1e-6))).to(input.dtype)
    return normal if weight is None else weight * normal


def _flash_backward(grad_out: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """float32: the query's gradient and a number per token and head; keys and values of grouped heads for each head."""
    batch, heads, tokens, width = query.shape
    rounded = -(-tokens // 128) * 128
    wide = -(-width // 32) * 32
    grouped = 0 if key.shape[1] == heads else 2 * batch * heads * key.shape[2] * width * key.itemsize
    return 4 * batch * heads * rounded * (wide + 1) + grouped


def _workspaces(device: str) -> dict[Any, Callable[..., int]]:
    def linear(_: Tensor, inputs: list[Tensor], grads: list[Tensor], *ignored: Any) -> int:
        return tiled.workspace_bytes(grads[0].shape[-1], inputs[0].shape[-1], len(inputs), device)

    def embedding(weight: Tensor, indices: list[Tensor], grads: list[Tensor], *ignored: Any) -> int:
        rows = weight.shape[0] if weight.dim() == 2 else indices[0].numel()  # of a norm: the slot is no weight
        return tiled.workspace_bytes(rows, grads[0].shape[-1], len(indices), device)

    ours = torch.ops.lomo_kernels
    return {
        ours.linear_update_.default: linear,
        ours.linear_sq_norm_.default: linear,
        ours.embedding_update_.default: embedding,
        ours.embedding_sq_norm_.default: embedding,
        torch.ops.aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    }


class Kernels(NamedTuple):
    """What stands in for torch's functions that choose by device, and what operators take beside their results."""

    attention: Callable[..., Tensor] | None  # None: torch's own, for CPU tensors
    rms_norm: Callable[..., Tensor] | None
    device: str  # whose tiles are taken

    @property
    def workspaces(self) -> Workspaces:
        return _workspaces(self.device)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.attention:
                stack.enter_context(patch.object(F, "scaled_dot_product_attention", self.attention))
            if self.rms_norm:
                stack.enter_context(patch.object(F, "rms_norm", self.rms_norm))
            yield


KERNELS = {
    "gpu": Kernels(flash_attention, fused_rms_norm, "cuda"),
    "unfused": Kernels(unfused_attention, unfused_rms_norm, "cuda"),  # LLaMA in May 2023
    "cpu": Kernels(None, None, "cpu"),
}
