"""What rules with factors make of sums (`lomo_kernels.ops.rule_factors`): against float64, for every implementation.

tests/test_cuda_host.py runs this file on the CUDA kernels, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.oracle import assert_same_bits
from torch import Tensor

from lomo_kernels import backends
from lomo_kernels.composite import rule_factors

FORMS: dict[str, Callable[[str], Callable[..., Any]]] = {
    "backend": lambda name: getattr(torch.ops.lomo_kernels, name).default,
    "torch": lambda name: rule_factors.IMPLEMENTATIONS[name],
}
COMPILED = backends.choice("CPU").backend == "cpu"
EMULATED = "emulated" in backends.choice("CPU").detail
BAD = (math.nan, math.inf)

every_form = pytest.mark.parametrize("form", FORMS)


def float64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def number(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def sums(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1e-3


@every_form
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 5000])
def test_a_total(form: str, count: int) -> None:
    rows, found_inf = sums(count), number(0.0)
    slot = number(2.0)
    total, is_finite = FORMS[form]("factor_sums_total_")(rows, slot, found_inf)
    assert total.shape == is_finite.shape == () and is_finite.item() is True
    assert total.item() == pytest.approx(math.fsum(rows.tolist()), rel=1e-14)
    assert slot.item() == 2.0 + total.item()
    assert found_inf.item() == 0.0
    again, _ = FORMS[form]("factor_sums_total_")(rows, None, found_inf)
    assert again.item() == total.item() and slot.item() == 2.0 + total.item()


@every_form
@pytest.mark.parametrize("at", [0, 31, 32, 299])
@pytest.mark.parametrize("bad", BAD)
def test_a_total_that_is_not_finite(form: str, bad: float, at: int) -> None:
    rows, found_inf = sums(300), number(0.0)
    rows[at] = bad
    total, is_finite = FORMS[form]("factor_sums_total_")(rows, None, found_inf)
    assert not total.isfinite() and is_finite.item() is False
    assert found_inf.isnan()


@every_form
def test_a_step_that_is_skipped_stays_skipped(form: str) -> None:
    found_inf = number(1.0)
    _, is_finite = FORMS[form]("factor_sums_total_")(sums(3), None, found_inf)
    assert is_finite.item() is False and found_inf.item() == 1.0


@every_form
@pytest.mark.parametrize("wide", [True, False])
def test_inverse_rms(form: str, wide: bool) -> None:
    """Each operation is rounded as float64's, so compiled kernels have the same bits. torch takes MKL's roots on some
    CPUs, whose last bit may differ."""
    for shape in ((), (1,), (300,), (3, 700), (0,)):
        squares = sums(*shape)
        squares.view(-1)[5::7], squares.view(-1)[6::7] = 0.0, 1e60
        for elements in (1, 49, 0):
            expected = [1.0 / (math.sqrt(x / max(elements, 1)) + 1e-12) for x in squares.flatten().tolist()]
            made = FORMS[form]("inverse_rms")(squares, elements, wide)
            assert made.shape == squares.shape
            exact = float64(*expected).to(torch.float64 if wide else torch.float32)
            if form == "backend" and COMPILED:
                assert_same_bits(made.flatten(), exact, shape, elements)
            torch.testing.assert_close(made.flatten(), exact, rtol=1e-15 if wide else 1.2e-7, atol=0)
    bad = FORMS[form]("inverse_rms")(float64(math.nan, math.inf, 4.0), 1, wide)
    assert bad[0].isnan() and bad[1] == 0.0 and 0.49 < bad[2] <= 0.5


@every_form
@pytest.mark.parametrize("matrices", [1, 3])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 300), (1000, 3), (256, 256)])
def test_adalomo_factors(form: str, rows: int, columns: int, matrices: int) -> None:
    for beta, eps, is_vector, size in itertools.product((0.0, 0.2, 0.5, 0.97), (1e-30, 1e-3), (False, True), (1, 1e60)):
        count = 1 if is_vector else rows
        of_rows, of_columns = sums(matrices * count, seed=1) * size, sums(matrices, columns, seed=2) * size
        row = torch.empty(0) if is_vector else sums(matrices, rows, seed=3).float()
        column = sums(matrices, columns, seed=4).float()
        arguments = of_rows, of_columns, row, column, number(beta, torch.float32), eps
        before = [tensor.clone() for tensor in arguments[:4]]
        made = FORMS[form]("adalomo_factors")(*arguments)

        def moved(mean: Tensor, squares: Tensor, elements: int, given: Any = arguments) -> Tensor:
            share, new = given[4].item(), (squares / elements + given[5]).clamp(max=torch.finfo(torch.float32).max)
            return share * mean.double() + (1 - share) * new

        new_column = moved(column, of_columns, count)
        expected = [torch.empty(0), new_column.rsqrt(), torch.empty(0), new_column]
        if not is_vector:
            new_row = moved(row, of_rows.view(matrices, rows), columns)
            of_row = (new_row / new_row.mean(1, keepdim=True)).rsqrt()
            expected = [of_row.flatten(), new_column.rsqrt(), new_row, new_column]
        for one, other in zip(made, expected, strict=True):
            assert one.dtype is torch.float32 and one.shape == other.shape
            torch.testing.assert_close(one.double(), other.double(), rtol=5e-7, atol=0)
        assert all(map(torch.equal, arguments[:4], before))


@every_form
@pytest.mark.parametrize("bad", BAD)
def test_adalomo_factors_of_what_is_not_finite(form: str, bad: float) -> None:
    """Infinity is float32's largest number, NaN stays."""
    of_rows, of_columns = sums(2), sums(1, 3)
    of_rows[1] = of_columns[0, 2] = bad
    states = torch.ones(1, 2), torch.ones(1, 3)
    _, _, row, column = FORMS[form]("adalomo_factors")(of_rows, of_columns, *states, number(0.0, torch.float32), 1e-30)
    assert row.isnan().tolist() == [[False, math.isnan(bad)]]
    assert column.isnan().tolist() == [[False, False, math.isnan(bad)]]
    assert row.isinf().sum() == column.isinf().sum() == 0


