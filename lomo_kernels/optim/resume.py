"""Saving and loading a state dict. All checks come before anything is loaded. `saved_numbers` has those of numbers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from . import split
from .hyperparameters import check_group
from .managed_parameter import ManagedParameter
from .saved_numbers import EXPECTED, KEY, check_layout, entry_of, read_numbers, read_rule_state
from .settings import Settings
from .update_strategy import RULE_STATE, UpdateStrategy

_SGD_ONLY = frozenset(("momentum", "dampening", "nesterov", "maximize", "foreach", "differentiable", "fused"))


class Resumed(NamedTuple):
    """A state dict that was checked completely. It shares no memory with the user's, except the numbers' tensors."""

    groups: list[dict[str, Any]]  # hyperparameters, and what schedulers keep there; without parameters
    numbers: dict[str, Any] | None  # for `TrainingState.load`, and the seed; None: the state dict is SGD's
    dropped: list[str]  # options of SGD that are not loaded


def add_entry(optimizer: Any, state: dict[str, Any]) -> None:
    """A hook of `torch.optim.Optimizer.state_dict`: copies all tensors in it, and adds the library's entry."""
    for group in state["param_groups"]:
        group.update({key: value.clone() for key, value in group.items() if isinstance(value, Tensor)})
    state["state"] = {
        index: {name: value.clone() if isinstance(value, Tensor) else value for name, value in numbers.items()}
        for index, numbers in state["state"].items()  # the optimizer's own dicts: nothing may be put into them
    }
    training = optimizer._training
    state[KEY] = entry_of(training.state.export(), training.settings, training.managed_params)


def read(
    state_dict: Any,
    managed_params: Sequence[ManagedParameter],
    groups: Sequence[dict[str, Any]],
    defaults: dict[str, Any],
    kinds: Sequence[str],
    settings: Settings,
    strategy: UpdateStrategy,
) -> Resumed:
    """Checks a state dict completely, and changes nothing.

    Args:
        state_dict: from `Lomo.state_dict`, from `torch.distributed.checkpoint`'s helpers, or from `torch.optim.SGD`.
        managed_params, groups, defaults: of the optimizer that loads it.
        kinds: the kinds of loss scaling that the optimizer can continue; the first is its present one.
        settings, strategy: the optimizer's.

    Raises:
        TypeError, ValueError: a key is missing or unknown, a value has another type or is out of range, or a parameter
            has another name or shape.
    """
    theirs = _groups_of(state_dict)
    order = [number for group in theirs for number in group["params"]]
    numbers = read_numbers(state_dict, order, managed_params, kinds, settings, strategy.states)
    dropped = None
    if numbers is None:
        if not all({"momentum", "nesterov"} <= group.keys() for group in theirs):
            raise ValueError(f"Lomo: the state dict has no {KEY!r} entry; {EXPECTED} or torch.optim.SGD")
        dropped = _of_sgd(state_dict["state"], theirs, managed_params)
    options = _options(theirs, groups, defaults, dropped is not None)
    if numbers is not None and strategy.states:
        numbers[RULE_STATE] = read_rule_state(state_dict["state"], order, managed_params, strategy)
    if numbers is not None:
        numbers[split.LOW] = split.read(state_dict["state"], order, managed_params, splits=settings.splits)
    return Resumed(options, numbers, dropped or [])


def _groups_of(state_dict: Any) -> list[dict[str, Any]]:
    """The parameter groups of a state dict. Checks its keys and their types."""
    if not isinstance(state_dict, dict):
        raise TypeError(f"Lomo: the state dict is a {type(state_dict).__name__}, expected a dict")
    missing = [name for name in ("state", "param_groups") if name not in state_dict]
    if missing:
        raise ValueError(f"Lomo: the state dict lacks {' and '.join(missing)}; {EXPECTED}")
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, dict):
        raise TypeError(f"Lomo: the state dict's state is a {type(state).__name__}, expected a dict")
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise TypeError("Lomo: the state dict's param_groups are not a list of dicts, each with a list of params")
    if not all(isinstance(key, (int, str)) for group in groups for key in group["params"]):
        raise TypeError("Lomo: the state dict's param_groups have params that are neither numbers nor names")
    return groups


