# mypy: disable-error-code="no-untyped-def"
"""`sq_norm_` and `sq_norm_list_` in Triton. What they do is documented in `lomo_kernels/ops/sq_norm.py`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import COLUMNS, TYPES, fail
from .numerics import BLOCK, add_to_slot, elements, float64_of, load, sum_of_squares, widen


@triton.jit
def norm_block(grad, start, left, inv_scale, kinds, G: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of squares of BLOCK elements from `start` on, of which `left` are there."""
    bits = load(elements(grad, G, ALIGNED) + start, left, BLOCK)
    return sum_of_squares(widen(bits, G) * float64_of(inv_scale, kinds, 0).to(tl.float32), BLOCK)


@triton.jit(do_not_specialize=["numel", "inv_scale", "kinds", "slot"])
def sq_norm_kernel(
    grad,
    numel: tl.int64,
    inv_scale: tl.int64,
    kinds: tl.int32,
    slot: tl.int64,
    partials,
    counter,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    start = block.to(tl.int64) * BLOCK
    left = tl.minimum(numel.to(tl.int64) - start, BLOCK).to(tl.int32)
    total = norm_block(grad, start, left, inv_scale, kinds, G, False, BLOCK)
    slot = slot.to(tl.int64).to(tl.pointer_type(tl.float64), bitcast=True)
    add_to_slot(total, slot, partials, counter, block, tl.num_programs(0))


@triton.jit(do_not_specialize=["owners", "first_block", "inv_scale", "kinds"])
def sq_norm_list_kernel(
    table,
    owners: tl.int64,
    first_block: tl.int64,
    inv_scale: tl.int64,
    kinds: tl.int32,
    partials,
    counters,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block = first_block.to(tl.int64) + tl.program_id(0)
    owner = tl.load(table + owners.to(tl.int64) + block)
    row = table + owner * COLUMNS
    grad = tl.load(row + 1)
    slot = tl.load(row + 2).to(tl.pointer_type(tl.float64), bitcast=True)
    numel = tl.load(row + 3)
    first = tl.load(row + 4)
    start = (block - first) * BLOCK
    left = tl.minimum(numel - start, BLOCK).to(tl.int32)
    total = norm_block(grad, start, left, inv_scale, kinds, G, ALIGNED, BLOCK)
    add_to_slot(total, slot, partials + first, counters + owner, block - first, tl.cdiv(numel, BLOCK))


def sq_norm_(slot: Tensor, grad: Tensor, inv_scale: Tensor | None) -> None:
    op, device, numel = "sq_norm_", slot.device, grad.numel()
    launch.check_slot(op, "slot", slot, device)
    launch.check_element_type(op, "grad", grad, device)
    (number, _), kinds = launch.scalars(op, device, [("inv_scale", inv_scale, 1.0)])
    if numel == 0:
        return
    grad = grad.contiguous()
    blocks = launch.blocks_of(numel)
    with launch.on(device):
        partials, counter = launch.partials.get(device, blocks), launch.counters.get(device, 1)
        sq_norm_kernel[(blocks,)](
            grad,
            numel,
            number,
            kinds,
            slot.data_ptr(),
            partials,
            counter,
            G=TYPES[grad.dtype],
            BLOCK=BLOCK,
            **launch.options(),
        )


def sq_norm_list_(slots: list[Tensor], grads: list[Tensor], inv_scale: Tensor | None) -> None:
    op = "sq_norm_list_"
    if len(slots) != len(grads):
        fail(op, ": ", len(slots), " slots for ", len(grads), " grads")
    if not grads:
        return
    device = grads[0].device
    (number, _), kinds = launch.scalars(op, device, [("inv_scale", inv_scale, 1.0)])
    for slot, grad in zip(slots, grads, strict=True):
        launch.check_slot(op, "slot", slot, device)
        launch.check_element_type(op, "grad", grad, device)
    with launch.on(device):
        grads = [grad.contiguous() for grad in grads]  # kept until the kernels are launched
        rows = []
        for slot, grad in zip(slots, grads, strict=True):
            if numel := grad.numel():
                address = grad.data_ptr()
                variant = (grad.dtype, not address % 16)
                rows.append(launch.Row(0, address, slot.data_ptr(), numel, 0, launch.WHOLE, variant))
        for part in launch.rounds(rows):
            with launch.table_lock:
                table, owners, launches = launch.upload(part, device)
                partials = launch.partials.get(device, sum(one.blocks for one in launches))
                counters = launch.counters.get(device, len(part))
                for one in launches:
                    dtype, aligned = one.variant
                    sq_norm_list_kernel[(one.blocks,)](
                        table,
                        owners,
                        one.first_block,
                        number,
                        kinds,
                        partials,
                        counters,
                        G=TYPES[dtype],
                        ALIGNED=aligned,
                        BLOCK=BLOCK,
                        COLUMNS=COLUMNS.value,
                        **launch.options(),
                    )