@every_form
def test_adalomo_scale(form: str) -> None:
    for u, p, elements, threshold in itertools.product((0.0, 3.0, 700.0), (0.0, 1e-9, 5.0), (1, 49, 0), (1.0, 0.3)):
        coef, count = number(0.7), max(elements, 1)
        FORMS[form]("adalomo_scale_")(coef, float64(u), float64(p), elements, threshold, 1e-3)
        scale = max(math.sqrt(p / count), 1e-3) / max(math.sqrt(u / count), threshold)
        assert coef.shape == ()
        tolerance = 0.0 if COMPILED and form == "backend" else 1e-15
        assert coef.item() == pytest.approx(0.7 * (scale * threshold), rel=tolerance, abs=0.0)
    for bad in ((math.nan, 1.0), (1.0, math.nan)):
        coef = number(0.7)
        FORMS[form]("adalomo_scale_")(coef, float64(bad[0]), float64(bad[1]), 3, 1.0, 1e-3)
        assert coef.isnan()


@every_form
@pytest.mark.parametrize("is_finite", [True, False])
def test_states_are_replaced_or_kept(form: str, is_finite: bool) -> None:
    """More states than one launch takes, and some without elements."""
    shapes = [(1, 300), (1, 0), (0,), (2, 256), (3, 3), (1, 257), (5,)]
    memory = [torch.zeros(math.prod(shape) + 2) for shape in shapes]
    states = [whole[1:-1].view(shape) for whole, shape in zip(memory, shapes, strict=True)]
    new = [torch.rand(shape) + 1 for shape in shapes]
    FORMS[form]("replace_states_")(states, new, number(is_finite, torch.bool))
    for whole, state, changed in zip(memory, states, new, strict=True):
        assert torch.equal(state, changed if is_finite else torch.zeros_like(changed))
        assert whole[0] == whole[-1] == 0.0
    FORMS[form]("replace_states_")([], [], number(is_finite, torch.bool))


