# mypy: disable-error-code="no-untyped-def"
"""`sq_norm_` in Triton. What it does is documented in `lomo_kernels/ops/sq_norm.py`."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._overlap import Access, check_no_overlap, regions
from . import launch
from .launch import COLUMNS, TYPES, fail
from .numerics import (
    BLOCK,
    PROGRAMS,
    add_to_slot,
    blocks_per_program,
    elements,
    factor_of,
    load,
    slot_at,
    sum_of_squares,
    widen,
)


@triton.jit(do_not_specialize=["numel", "slot", "inv_scale", "kind", "owners", "first_program"])
def sq_norm_kernel(
    grad,
    numel: tl.int64,
    slot: tl.int64,
    inv_scale: tl.int64,
    kind: tl.int32,
    table,
    owners: tl.int64,
    first_program: tl.int64,
    partials,
    counters,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program adds up some blocks: of the one tensor in the arguments, or, with COLUMNS, of the tensor that the table
    says."""
    program = tl.program_id(0).to(tl.int64)
    if COLUMNS:
        program += first_program.to(tl.int64)
        owner = tl.load(table + owners.to(tl.int64) + program)
        row = table + owner * COLUMNS
        grad, slot, numel, first_of = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
        program -= first_of
        partials += first_of
        counters += owner
    numel = numel.to(tl.int64)
    grad = elements(grad, G, ALIGNED)
    unscale = factor_of(inv_scale, kind)
    several = blocks_per_program(tl.cdiv(numel, BLOCK))
    start = program * several * BLOCK
    end = tl.minimum(start + several * BLOCK, numel)
    bits = load(grad + start, tl.minimum(end - start, BLOCK).to(tl.int32), BLOCK)
    total = tl.zeros((), tl.float64)
    while start < end:
        first = start + BLOCK  # of the next block, which is under way while this one is added up
        next_bits = load(grad + first, tl.maximum(tl.minimum(end - first, BLOCK), 0).to(tl.int32), BLOCK)
        total += sum_of_squares(widen(bits, G) * unscale, BLOCK)
        bits, start = next_bits, first
    add_to_slot(total, slot_at(slot), partials, counters, program, tl.cdiv(numel, several * BLOCK))


def options(gpu: int) -> dict[str, Any]:
    """How norms are compiled. For sm_75 the compiler takes 80 registers by itself, and spills 16 bytes of a list's
    kernel; with this limit it takes 92 and spills none.

    Args:
        gpu: `launch.generation`.
    """
    return launch.options() | ({"maxnreg": 128} if 0 < gpu < 80 else {})


def programs_of(numel: int) -> int:
    """Programs that add up a tensor; see `blocks_per_program`."""
    blocks = launch.blocks_of(numel)
    return launch.cdiv(blocks, launch.cdiv(blocks, PROGRAMS.value))


def _alone(slot: Tensor, grad: Tensor, number: int, kind: int) -> None:
    """One gradient by one launch without a table."""
    device, grad = slot.device, grad.contiguous()
    programs = programs_of(grad.numel())
    with launch.on(device):
        partials, counter = launch.partials.get(device, programs), launch.counters.get(device, 1)
        sq_norm_kernel[(programs,)](
            grad,
            grad.numel(),
            slot.data_ptr(),
            number,
            kind,
            *(None, 0, 0),  # no table
            partials,
            counter,
            G=TYPES[grad.dtype],
            ALIGNED=False,  # what a launch knows of tensors needs no hint
            BLOCK=BLOCK,
            COLUMNS=0,
            **options(launch.generation(device)),
        )


def list_constants(grad: torch.dtype, plain: bool, *, gpu: int) -> dict[str, Any]:
    """What the kernel of a list is compiled for."""
    return {"G": TYPES[grad], "ALIGNED": plain, "BLOCK": BLOCK, "COLUMNS": COLUMNS.value, **options(gpu)}


def sq_norm_(slots: list[Tensor], grads: list[Tensor], inv_scale: Tensor | None) -> None:
    op = "sq_norm_"
    if len(slots) != len(grads):
        fail(op, ": ", len(slots), " slots for ", len(grads), " grads")
    if not grads:
        return
    device = grads[0].device
    number, kind = launch.inv_scale(op, inv_scale, device)
    for slot, grad in zip(slots, grads, strict=True):
        launch.check_slot(op, "slot", slot, device)
        launch.check_element_type(op, "grad", grad, device)
    check_no_overlap(op, regions(Access.ADDED, "slot", slots), regions(Access.READ, "grad", grads))
    if launch.is_alone(grads):
        _alone(slots[0], grads[0], number, kind)
        return
    with launch.on(device):
        grads = [grad.contiguous() for grad in grads]  # kept until the kernels are launched
        rows = []
        for slot, grad in zip(slots, grads, strict=True):
            if numel := grad.numel():
                address = grad.data_ptr()
                plain = not address % 16
                rows.append(launch.Row(0, address, slot.data_ptr(), numel, 0, launch.WHOLE, (grad.dtype,), plain))
        for part in launch.rounds(rows):
            with launch.table_lock:
                table, owners, launches = launch.upload(part, device, programs_of)
                partials = launch.partials.get(device, sum(launched.programs for launched in launches))
                counters = launch.counters.get(device, len(part))
                for launched in launches:
                    arguments = (
                        *(None, 0, 0),  # tensors are in the table
                        number,
                        kind,
                        table,
                        owners,
                        launched.first_program,
                        partials,
                        counters,
                    )
                    constants = functools.partial(list_constants, *launched.variant, gpu=launch.generation(device))
                    launch.run(sq_norm_kernel, launched, device, arguments, constants)
