# mypy: disable-error-code="no-untyped-def"
"""`update_` in Triton. What it does is documented in `lomo_kernels/ops/update.py`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import scalars as vectors
from ..ops._arguments import check_low
from ..ops._overlap import Access, check_no_overlap, regions
from . import launch
from .launch import COLUMNS, TYPES, fail
from .numerics import (
    BLOCK,
    SGD,
    add_to_slot,
    draw,
    elements,
    high_part,
    is_ordinary,
    joined,
    load,
    low_part,
    mix64,
    nearest,
    ordinary,
    scalar,
    share_a_key,
    slot_at,
    step_scalars,
    stochastic,
    store,
    sum_of_squares,
    updated,
    widen,
)

SCALARS = vectors.NAMES
INDICES = ("offset", "row_length", "row_stride")


@triton.jit(do_not_specialize=[*SCALARS, "on_device", "numel", "key", *INDICES, "slot", "owners", "first_block"])
def sgd_kernel(
    param,
    grad,
    low,
    numel: tl.int64,
    lr: tl.int64,
    weight_decay: tl.int64,
    inv_scale: tl.int64,
    clip_value: tl.int64,
    clip_coef: tl.int64,
    found_inf: tl.int64,
    step: tl.int64,
    on_device: tl.int32,
    key: tl.int64,
    offset: tl.int64,
    row_length: tl.int64,
    row_stride: tl.int64,
    slot: tl.int64,
    table,
    owners: tl.int64,
    first_block: tl.int64,
    partials,
    counters,
    P: tl.constexpr,
    G: tl.constexpr,
    RULE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CLAMP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program updates BLOCK elements: of the one tensor in the arguments, or, with COLUMNS, of the tensor that the
    table says. SPLIT: a bfloat16 parameter has a low part, whose address stands in the key's place of the table."""
    block = tl.program_id(0).to(tl.int64)
    if COLUMNS:
        block += first_block.to(tl.int64)
        owner = tl.load(table + owners.to(tl.int64) + block)
        row = table + owner * COLUMNS
        param, grad, slot, numel = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
        first, key = tl.load(row + 4), tl.load(row + 5)
        if SPLIT:
            low = key
        offset, row_length, row_stride = tl.load(row + 6), tl.load(row + 7), tl.load(row + 8)
        block -= first
        if NORM:
            partials += first
            counters += owner
    numel = numel.to(tl.int64)
    start = block * BLOCK
    left = tl.minimum(numel - start, BLOCK).to(tl.int32)
    param = elements(param, P, ALIGNED) + start
    # First of all what takes longest: the scalars may have to come from memory too. A thread has the same elements of
    # both: eight of a 16-bit gradient would have to be handed round where it has four of a float32 parameter.
    TOGETHER: tl.constexpr = 4 if tl.float32 == P else 16
    p_bits = load(param, left, BLOCK)
    if SPLIT:
        low = elements(low, P, ALIGNED) + start
        low_bits = load(low, left, BLOCK)
    g_bits = load(elements(grad, G, ALIGNED) + start, left, BLOCK, TOGETHER)
    rate, decay, unscale, limit, coef = step_scalars(
        lr, weight_decay, inv_scale, clip_value, clip_coef, on_device, CLAMP
    )
    scaled = widen(g_bits, G) * unscale
    before = joined(p_bits, low_bits) if SPLIT else widen(p_bits, P)
    p = updated(before, scaled, rate, decay, limit, coef, RULE, CLAMP)
    finite = tl.abs(scaled) < float("inf")
    # A gradient that is not finite shows in p, but not if it was clamped or its direction is finite: then the sum says
    # so, or an addition to p.
    HIDDEN: tl.constexpr = CLAMP or RULE != SGD
    SUM_FIRST: tl.constexpr = NORM and HIDDEN and STOCHASTIC and not ROWS
    if SUM_FIRST:
        total = sum_of_squares(scaled, BLOCK)
    if STOCHASTIC:
        stream = mix64((key.to(tl.int64) ^ scalar(step, on_device, tl.int64)).to(tl.uint64, bitcast=True))
        offset, row_length, row_stride = offset.to(tl.int64), row_length.to(tl.int64), row_stride.to(tl.int64)
        if ROWS:
            random = draw(stream, start, left, offset, row_length, row_stride, P, ROWS, PAIRS, BLOCK)
            rounded = tl.where(finite, stochastic(p, random, P), p_bits)
        else:
            # One decision for all of them: tests of each number would be a third of the instructions.
            shown = p + scaled * 0.0 if HIDDEN and not NORM else p
            all_ordinary = is_ordinary(shown, P) & share_a_key(offset + start, offset + start + left - 1, P)
            if SUM_FIRST:
                all_ordinary &= total < float("inf")
            if all_ordinary:
                random = draw(stream, start, left, offset, row_length, row_stride, P, ROWS, PAIRS, BLOCK, 1)
                rounded = ordinary(p, random, P)
            else:
                random = draw(stream, start, left, offset, row_length, row_stride, P, ROWS, PAIRS, BLOCK, 2)
                rounded = tl.where(finite, stochastic(p, random, P), p_bits)
    elif SPLIT:
        rounded = tl.where(finite, high_part(p), p_bits)
    else:
        rounded = tl.where(finite, nearest(p, P), p_bits)
    if scalar(found_inf, on_device, tl.float64) == 0.0:
        store(param, rounded, left, BLOCK)
        if SPLIT:
            store(low, tl.where(finite, low_part(p), low_bits), left, BLOCK)
    if NORM:
        if not SUM_FIRST:
            total = sum_of_squares(scaled, BLOCK)
        add_to_slot(total, slot_at(slot), partials, counters, block, tl.cdiv(numel, BLOCK))


