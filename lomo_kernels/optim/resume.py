"""What a state dict holds, its checks, and loading it. The checks come before anything is loaded."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rules import NUMBERS
from .factored_rules import STATES
from .hyperparameters import check_group, check_seed
from .managed_parameter import ManagedParameter
from .placement import shape_of
from .scaling import GROWTH_INTERVAL, KINDS, LARGEST_SCALE, SMALLEST_SCALE
from .settings import Settings
from .update_strategy import CLIP_MEANS, RULE_STATE, UpdateStrategy

KEY = "lomo"  # of the library's entry in a state dict
VERSION = 1  # of that entry; raised if a reader of this version would misread a newer entry

#: Numbers of the entry. `torch.distributed.checkpoint` keeps the same numbers with each parameter.
_NUMBERS = ("step", "skipped_steps", "scaling", "loss_scale", "growth_tracker", "seed")
_SGD_ONLY = frozenset(("momentum", "dampening", "nesterov", "maximize", "foreach", "differentiable", "fused"))
_WRAPPERS = frozenset(("_orig_mod", "_checkpoint_wrapped_module"))  # torch.compile, checkpoint_wrapper
_FROM = "expected one from Lomo.state_dict()"


class Resumed(NamedTuple):
    """A state dict that was checked completely. It shares no memory with the user's, except the numbers' tensors."""

    groups: list[dict[str, Any]]  # hyperparameters, and what schedulers keep there; without parameters
    numbers: dict[str, Any] | None  # for `TrainingState.load`, and the seed; None: the state dict is SGD's
    dropped: list[str]  # options of SGD that are not loaded


def layout(managed_params: Sequence[ManagedParameter]) -> list[list[Any]]:
    """Name and shape of every parameter. The position in this list keys a parameter's random bits."""
    return [[managed.name, list(shape_of(managed.param))] for managed in managed_params]


def add_entry(optimizer: Any, state: dict[str, Any]) -> None:
    """A hook of `torch.optim.Optimizer.state_dict`: copies all tensors in it, and adds the library's entry."""
    for group in state["param_groups"]:
        group.update({key: value.clone() for key, value in group.items() if isinstance(value, Tensor)})
    state["state"] = {
        index: {name: value.clone() if isinstance(value, Tensor) else value for name, value in numbers.items()}
        for index, numbers in state["state"].items()  # the optimizer's own dicts: nothing may be put into them
    }
    numbers = optimizer._training.state.export()
    numbers.pop(RULE_STATE, None)  # which is with the parameters
    state[KEY] = {
        "version": VERSION,
        **numbers,
        "seed": optimizer._training.settings.seed,
        "rule": optimizer._training.settings.rule,
        "parameters": layout(optimizer._training.managed_params),
    }


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
    numbers = dropped = None
    order = [number for group in theirs for number in group["params"]]
    if KEY in state_dict:
        numbers = _of_entry(state_dict[KEY], managed_params)
    elif any(isinstance(some, dict) and "scaling" in some for some in state_dict["state"].values()):
        numbers = _of_parameters(state_dict["state"], order, managed_params, strategy.states)
    elif all({"momentum", "nesterov"} <= group.keys() for group in theirs):
        dropped = _of_sgd(state_dict["state"], theirs, managed_params)
    else:
        raise ValueError(f"Lomo: the state dict has no {KEY!r} entry; {_FROM} or torch.optim.SGD")
    if numbers is not None:
        _check_numbers(numbers, kinds)
        if numbers["rule"] != settings.rule:
            raise ValueError(
                f"Lomo: the state dict was saved with rule {numbers['rule']!r}, this optimizer has {settings.rule!r}; "
                "construct it with the same rule"
            )
        _check_means(numbers.get(CLIP_MEANS), len(managed_params), settings.clip_tensor)
    options = _options(theirs, groups, defaults, dropped is not None)
    if numbers is not None and strategy.states:
        numbers[RULE_STATE] = _rule_state_of(state_dict["state"], order, managed_params, strategy)
    return Resumed(options, numbers, dropped or [])


