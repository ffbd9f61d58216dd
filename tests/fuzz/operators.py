"""Random calls of the operators, raw and through the public wrappers: equal to the reference in every byte, or refused in
this library's words with no byte changed."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
from support import oracle
from torch import Tensor

from fuzz import memory
from fuzz.specs import Finding, Kind, Outcome, Spec, check_words
from lomo_kernels import ops, reference
from lomo_kernels.rules import RULES

RAW = torch.ops.lomo_kernels
SCALARS = ("lr", "weight_decay", "inv_scale", "clip_value", "clip_coef", "found_inf")
NUMBERS: dict[str, tuple[Any, ...]] = {
    "lr": (0.1, 1.0, 0.0, 3e-2, 1e4, 1e-40, 1),
    "weight_decay": (0.0, 0.1, 1.1),
    "inv_scale": (1.0, 0.5, 2.0**-16, 1 / 3, 1e30),
    "clip_value": (math.inf, 0.1, 1e-41, 2),
    "clip_coef": (1.0, 0.37, 0.0),
    "found_inf": (0.0, 0.0, 0.0, 1.0),
}
ODD = (math.nan, math.inf, -math.inf, -1.0, -0.0, 1e308, 1e-320, 10**400, -(10**400), 10**5000, 2**63, True, None, "1", 1j)
INTEGERS = (0, 1, 2, -1, 2**31, 2**32 + 1, 2**40, 2**62, 2**63 - 1, -(2**63))
#: The sums, which have a tolerance. Everything else is compared bit by bit.
SUMMED = ("slot", "sq_norm", "row_sums", "column_sums")
#: By operator: the tensors of a call that are lists.
LISTS = {"params", "grads", "slots", "sq_norms", "lows", "inputs", "grad_outputs", "indices"}


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


# ---- Running --------------------------------------------------------------------------------------------------------


def _vector(scalars: Spec) -> Tensor:
    """The operators' vector of scalars. A number that no float64 can be stands for infinity."""
    numbers = [float(x) if isinstance(x, (int, float)) and abs(x) < 10**300 else math.inf for x in list(scalars.values())[:6]]
    vector = torch.tensor([*numbers, 0.0], dtype=torch.float64)
    step = scalars["step"]
    vector.view(torch.int64)[6] = step if isinstance(step, int) and -(2**63) <= step < 2**63 else 7
    return vector


def _arguments(spec: Spec, block: memory.Block, *, exotic: bool) -> list[Any]:
    """The positional arguments of the raw operator."""
    views: dict[str, Any] = {}
    for name, one in spec["tensors"].items():
        same = next((other for other in views if spec["tensors"][other] is one), None)
        views[name] = views[same] if same else block.view(name, one)
        if exotic and one["exotic"] and not same:
            views[name] = memory.exotic(views[name], one["exotic"])
        elif one["exotic"] in ("negative bit", "None"):
            views[name] = memory.exotic(views[name], one["exotic"])
    numbers = dict(spec["numbers"])
    if "shard" in numbers and spec["op"] == "update_":
        numbers["shard"] = [n for three in numbers["shard"] for n in three]
    for name, view in views.items():  # "params 3" is an entry of the list "params"
        numbers.setdefault(name.partition(" ")[0], []).append(view) if " " in name else numbers.update({name: view})
    numbers["scalars"] = _vector(spec["scalars"]) if "scalars" in spec else None
    inv_scale = spec.get("inv_scale")
    numbers["inv_scale"] = None if inv_scale is None else torch.tensor([inv_scale], dtype=torch.float64)
    schema = getattr(RAW, spec["op"]).default._schema
    renamed = {"sq_norm": "sq_norms", "low": "lows"} if spec["op"] == "update_" else {}
    given = []
    for argument in schema.arguments:
        is_list = str(argument.type).startswith("List")
        given.append(numbers.get(renamed.get(argument.name, argument.name), [] if is_list else None))
    return given


def _check_shards(spec: Spec) -> None:
    """Raises `Finding` if a shard that no parameter can have was accepted."""
    shards = spec["numbers"].get("shard") or []
    parts = [one for name, one in spec["tensors"].items() if name.partition(" ")[0] in ("params", "param", "weight")]
    for shard, part in zip(shards if spec["op"] == "update_" else [shards] if shards else [], parts, strict=False):
        offset, length, stride = shard
        last = max(math.prod(part["shape"]) - 1, 0)
        if offset < 0 or length <= 0 or stride < length or offset + last // length * stride + last % length >= 2**63:
            raise Finding(f"the shard {shard} of {last + 1} elements was accepted")


def _expected(spec: Spec, arguments: list[Any]) -> Any:
    op = spec["op"]
    if op == "_product_":
        out, gy, x, accumulate = arguments
        out.copy_((out.double() if accumulate else 0.0) + gy.double().T @ x.double())
    elif op == "_gram":
        x, gy = arguments
        return (gy.double().T @ x.double()).square().sum()
    else:
        reference.IMPLEMENTATIONS[op](*arguments)
    return None


def _close(actual: Tensor, expected: Tensor, relative: float) -> bool:
    finite = expected.isfinite()
    if not torch.equal(actual.isfinite(), finite):
        return False
    difference = (actual - expected)[finite].abs()
    return bool((difference <= relative * expected[finite].abs() + 1e-300).all())


