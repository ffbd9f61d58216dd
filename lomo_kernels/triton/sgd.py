# mypy: disable-error-code="no-untyped-def"
"""`sgd_` and `sgd_list_` in Triton. What they do is documented in `lomo_kernels/ops/sgd.py`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._overlap import Access, check_no_overlap, overlaps_itself, regions
from . import launch
from .launch import COLUMNS, TYPES, fail
from .numerics import (
    BLOCK,
    add_to_slot,
    draw,
    elements,
    float64_of,
    int64_of,
    is_ordinary,
    load,
    mix64,
    nearest,
    ordinary,
    share_a_key,
    slot_at,
    step_scalars,
    stepped,
    stochastic,
    store,
    sum_of_squares,
    widen,
)

SCALARS = ("lr", "weight_decay", "inv_scale", "clip_value", "clip_coef", "found_inf", "step")
MISSING = (0.0, 0.0, 1.0, float("inf"), 1.0, 0.0, 0)
INDICES = ("offset", "row_length", "row_stride")


@triton.jit(do_not_specialize=[*SCALARS, "kinds", "numel", "key", *INDICES, "slot", "owners", "first_block"])
def sgd_kernel(
    param,
    grad,
    numel: tl.int64,
    lr: tl.int64,
    weight_decay: tl.int64,
    inv_scale: tl.int64,
    clip_value: tl.int64,
    clip_coef: tl.int64,
    found_inf: tl.int64,
    step: tl.int64,
    kinds: tl.int32,
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
    ALIGNED: tl.constexpr,
    CLAMP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program updates BLOCK elements: of the one tensor in the arguments, or, with COLUMNS, of the tensor that the
    table says."""
    block = tl.program_id(0).to(tl.int64)
    if COLUMNS:
        block += first_block.to(tl.int64)
        owner = tl.load(table + owners.to(tl.int64) + block)
        row = table + owner * COLUMNS
        param, grad, slot, numel = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
        first, key = tl.load(row + 4), tl.load(row + 5)
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
    g_bits = load(elements(grad, G, ALIGNED) + start, left, BLOCK, TOGETHER)
    rate, decay, unscale, limit, coef = step_scalars(lr, weight_decay, inv_scale, clip_value, clip_coef, kinds, CLAMP)
    scaled = widen(g_bits, G) * unscale
    p = stepped(widen(p_bits, P), scaled, rate, decay, limit, coef, CLAMP)
    finite = tl.abs(scaled) < float("inf")
    # A gradient that is not finite shows in p, but not if it was clamped: then the sum says so, or an addition to p.
    SUM_FIRST: tl.constexpr = NORM and CLAMP and STOCHASTIC and not ROWS
    if SUM_FIRST:
        total = sum_of_squares(scaled, BLOCK)
    if STOCHASTIC:
        stream = mix64((key.to(tl.int64) ^ int64_of(step, kinds, 6)).to(tl.uint64, bitcast=True))
        offset, row_length, row_stride = offset.to(tl.int64), row_length.to(tl.int64), row_stride.to(tl.int64)
        if ROWS:
            random = draw(stream, start, left, offset, row_length, row_stride, P, ROWS, PAIRS, BLOCK)
            rounded = tl.where(finite, stochastic(p, random, P), p_bits)
        else:
            # One decision for all of them: tests of each number would be a third of the instructions.
            shown = p + scaled * 0.0 if CLAMP and not NORM else p
            all_ordinary = is_ordinary(shown, P) & share_a_key(offset + start, offset + start + left - 1, P)
            if SUM_FIRST:
                all_ordinary &= total < float("inf")
            if all_ordinary:
                random = draw(stream, start, left, offset, row_length, row_stride, P, ROWS, PAIRS, BLOCK, 1)
                rounded = ordinary(p, random, P)
            else:
                random = draw(stream, start, left, offset, row_length, row_stride, P, ROWS, PAIRS, BLOCK, 2)
                rounded = tl.where(finite, stochastic(p, random, P), p_bits)
    else:
        rounded = tl.where(finite, nearest(p, P), p_bits)
    if float64_of(found_inf, kinds, 5) == 0.0:
        store(param, rounded, left, BLOCK)
    if NORM:
        if not SUM_FIRST:
            total = sum_of_squares(scaled, BLOCK)
        add_to_slot(total, slot_at(slot), partials, counters, block, tl.cdiv(numel, BLOCK))


