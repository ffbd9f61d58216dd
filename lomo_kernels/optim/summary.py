"""The table that `Lomo.summary` returns: what becomes of each parameter's gradient, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from ..layers import FusedLayer, fused_class_of, layers_of, weight_of
from .factored_rules import FactoredRule
from .managed_parameter import OTHER_CALL, ManagedParameter
from .placement import shape_of

_HEADER = ("parameters", "of shape", "dtype", "MiB", "gradient", "why")


def summary(
    managed_params: Sequence[ManagedParameter],
    model: nn.Module | None,
    *,
    kept: bool,
    evicted: Iterable[ManagedParameter] = (),
    rule: FactoredRule | None = None,
) -> str:
    """One line for parameters that differ only in the numbers in their names.

    Args:
        model: in which layers are fused, if any.
        kept: whether gradients, or their factors, are kept until backward has ended.
        evicted: those that did not fit into `clip_memory`.
        rule: if it has row and column factors.
    """
    only_looked_up = _only_looked_up(managed_params, model)
    reasons, twice = _reasons(managed_params, model), {managed.index for managed in evicted}
    lines: dict[tuple[str, ...], list[ManagedParameter]] = {}
    for managed in managed_params:
        name = re.sub(r"(?<![^.])\d+(?![^.])", "*", managed.name)
        shape, dtype = str(list(shape_of(managed.param))), str(managed.param.dtype).removeprefix("torch.")
        gradient = _gradient(managed, kept, rule, managed.index in only_looked_up)
        gradient = "computed twice" if managed.index in twice else gradient
        lines.setdefault((name, shape, dtype, gradient, reasons[managed.index]), []).append(managed)
    rows = [_HEADER]
    for (name, shape, dtype, gradient, reason), same in lines.items():
        count = f"{len(same)} x {name}" if len(same) > 1 else same[0].name
        rows.append((count, shape, dtype, _mebibytes(same), gradient, reason))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*text, *_totals(managed_params, kept, twice)])


def _gradient(managed: ManagedParameter, kept: bool, rule: FactoredRule | None, only_looked_up: bool) -> str:
    if not managed.param.requires_grad:
        return "none"
    if managed.fused and kept and managed.why_formed != OTHER_CALL:
        return "its factors are kept, or it, if smaller"
    if managed.fused and not kept and not managed.why_formed:  # see `fused_factored`
        if rule is None or rule.is_by_row(managed):
            return "never exists"
        return "its tokens' rows, or it, if smaller" if only_looked_up else "formed once, and freed"
    if kept:
        return "kept" if managed.small else "kept, and it is large"
    return "freed in its hook"


def _only_looked_up(managed_params: Sequence[ManagedParameter], model: nn.Module | None) -> set[int]:
    """Indices of the parameters whose layers are all embeddings."""
    by_id = {id(managed.param): managed.index for managed in managed_params}
    layers = [] if model is None else [module for module, _ in layers_of(model, by_id)]
    embeddings, others = (
        {by_id[id(weight_of(module))] for module in layers if isinstance(module, nn.Embedding) is is_one}
        for is_one in (True, False)
    )
    return embeddings - others


def _reasons(managed_params: Sequence[ManagedParameter], model: nn.Module | None) -> dict[int, str]:
    by_id = {id(managed.param): managed.index for managed in managed_params}
    reasons = {
        managed.index: "fused_layers=False" if model is None else "in no module of the model"
        for managed in managed_params
    }
    homes: dict[int, str] = {}
    for module in () if model is None else model.modules():
        kind = type(module).plain.__name__ if isinstance(module, FusedLayer) else type(module).__name__
        for name, param in module._parameters.items():
            if id(param) in by_id:
                homes[by_id[id(param)]] = f"{name} of {kind}"
    reasons |= homes
    for module, reason in () if model is None else layers_of(model, by_id):
        managed = managed_params[by_id[id(weight_of(module))]]
        if reason is not None and managed.fused:
            reasons[managed.index] += f", also {reason}"
        elif reason is not None and fused_class_of(module) is not None:
            reasons[managed.index] += f": {reason}"
    for managed in managed_params:
        if managed.why_formed:
            reasons[managed.index] += f"; {managed.why_formed}"
        if not managed.param.requires_grad:
            reasons[managed.index] = "frozen"
    return reasons


def _totals(managed_params: Sequence[ManagedParameter], kept: bool, twice: set[int]) -> list[str]:
    trained = [managed for managed in managed_params if managed.param.requires_grad]
    fused = [managed for managed in trained if managed.fused]
    elements, without = (sum(managed.param.numel() for managed in some) for some in (trained, fused))
    lines = [
        f"{len(fused)} of {len(trained)} trained parameters, {without / max(elements, 1):.1%} of their elements, are"
        " weights of fused layers."
    ]
    if low := [managed.low for managed in managed_params if managed.low is not None]:
        lines.append(f'rounding="split" keeps {sum(part.nbytes for part in low) / 2**20:.2f} MiB of low parts.')
    if kept:
        others = [
            managed
            for managed in trained
            if not (managed.fused and managed.why_formed != OTHER_CALL) and managed.index not in twice
        ]
        lines.append(f"Until backward has ended, {_mebibytes(others)} MiB of other gradients are kept.")
    if any(managed.why_formed == OTHER_CALL for managed in trained):
        lines.append(
            "If that call is a head with its loss: with lomo_kernels.linear_cross_entropy(hidden, head.weight, targets)"
            " its gradient never exists."
        )
    if twice:
        lines.append(f"{len(twice)} gradients did not fit into clip_memory: backward runs twice through their layers.")
    return lines


def _mebibytes(managed_params: Sequence[ManagedParameter]) -> str:
    return f"{sum(managed.bytes for managed in managed_params) / 2**20:.2f}"