def _groups_of(state_dict: Any) -> list[dict[str, Any]]:
    """The parameter groups of a state dict. Checks its keys and their types."""
    if not isinstance(state_dict, dict):
        raise TypeError(f"Lomo: the state dict is a {type(state_dict).__name__}, expected a dict")
    missing = [name for name in ("state", "param_groups") if name not in state_dict]
    if missing:
        raise ValueError(f"Lomo: the state dict lacks {' and '.join(missing)}; {_FROM}")
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, dict):
        raise TypeError(f"Lomo: the state dict's state is a {type(state).__name__}, expected a dict")
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise TypeError("Lomo: the state dict's param_groups are not a list of dicts, each with a list of params")
    return groups


def _of_entry(entry: Any, managed_params: Sequence[ManagedParameter]) -> dict[str, Any]:
    """The numbers of the library's entry. Its parameters are compared with `managed_params`."""
    if not isinstance(entry, dict):
        raise TypeError(f"Lomo: the state dict's {KEY!r} entry is a {type(entry).__name__}, expected a dict")
    version = entry.get("version", VERSION)
    if type(version) is not int or version < 1:
        raise ValueError(f"Lomo: the state dict's version is {version!r}, expected an integer from 1 to {VERSION}")
    if version > VERSION:
        raise ValueError(
            f"Lomo: the state dict has version {version}; this lomo_kernels reads versions up to {VERSION}. Update "
            "lomo_kernels to the release that saved it, or a later one"
        )
    _check_keys(entry, (*_NUMBERS, "parameters"), optional=("version", "rule", CLIP_MEANS))
    _check_layout(entry["parameters"], managed_params)
    numbers = {name: entry[name] for name in (*_NUMBERS, CLIP_MEANS) if name in entry}
    return numbers | {"rule": entry.get("rule", "sgd")}  # older ones have no rule


def _of_parameters(
    state: dict[Any, Any],
    order: Sequence[Any],
    managed_params: Sequence[ManagedParameter],
    own_states: Sequence[str],
) -> dict[str, Any]:
    """The numbers that `torch.distributed.checkpoint` keeps with every parameter. It has compared names and shapes. Of
    frozen parameters it loads none, or those that this optimizer had.

    Args:
        order: the keys of `state` in the order of `managed_params`.
        own_states: names of the states that the optimizer's rule has.
    """
    frozen = {key for key, managed in zip(order, managed_params, strict=False) if not managed.param.requires_grad}
    for name, numbers in state.items():
        if not isinstance(numbers, dict):
            raise TypeError(f"Lomo: the state of {name} is a {type(numbers).__name__}, expected a dict")
        _check_keys(numbers, (*_NUMBERS, "rule"), optional=(CLIP_MEANS, *STATES, *own_states))
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
        raise ValueError(f"Lomo: the state dict's scaling is {scaling!r}, expected 0 to {len(KINDS) - 1}")
    names = {number: name for name, number in NUMBERS.items()}
    numbers = first | {"scaling": KINDS[scaling], "rule": names.get(first["rule"], first["rule"])}
    if CLIP_MEANS in first:
        unknown = torch.tensor(math.inf, dtype=torch.float64, device="cpu")
        means = [state.get(key, {}).get(CLIP_MEANS, unknown if key in frozen else None) for key in order]
        if not all(isinstance(mean, Tensor) and mean.numel() == 1 for mean in means):
            raise ValueError(f"Lomo: the state dict has {CLIP_MEANS} of some parameters only; expected it of all")
        numbers[CLIP_MEANS] = torch.cat([mean.reshape(1).cpu() for mean in means])
    return numbers


