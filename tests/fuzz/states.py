"""Mutated state dicts: a load is right, or refused in this library's words with weights and state as they were."""

from __future__ import annotations

import copy
import math
import warnings
from random import Random
from typing import Any

import torch
from torch import Tensor

from fuzz import models
from fuzz.specs import Finding, Kind, Outcome, Spec, check_words
from lomo_kernels import Lomo

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63 - 1, 2**63, 10**400, 10**5000, 0.5, -0.5, math.nan, math.inf, 1e308, 1j,
    "", "dynamic", "sgd", "a" * 1000, [], {}, (), [1], {"a": 1}, {1, 2}, b"x", object, ["tensor", "float64", 1],
    ["tensor", "int64", 0], ["tensor", "float32", 2], ["tensor", "float32", -1], ["tensor", "float64", 3],
    ["tensor", "uint8", 4], ["meta"], ["sparse"], ["nan"], ["quantized"], ["complex"], ["bool"],
)  # fmt: skip


def _made(value: Any) -> Any:
    """A value of a spec, which has no tensors in it."""
    if not isinstance(value, list) or not value:
        return copy.deepcopy(value)  # another mutation may change it
    kinds = {
        "tensor": lambda: torch.full([2] * max(value[2], 0), 3, dtype=getattr(torch, value[1])),
        "meta": lambda: torch.ones((), device="meta"),
        "sparse": lambda: torch.ones(1).to_sparse(),
        "nan": lambda: torch.full((), math.nan),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(1), 0.1, 0, torch.quint8),
        "complex": lambda: torch.ones((), dtype=torch.complex64),
        "bool": lambda: torch.ones((), dtype=torch.bool),
    }
    return kinds[value[0]]() if value[0] in kinds else list(value)


def draw(r: Random) -> Spec:
    spec = models.draw(r)
    spec["steps"] = [{"way": "backward", "batches": [r.randrange(10**6)], "overflows": False} for _ in range(2)]
    spec["fused"] = spec["resumes"] = False
    spec["mutations"] = [
        {
            "where": [
                r.randrange(1 << 16) for _ in range(5)
            ],  # which child of a dict or list, from the outside inwards
            "depth": r.choice((1, 2, 2, 3, 3, 3, 4, 5)),
            "how": r.choice(
                ("replace", "replace", "replace", "delete", "add", "element", "reshape", "dtype", "double")
            ),
            "value": r.randrange(len(VALUES)),
        }
        for _ in range(r.choice((1, 1, 2, 3)))
    ]
    return spec


def _mutate(state: dict[str, Any], mutation: Spec) -> None:
    """Changes one thing somewhere in a state dict."""
    parent: Any = state
    for depth, number in enumerate(mutation["where"]):
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        if not keys:
            break
        key = keys[number % len(keys)]
        inner = parent[key]
        if depth + 1 >= mutation["depth"] or not isinstance(inner, (dict, list)) or not inner:
            _change(parent, key, mutation)
            return
        parent = inner


def _change(parent: Any, key: Any, mutation: Spec) -> None:
    how, value, old = mutation["how"], _made(VALUES[mutation["value"]]), parent[key]
    if how == "delete":
        del parent[key]
    elif how == "add" and isinstance(parent, dict):
        parent["another key"] = value
    elif how == "add":
        parent.append(value)
    elif how == "element" and isinstance(old, Tensor) and old.numel():
        with torch.no_grad():
            number = value if isinstance(value, (int, float)) and abs(value) < 2**31 else -1
            old.flatten()[mutation["where"][0] % old.numel()] = number
    elif how == "reshape" and isinstance(old, Tensor):
        parent[key] = old[None] if old.dim() < 2 else old.flatten()
    elif how == "dtype" and isinstance(old, Tensor):
        parent[key] = old.to(torch.float64 if old.dtype is not torch.float64 else torch.float32)
    elif how == "double" and isinstance(old, list):
        parent[key] = old + old
    else:
        parent[key] = value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.is_meta or b.is_meta or a.layout is not b.layout or a.layout is not torch.strided:
            return a.is_meta == b.is_meta and a.layout is b.layout
        return a.numel() == b.numel() and bool((a.isnan() & b.isnan() | (a == b)).all())
    if isinstance(a, Tensor) or isinstance(b, Tensor):  # a number may be kept as a tensor of the same value
        return False
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b or (a != a and b != b)


#: What a load takes from a state dict if it is there, in the library's entry.
LOADED = ("step", "skipped_steps", "scaling", "loss_scale", "growth_tracker", "seed", "rule")


def _check_loaded(optimizer: Lomo, given: dict[str, Any]) -> None:
    now = optimizer.state_dict()
    if "lomo" in given:
        for name in LOADED:
            if name in given["lomo"] and not _equal(now["lomo"][name], given["lomo"][name]):
                raise Finding(f"{name} is {now['lomo'][name]!r} after a load of {given['lomo'][name]!r}")
    for ours, theirs in zip(now["param_groups"], given["param_groups"], strict=True):
        for name in ("lr", "weight_decay", "clip_grad_value"):
            if name in theirs and not _equal(ours[name], theirs[name]):
                raise Finding(f"{name} is {ours[name]!r} after a load of {theirs[name]!r}")


def run(spec: Spec) -> Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, optimizer = models.make(spec)
        except Exception as error:
            check_words(error, raw=False)
            return Outcome("refused")
        for step in spec["steps"]:
            models.do(optimizer, model, step, spec["lr"])
        given = copy.deepcopy(optimizer.state_dict())
        models.do(optimizer, model, spec["steps"][0], spec["lr"])
        before = copy.deepcopy((optimizer.state_dict(), [param.detach() for param in model.parameters()]))
        for mutation in spec["mutations"]:
            try:
                _mutate(given, mutation)
            except Exception:  # torch makes no such tensor
                return Outcome("impossible", 0)
        kept = copy.deepcopy(given)
        outcome = "equal"
        try:
            optimizer.load_state_dict(given)
        except Exception as error:
            check_words(error, raw=False)
            outcome = "refused"
            now = copy.deepcopy((optimizer.state_dict(), [param.detach() for param in model.parameters()]))
            if not _equal(now, before):
                raise Finding(f"the state has changed, and then it was refused: {error}") from error
        else:
            if not _equal([p.detach() for p in model.parameters()], before[1]):
                raise Finding("a load has changed a weight")
            _check_loaded(optimizer, kept)
        try:  # whatever was loaded is a state that a run can have
            models.do(optimizer, model, spec["steps"][1], spec["lr"])
        except Exception as error:
            check_words(error, raw=False)
        numbers = [float(group[name]) for group in optimizer.param_groups for name in ("lr", "weight_decay")]
        if max(numbers) < 1e3 and not all(param.isfinite().all() for param in model.parameters()):
            raise Finding("the next step made a weight that is not finite")
        optimizer.remove()
    return Outcome(outcome)


STATES = Kind(draw, run)
