"""Checks of (input, grad_output) and (indices, grad_output) pairs, for the operators of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import DTYPES, as_list, check_element_type, check_lengths, check_memory
from ._overlap import Access, check_no_overlap, have_addresses, regions

INDEX_DTYPES = (torch.int64, torch.int32)


def pair_lists(op: str, name: str, first: Any, grad_output: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Both as lists of equal length, at least one. A single tensor is a list of one."""
    if {isinstance(given, Tensor) for given in (first, grad_output) if isinstance(given, (Tensor, list, tuple))} == {
        True,
        False,
    }:
        raise TypeError(
            f"{op}: one of {name} and grad_output is a tensor and one is not, expected two tensors or two lists"
        )
    firsts = [first] if isinstance(first, Tensor) else as_list(op, name, first)
    grads = [grad_output] if isinstance(grad_output, Tensor) else as_list(op, "grad_output", grad_output)
    check_lengths(op, f"{name} tensors", len(firsts), grad_output=len(grads))
    if not firsts:
        raise ValueError(f"{op}: {name} is an empty list, expected one tensor per use of the layer")
    return firsts, grads


def check_linear(op: str, inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor], like: Tensor) -> None:
    """Raises TypeError or ValueError unless every pair is of one linear layer, on the device of `like`.

    Returns nothing; the weight's shape is that of the first pair.
    """
    check_lengths(op, "input tensors", len(inputs), grad_output=len(grad_outputs))
    if not inputs:
        raise ValueError(f"{op}: input is an empty list, expected one tensor per use of the layer")
    for x, gy in zip(inputs, grad_outputs, strict=True):
        check_element_type(op, "input", x)
        check_element_type(op, "grad_output", gy)
        _check_device(op, "input", x, like)
        _check_device(op, "grad_output", gy, like)
        if x.dtype != gy.dtype:
            raise TypeError(f"{op}: input has dtype {x.dtype}, grad_output has dtype {gy.dtype}, expected the same")
        if x.dim() == 0 or gy.dim() == 0 or x.shape[:-1] != gy.shape[:-1]:
            raise ValueError(
                f"{op}: input has shape {list(x.shape)}, grad_output has shape {list(gy.shape)}, expected "
                "[..., in_features] and [..., out_features] with the same leading dimensions"
            )
        if x.shape[-1] != inputs[0].shape[-1] or gy.shape[-1] != grad_outputs[0].shape[-1]:
            raise ValueError(f"{op}: the pairs differ in their last dimensions, expected uses of one layer")


def check_linear_update(op: str, weight: Tensor, inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor]) -> None:
    """`check_linear`, and raises TypeError or ValueError unless the weight has the shape of the pairs' gradient."""
    check_element_type(op, "weight", weight)
    check_linear(op, inputs, grad_outputs, weight)
    columns, rows = inputs[0].shape[-1], grad_outputs[0].shape[-1]
    check_weight(op, weight, rows, columns, "[out_features, in_features] of grad_output and input")


def is_plain_linear(
    written: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    weight: Tensor | None = None,
) -> bool:
    """Whether `check_linear` and `check_factors_apart` would find nothing, nor `check_linear_update` of the weight.

    In one function, because a fused layer asks twice in each step.

    Args:
        written: weight or slot first. None: not given.
    """
    first = written[0]
    if not isinstance(first, Tensor) or len(inputs) != len(grad_outputs) or not inputs:
        return False
    x, gy, device, storages = inputs[0], grad_outputs[0], first.device, set()
    if not (isinstance(x, Tensor) and isinstance(gy, Tensor) and x.dim() and gy.dim()):
        return False
    columns, rows = x.shape[-1], gy.shape[-1]
    if weight is not None and (weight.dtype not in DTYPES or weight.shape != (rows, columns)):
        return False
    tensors = 0
    for group in (written, inputs, grad_outputs):
        for tensor in group:
            if tensor is not None:
                if tensor.device != device or tensor.layout is not torch.strided or tensor.is_nested:
                    return False
                storage = tensor.untyped_storage()
                if not storage.nbytes():  # freed, or a tensor without elements
                    return False
                storages.add(storage._cdata)
                tensors += 1
    for x, gy in zip(inputs, grad_outputs, strict=True):
        if x.dtype not in DTYPES or x.dtype is not gy.dtype or not (x.dim() and gy.dim()):
            return False
        if x.shape[:-1] != gy.shape[:-1] or x.shape[-1] != columns or gy.shape[-1] != rows:
            return False
    return len(storages) == tensors


def check_factors_apart(
    op: str, factors: Sequence[Tensor], weight: Tensor | None, slot: Tensor | None, low: Sequence[Tensor] = ()
) -> None:
    """Raises RuntimeError if the weight, its low part or the slot, which are written, shares memory with a factor or
    with each other: then a part would change before it is used."""
    slots = [] if slot is None else [slot]
    weights = [] if weight is None else [weight]
    for tensor in (*weights, *slots, *low, *factors):
        check_memory(op, "a weight, slot or factor", tensor)
    if not have_addresses((*weights, *slots)):
        return
    check_no_overlap(
        op,
        regions(Access.WRITTEN, "weight", weights),
        regions(Access.WRITTEN, "low", low),
        regions(Access.ADDED, "slot" if weight is None else "sq_norm", slots),
        regions(Access.READ, "a factor of its gradient", factors),
    )


def check_weight(op: str, weight: Tensor, rows: int | None, columns: int, expected: str) -> None:
    """Raises TypeError or ValueError unless `weight` is a matrix [rows, columns]. `rows` None: any number."""
    check_element_type(op, "weight", weight)
    if weight.dim() != 2 or weight.shape[1] != columns or (rows is not None and weight.shape[0] != rows):
        shape = f"[{'any' if rows is None else rows}, {columns}]"
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}, expected {shape}: {expected}")


def check_embedding(
    op: str, indices: Sequence[Tensor], grad_outputs: Sequence[Tensor], padding_idx: Sequence[int], like: Tensor
) -> None:
    """Raises TypeError or ValueError unless every pair is of one embedding, on the device of `like`."""
    check_lengths(op, "indices tensors", len(indices), padding_idx=len(padding_idx))
    for index, gy in zip(indices, grad_outputs, strict=True):
        if not isinstance(index, Tensor):
            raise TypeError(f"{op}: indices is a {type(index).__name__}, expected a tensor")
        if index.dtype not in INDEX_DTYPES:
            raise TypeError(f"{op}: indices has dtype {index.dtype}, expected int64 or int32")
        check_element_type(op, "grad_output", gy)
        _check_device(op, "indices", index, like)
        _check_device(op, "grad_output", gy, like)
        if gy.dim() == 0 or index.shape != gy.shape[:-1]:
            raise ValueError(
                f"{op}: indices has shape {list(index.shape)}, grad_output has shape {list(gy.shape)}, expected "
                "[...] and [..., embedding_dim]"
            )
        if gy.shape[-1] != grad_outputs[0].shape[-1]:
            raise ValueError(f"{op}: the pairs differ in embedding_dim, expected uses of one embedding")


def _check_device(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {like.device}, where the weight or slot is")
