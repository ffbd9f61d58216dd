"""A small, fixed part of `make fuzz`, and what it found.

Less than a minute on one core. docs/robustness.md says which planted defects so many cases find.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fuzz.__main__ import run_cases
from fuzz.specs import Finding, shrink
from torch import Tensor, nn

from lomo_kernels import Lomo, backends, ops

RAW = torch.ops.lomo_kernels
needs_compiled = pytest.mark.skipif(backends.choice("CPU").backend != "cpu", reason="compares the compiled operators")

#: Cases of each kind, which take some ten seconds.
CASES = {"operators": 4000, "wrappers": 2500, "models": 250, "states": 150}


@needs_compiled
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.filterwarnings("ignore")
def test_random_cases(kind: str) -> None:
    """Equal to the reference or the textbook; or refused in the library's words, with nothing changed."""
    counts = run_cases(kind, 0, 0, CASES[kind], seconds=math.inf)
    assert counts["cases"] == CASES[kind]
    assert counts["equal"] >= CASES[kind] * (0.25 if kind in ("wrappers", "states") else 0.5), counts  # not all refused


def test_a_case_is_made_smaller() -> None:
    def fails(spec: dict[str, Any]) -> bool:
        return spec["n"] > 5 and "x" in spec["list"]

    assert shrink({"n": 1000, "list": ["a", "x", "b"], "flag": True}, fails) == {"n": 7, "list": ["x"], "flag": False}


def test_words_of_others_are_a_finding() -> None:
    from fuzz.specs import check_words

    check_words(ValueError("sgd_: lr is nan, expected a number >= 0 and finite"), raw=False)
    for error in (OverflowError("int too large"), RuntimeError("sgd_: INTERNAL ASSERT FAILED"), KeyError("sgd_: x")):
        with pytest.raises(Finding):
            check_words(error, raw=True)


# ---- What it found --------------------------------------------------------------------------------------------------


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def scalars() -> Tensor:
    return torch.tensor([0.1, 0.0, 1.0, math.inf, 1.0, 0.0, 0.0], dtype=torch.float64)


@needs_compiled
@pytest.mark.parametrize("freed_one", ["param", "grad", "slot", "scalars"])
def test_freed_memory_is_refused(freed_one: str) -> None:
    """It was a crash: FSDP frees the storage of a tensor that keeps its sizes."""
    given = {"param": torch.ones(9), "grad": torch.ones(9), "scalars": scalars()}
    given["slot"] = torch.zeros(1, dtype=torch.float64)
    freed(given[freed_one])
    with pytest.raises(RuntimeError, match="its memory was freed"):
        RAW.update_([given["param"]], [given["grad"]], given["scalars"], [given["slot"]], 0, False, 0, [0], [], [])
    factor = torch.ones(2, 3, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="its memory was freed"):
        RAW._product_(torch.zeros(3, 3), freed(factor.clone()), factor, False)


@needs_compiled
def test_lists_beside_no_parameters_are_refused() -> None:
    """The CUDA operator did nothing, without a word."""
    one, none = torch.ones(1), torch.empty(0)
    calls = [
        lambda: RAW.update_([], [one], scalars(), [], 0, False, 0, [], [], []),
        lambda: RAW.update_([], [], scalars(), [one.double()], 0, False, 0, [], [], []),
        lambda: RAW.update_([], [], scalars(), [], 0, False, 0, [1], [], []),
        lambda: RAW.update_([], [], scalars(), [], 0, False, 0, [], [0, 1, 1], []),
        lambda: RAW.update_([], [], scalars(), [], 0, False, 0, [], [], [none]),
        lambda: RAW.update_([], [], scalars(), [], 99, False, 0, [], [], []),
        lambda: RAW.update_([], [], one, [], 0, False, 0, [], [], []),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"^update_: (0 params, 1|0 params, 3|rule is 99|scalars has)"):
            call()
    RAW.update_([], [], scalars(), [], 0, False, 0, [], [], [])


