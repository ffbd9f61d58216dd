"""Adding a parameter group to an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .hyperparameters import check_group
from .parameters import check_apart, check_parameter, is_served, name_of
from .records import Record
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
    known = {id(record.param) for record in training.records}
    records = []
    for index, entry in enumerate(entries, start=len(training.records)):
        name, param = name_of(entry, index)
        check_parameter(name, param)
        if id(param) in known:
            raise ValueError(f"Lomo: {name} is given twice; each parameter has one place in one group")
        known.add(id(param))
        records.append(Record(param, index, name))
        records[-1].served = is_served(param)
    check_apart((record.name, record.param) for record in (*training.records, *records))
    group = {**optimizer.defaults, **param_group, "params": entries}
    check_group(group, f"Lomo: param_groups[{len(optimizer.param_groups)}]")

    def add() -> None:
        torch.optim.Optimizer.add_param_group(optimizer, group)
        training.records.extend(records)

    def add_later() -> None:
        ranks = training.join_ranks([*training.records, *records], [*optimizer.param_groups, group])
        add()
        training.extend(records, ranks)

    if training.started:
        all_or_nothing(optimizer, add_later)
    else:
        add()
