"""Random calls of the raw operators as plain values, most of them good, some changed for the worse."""

from __future__ import annotations

import math
from random import Random
from typing import Any

from fuzz import memory
from fuzz.specs import Spec
from lomo_kernels.rules import RULES

SCALARS = ("lr", "weight_decay", "inv_scale", "clip_value", "clip_coef", "found_inf")
NUMBERS: dict[str, tuple[Any, ...]] = {
    "lr": (0.1, 1.0, 0.0, 3e-2, 1e4, 1e-40, 1),
    "weight_decay": (0.0, 0.1, 1.1),
    "inv_scale": (1.0, 0.5, 2.0**-16, 1 / 3, 1e30),
    "clip_value": (math.inf, 0.1, 1e-41, 2),
    "clip_coef": (1.0, 0.37, 0.0),
    "found_inf": (0.0, 0.0, 0.0, 1.0),
}
ODD = (
    math.nan,
    math.inf,
    -math.inf,
    -1.0,
    -0.0,
    1e308,
    1e-320,
    10**400,
    -(10**400),
    10**5000,
    2**63,
    True,
    None,
    "1",
    1j,
)
INTEGERS = (0, 1, 2, -1, 2**31, 2**32 + 1, 2**40, 2**62, 2**63 - 1, -(2**63))
# ---- Drawing --------------------------------------------------------------------------------------------------------


def _seed(r: Random) -> int:
    return r.randrange(1 << 30)


def _tensor(r: Random, shape: list[int], dtype: str, values: str = "mixed") -> Spec:
    return memory.tensor(shape, dtype, values, _seed(r), memory.layout(r))


def _slot(r: Random) -> Spec:
    return memory.tensor(r.choice(([1], [1], [])), "float64", "squares", _seed(r))