def _same_choices(spec: Spec, name: str, one: Spec, got: memory.Block, want: memory.Block) -> None:
    """Gives both blocks the same bits for what has no one value: a NaN's, which torch's conversions choose as they like;
    in layers' sums the sign of a zero; and in an embedding a low part that counts as zero, because its row was left."""
    written = name.partition(" ")[0] in ("params", "param", "weight", "out")
    if not written or one["dtype"] not in memory.DTYPES:
        return
    actual, expected = got.view(name, one), want.view(name, one)
    if any(n > 1 and stride == 0 for n, stride in zip(actual.shape, actual.stride(), strict=True)):
        return
    low_name = name.replace("params", "lows") if name.startswith("params") else "low"
    low = spec["tensors"].get(low_name)
    nan = actual.isnan() & expected.isnan()
    if low and low["dtype"] == "int16" and low["shape"] == one["shape"]:
        ours, theirs = got.view(low_name, low), want.view(low_name, low)
        unused = nan
        if spec["op"] == "embedding_update_" and one["dtype"] == "bfloat16":
            unused = nan | (reference.join(actual, ours) == reference.join(expected, theirs))
        ours[unused] = theirs[unused]
    actual.masked_fill_(nan, math.nan)
    expected.masked_fill_(nan, math.nan)
    if spec["op"].startswith("linear"):
        zero = (actual == 0) & (expected == 0)
        actual.masked_fill_(zero, 0.0)
        expected.masked_fill_(zero, 0.0)


def compare(spec: Spec, got: memory.Block, want: memory.Block) -> None:
    for name, one in spec["tensors"].items():
        base = name.partition(" ")[0]
        shares = one["exotic"] in ("", *memory.SHARING)
        if base in (*SUMMED, "slots", "sq_norms") and one["dtype"] == "float64" and shares:
            actual, expected = got.view(name, one), want.view(name, one)
            if not _close(actual, expected, 3e-5 if spec["op"].startswith("linear") else 1e-6):
                raise Finding(f"{name} is {actual.tolist()}, the reference has {expected.tolist()}")
            expected.copy_(actual)
    if any(one["at"] for one in spec["tensors"].values() if one["values"] == "integers"):  # other values: sums round
        for name, one in spec["tensors"].items():
            if name.partition(" ")[0] in ("weight", "out", "low", "slot", "sq_norm"):
                want.view(name, one).copy_(got.view(name, one))
    for name, one in spec["tensors"].items():
        _same_choices(spec, name, one, got, want)
    if not torch.equal(got.bytes, want.bytes):
        wrong = (got.bytes != want.bytes).nonzero().flatten()
        owners = [
            f"{name} from byte {begin}" for name, (begin, _) in want.places.items() if begin <= int(wrong[0])
        ]  # the last that begins before it
        raise Finding(
            f"{len(wrong)} bytes differ from the reference's, the first is byte {int(wrong[0])} of the block, after "
            f"{owners[-1] if owners else 'the guard'}; "
            f"{got.bytes[wrong[:8]].tolist()} in place of {want.bytes[wrong[:8]].tolist()}"
        )


def run(spec: Spec) -> Outcome:
    """One raw call."""
    got = memory.Block(spec["tensors"], inference=spec.get("inference", False))
    want = got.copy()
    before = got.bytes.clone()
    exotics = {one["exotic"] for one in spec["tensors"].values()} - {""}
    try:
        arguments = _arguments(spec, got, exotic=True)
    except Exception:  # torch makes no such tensor
        return Outcome("impossible", 0)
    try:
        result = getattr(RAW, spec["op"]).default(*arguments)
    except Exception as error:
        check_words(error, raw=True)
        if not torch.equal(got.bytes, before):
            raise Finding(f"bytes have changed, and then it was refused: {str(error)[:200]}") from error
        return Outcome("refused")
    _check_shards(spec)
    written = [a for a in arguments for a in (a if isinstance(a, list) else [a]) if isinstance(a, Tensor)]
    if exotics & {"meta", "fake"} and all(t.is_meta or type(t).__name__ == "FakeTensor" for t in written):
        if not torch.equal(got.bytes, before):
            raise Finding("a call with tensors that have no memory changed memory")
        return Outcome("equal")
    try:
        expected = _expected(spec, _arguments(spec, want, exotic=False))
    except Exception as error:
        if "negative bit" in exotics and "share memory" in str(error):  # torch gives the operator a copy
            return Outcome("equal")
        if torch.equal(got.bytes, before) and any(0 in one["shape"] for one in spec["tensors"].values()):
            return Outcome("equal")  # nothing to do, and nothing done
        raise Finding(f"it was not refused; the reference says {type(error).__name__}: {str(error)[:300]}") from error
    compare(spec, got, want)
    if expected is not None and not math.isclose(float(result[0]), float(expected), rel_tol=1e-5, abs_tol=1e-9):
        raise Finding(f"_gram is {float(result[0])}, expected {float(expected)}")
    return Outcome("equal")


OPERATORS = Kind(draw, run)