def options(gpu: int, param: torch.dtype, stochastic: bool, rows: bool, norm: bool, clamp: bool) -> dict[str, Any]:
    """How a variant is compiled. Rounding bfloat16 stochastically is work for the arithmetic units as much as for the
    memory: with half the threads, 32 elements each, what is done once per thread weighs half: counted in Hopper's
    machine code, 31 instructions per element instead of 36. Norms and rows would then take all 255 registers. On AMD's
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
    if param.numel() == 0:
        return
    if not param.is_contiguous() and overlaps_itself(param):
        why = "(an expanded tensor?); it cannot be updated in place. Pass a contiguous parameter"
        fail(op, ": several elements of param share one place in memory ", why)


def check_all_apart(op: str, params: list[Tensor], grads: list[Tensor], slots: list[Tensor]) -> None:
    check_no_overlap(
        op,
        regions(Access.WRITTEN, "param", params),
        regions(Access.READ, "grad", grads),
        regions(Access.ADDED, "sq_norm", slots),
    )


def in_order(param: Tensor, grad: Tensor, any_order: bool) -> tuple[Tensor, Tensor]:
    """Both with their elements one after the other, in row-major order or, where `any_order`, in the same order: the
    tensors themselves where they are so, else copies."""
    if param.is_contiguous() and grad.is_contiguous():
        return param, grad
    if any_order and param.stride() == grad.stride() and launch.is_dense(param):
        return param, grad
    return param.detach().contiguous(), grad.detach().contiguous()


def sgd_(
    param: Tensor,
    grad: Tensor,
    lr: Tensor,
    weight_decay: Tensor | None,
    inv_scale: Tensor | None,
    clip_value: Tensor | None,
    clip_coef: Tensor | None,
    found_inf: Tensor | None,
    sq_norm: Tensor | None,
    stochastic: bool,
    seed: int,
    parameter_id: int,
    step: Tensor | None,
    shard: Sequence[int] | None,
) -> None:
    device, numel = param.device, param.numel()
    check("sgd_", param, grad, device)
    given = (lr, weight_decay, inv_scale, clip_value, clip_coef, found_inf, step)
    numbers, kinds = launch.scalars("sgd_", device, zip(SCALARS, given, MISSING, strict=True))
    if sq_norm is not None:
        launch.check_slot("sgd_", "sq_norm", sq_norm, device)
    check_all_apart("sgd_", [param], [grad], [] if sq_norm is None else [sq_norm])
    where = launch.indices_of("sgd_", shard, numel)
    if numel == 0:
        return
    stochastic = stochastic and param.dtype != torch.float32
    if not stochastic:
        where = launch.WHOLE
    p, g = in_order(param, grad, any_order=not stochastic and sq_norm is None)
    blocks = launch.blocks_of(numel)
    with launch.on(device):
        slot, partials, counter = 0, None, None
        if sq_norm is not None:
            slot = sq_norm.data_ptr()
            partials, counter = launch.partials.get(device, blocks), launch.counters.get(device, 1)
        sgd_kernel[(blocks,)](
            p,
            g,
            numel,
            *numbers,
            kinds,
            launch.parameter_key(seed, parameter_id) if stochastic else 0,
            where.offset,
            where.row_length,
            where.row_stride,
            slot,
            *(None, 0, 0),  # no table
            partials,
            counter,
            P=TYPES[param.dtype],
            G=TYPES[grad.dtype],
            ALIGNED=False,  # what a launch knows of tensors needs no hint
            COLUMNS=0,
            CLAMP=clip_value is not None,
            STOCHASTIC=stochastic,
            ROWS=where.rows,
            PAIRS=where.pairs,
            NORM=sq_norm is not None,
            BLOCK=BLOCK,
            **options(
                launch.generation(device),
                param.dtype,
                stochastic,
                where.rows,
                sq_norm is not None,
                clip_value is not None,
            ),
        )
        if p is not param:
            param.detach().copy_(p)


def list_constants(
    param: torch.dtype, grad: torch.dtype, stochastic: bool, plain: bool, *, gpu: int, clamp: bool, norm: bool
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
        "ALIGNED": plain,
        "CLAMP": clamp,
        "STOCHASTIC": stochastic,
        "ROWS": rows,
        "PAIRS": not rows,
        "NORM": norm,
        "BLOCK": BLOCK,
        "COLUMNS": COLUMNS.value,
        **compiled,
    }


def sgd_list_(
    params: list[Tensor],
    grads: list[Tensor],
    lr: Tensor,
    weight_decay: Tensor | None,
    inv_scale: Tensor | None,
    clip_value: Tensor | None,
    clip_coef: Tensor | None,
    found_inf: Tensor | None,
    sq_norm: list[Tensor],
    stochastic: bool,
    seed: int,
    parameter_id: list[int],
    step: Tensor | None,
    shard: list[int],
) -> None:
    op, n = "sgd_list_", len(params)
    if len(grads) != n:
        fail(op, ": ", n, " params, ", len(grads), " grads")
    if sq_norm and len(sq_norm) != n:
        fail(op, ": ", n, " params, ", len(sq_norm), " sq_norm slots")
    if len(parameter_id) != n:
        fail(op, ": ", n, " params, ", len(parameter_id), " parameter_id")
    if shard and len(shard) != 3 * n:
        fail(op, ": ", n, " params, ", len(shard), " numbers in shard")
    if n == 0:
        return
    device = params[0].device
    given = (lr, weight_decay, inv_scale, clip_value, clip_coef, found_inf, step)
    numbers, kinds = launch.scalars(op, device, zip(SCALARS, given, MISSING, strict=True))
    where = []
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        check(op, param, grad, device)
        where.append(launch.indices_of(op, shard[3 * i : 3 * i + 3] or None, param.numel()))
    for slot in sq_norm:
        launch.check_slot(op, "sq_norm", slot, device)
    check_all_apart(op, params, grads, sq_norm)
    with launch.on(device):
        rows, copies = [], []
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if param.numel() == 0:
                continue
            rounded = stochastic and param.dtype != torch.float32
            p, g = in_order(param, grad, any_order=not rounded and not sq_norm)
            copies.append((param, p, g))
            addresses = p.data_ptr(), g.data_ptr()
            indices = where[i] if rounded else launch.WHOLE
            aligned = not (addresses[0] | addresses[1]) % 16
            rows.append(
                launch.Row(
                    *addresses,
                    sq_norm[i].data_ptr() if sq_norm else 0,
                    param.numel(),
                    launch.parameter_key(seed, parameter_id[i]) if rounded else 0,
                    indices,
                    (param.dtype, grad.dtype, rounded),
                    aligned and indices.pairs and not indices.rows,
                )
            )
        for part in launch.rounds(rows):
            with launch.table_lock:
                table, owners, launches = launch.upload(part, device, launch.blocks_of)
                partials, counters = None, None
                if sq_norm:
                    partials = launch.partials.get(device, sum(one.programs for one in launches))
                    counters = launch.counters.get(device, len(part))
                for one in launches:
                    arguments = (
                        *(None, None, 0),  # tensors are in the table
                        *numbers,
                        kinds,
                        *(0, 0, 0, 0, 0),
                        table,
                        owners,
                        one.first_program,
                        partials,
                        counters,
                    )
                    constants = functools.partial(
                        list_constants,
                        *one.variant,
                        gpu=launch.generation(device),
                        clamp=clip_value is not None,
                        norm=bool(sq_norm),
                    )
                    launch.run(sgd_kernel, one, device, arguments, constants)
        for param, p, _ in copies:
            if p is not param:
                param.detach().copy_(p)
