"""Random calls of the public wrappers: numbers and scalars of every kind, and tensors that are no tensors.

The arguments are those of `fuzz.operators`; the wrapper gets them by name, in the way a user writes them.
"""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
from torch import Tensor

from fuzz import calls, memory, operators
from fuzz.calls import ODD
from fuzz.specs import Finding, Kind, Outcome, Spec, check_words
from lomo_kernels import ops, reference

HYPERPARAMETERS = ("lr", "weight_decay", "inv_scale", "clip_value", "clip_coef", "found_inf")
OPTIONS = ("rule", "rounding", "seed", "parameter_id", "step", "shard")
#: Kinds of scalars: plain numbers, and tensors that hold one.
AS = (
    "",
    "",
    "",
    "freed",
    "float64",
    "float32",
    "float64 of no dimension",
    "int64",
    "two elements",
    "meta",
    "sparse",
    "nested",
)


def draw(r: Random) -> Spec:
    list_ = r.random() < 0.4
    spec = calls.draw_update(r) if r.random() < 0.7 else calls.draw_sq_norm(r)
    names = list(spec["tensors"])
    if not list_ and names:  # the wrappers of one tensor
        spec["tensors"] = {name: spec["tensors"][name] for name in names if name.endswith(" 0")}
    update = spec["op"] == "update_"
    options: Spec = {"rounding": "nearest"}
    numbers = spec.pop("numbers")
    if update:
        rounding = "split" if any(n.startswith("lows") for n in names) else "nearest"
        options["rounding"] = "stochastic" if numbers["stochastic"] else rounding
        options |= {"rule": r.choice(("sgd", "sign")), "seed": numbers["seed"], "step": spec["scalars"].pop("step")}
        options["parameter_id"], options["shard"] = numbers["parameter_id"], numbers["shard"] or None
    scalars: Spec = {}
    for name in HYPERPARAMETERS if update else ("inv_scale",):
        if r.random() < 0.5 or (name == "lr" and update):
            scalars[name] = [r.choice(calls.NUMBERS[name]), r.choice(AS) if r.random() < 0.3 else ""]
    spec |= {"scalars": scalars, "options": options, "list": list_}
    for _ in range(r.choice((0, 0, 1, 1, 2))):
        way = r.randrange(4)
        if way == 0 and scalars:
            scalars[r.choice(list(scalars))][0] = r.choice(ODD)
        elif way == 1:
            options[r.choice(OPTIONS)] = r.choice((*ODD, *calls.INTEGERS, "split", [1, 2], [0, 10**5000, 1], (0, 1, 1)))
        elif spec["tensors"]:
            calls.mutate(r, {"tensors": spec["tensors"], "numbers": {}, "op": spec["op"]})
    return spec


def _scalar(value: Any, kind: str) -> Any:
    if not kind:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    made = torch.tensor([number], dtype=torch.float64)
    kinds = {
        "float64": lambda: made,
        "float32": made.float,
        "float64 of no dimension": lambda: made[0],
        "int64": lambda: torch.tensor([1]),
        "two elements": lambda: torch.cat([made, made]),
        "meta": lambda: made.to("meta"),
        "sparse": made.to_sparse,
        "freed": lambda: memory.freed(made),
        "nested": lambda: torch.nested.nested_tensor([made]),
    }
    return kinds[kind]()


def _by_name(spec: Spec, block: memory.Block, *, exotic: bool) -> dict[str, list[Any]]:
    lists: dict[str, list[Any]] = {}
    views: dict[str, Any] = {}
    for name, one in spec["tensors"].items():
        same = next((other for other in views if spec["tensors"][other] is one), None)
        views[name] = views[same] if same else block.view(name, one)
        if not same and one["exotic"] and (exotic or one["exotic"] in ("negative bit", "None")):
            views[name] = memory.exotic(views[name], one["exotic"])
        lists.setdefault(name.partition(" ")[0], []).append(views[name])
    return lists


