"""A change of an optimizer that is made whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .attachment import cut


def all_or_nothing(optimizer: Any, change: Callable[[], None]) -> None:
    """Calls `change`. If it raises, the optimizer, its parameters' hooks and its layers are as they were before."""
    attributes = vars(optimizer).copy()
    records = [(record, vars(record).copy()) for record in optimizer._records]
    groups, attached = len(optimizer.param_groups), optimizer._attachment.extent()
    state, numbers = dict(optimizer.state), optimizer._state.export()
    try:
        change()
    except BaseException:
        optimizer.__dict__ = attributes
        optimizer._attachment.cut_back(attached)
        cut(optimizer._records, len(records))
        cut(optimizer.param_groups, groups)
        for record, before in records:
            record.__dict__ = before
        optimizer.state.clear()
        optimizer.state.update(state)
        optimizer._state.load(numbers)
        raise
