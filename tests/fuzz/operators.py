"""Random raw calls of the operators: equal to the reference in every byte, or refused in this library's words with no
byte changed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fuzz import memory
from fuzz.calls import draw
from fuzz.specs import Finding, Kind, Outcome, Spec, check_words
from lomo_kernels import reference

RAW = torch.ops.lomo_kernels
#: The sums, which have a tolerance. Everything else is compared bit by bit.
SUMMED = ("slot", "sq_norm", "row_sums", "column_sums")
#: What operators write that add up products.
RESULTS = ("weight", "out", "low", "slot", "sq_norm")


# ---- Running --------------------------------------------------------------------------------------------------------


def _vector(scalars: Spec) -> Tensor:
    """The operators' vector of scalars. A number that no float64 can be stands for infinity."""
    numbers = [
        float(x) if isinstance(x, (int, float)) and abs(x) < 10**300 else math.inf for x in list(scalars.values())[:6]
    ]
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
        if (exotic and one["exotic"] and not same) or one["exotic"] in ("negative bit", "None"):
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
    """Gives both blocks the same bits for what has no one value: a NaN's, which torch's conversions choose as they
    like; in layers' sums the sign of a zero; in an embedding a low part that counts as zero, whose row was left."""
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


def _copy_results_of_separate(spec: Spec, given: memory.Block, want: memory.Block) -> None:
    """Gives `want` the results that the operator itself has with the same values in tensors that share no memory. What
    lies in shared memory is no small integers, so that sums round, and not as the reference's do."""
    separate = given.separate(spec["tensors"])
    getattr(RAW, spec["op"]).default(*_arguments(spec, separate, exotic=False))
    for name, one in spec["tensors"].items():
        if name.partition(" ")[0] in RESULTS:
            want.write(name, one, separate.view(name, one))


def run(spec: Spec) -> Outcome:
    """One raw call."""
    got = memory.Block(spec["tensors"], inference=spec.get("inference", False))
    want = got.copy()
    before = got.bytes.clone()
    shared_sums = any(one["at"] for one in spec["tensors"].values() if one["values"] == "integers")
    given = got.copy() if shared_sums else None
    exotics = {one["exotic"] for one in spec["tensors"].values()} - {""}
    if {"freed", "fake"} <= exotics:  # torch prints both in its error message, and crashes
        return Outcome("impossible", 0)
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
    if given is not None:
        _copy_results_of_separate(spec, given, want)
    compare(spec, got, want)
    if expected is not None and not math.isclose(float(result[0]), float(expected), rel_tol=1e-5, abs_tol=1e-9):
        raise Finding(f"_gram is {float(result[0])}, expected {float(expected)}")
    return Outcome("equal")


OPERATORS = Kind(draw, run)
