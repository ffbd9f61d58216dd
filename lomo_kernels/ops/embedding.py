"""``embedding_update_`` and ``embedding_sq_norm_``: `sgd_` and `sq_norm_` for an embedding whose gradient never exists.

Row r of the gradient of ``weight`` in ``y = weight[indices]`` is the sum of the rows of ``grad_output`` whose index is
r. These operators take ``indices`` and ``grad_output`` in place of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._arguments import (
    Scalar,
    check_devices,
    check_low,
    check_served,
    check_shard,
    check_slot,
    integer,
    inv_scale_tensor,
    library,
)
from ._overlap import check_scale_apart
from ._pairs import check_embedding, check_factors_apart, check_weight, pair_lists
from .scalars import check_vector
from .update import Step, increment_version, update_arguments

if TYPE_CHECKING:
    from typing_extensions import Unpack

# padding_idx: one per pair, negative for none.
library.define(
    "embedding_sq_norm_(Tensor(a!) slot, Tensor[] indices, Tensor[] grad_outputs, int[] padding_idx, "
    "Tensor? inv_scale) -> ()"
)
library.define(
    "embedding_update_(Tensor(a!) weight, Tensor[] indices, Tensor[] grad_outputs, int[] padding_idx, Tensor scalars, "
    "Tensor(b!)? sq_norm, int rule, bool stochastic, int seed, int parameter_id, int[] shard, "
    "Tensor(c!)? low=None) -> ()"
)


@torch.library.register_fake("lomo_kernels::embedding_sq_norm_")
def _(slot: Tensor, indices: list[Tensor], grad_outputs: list[Tensor], padding_idx: list[int], inv_scale: Any) -> None:
    check_embedding("embedding_sq_norm_", indices, grad_outputs, padding_idx, slot)
    check_devices("embedding_sq_norm_", slot, None, inv_scale)


@torch.library.register_fake("lomo_kernels::embedding_update_")
def _(
    weight: Tensor,
    indices: list[Tensor],
    grad_outputs: list[Tensor],
    padding_idx: list[int],
    scalars: Tensor,
    sq_norm: Tensor | None,
    rule: int,
    stochastic: bool,
    seed: int,
    parameter_id: int,
    shard: list[int],
    low: Tensor | None = None,
) -> None:
    _check_update("embedding_update_", weight, indices, grad_outputs, padding_idx)
    check_vector("embedding_update_", scalars, weight.device)
    check_devices("embedding_update_", weight, sq_norm, None)
    check_low("embedding_update_", [weight], [] if low is None else [low], stochastic=stochastic)


def _check_update(
    op: str, weight: Tensor, indices: list[Tensor], grad_outputs: list[Tensor], padding_idx: list[int]
) -> None:
    check_embedding(op, indices, grad_outputs, padding_idx, weight)
    check_weight(op, weight, None, grad_outputs[0].shape[-1], "[num_embeddings, embedding_dim]")


def _padding(op: str, padding_idx: int | None, pairs: int) -> list[int]:
    if padding_idx is None:
        return [-1] * pairs
    if integer(op, "padding_idx", padding_idx) < 0:
        raise ValueError(f"{op}: padding_idx is {padding_idx}, expected None or a row's index, >= 0")
    return [padding_idx] * pairs


def embedding_sq_norm_(
    slot: Tensor,
    indices: Tensor | Sequence[Tensor],
    grad_output: Tensor | Sequence[Tensor],
    *,
    padding_idx: int | None = None,
    inv_scale: Scalar | None = None,
) -> None:
    """Adds the sum of ``(gradient * inv_scale) ** 2`` to `slot`. Rows with the same index are summed first, in float32.

    Args:
        slot: float64, one element, on the gradient's device.
        indices: int64 or int32, any shape; or a list, one tensor per use of the embedding.
        grad_output: [*indices.shape, embedding_dim], float32, bfloat16 or float16; a list where `indices` is one.
        padding_idx: tokens with this index count nothing, as in `torch.nn.functional.embedding`.
        inv_scale: one over the loss scale; default 1.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, layout or device; the slot is then unchanged.
        RuntimeError: a negative index on the CPU; the slot is then unchanged. (Such tokens are left out on a GPU.)
    """
    op = "embedding_sq_norm_"
    index_list, grad_outputs = pair_lists(op, "indices", indices, grad_output)
    check_slot(op, "slot", slot, slot.device if isinstance(slot, Tensor) else torch.device("cpu"))
    paddings = _padding(op, padding_idx, len(index_list))
    check_embedding(op, index_list, grad_outputs, paddings, slot)
    check_served(slot)
    check_factors_apart(op, [*index_list, *grad_outputs], None, slot)
    number = inv_scale_tensor(op, inv_scale, slot.device)
    check_scale_apart(op, inv_scale, [slot])
    torch.ops.lomo_kernels.embedding_sq_norm_.default(slot, index_list, grad_outputs, paddings, number)


def embedding_sgd_(
    weight: Tensor,
    indices: Tensor | Sequence[Tensor],
    grad_output: Tensor | Sequence[Tensor],
    *,
    padding_idx: int | None = None,
    sq_norm: Tensor | None = None,
    parameter_id: int = 0,
    shard: Sequence[int] | None = None,
    low: Tensor | None = None,
    **step: Unpack[Step],
) -> None:
    """`sgd_` on an embedding's weight. Each row of the gradient is the sum of the tokens that looked the row up.

    Only rows that occur in `indices` are changed, except by weight decay, which reaches every row. Rows with the same
    index are summed in float32, in a fixed order, and the result is rounded once.

    Args:
        weight: [num_embeddings, embedding_dim], float32, bfloat16 or float16. Its version counter is increased.
        indices: int64 or int32, any shape, in ``[0, num_embeddings)``; or a list, one tensor per use of the embedding.
        grad_output: [*indices.shape, embedding_dim], float32, bfloat16 or float16; a list where `indices` is one.
        padding_idx: tokens with this index count nothing, as in `torch.nn.functional.embedding`; its row still decays.
        sq_norm: float64, one element: what `embedding_sq_norm_` adds is added to it.
        shard: ``(offset, row_length, row_stride)`` if `weight` is a part of a larger parameter, as in `sgd_`.
        lr, weight_decay, inv_scale, clip_value, clip_coef, found_inf, step, rule, rounding, seed, parameter_id, low: as
            in `sgd_`.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, layout, device or range; nothing is changed then.
        RuntimeError: elements of `weight` or `low` share memory with each other, a factor, `sq_norm` or a scalar;
            `sq_norm` shares memory with a factor or a scalar; an index is out of range on the CPU. Nothing is changed
            then. (Such tokens are left out on a GPU, because the host reads nothing.)
    """
    op = "embedding_sgd_"
    index_list, grad_outputs = pair_lists(op, "indices", indices, grad_output)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: weight is a {type(weight).__name__}, expected a tensor")
    paddings = _padding(op, padding_idx, len(index_list))
    _check_update(op, weight, index_list, grad_outputs, paddings)
    if padding_idx is not None and padding_idx >= weight.shape[0]:
        raise ValueError(f"{op}: padding_idx is {padding_idx}, expected a row of weight, < {weight.shape[0]}")
    check_served(weight)
    slots = [] if sq_norm is None else [sq_norm]
    scalars, settings, lows = update_arguments(op, slots, [weight], [low], step)
    check_factors_apart(op, [*index_list, *grad_outputs], weight, sq_norm, lows)
    torch.ops.lomo_kernels.embedding_update_.default(
        weight,
        index_list,
        grad_outputs,
        paddings,
        scalars,
        sq_norm,
        *settings,
        integer(op, "parameter_id", parameter_id),
        [] if shard is None else check_shard(op, shard, weight.numel()),
        low,
    )
    increment_version([weight])
