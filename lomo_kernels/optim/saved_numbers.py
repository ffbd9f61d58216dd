"""The numbers of a state dict: step, counters, loss scale, seed, rule, and what a strategy keeps between steps.

They stand in the library's entry. `torch.distributed.checkpoint` keeps them with each parameter in its place. Reading
checks everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..numbers import shown
from .factored_rules import NUMBERS, STATES
from .hyperparameters import check_seed
from .managed_parameter import ManagedParameter
from .placement import shape_of
from .scaling import GROWTH_INTERVAL, KINDS, LARGEST_SCALE, SMALLEST_SCALE
from .settings import Settings
from .split import LOW
from .update_strategy import CLIP_MEANS, RULE_STATE, UpdateStrategy

KEY = "lomo"  # of the library's entry in a state dict
VERSION = 1  # of that entry; raised if a reader of this version would misread a newer entry

_NUMBERS = ("step", "skipped_steps", "scaling", "loss_scale", "growth_tracker", "seed")
_WRAPPERS = frozenset(("_orig_mod", "_checkpoint_wrapped_module"))  # torch.compile, checkpoint_wrapper
EXPECTED = "expected one from Lomo.state_dict()"


def entry_of(
    exported: dict[str, Any], settings: Settings, managed_params: Sequence[ManagedParameter]
) -> dict[str, Any]:
    """The library's entry in a state dict. `exported`: from `TrainingState.export`."""
    return {
        "version": VERSION,
        **{name: value for name, value in exported.items() if name != RULE_STATE},  # which is with the parameters
        "seed": settings.seed,
        "rule": settings.rule,
        "parameters": _layout(managed_params),
    }


def read_numbers(
    state_dict: dict[str, Any],
    order: Sequence[Any],
    managed_params: Sequence[ManagedParameter],
    kinds: Sequence[str],
    settings: Settings,
    states: Sequence[str],
) -> dict[str, Any] | None:
    """The numbers of a state dict, checked; None if it has none of ours. The states of a rule come from
    `read_rule_state`.

    Args:
        order: the keys of ``state_dict["state"]`` in the order of `managed_params`.
        kinds, settings: as `resume.read` takes them.
        states: names of the tensors that the optimizer's strategy keeps for each parameter.
    """
    if KEY in state_dict:
        numbers = _of_entry(state_dict[KEY], managed_params)
    elif any(isinstance(some, dict) and "scaling" in some for some in state_dict["state"].values()):
        numbers = _of_parameters(state_dict["state"], order, managed_params, states)
    else:
        return None
    _check_numbers(numbers, kinds)
    if numbers["rule"] != settings.rule:
        raise ValueError(
            f"Lomo: the state dict was saved with rule {shown(numbers['rule'])}, this optimizer has {settings.rule!r}; "
            "construct it with the same rule"
        )
    _check_means(numbers.get(CLIP_MEANS), len(managed_params), settings.clip_tensor)
    return numbers


def _layout(managed_params: Sequence[ManagedParameter]) -> list[list[Any]]:
    """Name and shape of every parameter. The position in this list keys a parameter's random bits."""
    return [[managed.name, list(shape_of(managed.param))] for managed in managed_params]


def _of_entry(entry: Any, managed_params: Sequence[ManagedParameter]) -> dict[str, Any]:
    """The numbers of the library's entry. Its parameters are compared with `managed_params`."""
    if not isinstance(entry, dict):
        raise TypeError(f"Lomo: the state dict's {KEY!r} entry is a {type(entry).__name__}, expected a dict")
    version = entry.get("version", VERSION)
    if type(version) is not int or version < 1:
        raise ValueError(f"Lomo: the state dict's version is {shown(version)}, expected an integer from 1 to {VERSION}")
    if version > VERSION:
        raise ValueError(
            f"Lomo: the state dict has version {shown(version)}; this lomo_kernels reads versions up to {VERSION}. "
            "Update lomo_kernels to the release that saved it, or a later one"
        )
    _check_keys(entry, (*_NUMBERS, "parameters"), optional=("version", "rule", CLIP_MEANS))
    check_layout(entry["parameters"], managed_params)
    numbers = {name: entry[name] for name in (*_NUMBERS, CLIP_MEANS) if name in entry}
    return numbers | {"rule": entry.get("rule", "sgd")}  # older ones have no rule


