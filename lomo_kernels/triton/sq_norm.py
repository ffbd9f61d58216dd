# mypy: disable-error-code="no-untyped-def"
"""`sq_norm_` and `sq_norm_list_` in Triton. What they do is documented in `lomo_kernels/ops/sq_norm.py`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops._overlap import Access, check_no_overlap, regions
from . import launch
from .launch import COLUMNS, TYPES, fail
from .numerics import BLOCK, add_to_slot, elements, float64_of, load, slot_at, sum_of_squares, widen


@triton.jit(do_not_specialize=["numel", "slot", "inv_scale", "kinds", "owners", "first_block"])
def sq_norm_kernel(
    grad,
    numel: tl.int64,
    slot: tl.int64,
    inv_scale: tl.int64,
    kinds: tl.int32,
    table,
    owners: tl.int64,
    first_block: tl.int64,
    partials,
    counters,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program adds up BLOCK elements: of the one tensor in the arguments, or, with COLUMNS, of the tensor that the
    table says."""
    block = tl.program_id(0).to(tl.int64)
    if COLUMNS:
        block += first_block.to(tl.int64)
        owner = tl.load(table + owners.to(tl.int64) + block)
        row = table + owner * COLUMNS
        grad, slot, numel, first = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
        block -= first
        partials += first
        counters += owner
    numel = numel.to(tl.int64)
    start = block * BLOCK
    left = tl.minimum(numel - start, BLOCK).to(tl.int32)
    bits = load(elements(grad, G, ALIGNED) + start, left, BLOCK)
    total = sum_of_squares(widen(bits, G) * float64_of(inv_scale, kinds, 0).to(tl.float32), BLOCK)
    add_to_slot(total, slot_at(slot), partials, counters, block, tl.cdiv(numel, BLOCK))


def sq_norm_(slot: Tensor, grad: Tensor, inv_scale: Tensor | None) -> None:
    op, device, numel = "sq_norm_", slot.device, grad.numel()
    launch.check_slot(op, "slot", slot, device)
    launch.check_element_type(op, "grad", grad, device)
    check_no_overlap(op, regions(Access.ADDED, "slot", [slot]), regions(Access.READ, "grad", [grad]))
    (number,), kinds = launch.scalars(op, device, [("inv_scale", inv_scale, 1.0)])
    if numel == 0:
        return
    grad = grad.contiguous()
    blocks = launch.blocks_of(numel)
    with launch.on(device):
        partials, counter = launch.partials.get(device, blocks), launch.counters.get(device, 1)
        sq_norm_kernel[(blocks,)](
            grad,
            numel,
            slot.data_ptr(),
            number,
            kinds,
            *(None, 0, 0),  # no table
            partials,
            counter,
            G=TYPES[grad.dtype],
            ALIGNED=False,  # what a launch knows of tensors needs no hint
            BLOCK=BLOCK,
            COLUMNS=0,
            **launch.options(),
        )


def sq_norm_list_(slots: list[Tensor], grads: list[Tensor], inv_scale: Tensor | None) -> None:
    op = "sq_norm_list_"
    if len(slots) != len(grads):
        fail(op, ": ", len(slots), " slots for ", len(grads), " grads")
    if not grads:
        return
    device = grads[0].device
    (number,), kinds = launch.scalars(op, device, [("inv_scale", inv_scale, 1.0)])
    for slot, grad in zip(slots, grads, strict=True):
        launch.check_slot(op, "slot", slot, device)
        launch.check_element_type(op, "grad", grad, device)
    check_no_overlap(op, regions(Access.ADDED, "slot", slots), regions(Access.READ, "grad", grads))
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
                    sq_norm_kernel[(one.blocks,)](
                        *(None, 0, 0),  # tensors are in the table
                        number,
                        kinds,
                        table,
                        owners,
                        one.first_block,
                        partials,
                        counters,
                        G=TYPES[dtype],
                        ALIGNED=aligned,
                        BLOCK=BLOCK,
                        COLUMNS=COLUMNS.value,
                        **launch.options(),
                    )