def _of_sgd(
    state: dict[Any, Any], theirs: list[dict[str, Any]], managed_params: Sequence[ManagedParameter]
) -> list[str]:
    """The options of `torch.optim.SGD` that `Lomo` does not use. Compares names and shapes if they are there."""
    if any(group.get("maximize") for group in theirs):
        raise ValueError("Lomo: the state dict is from a torch.optim.SGD with maximize=True, which Lomo does not have")
    shapes = []
    for group in theirs:
        names = group.get("param_names", [None] * len(group["params"]))
        for name, number in zip(names, group["params"], strict=True):
            some = state.get(number)
            buffer = some.get("momentum_buffer") if isinstance(some, dict) else None
            shapes.append([name, None if buffer is None else list(buffer.shape)])
    check_layout(shapes, managed_params)
    used = {key for group in theirs for key in _SGD_ONLY if group.get(key)}
    return sorted(used | ({"momentum_buffer"} if any(shape for _, shape in shapes) else set()))


def _options(
    theirs: list[dict[str, Any]], ours: Sequence[dict[str, Any]], defaults: dict[str, Any], of_sgd: bool
) -> list[dict[str, Any]]:
    """Copies of the options in the state dict's groups, for the present parameters. Reads options that are tensors.

    The state dict's parameter names are not loaded: the present names stay.
    """
    if len(theirs) != len(ours):
        raise ValueError(f"Lomo: the state dict has {len(theirs)} parameter groups, this optimizer has {len(ours)}")
    groups = []
    for index, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        if len(their["params"]) != len(our["params"]):
            raise ValueError(
                f"Lomo: param_groups[{index}] has {len(their['params'])} parameters in the state dict, "
                f"{len(our['params'])} here"
            )
        left_out = {"params", "param_names"} | (_SGD_ONLY if of_sgd else set())
        group = {**defaults, **{key: value for key, value in their.items() if key not in left_out}}
        where = f"Lomo: param_groups[{index}] of the state dict"
        check_group(group, where)
        check_group({key: _read(group[key]) for key in ("lr", "weight_decay", "clip_grad_value")}, where)
        groups.append(copy.deepcopy(group))
    return groups


def _read(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def load(optimizer: Any, state_dict: Any) -> None:
    """`Lomo.load_state_dict`, but for undoing it if it fails."""
    training = optimizer._training
    if isinstance(state_dict, dict):
        state_dict = state_dict.copy()  # as torch hands it to hooks
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = pre_hook(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    kind = training.state.scale.kind
    kinds = (kind, "dynamic") if training.scale_is_open else (kind,)
    loaded = read(
        state_dict,
        training.managed_params,
        optimizer.param_groups,
        optimizer.defaults,
        kinds,
        training.settings,
        training.state.strategy,
    )
    if loaded.numbers is None:
        warnings.warn(
            "Lomo: the state dict is from torch.optim.SGD. Loaded: learning rates, weight decay and what "
            f"schedulers keep in the groups. Dropped: {', '.join(loaded.dropped) or 'nothing that was in use'}",
            stacklevel=6,  # load_state_dict's caller
        )
        training.drop_norm()
    else:
        training.norm_is_known = False
        if loaded.numbers["scaling"] != kind:  # what the first backward of the run that is resumed has settled
            training.set_loss_scale(loaded.numbers["scaling"])
        training.state.load(loaded.numbers)
        split.load(training.managed_params, loaded.numbers[split.LOW])
        training.settings = replace(training.settings, seed=loaded.numbers["seed"])
    optimizer.param_groups = [
        new | {key: group[key] for key in ("params", "param_names") if key in group}
        for group, new in zip(optimizer.param_groups, loaded.groups, strict=True)
    ]
    training.show_state()
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)