def _call(spec: Spec, lists: dict[str, list[Any]]) -> None:
    scalars = {name: _scalar(*pair) for name, pair in spec["scalars"].items()}
    if spec["op"] == "sq_norm_":
        slots, grads = lists.get("slots", []), lists.get("grads", [])
        if spec["list"]:
            ops.sq_norm_list_(slots, grads, **scalars)
        else:
            ops.sq_norm_(slots[0] if slots else None, grads[0] if grads else None, **scalars)
        return
    options = {name: value for name, value in spec["options"].items() if value is not None}
    params, grads = lists.get("params", []), lists.get("grads", [])
    slots, lows = lists.get("sq_norms"), lists.get("lows")
    if spec["list"]:
        if isinstance(options.get("shard"), list) and options["shard"] and not isinstance(options["shard"][0], list):
            options["shard"] = [options["shard"]] * len(params)
        ops.sgd_list_(params, grads, sq_norm=slots, low=lows, **scalars, **options)
        return
    for name in ("parameter_id", "shard"):  # drawn for a list
        drawn = options.get(name)
        if isinstance(drawn, list) and drawn and (name == "parameter_id" or isinstance(drawn[0], list)):
            options[name] = drawn[0]
    first = [one[0] if one else None for one in (params, grads, slots, lows)]
    ops.sgd_(first[0], first[1], sq_norm=first[2], low=first[3], **scalars, **options)


def _number(pair: list[Any]) -> float:
    scalar = _scalar(*pair)
    return scalar.item() if isinstance(scalar, Tensor) else float(scalar)


def _expect(spec: Spec, lists: dict[str, list[Any]]) -> None:
    """What the documentation says, from plain numbers and `reference.updated`."""
    neutral = {"inv_scale": 1.0, "clip_value": math.inf, "clip_coef": 1.0, "weight_decay": 0.0, "found_inf": 0.0}
    given = {n: _number(pair) for n, pair in spec["scalars"].items() if pair[0] is not None or pair[1]}
    numbers: dict[str, Any] = neutral | given
    found_inf = numbers.pop("found_inf")
    slots = lists.get("slots" if spec["op"] == "sq_norm_" else "sq_norms", [])
    for slot, grad in zip(slots, lists.get("grads", []), strict=False):
        if slot is not None:
            slot.detach().add_(reference.sum_of_squares(grad, numbers["inv_scale"]))
    if spec["op"] == "sq_norm_" or found_inf:
        return
    options = spec["options"]
    rule = {"rule": options["rule"]} if options.get("rule") is not None else {}
    for i, (param, grad) in enumerate(zip(lists.get("params", []), lists.get("grads", []), strict=True)):
        if options["rounding"] == "split" and param.dtype is torch.bfloat16:
            low = lists["lows"][i]
            new, new_low = reference.updated_split(param, low, grad, **numbers, **rule)
            low.copy_(new_low)
        else:
            keys: dict[str, Any] = {name: options.get(name) or 0 for name in ("seed", "step", "parameter_id")}
            ids, shard = options.get("parameter_id"), options.get("shard")
            keys["parameter_id"] = ids[i] if isinstance(ids, (list, tuple)) and ids else int(ids or 0) if ids else 0
            if ids is None and spec["list"]:
                keys["parameter_id"] = i
            if shard:
                shard = shard[i] if isinstance(shard[0], (list, tuple)) else shard
            new = reference.updated(
                param,
                grad,
                **numbers,
                **rule,
                **keys,
                shard=shard or None,
                stochastic=options["rounding"] == "stochastic",
            )
        param.detach().copy_(new)


def run(spec: Spec) -> Outcome:
    got = memory.Block(spec["tensors"])
    want = got.copy()
    before = got.bytes.clone()
    kinds = {one["exotic"] for one in spec["tensors"].values()} | {pair[1] for pair in spec["scalars"].values()}
    if {"freed", "fake"} <= kinds:  # torch prints both in its error message, and crashes
        return Outcome("impossible", 0)
    try:
        lists = _by_name(spec, got, exotic=True)
    except Exception:
        return Outcome("impossible", 0)
    try:
        _call(spec, lists)
    except Exception as error:
        check_words(error, raw=False)
        if not torch.equal(got.bytes, before):
            raise Finding(f"bytes have changed, and then it was refused: {str(error)[:200]}") from error
        return Outcome("refused")
    tensors = [t for one in lists.values() for t in one if isinstance(t, Tensor)]
    if all(t.is_meta or type(t).__name__ == "FakeTensor" for t in tensors):
        return Outcome("equal")
    try:
        _expect(spec, _by_name(spec, want, exotic=False))
    except Exception as error:
        if any(one["exotic"] == "negative bit" for one in spec["tensors"].values()):
            return Outcome("equal")
        raise Finding(f"it was not refused; the reference says {type(error).__name__}: {str(error)[:300]}") from error
    operators.compare(spec, got, want)
    return Outcome("equal")


WRAPPERS = Kind(draw, run)