def options(gpu: int, param: torch.dtype, stochastic: bool, rows: bool, norm: bool, clamp: bool) -> dict[str, Any]:
    """How a variant is compiled. Rounding bfloat16 stochastically is work for the arithmetic units as much as for the
    memory: with half the threads, 32 elements each, what is done once per thread weighs half: counted in Hopper's
    machine code, 23 instructions per element instead of 27. Norms and rows would then take all 255 registers. On AMD's
    GPUs it would spill six scalar registers.

    Two programs or more share a multiprocessor of Hopper's: one loads while another computes. Left to itself the
    compiler takes up to 179 registers for float16 with a clamp; with 120 it spills none.

    Args:
        gpu: `launch.generation`.
    """
    half = stochastic and param == torch.bfloat16 and not rows and not norm and gpu > 0
    limited = stochastic and param == torch.float16 and clamp and not rows and gpu >= 80
    return launch.options(launch.WARPS // 2 if half else launch.WARPS) | ({"maxnreg": 120} if limited else {})


def check(op: str, param: Tensor, grad: Tensor, device: torch.device) -> None:
    launch.check_element_type(op, "param", param, device)
    launch.check_element_type(op, "grad", grad, device)
    if grad.shape != param.shape:
        fail(op, ": grad has shape ", list(grad.shape), ", param has shape ", list(param.shape))
    launch.check_apart(op, "param", param)


def check_all_apart(op: str, params: list[Tensor], grads: list[Tensor], slots: list[Tensor], low: list[Tensor]) -> None:
    check_no_overlap(
        op,
        regions(Access.WRITTEN, "param", params),
        regions(Access.WRITTEN, "low", low),
        regions(Access.READ, "grad", grads),
        regions(Access.ADDED, "sq_norm", slots),
    )


def in_order(param: Tensor, *others: Tensor, any_order: bool) -> tuple[Tensor, ...]:
    """All with their elements one after the other, in row-major order or, where `any_order`, in the same order: the
    tensors themselves where they are so, else copies."""
    if all(tensor.is_contiguous() for tensor in (param, *others)):
        return param, *others
    if any_order and all(param.stride() == other.stride() for other in others) and launch.is_dense(param):
        return param, *others
    return tuple(tensor.detach().contiguous() for tensor in (param, *others))


def bring_back(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Copies what `in_order` copied back."""
    for tensor, copy in zip(tensors, copies, strict=True):
        if copy is not tensor:
            tensor.detach().copy_(copy)


def _alone(
    param: Tensor,
    grad: Tensor,
    low: Tensor | None,
    scalars: launch.StepScalars,
    sq_norm: Tensor | None,
    rule: int,
    stochastic: bool,
    key: int,
    element_indices: launch.Indices,
) -> None:
    """One parameter by one launch without a table. `low`: if it is split."""
    device, numel = param.device, param.numel()
    lows = () if low is None else (low,)
    p, *low_copy, g = in_order(param, *lows, grad, any_order=not stochastic and sq_norm is None)
    blocks = launch.blocks_of(numel)
    with launch.on(device):
        slot, partials, counter = 0, None, None
        if sq_norm is not None:
            slot = sq_norm.data_ptr()
            partials, counter = launch.partials.get(device, blocks), launch.counters.get(device, 1)
        sgd_kernel[(blocks,)](
            p,
            g,
            low_copy[0] if low_copy else None,
            numel,
            *scalars.arguments,
            scalars.on_device,
            key,
            element_indices.offset,
            element_indices.row_length,
            element_indices.row_stride,
            slot,
            *(None, 0, 0),  # no table
            partials,
            counter,
            P=TYPES[param.dtype],
            G=TYPES[grad.dtype],
            RULE=rule,
            ALIGNED=False,  # what a launch knows of tensors needs no hint
            COLUMNS=0,
            CLAMP=scalars.clamps,
            STOCHASTIC=stochastic,
            ROWS=element_indices.rows,
            PAIRS=element_indices.pairs,
            NORM=sq_norm is not None,
            SPLIT=low is not None,
            BLOCK=BLOCK,
            **options(
                launch.generation(device),
                param.dtype,
                stochastic,
                element_indices.rows,
                sq_norm is not None,
                scalars.clamps,
            ),
        )
        bring_back((param, *lows), (p, *low_copy))


def list_constants(
    param: torch.dtype,
    grad: torch.dtype,
    stochastic: bool,
    split: bool,
    plain: bool,
    *,
    gpu: int,
    rule: int,
    clamp: bool,
    norm: bool,
) -> dict[str, Any]:
    """What the kernel of a list is compiled for: two variants, so that the rows of a list make no others.

    With rows that are not plain a thread has 8 elements: 16 would take up to 204 registers of Hopper's, and a limit
    would spill some.
    """
    rows = stochastic and not plain
    compiled = options(gpu, param, stochastic, rows, norm, clamp)
    if rows:
        compiled["num_warps"] *= 2
    return {
        "P": TYPES[param],
        "G": TYPES[grad],
        "RULE": rule,
        "ALIGNED": plain,
        "CLAMP": clamp,
        "STOCHASTIC": stochastic,
        "ROWS": rows,
        "PAIRS": not rows,
        "NORM": norm,
        "SPLIT": split,
        "BLOCK": BLOCK,
        "COLUMNS": COLUMNS.value,
        **compiled,
    }


def update_(
    params: list[Tensor],
    grads: list[Tensor],
    scalars: Tensor,
    sq_norm: list[Tensor],
    rule: int,
    stochastic: bool,
    seed: int,
    parameter_id: list[int],
    shard: list[int],
    low: list[Tensor],
) -> None:
    op, n = "update_", len(params)
    if len(grads) != n:
        fail(op, ": ", n, " params, ", len(grads), " grads")
    if sq_norm and len(sq_norm) != n:
        fail(op, ": ", n, " params, ", len(sq_norm), " sq_norm slots")
    if len(parameter_id) != n:
        fail(op, ": ", n, " params, ", len(parameter_id), " parameter_id")
    if shard and len(shard) != 3 * n:
        fail(op, ": ", n, " params, ", len(shard), " numbers in shard")
    if low and len(low) != n:
        fail(op, ": ", n, " params, ", len(low), " low parts")
    check_low(op, params, low, stochastic=stochastic)
    launch.check_rule(op, rule)
    if n == 0:
        return
    device = params[0].device
    step = launch.step_scalars(op, scalars, device)
    element_indices, rounded, keys = [], [], []
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        check(op, param, grad, device)
        indices = launch.indices_of(op, shard[3 * i : 3 * i + 3], param.numel())
        rounded.append(stochastic and param.dtype != torch.float32)
        element_indices.append(indices if rounded[i] else launch.WHOLE)
        keys.append(launch.parameter_key(seed, parameter_id[i]) if rounded[i] else 0)
    for slot in sq_norm:
        launch.check_slot(op, "sq_norm", slot, device)
    for of_param in low:
        launch.check_apart(op, "low", of_param)
    check_all_apart(op, params, grads, sq_norm, low)
    lows: list[Tensor | None] = [of_param if of_param.numel() else None for of_param in low] or [None] * n
    if launch.is_alone(params):
        of_norm = sq_norm[0] if sq_norm else None
        _alone(params[0], grads[0], lows[0], step, of_norm, rule, rounded[0], keys[0], element_indices[0])
        return
    with launch.on(device):
        rows, copies = [], []
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if param.numel() == 0:
                continue
            written = [param] if lows[i] is None else [param, low[i]]
            *copied, g = in_order(*written, grad, any_order=not rounded[i] and not sq_norm)
            copies.append((written, copied, g))
            addresses = copied[0].data_ptr(), g.data_ptr()
            low_address = copied[1].data_ptr() if len(copied) > 1 else 0
            aligned = not (addresses[0] | addresses[1] | low_address) % 16
            rows.append(
                launch.Row(
                    *addresses,
                    sq_norm[i].data_ptr() if sq_norm else 0,
                    param.numel(),
                    keys[i] or low_address,
                    element_indices[i],
                    (param.dtype, grad.dtype, rounded[i], len(copied) > 1),
                    aligned and element_indices[i].pairs and not element_indices[i].rows,
                )
            )
        for part in launch.rounds(rows):
            with launch.table_lock:
                table, owners, launches = launch.upload(part, device, launch.blocks_of)
                partials, counters = None, None
                if sq_norm:
                    partials = launch.partials.get(device, sum(launched.programs for launched in launches))
                    counters = launch.counters.get(device, len(part))
                for launched in launches:
                    arguments = (
                        *(None, None, None, 0),  # tensors are in the table
                        *step.arguments,
                        step.on_device,
                        *(0, 0, 0, 0, 0),
                        table,
                        owners,
                        launched.first_program,
                        partials,
                        counters,
                    )
                    constants = functools.partial(
                        list_constants,
                        *launched.variant,
                        gpu=launch.generation(device),
                        rule=rule,
                        clamp=step.clamps,
                        norm=bool(sq_norm),
                    )
                    launch.run(sgd_kernel, launched, device, arguments, constants)
        for written, copied, _ in copies:
            bring_back(written, copied)
