"""`factor_sums_`, `factored_sq_norm_` and `factored_update_`: kernels against the reference."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.oracle import assert_same_bits
from torch import Tensor

from lomo_kernels import reference
from lomo_kernels.ops.scalars import vector

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: (matrices, rows of each, columns): around the kernels' 8 rows, 64 columns and 4096 elements, and above 64 KiB; rows
#: that begin where vectors do, and others.
SHAPES = [
    (1, 1, 1),
    (1, 3, 5),
    (1, 8, 64),
    (1, 9, 65),
    (1, 17, 63),
    (3, 5, 7),
    (300, 3, 3),
    (8000, 3, 3),
    (1, 1, 5000),
    (1, 2, 4097),
    (1, 300, 700),
    (2, 260, 300),
    (1, 5000, 2),
    (1, 40, 256),
    (3, 18, 264),
]
CLIPPING = {"inv_scale": 0.5, "clip_value": 0.9, "clip_coef": 0.7}
#: Without clipping the kernels run fewer instructions.
EVERY_CLIPPING: tuple[dict[str, float], ...] = (CLIPPING, {})
NONE = torch.empty(0)


def scalars(clipping: dict[str, float] = CLIPPING, **numbers: float) -> Tensor:
    return vector("test", torch.device("cpu"), {"lr": 0.1, "weight_decay": 0.1, "step": 3} | clipping | numbers)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return oracle.ordinary(math.prod(shape), dtype, seed).view(shape)


def factors(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) * 3 + 0.01


def strided(tensor: Tensor) -> Tensor:
    """The same values at other strides."""
    rows, columns = tensor.shape
    wide = tensor.new_zeros(columns, 2 * rows)
    wide[:, ::2] = tensor.T
    return wide[:, ::2].T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    matrices, rows, columns = shape
    grad = values((matrices * rows, columns), dtype, 1)
    for clipping, given_grad in itertools.product(EVERY_CLIPPING, (grad, strided(grad))):
        g = reference.factored_gradient(grad, NONE, NONE, **clipping).double().square()
        of_rows = torch.ones(matrices * rows, dtype=torch.float64)
        of_columns = torch.ones(matrices, columns, dtype=torch.float64)
        torch.ops.lomo_kernels.factor_sums_(of_rows, of_columns, given_grad, scalars(clipping))
        torch.testing.assert_close(of_rows, 1 + g.sum(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(of_columns, 1 + g.view(matrices, rows, columns).sum(1), rtol=1e-12, atol=0)


def test_sums_of_numbers_whose_squares_float32_has_not() -> None:
    grad = torch.tensor([[1e30, 2e-30], [3e-30, 1e-38]])
    of_rows, of_columns = torch.zeros(2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    torch.ops.lomo_kernels.factor_sums_(of_rows, of_columns, grad, vector("test", grad.device, {"lr": 0.1}))
    torch.testing.assert_close(of_rows, grad.double().square().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(of_columns[0], grad.double().square().sum(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_sums_have_the_same_bits_for_any_number_of_threads(threads: int) -> None:
    grad = values((3000, 200), torch.bfloat16, 1)
    results = []
    before = torch.get_num_threads()
    for count in (1, threads):
        torch.set_num_threads(count)
        of_rows, of_columns = torch.zeros(3000, dtype=torch.float64), torch.zeros(1, 200, dtype=torch.float64)
        slot = torch.zeros(1, dtype=torch.float64)
        torch.ops.lomo_kernels.factor_sums_(of_rows, of_columns, grad, scalars())
        torch.ops.lomo_kernels.factored_sq_norm_(slot, grad, factors((3000,), 2), factors((1, 200), 3), scalars())
        results.append((of_rows, of_columns, slot))
    torch.set_num_threads(before)
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sum_of_squares(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    matrices, rows, columns = shape
    grad = values((matrices * rows, columns), dtype, 1)
    every_rows, every_columns = (factors((matrices * rows,), 2), NONE), (factors((matrices, columns), 3), NONE)
    for of_rows, of_columns, clipping in itertools.product(every_rows, every_columns, EVERY_CLIPPING):
        f = reference.factored_gradient(grad, of_rows, of_columns, **clipping)
        slot = torch.ones(1, dtype=torch.float64)
        torch.ops.lomo_kernels.factored_sq_norm_(slot, strided(grad), of_rows, of_columns, scalars(clipping))
        case = f"{of_rows.numel()} row factors, {of_columns.numel()} column factors, {clipping}"
        assert slot.item() == pytest.approx(1 + f.double().square().sum().item(), rel=1e-6), case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_update(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    matrices, rows, columns = shape
    param = values((matrices * rows, columns), dtype, 5)
    of_rows, of_columns = factors((matrices * rows,), 2), factors((matrices, columns), 3)
    for grad_dtype, stochastic in itertools.product(DTYPES, (False, True)):
        grad = values((matrices * rows, columns), grad_dtype, 1)
        grad.view(-1)[3 :: max(7, grad.numel() // 3)] = math.nan
        grad.view(-1)[4 :: max(9, grad.numel() // 3)] = math.inf
        for shard, clipping in (([], CLIPPING), ([5, columns, columns + 2], {})):
            expected = param.clone()
            arguments = (of_rows, of_columns, scalars(clipping), 0, stochastic, 11, 4, shard)
            reference.IMPLEMENTATIONS["factored_update_"](expected, grad, *arguments)
            assert param.numel() < 100 or not torch.equal(expected, param)
            for ours in (param.clone(), strided(param)):
                torch.ops.lomo_kernels.factored_update_(ours, strided(grad), *arguments)
                assert_same_bits(ours.contiguous(), expected, grad_dtype, stochastic, shard, clipping)


def test_found_inf_leaves_the_parameter() -> None:
    param, grad = values((5, 70), torch.bfloat16, 5), values((5, 70), torch.bfloat16, 1)
    before = param.clone()
    torch.ops.lomo_kernels.factored_update_(param, grad, NONE, NONE, scalars(found_inf=1.0), 0, False, 0, 0, [])
    assert_same_bits(param, before)


def test_a_product_that_overflows_keeps_its_element() -> None:
    param, grad = torch.ones(2, 2), torch.tensor([[1e30, 1.0], [1.0, 1.0]])
    of_rows = torch.tensor([1e30, 1.0])
    one = vector("test", param.device, {"lr": 1.0})
    torch.ops.lomo_kernels.factored_update_(param, grad, of_rows, NONE, one, 0, False, 0, 0, [])
    assert param.tolist() == [[1.0, float(torch.tensor(1.0) - torch.tensor(1e30))], [0.0, 0.0]]


@settings(max_examples=60, deadline=None)
@given(
    bits=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=80),
    rows=st.integers(1, 4),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    stochastic=st.booleans(),
)
def test_any_bits(bits: list[int], rows: int, dtype: torch.dtype, stochastic: bool) -> None:
    columns = -(-len(bits) // rows)
    bits = (bits * 2)[: rows * columns] if len(bits) * 2 >= rows * columns else (bits * rows)[: rows * columns]
    grad = torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(dtype).view(rows, columns)
    param = grad.flip(0, 1).contiguous()
    expected = param.clone()
    arguments = (factors((rows,), 2), factors((1, columns), 3), scalars(), 0, stochastic, 1, 2, [])
    reference.IMPLEMENTATIONS["factored_update_"](expected, grad, *arguments)
    torch.ops.lomo_kernels.factored_update_(param, grad, *arguments)
    finite = ~expected.isnan()
    assert_same_bits(param[finite], expected[finite])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(4)}, "expected a matrix"),
        ({"row_factors": torch.zeros(4)}, "has shape"),
        ({"row_factors": torch.zeros(3, dtype=torch.float64)}, "dtype"),
        ({"column_factors": torch.zeros(4)}, "has shape"),
        ({"column_factors": torch.zeros(2, 4)}, "expected a divisor"),
        ({"column_factors": torch.zeros(1, 8)[:, ::2]}, "contiguous"),
        ({"param": torch.zeros(3, 5)}, "has shape"),
        ({"shard": [1, 2]}, "shard has 2 numbers"),
        ({"rule": 9}, "rule is 9"),
    ],
    ids=str,
)
def test_other_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "param": torch.ones(3, 4),
        "grad": torch.ones(3, 4),
        "row_factors": torch.ones(3),
        "column_factors": torch.ones(1, 4),
        "scalars": scalars(),
        "rule": 0,
        "stochastic": False,
        "seed": 0,
        "parameter_id": 0,
        "shard": [],
    } | change
    before = given["param"].clone()
    with pytest.raises((RuntimeError, ValueError), match=message):
        torch.ops.lomo_kernels.factored_update_(*given.values())
    assert torch.equal(given["param"], before)


def test_shared_memory_is_refused() -> None:
    param = torch.ones(3, 4)
    sums = torch.zeros(8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="share"):
        torch.ops.lomo_kernels.factored_update_(param, param, NONE, NONE, scalars(), 0, False, 0, 0, [])
    with pytest.raises(RuntimeError, match="share"):
        torch.ops.lomo_kernels.factor_sums_(sums[:3], sums[2:6].view(1, 4), param, scalars())
    vectors = torch.ones(16, dtype=torch.float64)
    floats = vectors.view(torch.float32)
    for rows, columns in ((param[0, :3], NONE), (NONE, param[1:2])):
        with pytest.raises(RuntimeError, match="share"):
            torch.ops.lomo_kernels.factored_update_(
                param, torch.ones(3, 4), rows, columns, scalars(), 0, False, 0, 0, []
            )
        with pytest.raises(RuntimeError, match="share"):
            torch.ops.lomo_kernels.factored_sq_norm_(
                vectors[:1],
                torch.ones(3, 4),
                *(floats[: one.numel()].view(one.shape) for one in (rows, columns)),
                scalars(),
            )
    with pytest.raises(RuntimeError, match="share"):
        vectors[:7] = scalars()
        torch.ops.lomo_kernels.factor_sums_(vectors[6:9], torch.zeros(1, 4, dtype=torch.float64), param, vectors[:7])


@pytest.mark.parametrize("rows", [0, 3])
def test_no_matrix_is_refused(rows: int) -> None:
    of_rows, of_columns = torch.zeros(rows, dtype=torch.float64), torch.zeros(0, 4, dtype=torch.float64)
    with pytest.raises((RuntimeError, ValueError), match="0 matrices"):
        torch.ops.lomo_kernels.factor_sums_(of_rows, of_columns, torch.ones(rows, 4), scalars())