def _rule_state_of(
    state: dict[Any, Any], order: Sequence[Any], managed_params: Sequence[ManagedParameter], strategy: UpdateStrategy
) -> list[dict[str, Tensor]]:
    """Each parameter's state of the rule. Raises ValueError unless it is of the shapes that the optimizer has."""
    found = []
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
                was = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else repr(given)
                raise ValueError(
                    f"Lomo: the state dict's {name} of {managed.name} is {was}, expected {own.dtype} {list(own.shape)}"
                )
            if not bool(((given >= 0) & given.isfinite()).all()):
                raise ValueError(f"Lomo: the state dict's {name} of {managed.name} has an element that no mean can be")
        found.append({name: theirs[name] for name in expected})
    return found


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
        raise ValueError(f"Lomo: the state dict's {KEY!r} entry lacks {', '.join(sorted(missing))}; {_FROM}")
    unknown = [str(key) for key in entry if key not in keys and key not in optional]
    if unknown:
        raise ValueError(
            f"Lomo: the state dict's {KEY!r} entry has unknown keys: {', '.join(sorted(unknown))}. It was changed by "
            "hand, or saved by another release of lomo_kernels"
        )


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
    _check_layout(shapes, managed_params)
    used = {key for group in theirs for key in _SGD_ONLY if group.get(key)}
    return sorted(used | ({"momentum_buffer"} if any(shape for _, shape in shapes) else set()))


def _check_layout(theirs: Any, managed_params: Sequence[ManagedParameter]) -> None:
    """Raises ValueError unless names and shapes are those of `managed_params`. None is not compared, and neither is the
    name of a parameter that was given without one."""
    ours = layout(managed_params)
    if not isinstance(theirs, list) or not all(isinstance(one, (list, tuple)) and len(one) == 2 for one in theirs):
        raise ValueError(f"Lomo: the state dict's parameters are not a list of (name, shape); {_FROM}")
    if len(ours) != len(theirs):
        raise ValueError(f"Lomo: the state dict has {len(theirs)} parameters, this optimizer has {len(ours)}")
    for managed, (name, shape), (our_name, our_shape) in zip(managed_params, theirs, ours, strict=True):
        nameless = f"parameter {managed.index}"
        same_name = name is None or nameless in (name, our_name) or _bare(name) == _bare(our_name)
        if not same_name or (shape is not None and list(shape) != our_shape):
            of_shape = "" if shape is None else f" of shape {list(shape)}"
            raise ValueError(
                f"Lomo: parameter {managed.index} is {name}{of_shape} in the state dict, "
                f"{our_name} of shape {our_shape} here; expected the same parameters in the same order"
            )


def _bare(name: str) -> str:
    """A parameter's name without the parts that `torch.compile` and `checkpoint_wrapper` add."""
    return ".".join(part for part in str(name).split(".") if part not in _WRAPPERS)


def _check_numbers(numbers: dict[str, Any], kinds: Sequence[str]) -> None:
    """Raises ValueError unless step, counters, loss scale and seed are possible in a run."""
    scaling = numbers["scaling"]
    if not isinstance(scaling, str) or scaling not in KINDS:
        raise ValueError(f"Lomo: the state dict's scaling is {scaling!r}, expected one of {', '.join(KINDS)}")
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
        raise ValueError(f"Lomo: the state dict's {name} is {value!r}, {expected}")
    if value.dtype is not dtype or value.numel() != 1 or value.is_meta:
        raise ValueError(
            f"Lomo: the state dict's {name} has shape {list(value.shape)} and dtype {value.dtype} on {value.device}, "
            f"{expected}"
        )
    number = value.item()
    if not smallest <= number <= largest:
        raise ValueError(f"Lomo: the state dict's {name} is {number}, {expected}")
    return number


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
            stacklevel=4,  # load_state_dict's caller
        )
        training.drop_norm()
    else:
        training.norm_is_known = False
        if loaded.numbers["scaling"] != kind:  # what the first backward of the run that is resumed has settled
            training.set_loss_scale(loaded.numbers["scaling"])
        training.state.load(loaded.numbers)
        training.settings = replace(training.settings, seed=loaded.numbers["seed"])
    optimizer.param_groups = [
        new | {key: group[key] for key in ("params", "param_names") if key in group}
        for group, new in zip(optimizer.param_groups, loaded.groups, strict=True)
    ]
    training.show_state()
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)