@needs_compiled
@pytest.mark.parametrize("elements", [2**40 + 1, 2**62, 2**63 - 1])
def test_more_elements_than_any_memory_has_are_refused(elements: int) -> None:
    """An expanded tensor has them in four bytes. Their number overflowed, or the C++ library's words came."""
    slot, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, 1)
    row = one.expand(1, elements)
    calls = [
        lambda: RAW.sq_norm_([slot], [row], None),
        lambda: RAW.factored_sq_norm_(slot, row, torch.empty(0), torch.empty(0), scalars()),
        lambda: RAW.embedding_sq_norm_(slot, [torch.zeros(1, dtype=torch.int64)], [row], [-1], None),
        lambda: RAW._gram(row.T, row.T),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=rf"has {elements} elements, expected at most 1099511627776"):
            call()
    assert slot.item() == 0


@needs_compiled
@pytest.mark.parametrize("shard", [(2**63 - 1, 1, 2), (0, 1, 2**62), (5, 2, 2**63 - 1)])
def test_a_shard_beyond_64_bits_is_refused_in_raw_calls(shard: tuple[int, int, int]) -> None:
    """It was a signed overflow."""
    param, index, gy = torch.ones(9, 1), torch.zeros(1, dtype=torch.int64), torch.ones(1, 1)
    one = torch.empty(0)
    calls = [
        lambda: RAW.update_([param], [param + 1], scalars(), [], 0, True, 0, [0], list(shard), []),
        lambda: RAW.factored_update_(param, param + 1, one, one, scalars(), 0, True, 0, 0, list(shard)),
        lambda: RAW.embedding_update_(param, [index], [gy], [-1], scalars(), None, 0, True, 0, 0, list(shard)),
        lambda: RAW.linear_update_(param, [gy], [torch.ones(1, 9)], scalars(), None, 0, True, 0, 0, list(shard)),
    ]
    for call in calls:
        with pytest.raises((RuntimeError, ValueError), match="beyond 64 bits"):
            call()
    assert param.eq(1).all()


@pytest.mark.parametrize("name", ["lr", "clip_value", "found_inf", "step", "seed", "shard"])
def test_an_int_of_thousands_of_digits_is_refused(name: str) -> None:
    """It was an OverflowError, or Python's own words about its limit on digits."""
    param = torch.ones(3)
    for number in (10**400, -(10**400), 10**5000):
        value = (number, 1, 1) if name == "shard" else number
        with pytest.raises(ValueError, match=f"^sgd_: {name} is "):
            ops.sgd_(param, torch.ones(3), **({"lr": 0.1} | {name: value}))  # type: ignore[arg-type]
    assert param.eq(1).all()


def test_scalars_and_gradients_without_strides_are_refused() -> None:
    """They were refused in torch's words: "reshape is not implemented for sparse tensors", "Internal error"."""
    one = torch.ones(1)
    nested = torch.nested.nested_tensor([one])
    for given in ({"lr": one.to_sparse()}, {"lr": nested}, {"lr": 0.1, "found_inf": one.to_sparse()}):
        with pytest.raises(ValueError, match="expected a dense"):
            ops.sgd_(torch.ones(3), torch.ones(3), **given)
    with pytest.raises(ValueError, match="expected a dense"):
        ops.sgd_(torch.ones(1), nested, lr=0.1)


@pytest.mark.parametrize("name", ["lr", "weight_decay", "clip_grad_norm", "clip_grad_value", "loss_scale", "seed"])
def test_an_optimizer_refuses_such_an_int(name: str) -> None:
    for number in (10**400, 10**5000):
        with pytest.raises(ValueError, match=rf"^Lomo.*{name}.* is .*expected"):
            Lomo(nn.Linear(2, 2), **({"lr": 0.1} | {name: number}))