NARROW, WIDE, FLAG = torch.ones(1, 3), torch.ones(1, 3, dtype=torch.float64), torch.ones((), dtype=torch.bool)
REFUSED: dict[str, tuple[str, Sequence[Any], str]] = {
    "float32 sums": ("factor_sums_total_", (torch.ones(3), None, number(0.0)), "row_sums has dtype"),
    "strided sums": ("factor_sums_total_", (float64(1, 2, 3, 4)[::2], None, number(0.0)), "row_sums has dtype"),
    "a slot of two": ("factor_sums_total_", (float64(1), float64(1, 2), number(0.0)), "slot has shape"),
    "a float32 flag": ("factor_sums_total_", (float64(1), None, number(0.0, torch.float32)), "found_inf has"),
    "float32 squares": ("inverse_rms", (torch.ones(3), 1, True), "squares has dtype"),
    "columns of another shape": (
        "adalomo_factors",
        (float64(1, 2), WIDE[:, :2].contiguous(), torch.ones(1, 2), NARROW, number(0.1, torch.float32), 1e-30),
        "column has shape",
    ),
    "a row of another shape": (
        "adalomo_factors",
        (float64(1, 2), WIDE, torch.ones(1, 3), NARROW, number(0.1, torch.float32), 1e-30),
        "row has shape",
    ),
    "a float64 beta": ("adalomo_factors", (float64(1), WIDE, torch.ones(1, 1), NARROW, number(0.1), 0.1), "beta has"),
    "two coefficients": ("adalomo_scale_", (float64(1, 2), float64(1), float64(1), 1, 1.0, 0.1), "coef has shape"),
    "a float32 size": ("adalomo_scale_", (float64(1), torch.ones(1), float64(1), 1, 1.0, 0.1), "u_squares has"),
    "a state too many": ("replace_states_", ([NARROW, NARROW.clone()], [NARROW.clone()], FLAG), "1 new for 2 states"),
    "another shape": ("replace_states_", ([NARROW], [torch.ones(3, 1)], FLAG), "new has shape"),
    "a float64 state": ("replace_states_", ([WIDE], [WIDE.clone()], FLAG), "states has dtype"),
    "a flag of floats": ("replace_states_", ([NARROW], [NARROW.clone()], number(1.0)), "is_finite has dtype"),
}


@every_form
@pytest.mark.parametrize("case", REFUSED)
def test_other_arguments_are_refused(form: str, case: str) -> None:
    name, arguments, message = REFUSED[case]
    with pytest.raises((RuntimeError, ValueError), match=f"{name}: {message}"):
        FORMS[form](name)(*arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("factor_sums_total_", lambda one: (one, None, one)),
        ("factor_sums_total_", lambda one: (float64(1), one, one)),
        ("adalomo_scale_", lambda one: (one, one, float64(1), 1, 1.0, 0.1)),
        ("replace_states_", lambda _: ([NARROW], [NARROW], FLAG)),
    ],
)
def test_shared_memory_is_refused(name: str, arguments: Callable[[Tensor], Sequence[Any]]) -> None:
    with pytest.raises(RuntimeError, match=f"{name}: .*memory"):
        FORMS["backend"](name)(*arguments(float64(1.0)))


@pytest.mark.parametrize("name", rule_factors.IMPLEMENTATIONS)
def test_who_serves_an_operator(name: str) -> None:
    """If compiled kernels are there, torch's operators make AdaLomo's factors on CPUs, and nothing else."""
    choice = backends.choice("CPU")
    if COMPILED:
        assert choice.of(name).backend == ("tiled" if name == "adalomo_factors" and not EMULATED else "cpu")