def _of_parameters(
    state: dict[Any, Any],
    order: Sequence[Any],
    managed_params: Sequence[ManagedParameter],
    states: Sequence[str],
) -> dict[str, Any]:
    """The numbers that `torch.distributed.checkpoint` keeps with every parameter. It has compared names and shapes. Of
    frozen parameters it loads none, or those that this optimizer had.

    Args:
        order, states: as `read_numbers` takes them.
    """
    frozen = {key for key, managed in zip(order, managed_params, strict=False) if not managed.param.requires_grad}
    for name, numbers in state.items():
        if not isinstance(numbers, dict):
            raise TypeError(f"Lomo: the state of {name} is a {type(numbers).__name__}, expected a dict")
        _check_keys(numbers, (*_NUMBERS, "rule"), optional=(CLIP_MEANS, LOW, *STATES, *states))
    trained = [name for name in state if name not in frozen] or list(state)
    first = state[trained[0]]
    for name in trained:
        different = [key for key in (*_NUMBERS, "rule") if not _same(state[name][key], first[key])]
        if different:
            raise ValueError(
                f"Lomo: the state dict's {different[0]} differs between {trained[0]} and {name}; expected the "
                "same for all, from one checkpoint"
            )
    scaling = first["scaling"]
    if type(scaling) is not int or not 0 <= scaling < len(KINDS):
        raise ValueError(f"Lomo: the state dict's scaling is {shown(scaling)}, expected 0 to {len(KINDS) - 1}")
    names = {number: name for name, number in NUMBERS.items()}
    numbers = first | {"scaling": KINDS[scaling], "rule": names.get(first["rule"], first["rule"])}
    if CLIP_MEANS in first:
        unknown = torch.tensor(math.inf, dtype=torch.float64, device="cpu")
        means = [state.get(key, {}).get(CLIP_MEANS, unknown if key in frozen else None) for key in order]
        if not all(isinstance(mean, Tensor) and mean.numel() == 1 for mean in means):
            raise ValueError(f"Lomo: the state dict has {CLIP_MEANS} of some parameters only; expected it of all")
        numbers[CLIP_MEANS] = torch.cat([mean.reshape(1).cpu() for mean in means])
    return numbers


def read_rule_state(
    state: dict[Any, Any], order: Sequence[Any], managed_params: Sequence[ManagedParameter], strategy: UpdateStrategy
) -> list[dict[str, Tensor]]:
    """Each parameter's state of the rule. Raises ValueError unless it is of the shapes that the optimizer has."""
    states = []
    for key, managed in zip(order, managed_params, strict=True):
        ours = strategy.by_parameter(managed.index)
        expected = {name: ours[name] for name in strategy.states if name in ours}
        theirs = state.get(key, {})
        if not isinstance(theirs, dict):
            raise TypeError(f"Lomo: the state of {managed.name} is a {type(theirs).__name__}, expected a dict")
        if not theirs and not managed.param.requires_grad:  # as `torch.distributed.checkpoint` loads it
            expected = {}
        for name, own in expected.items():
            given = theirs.get(name)
            if not isinstance(given, Tensor) or given.shape != own.shape or given.dtype != own.dtype or given.is_meta:
                was = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else shown(given)
                raise ValueError(
                    f"Lomo: the state dict's {name} of {managed.name} is {was}, expected {own.dtype} {list(own.shape)}"
                )
            if not bool(((given >= 0) & given.isfinite()).all()):
                raise ValueError(f"Lomo: the state dict's {name} of {managed.name} has an element that no mean can be")
        states.append({name: theirs[name] for name in expected})
    return states


def _check_means(means: Any, count: int, clip_tensor: float | None) -> None:
    """Raises ValueError unless `means` are those of `count` parameters, or None if the optimizer has none."""
    if (means is None) != (clip_tensor is None):
        saved, ours = ("without", f"has {clip_tensor}") if means is None else ("with", "has none")
        raise ValueError(
            f"Lomo: the state dict was saved {saved} clip_tensor, this optimizer {ours}; construct it alike"
        )
    if means is None:
        return
    if not isinstance(means, Tensor) or means.dtype != torch.float64 or means.shape != (count,):
        raise ValueError(f"Lomo: the state dict's {CLIP_MEANS} is not a float64 tensor of {count} elements")
    if not bool((means > 0).all()):
        raise ValueError(f"Lomo: the state dict's {CLIP_MEANS} has an element that is not above zero")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.dtype is b.dtype and a.shape == b.shape and torch.equal(a.cpu(), b.cpu()))
    return type(a) is type(b) and bool(a == b)