def test_a_view_that_negates_its_memory() -> None:
    """Read: negated. Written: refused. torch failed after embedding_update_ had written it."""
    memory = torch.view_as_complex(torch.arange(1.0, 9.0).view(4, 2))
    view = memory.conj().imag
    param = torch.zeros(4)
    ops.sgd_(param, view, lr=1.0)
    assert view.is_neg() and param.equal(torch.tensor([2.0, 4.0, 6.0, 8.0]))
    index = torch.zeros(1, dtype=torch.int64)
    calls = [
        lambda: ops.sgd_(view, torch.ones(4), lr=1.0),
        lambda: ops.embedding_sgd_(view[:, None], index, torch.ones(1, 1), lr=1.0, weight_decay=0.5),
        lambda: ops.linear_sgd_(view[:, None], torch.ones(1, 1), torch.ones(1, 4), lr=1.0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="negates or conjugates its memory"):
            call()
    assert view.equal(torch.tensor([-2.0, -4.0, -6.0, -8.0]))


@needs_compiled
def test_raw_calls_of_layers_check_what_the_wrappers_check() -> None:
    """Wrong shapes left a part of the weight as it was, and shared memory gave other weights."""
    weight, slot = torch.ones(4, 3), torch.zeros(1, dtype=torch.float64)
    x, gy = torch.ones(2, 3), torch.ones(2, 4)
    rest = (scalars(), None, 0, False, 0, 0, [])
    refused = [
        lambda: RAW.linear_update_(torch.ones(5, 3), [x], [gy], *rest),
        lambda: RAW.linear_update_(weight, [x, x], [gy], *rest),
        lambda: RAW.linear_update_(weight, [], [], *rest),
        lambda: RAW.linear_update_(weight, [weight[:2]], [gy], *rest),
        lambda: RAW.linear_sq_norm_(slot, [x], [gy.bfloat16()], None),
        lambda: RAW.linear_sq_norm_(slot.float(), [x], [gy], None),
        lambda: RAW.embedding_sq_norm_(
            slot, [torch.zeros(1, dtype=torch.int64)], [slot.view(torch.float32)[None]], [-1], None
        ),
    ]
    for call in refused:
        with pytest.raises((RuntimeError, ValueError, TypeError), match=r"^(linear|embedding)_\w+_: "):
            call()
    assert weight.eq(1).all() and slot.eq(0).all()


@pytest.mark.parametrize("op", ["update_", "linear_update_", "embedding_update_", "sq_norm_", "_product_"])
def test_a_meta_tensor_among_others_is_refused(op: str) -> None:
    """The call did nothing, without a word."""
    slot, weight = torch.zeros(1, dtype=torch.float64, device="meta"), torch.ones(2, 2)
    x, index = torch.ones(1, 2), torch.zeros(1, dtype=torch.int64)
    rest = (0, False, 0, 0, [])
    calls = {
        "update_": lambda: RAW.update_([weight], [weight + 1], scalars(), [slot], 0, False, 0, [0], [], []),
        "linear_update_": lambda: RAW.linear_update_(weight, [x], [x], scalars(), slot, *rest),
        "embedding_update_": lambda: RAW.embedding_update_(weight, [index], [x], [-1], scalars(), slot, *rest),
        "sq_norm_": lambda: RAW.sq_norm_([slot.new_zeros(1, device="cpu")], [weight], slot),
        "_product_": lambda: RAW._product_(weight, x, x.to("meta"), False),
    }
    with pytest.raises(ValueError, match=f"^{op}: "):
        calls[op]()


def test_malformed_layouts_and_keys_of_a_state_dict_are_refused() -> None:
    """In Python's words before: "'int' object is not iterable", "unhashable type"."""
    for where, value in (
        (("lomo", "parameters", 0, 1), 3),
        (("param_groups", 0, "params", 0), {}),
        (("lomo", "step"), 10**5000),
    ):
        optimizer = Lomo(nn.Linear(2, 2), lr=0.1)
        state: Any = optimizer.state_dict()
        inner = state
        for key in where[:-1]:
            inner = inner[key]
        inner[where[-1]] = value
        with pytest.raises((TypeError, ValueError), match=r"^Lomo: "):
            optimizer.load_state_dict(state)
