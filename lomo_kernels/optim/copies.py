"""Copying and pickling an optimizer: another one with the same settings and numbers, of the parameters' copies."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

from . import split
from .engines.choose import is_engine
from .parameters import check_groups

#: Groups, the constructor's other arguments, and numbers.
Parts = tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]


def deep_copy(optimizer: Any, memo: dict[int, Any]) -> Any:
    """An equal optimizer of the parameters' copies. They have to be in `memo`: the model is copied first.

    Gradients, and hooks that were registered on the optimizer, are not copied, as with torch's optimizers.
    """

    def copied(original: Any, name: str) -> Any:
        if id(original) not in memo:
            raise TypeError(
                f"Lomo: {name} was not copied before the optimizer, so the optimizer's copy would train nothing. "
                "Copy both together, the model first: copy.deepcopy((model, optimizer))"
            )
        return memo[id(original)]

    groups, settings, numbers = _parts(optimizer, copied)
    kind: Any = type(optimizer)
    new = kind.__new__(kind)
    memo[id(optimizer)] = new

    def own(options: dict[str, Any]) -> dict[str, Any]:
        done = ("params", "fused_layers", "process_group")  # a process group is not copied
        return {key: value if key in done else copy.deepcopy(value, memo) for key, value in options.items()}

    new._become([own(group) for group in groups], own(settings), numbers)
    return new


def pickled(optimizer: Any) -> tuple[Any, ...]:
    """What ``__reduce_ex__`` returns: the optimizer with its parameters. A model in the same pickle shares them."""
    if optimizer._training.engine is not None:
        raise TypeError("Lomo: an optimizer over several ranks cannot be pickled; save its state_dict()")
    return _unpickled, (type(optimizer), *_parts(optimizer, lambda part, _: part))


def _unpickled(kind: Any, *parts: Any) -> Any:
    optimizer = kind.__new__(kind)
    optimizer._become(*parts)
    optimizer._training.unpickled = True
    return optimizer


def remake(optimizer: Any) -> None:
    """Makes `optimizer` anew, in place, of the parameters that its groups have now, which another library has put
    there (accelerate with FSDP2). Settings, groups and step hooks stay.

    Raises:
        RuntimeError: it has made a step, or the number of parameters is another one.
    """
    training = optimizer._training
    present = [param for group in optimizer.param_groups for param in group["params"]]
    if len(present) != len(training.managed_params) or optimizer.step_count.item():
        raise RuntimeError(
            "Lomo: the parameters of the optimizer were exchanged after its first step, or some of them only. Make a "
            "new optimizer of the new parameters"
        )
    new = {id(managed.param): param for managed, param in zip(training.managed_params, present, strict=True)}
    groups, settings = _arguments(optimizer, lambda part, _: new.get(id(part), part))
    hooks = {name: hooks for name, hooks in vars(optimizer).items() if name.startswith("_optimizer_") and hooks}
    training.end_use("its parameters were exchanged")
    optimizer._become(groups, settings)
    vars(optimizer).update(hooks)
    for before, after in zip(training.managed_params, optimizer._training.managed_params, strict=True):
        after.is_embedding = before.is_embedding


def _parts(optimizer: Any, of: Callable[[Any, str], Any]) -> Parts:
    """What `Lomo._become` makes the same optimizer of other parameters from.

    Args:
        of: called with a parameter (or the model in which layers are fused) and its name; returns the other one.
    """
    steps = optimizer._training.steps
    parts: Parts = steps.between("copy.deepcopy or pickle", lambda: _parts_now(optimizer, of))
    return parts


def _parts_now(optimizer: Any, of: Callable[[Any, str], Any]) -> Parts:
    """`_parts`, while no step runs."""
    training = optimizer._training
    training.check_not_ended()
    check_groups(training.managed_params, optimizer.param_groups)
    if is_engine(training.settings.process_group):
        raise TypeError("Lomo: an optimizer of a DeepSpeed engine cannot be copied; save its state_dict()")
    groups, settings = _arguments(optimizer, of)
    numbers = training.state.export() | training.state.export_norms() | split.export(training.managed_params)
    return groups, settings, numbers


def _arguments(optimizer: Any, of: Callable[[Any, str], Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The first two of `_parts`."""
    training = optimizer._training
    groups = []
    managed_params = iter(training.managed_params)
    for group in optimizer.param_groups:
        params = [of(managed.param, managed.name) for managed in itertools.islice(managed_params, len(group["params"]))]
        entries = list(zip(group["param_names"], params, strict=True)) if "param_names" in group else params
        groups.append({key: value for key, value in group.items() if key != "param_names"} | {"params": entries})
    model = training.attachment.model
    settings = {
        "lr": optimizer.defaults["lr"],
        "weight_decay": optimizer.defaults["weight_decay"],
        "clip_grad_value": optimizer.defaults["clip_grad_value"],
        "fused_layers": False if model is None else of(model, "the model"),
        **training.settings.arguments(),
    }
    return groups, settings
