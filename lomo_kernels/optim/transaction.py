"""A change of an optimizer that is made whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .attachment import cut
from .split import LOW, export, load


def all_or_nothing(optimizer: Any, change: Callable[[], None]) -> None:
    """Calls `change`. If it raises, the optimizer, its parameters' hooks and its layers are as they were before.

    Raises:
        RuntimeError: the caller is inside a step.
    """
    undo: list[Callable[[], None]] = []

    def run() -> None:
        undo.append(_way_back(optimizer))
        change()

    try:
        optimizer._training.steps.between("a change of its state or groups", run)
    except BaseException:
        for restore in undo:
            restore()
        raise


def _way_back(optimizer: Any) -> Callable[[], None]:
    """What brings the optimizer back to what it is now."""
    training = optimizer._training
    changed = [optimizer, training, *training.managed_params]
    attributes = [vars(instance).copy() for instance in changed]
    groups, managed_params, attached = (
        len(optimizer.param_groups),
        len(training.managed_params),
        training.attachment.extent(),
    )
    state, numbers, low = dict(optimizer.state), training.state.export(), export(training.managed_params)[LOW]

    def restore() -> None:
        for instance, before in zip(changed, attributes, strict=True):
            instance.__dict__ = before
        training.attachment.cut_back(attached)
        cut(training.managed_params, managed_params)
        cut(optimizer.param_groups, groups)
        optimizer.state.clear()
        optimizer.state.update(state)
        training.state.load(numbers)
        load(training.managed_params, low)

    return restore