def _check_keys(entry: dict[str, Any], keys: Sequence[str], optional: Sequence[str] = ()) -> None:
    missing = [key for key in keys if key not in entry]
    if missing:
        raise ValueError(f"Lomo: the state dict's {KEY!r} entry lacks {', '.join(sorted(missing))}; {EXPECTED}")
    unknown = [str(key) for key in entry if key not in keys and key not in optional]
    if unknown:
        raise ValueError(
            f"Lomo: the state dict's {KEY!r} entry has unknown keys: {', '.join(sorted(unknown))}. It was changed by "
            "hand, or saved by another release of lomo_kernels"
        )


def check_layout(theirs: Any, managed_params: Sequence[ManagedParameter]) -> None:
    """Raises ValueError unless names and shapes are those of `managed_params`. None is not compared, and neither is the
    name of a parameter that was given without one."""
    ours = _layout(managed_params)
    if not isinstance(theirs, list) or not all(map(_is_name_and_shape, theirs)):
        raise ValueError(f"Lomo: the state dict's parameters are not a list of (name, shape); {EXPECTED}")
    if len(ours) != len(theirs):
        raise ValueError(f"Lomo: the state dict has {len(theirs)} parameters, this optimizer has {len(ours)}")
    for managed, (name, shape), (our_name, our_shape) in zip(managed_params, theirs, ours, strict=True):
        nameless = f"parameter {managed.index}"
        same_name = name is None or nameless in (name, our_name) or _bare(name) == _bare(our_name)
        if not same_name or (shape is not None and list(shape) != our_shape):
            of_shape = "" if shape is None else f" of shape {shown(list(shape))}"
            raise ValueError(
                f"Lomo: parameter {managed.index} is {name}{of_shape} in the state dict, "
                f"{our_name} of shape {our_shape} here; expected the same parameters in the same order"
            )


def _is_name_and_shape(entry: Any) -> bool:
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        return False
    name, shape = entry
    sizes = shape if isinstance(shape, (list, tuple)) else [] if shape is None else [None]
    return (name is None or isinstance(name, str)) and all(isinstance(size, int) for size in sizes)


def _bare(name: str) -> str:
    """A parameter's name without the parts that `torch.compile` and `checkpoint_wrapper` add."""
    return ".".join(part for part in str(name).split(".") if part not in _WRAPPERS)


def _check_numbers(numbers: dict[str, Any], kinds: Sequence[str]) -> None:
    """Raises ValueError unless step, counters, loss scale and seed are possible in a run."""
    scaling = numbers["scaling"]
    if not isinstance(scaling, str) or scaling not in KINDS:
        raise ValueError(f"Lomo: the state dict's scaling is {shown(scaling)}, expected one of {', '.join(KINDS)}")
    if scaling not in kinds:
        raise ValueError(
            f"Lomo: the state dict was saved with {scaling} loss scaling, this optimizer has {kinds[0]}; construct it "
            "with the same loss_scale"
        )
    step = _number("step", numbers["step"], torch.int64, 0, 2**63 - 1)
    _number("skipped_steps", numbers["skipped_steps"], torch.int64, 0, step)
    smallest, largest = {
        "none": (1.0, 1.0),
        "static": (SMALLEST_SCALE, LARGEST_SCALE),
        "dynamic": (SMALLEST_SCALE, torch.finfo(torch.float32).max),
    }[scaling]
    _number("loss_scale", numbers["loss_scale"], torch.float32, smallest, largest)
    last = GROWTH_INTERVAL - 1 if scaling == "dynamic" else 0
    _number("growth_tracker", numbers["growth_tracker"], torch.int32, 0, last)
    check_seed(numbers["seed"], "Lomo: the state dict's seed")


def _number(name: str, value: Any, dtype: torch.dtype, smallest: float, largest: float) -> Any:
    """The only element of a tensor. Raises ValueError unless it has `dtype` and is in range."""
    allowed = f"{smallest:g}" if smallest == largest else f"from {smallest:g} to {largest:g}"
    expected = f"expected a tensor of one element, {str(dtype).removeprefix('torch.')}, {allowed}"
    if not isinstance(value, Tensor):
        raise ValueError(f"Lomo: the state dict's {name} is {shown(value)}, {expected}")
    if value.dtype is not dtype or value.numel() != 1 or value.is_meta:
        raise ValueError(
            f"Lomo: the state dict's {name} has shape {list(value.shape)} and dtype {value.dtype} on {value.device}, "
            f"{expected}"
        )
    number = value.item()
    if not smallest <= number <= largest:
        raise ValueError(f"Lomo: the state dict's {name} is {number}, {expected}")
    return number
