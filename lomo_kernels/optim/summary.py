"""The table that `Lomo.summary` returns: what becomes of each parameter's gradient, and why."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from ..layers import FusedLayer, fused_class_of, layers_of
from .ranks import shape_of
from .records import Record

_HEADER = ("parameters", "of shape", "dtype", "MiB", "gradient", "why")


def summary(records: Sequence[Record], model: nn.Module | None, *, kept: bool) -> str:
    """One line for parameters that differ only in the numbers in their names.

    Args:
        model: in which layers are fused, if any.
        kept: whether gradients, or their factors, are kept until backward has ended (one pass, and clipping).
    """
    reasons = _reasons(records, model)
    lines: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        name = re.sub(r"(?<![^.])\d+(?![^.])", "*", record.name)
        shape, dtype = str(list(shape_of(record.param))), str(record.param.dtype).removeprefix("torch.")
        gradient = _gradient(record, kept)
        lines.setdefault((name, shape, dtype, gradient, reasons[record.index]), []).append(record)
    rows = [_HEADER]
    for (name, shape, dtype, gradient, reason), same in lines.items():
        count = f"{len(same)} x {name}" if len(same) > 1 else same[0].name
        rows.append((count, shape, dtype, _mebibytes(same), gradient, reason))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*text, *_totals(records, kept)])


def _gradient(record: Record, kept: bool) -> str:
    if not record.param.requires_grad:
        return "none"
    if record.fused:
        return "its factors are kept, or it, if smaller" if kept else "never exists"
    if kept:
        return "kept" if record.small else "kept, and it is large"
    return "freed in its hook"


def _reasons(records: Sequence[Record], model: nn.Module | None) -> dict[int, str]:
    by_id = {id(record.param): record.index for record in records}
    reasons = {
        record.index: "fused_layers=False" if model is None else "in no module of the model" for record in records
    }
    homes: dict[int, str] = {}
    for module in () if model is None else model.modules():
        kind = type(module).plain.__name__ if isinstance(module, FusedLayer) else type(module).__name__
        for name, param in module._parameters.items():
            if id(param) in by_id:
                homes[by_id[id(param)]] = f"{name} of {kind}"
    reasons |= homes
    for module, reason in () if model is None else layers_of(model, by_id):
        record = records[by_id[id(module._parameters["weight"])]]
        if reason is not None and record.fused:
            reasons[record.index] += f", also {reason}"
        elif reason is not None and fused_class_of(module) is not None:
            reasons[record.index] += f": {reason}"
    for record in records:
        if not record.param.requires_grad:
            reasons[record.index] = "frozen"
    return reasons


def _totals(records: Sequence[Record], kept: bool) -> list[str]:
    trained = [record for record in records if record.param.requires_grad]
    fused = [record for record in trained if record.fused]
    elements, without = (sum(record.param.numel() for record in some) for some in (trained, fused))
    lines = [
        f"{len(fused)} of {len(trained)} trained parameters, {without / max(elements, 1):.1%} of their elements, are"
        " weights of fused layers."
    ]
    if kept:
        others = [record for record in trained if not record.fused]
        lines.append(f"Until backward has ended, {_mebibytes(others)} MiB of other gradients are kept.")
    return lines


def _mebibytes(records: Sequence[Record]) -> str:
    return f"{sum(record.bytes for record in records) / 2**20:.2f}"
