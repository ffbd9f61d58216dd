"""Adding a parameter group to an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .hyperparameters import check_group
from .managed_parameter import ManagedParameter
from .parameters import check_apart, check_parameter, is_supported, name_of
from .transaction import all_or_nothing


def add_group(optimizer: Any, param_group: dict[str, Any]) -> None:
    """`Lomo.add_param_group`, which the constructor calls too."""
    training = optimizer._training
    training.check_not_ended()
    if not isinstance(param_group, dict):
        raise TypeError(f"Lomo: a parameter group is a {type(param_group).__name__}, expected a dict")
    entries = param_group["params"]
    entries = [entries] if isinstance(entries, Tensor) else entries
    if not isinstance(entries, set):  # torch's own error says why not
        entries = list(entries)
    known = {id(managed.param) for managed in training.managed_params}
    managed_params = []
    for index, entry in enumerate(entries, start=len(training.managed_params)):
        name, param = name_of(entry, index)
        check_parameter(name, param)
        if id(param) in known:
            raise ValueError(f"Lomo: {name} is given twice; each parameter has one place in one group")
        known.add(id(param))
        managed_params.append(ManagedParameter(param, index, name))
        managed_params[-1].supported = is_supported(param)
    check_apart((managed.name, managed.param) for managed in (*training.managed_params, *managed_params))
    group = {**optimizer.defaults, **param_group, "params": entries}
    check_group(group, f"Lomo: param_groups[{len(optimizer.param_groups)}]")

    def add() -> None:
        torch.optim.Optimizer.add_param_group(optimizer, group)
        training.managed_params.extend(managed_params)

    def add_later() -> None:
        engine = training.join_engine([*training.managed_params, *managed_params], [*optimizer.param_groups, group])
        add()
        training.extend(managed_params, engine)

    if training.started:
        all_or_nothing(optimizer, add_later)
    else:
        add()