def _shape(r: Random) -> list[int]:
    n = memory.size(r)
    return r.choice(([n], [n], [1, n], [n, 1], [r.choice((2, 3, 5)), max(n // 3, 0)], [2, 1, n // 2], []))


def _matrix(r: Random) -> list[int]:
    return [r.choice((0, 1, 2, 3, 8, 9, 17, 40)), r.choice((0, 1, 5, 16, 31, 64, 130, 600))]


def _scalars(r: Random) -> Spec:
    spec = {name: r.choice(NUMBERS[name]) for name in SCALARS}
    return spec | {"step": r.choice(INTEGERS) if r.random() < 0.5 else 0}


def _shard(r: Random, numel: int) -> list[int]:
    if r.random() < 0.6:
        return []
    length = r.choice((1, 2, 7, 64, 10**6))
    return [r.choice((0, 1, 7, 2**31, 2**32 + 3, 2**40)), length, length + r.choice((0, 1, 5, 2**20))]


def _split(r: Random, stochastic: bool, param: Spec) -> Spec | None:
    """The low part of a parameter, if it is to be split."""
    if stochastic or param["dtype"] == "float16" or r.random() < 0.7:
        return None
    shape = param["shape"] if param["dtype"] == "bfloat16" else [0]
    return memory.tensor(shape, "int16", "mixed", _seed(r), memory.layout(r))


def _update(r: Random, param: Spec) -> tuple[Spec, Spec]:
    """What every update takes after its scalars: tensors, and numbers."""
    stochastic = r.random() < 0.4
    low = _split(r, stochastic, param)
    numbers = {
        "rule": r.randrange(len(RULES)),
        "stochastic": stochastic,
        "seed": r.choice(INTEGERS),
        "parameter_id": r.choice(INTEGERS),
        "shard": _shard(r, math.prod(param["shape"])),
    }
    return ({"low": low} if low else {}), numbers


def draw_update(r: Random) -> Spec:
    count = r.choice((1, 1, 1, 2, 3, 7)) if r.random() < 0.98 else 0
    stochastic, splits, slots = r.random() < 0.4, r.random() < 0.25, r.random() < 0.4
    tensors, ids, shards = {}, [], []
    for i in range(count):
        shape = _shape(r)
        dtypes = memory.DTYPES[:2] if splits else memory.DTYPES
        param = _tensor(r, shape, r.choice(dtypes))
        tensors[f"params {i}"], tensors[f"grads {i}"] = param, _tensor(r, shape, r.choice(memory.DTYPES))
        if slots:
            tensors[f"sq_norms {i}"] = _slot(r)
        if splits:
            of = shape if param["dtype"] == "bfloat16" else [0]
            tensors[f"lows {i}"] = memory.tensor(of, "int16", "mixed", _seed(r), memory.layout(r))
        ids.append(r.choice(INTEGERS))
        shards.append(_shard(r, math.prod(shape)) or [0, 10**9, 10**9])
    numbers = {
        "rule": r.randrange(len(RULES)),
        "stochastic": stochastic and not splits,
        "seed": r.choice(INTEGERS),
        "parameter_id": ids,
        "shard": shards if r.random() < 0.3 else [],
    }
    return {"op": "update_", "tensors": tensors, "scalars": _scalars(r), "numbers": numbers}


def draw_sq_norm(r: Random) -> Spec:
    tensors = {}
    for i in range(r.choice((1, 1, 2, 5)) if r.random() < 0.98 else 0):
        tensors[f"slots {i}"] = _slot(r)
        values = "ordinary" if r.random() < 0.7 else "mixed"
        tensors[f"grads {i}"] = _tensor(r, _shape(r), r.choice(memory.DTYPES), values)
    return {"op": "sq_norm_", "tensors": tensors, "numbers": {}, "inv_scale": _inv_scale(r)}


def _inv_scale(r: Random) -> float | None:
    return r.choice((None, 1.0, 0.5, 2.0**-16, 1 / 3))


def draw_factored(r: Random) -> Spec:
    op = r.choice(("factor_sums_", "factored_sq_norm_", "factored_update_"))
    matrices, (rows, columns) = r.choice((1, 1, 2, 3)), _matrix(r)
    grad = _tensor(r, [matrices * rows, columns], r.choice(memory.DTYPES), r.choice(("ordinary", "mixed")))
    sums = op == "factor_sums_"
    of_rows = memory.tensor([matrices * rows], "float64" if sums else "float32", "squares", _seed(r))
    of_columns = memory.tensor([matrices, columns], "float64" if sums else "float32", "squares", _seed(r))
    if not sums and r.random() < 0.2:
        of_rows["shape"] = [0]
    if not sums and r.random() < 0.2:
        of_columns["shape"] = [0]
    if sums:
        tensors, numbers = {"row_sums": of_rows, "column_sums": of_columns, "grad": grad}, {}
    else:
        tensors, numbers = {"grad": grad, "row_factors": of_rows, "column_factors": of_columns}, {}
    if op == "factored_sq_norm_":
        tensors = {"slot": _slot(r)} | tensors
    if op == "factored_update_":
        tensors = {"param": _tensor(r, list(grad["shape"]), r.choice(memory.DTYPES))} | tensors
        more, numbers = _update(r, tensors["param"])
        tensors |= more
    return {"op": op, "tensors": tensors, "scalars": _scalars(r), "numbers": numbers}


def draw_layer(r: Random) -> Spec:
    """Of a linear layer or an embedding. Sums of small integers are exact in any order: the result is one of bits."""
    layer, norm = r.choice(("linear", "embedding")), r.random() < 0.3
    rows, columns = r.choice((1, 2, 5, 16, 33, 100)), r.choice((0, 1, 3, 16, 31, 64, 130))
    tensors: dict[str, Spec] = {}
    name = "inputs" if layer == "linear" else "indices"
    dtype = r.choice(memory.DTYPES)
    for i in range(r.choice((1, 1, 2))):
        leading = r.choice(([], [1], [3], [2, 4], [40], [0], [5, 1, 3]))
        if layer == "linear":
            tensors[f"inputs {i}"] = _tensor(r, [*leading, columns], dtype, "integers")
            tensors[f"grad_outputs {i}"] = _tensor(r, [*leading, rows], dtype, "integers")
        else:
            index = _tensor(r, leading, r.choice(("int64", "int64", "int32")), "ids")
            tensors[f"indices {i}"] = index | {"rows": rows}
            tensors[f"grad_outputs {i}"] = _tensor(r, [*leading, columns], r.choice(memory.DTYPES), "integers")
    tensors = {k: tensors[k] for k in sorted(tensors, key=lambda k: k.split()[0] != name)}  # as the operators take them
    numbers: Spec = {}
    if layer == "embedding":
        numbers["padding_idx"] = [r.choice((-1, -1, 0, 1)) for k in tensors if k.startswith("indices")]
    if norm:
        tensors = {"slot": _slot(r)} | tensors
        return {"op": f"{layer}_sq_norm_", "tensors": tensors, "numbers": numbers, "inv_scale": _inv_scale(r)}
    weight = _tensor(r, [rows, columns], r.choice(memory.DTYPES))
    tensors = {"weight": weight} | tensors
    more, update = _update(r, weight)
    if r.random() < 0.4:
        tensors["sq_norm"] = _slot(r)
    scalars = _scalars(r) | {"inv_scale": r.choice((1.0, 0.5, 2.0**-16))}
    return {"op": f"{layer}_update_", "tensors": tensors | more, "scalars": scalars, "numbers": numbers | update}


def draw_internal(r: Random) -> Spec:
    """Operators that only this library calls."""
    dtype, (a, b) = r.choice(memory.DTYPES), (r.choice((1, 3, 16, 49, 130)), r.choice((1, 2, 31, 64, 100)))
    tokens = r.choice((0, 1, 2, 31, 33, 130))
    gy, x = _tensor(r, [tokens, a], dtype, "integers"), _tensor(r, [tokens, b], dtype, "integers")
    if r.random() < 0.4:
        return {"op": "_gram", "tensors": {"input": x, "grad_output": gy}, "numbers": {}}
    out = memory.tensor([a, b], "float32", "integers", _seed(r))
    tensors = {"out": out, "grad_output": gy, "input": x}
    return {"op": "_product_", "tensors": tensors, "numbers": {"accumulate": r.random() < 0.5}}


def mutate(r: Random, spec: Spec) -> None:
    """Changes one thing of a call for the worse, or for something that nobody calls it with."""
    tensors, names = spec["tensors"], list(spec["tensors"])
    one = tensors[r.choice(names)] if names else memory.tensor([1], "float32", "mixed", 0)
    ways = ["shape", "shape", "dtype", "layout", "exotic", "overlap", "overlap", "drop", "repeat", "numbers", "numbers"]
    way = r.choice(ways + ["scalars"] * 3 * ("scalars" in spec))
    if way == "shape":
        shape = list(one["shape"])
        change = r.randrange(5)
        if change == 0 and shape:
            shape[r.randrange(len(shape))] = r.choice((0, 1, 2, 5, 64))
        elif change == 1:
            shape = shape[:-1]
        elif change == 2:
            shape = shape[1:]
        elif change == 3:
            shape.insert(r.randrange(len(shape) + 1), r.choice((1, 1, 2)))
        elif shape:
            i = r.randrange(len(shape))
            shape[i] = max(0, shape[i] + r.choice((-1, 1)))
        one["shape"] = shape if math.prod(shape) < 10**5 else []
    elif way == "dtype":
        one["dtype"] = r.choice(memory.DTYPES + memory.OTHER_DTYPES)
    elif way == "layout":
        one["layout"] = r.choice(memory.LAYOUTS)
    elif way == "exotic":
        one["exotic"] = r.choice(memory.EXOTIC)
    elif way == "overlap" and len(names) > 1:
        place = r.randrange(1, len(names))
        one = tensors[names[place]]
        if one["values"] == "ids":  # what lies there as an index would be a weight of exabytes
            return
        one["at"] = [r.choice(names[:place]), r.choice((0, 0, 2, 4, 8, 30, 64, -4, -8, 1000))]
    elif way == "drop" and names:
        del tensors[r.choice(names)]
    elif way == "repeat" and names:
        name, _, number = r.choice(names).partition(" ")
        other = r.choice([n for n in names if n.startswith(name)])
        if number:
            tensors[f"{name} {number}"] = dict(tensors[other], at=[other, 0]) if r.random() < 0.5 else tensors[other]
    elif way == "scalars":
        spec["scalars"][r.choice(("lr", "weight_decay", "clip_coef", "found_inf", "step"))] = r.choice(ODD[:8])
    elif spec["numbers"]:
        name = r.choice(list(spec["numbers"]))
        name = "shard" if "shard" in spec["numbers"] and r.random() < 0.4 else name
        if name == "shard":
            count = len([n for n in names if n.startswith("params")])
            three = [r.choice((0, 1, -1, 3, 2**31, 2**62, 2**63 - 1, -(2**63))) for _ in range(r.choice((3, 3, 3, 2)))]
            spec["numbers"]["shard"] = [three] * count if spec["op"] == "update_" else three
        elif name in ("parameter_id", "padding_idx") and isinstance(spec["numbers"][name], list):
            spec["numbers"][name] = [r.choice(INTEGERS) for _ in range(r.randrange(4))]
        elif name != "stochastic" and name != "accumulate":
            spec["numbers"][name] = r.choice(INTEGERS)


def draw(r: Random) -> Spec:
    spec = r.choice((draw_update, draw_update, draw_sq_norm, draw_factored, draw_layer, draw_internal))(r)
    spec["inference"] = r.random() < 0.03
    for _ in range(r.choice((0, 0, 0, 1, 1, 2))):
        mutate(r, spec)
    return spec
