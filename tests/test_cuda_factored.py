"""The CUDA kernels with row and column factors on the host: what only such kernels can get wrong.

tests/test_cuda_host.py has that of the other kernels, and runs the operators' own tests.
"""

import itertools
import math

import lomo_kernels_testing
import pytest
import torch
from support import oracle
from support.oracle import DTYPES, assert_same_bits, name_of
from test_cuda_host import CODES, SHARDS, WHOLE, launches_of

from lomo_kernels import reference
from lomo_kernels.ops.scalars import vector
from lomo_kernels.rules import RULES

host = lomo_kernels_testing.cuda
NONE = torch.empty(0)
CLIPPING = {"inv_scale": 0.5, "clip_value": 0.9, "clip_coef": 0.7}
#: (matrices, rows of each, columns): rows that begin where vectors do, several to a tile and several tiles to a row;
#: and the same with tiles that are cut off.
STRAIGHT = [(1, 32, 256), (1, 3, 4096), (1, 70, 1000), (4, 40, 128), (3, 17, 704), (1, 2, 12_288), (2000, 1, 8)]
CROOKED = [(1, 41, 301), (1, 3, 5001), (7, 33, 41), (900, 3, 3), (1, 4097, 2), (1, 2, 100_004)]

every_shape = pytest.mark.parametrize("shape", STRAIGHT + CROOKED, ids=str)


@pytest.fixture(autouse=True)
def ascending():
    host.set_block_order(0)
    yield
    host.set_block_order(0)


def scalars(**numbers):
    return vector("test", torch.device("cpu"), {"lr": 0.1, "weight_decay": 0.1, "step": 3} | numbers)


def matrix(shape, dtype, seed):
    matrices, rows, columns = shape
    return oracle.ordinary(matrices * rows * columns, dtype, seed).view(matrices * rows, columns)


def factors_of(shape):
    matrices, rows, columns = shape
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.rand(size, generator=generator) * 3 + 0.01 for size in ((matrices * rows,), (matrices, columns)))


def addresses(*tensors):
    return tuple(tensor.data_ptr() if tensor.numel() else 0 for tensor in tensors)


def update(param, grad, shape, factors, numbers, *, low=None, rule="sgd", stochastic=False, shard=WHOLE):
    gradient = grad.data_ptr(), CODES[grad.dtype], grad.numel(), 0
    host.factored_update(
        (param.data_ptr(), CODES[param.dtype], gradient, 4, *shard),
        0 if low is None else low.data_ptr(),
        (grad.data_ptr(), CODES[grad.dtype], *shape),
        addresses(*factors),
        numbers.data_ptr(),
        RULES[rule],
        stochastic,
        11,
    )


def norm(grad, shape, factors, numbers):
    slot = torch.ones(1, dtype=torch.float64)
    host.factored_sq_norm(
        slot.data_ptr(), (grad.data_ptr(), CODES[grad.dtype], *shape), addresses(*factors), numbers.data_ptr()
    )
    return slot


def sums(grad, shape, numbers):
    """What is added to ones, of rows and of columns. The elements before and after them must stay as they are: -0."""
    matrices, rows, columns = shape
    parts = []
    for count in (matrices * rows, matrices * columns):
        memory = torch.full((count + 600,), -0.0, dtype=torch.float64)
        memory[300:-300] = 1
        parts.append(memory)
    at = [memory[300:].data_ptr() for memory in parts]
    host.factor_sums(*at, (grad.data_ptr(), CODES[grad.dtype], *shape), numbers.data_ptr())
    for memory in parts:
        assert (1 / memory[:300] == -math.inf).all() and (1 / memory[-300:] == -math.inf).all()
    return parts[0][300:-300], parts[1][300:-300].view(matrices, columns)


def expected_update(param, grad, factors, numbers, rule="sgd", stochastic=False, shard=()):
    result = param.clone()
    arguments = (*factors, numbers, RULES[rule], stochastic, 11, 4, list(shard))
    reference.IMPLEMENTATIONS["factored_update_"](result, grad, *arguments)
    return result


@pytest.mark.parametrize("rule", RULES)
@every_shape
def test_updates(shape, rule):
    of_rows, of_columns = factors_of(shape)
    for param_dtype, grad_dtype, stochastic in itertools.product(DTYPES, DTYPES, (False, True)):
        param, grad = matrix(shape, param_dtype, 5), matrix(shape, grad_dtype, 1)
        grad.view(-1)[5::4099] = math.inf
        numbers = scalars(**CLIPPING)
        for factors in ((of_rows, of_columns), (of_rows, NONE), (NONE, of_columns)) if stochastic else ((NONE, NONE),):
            p = param.clone()
            update(p, grad, shape, factors, numbers, rule=rule, stochastic=stochastic)
            assert_same_bits(
                p, expected_update(param, grad, factors, numbers, rule, stochastic), grad_dtype, stochastic
            )


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=name_of)
@every_shape
def test_updates_of_split_weights(shape, grad_dtype):
    param, grad = matrix(shape, torch.bfloat16, 5), matrix(shape, grad_dtype, 1)
    low = torch.randint(-(2**15), 2**15, param.shape).to(torch.int16)
    factors, numbers = factors_of(shape), scalars(**CLIPPING)
    f = reference.factored_gradient(grad, *factors, **CLIPPING)
    expected = reference.updated_split(param, low, f, lr=0.1, weight_decay=0.1)
    update(param, grad, shape, factors, numbers, low=low)
    assert_same_bits(param, expected[0])
    assert_same_bits(low, expected[1])


@pytest.mark.parametrize("offset", [1, 3, 4])
@pytest.mark.parametrize("shape", STRAIGHT[:3] + CROOKED[:2], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_alignment(dtype, shape, offset):
    """Of parameter, gradient and factors; nothing beyond a parameter is touched."""
    param, grad, factors, numbers = matrix(shape, dtype, 5), matrix(shape, dtype, 1), factors_of(shape), scalars()
    expected = expected_update(param, grad, factors, numbers, stochastic=True)
    exact = norm(grad, shape, factors, numbers)
    exact_sums = sums(grad, shape, numbers)
    for which in range(3):
        offsets = [offset if i == which else 0 for i in range(3)]
        p, surroundings = oracle.misaligned(param.flatten(), offsets[0])
        g, _ = oracle.misaligned(grad.flatten(), offsets[1])
        of_columns, _ = oracle.misaligned(factors[1].flatten(), offsets[2])
        update(p, g, shape, (factors[0], of_columns), numbers, stochastic=True)
        assert_same_bits(p.view_as(expected), expected, offsets)
        assert (surroundings[: offsets[0]] == 7).all() and (surroundings[offsets[0] + p.numel() :] == 7).all()
        assert_same_bits(norm(g, shape, (factors[0], of_columns), numbers), exact, offsets)
        assert all(map(torch.equal, sums(g, shape, numbers), exact_sums)), offsets


@pytest.mark.parametrize("shard", SHARDS[::3], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_shards(dtype, shard):
    shape = (1, 9, 1000)
    param, grad, factors, numbers = (
        matrix(shape, dtype, 5),
        matrix(shape, torch.float32, 1),
        factors_of(shape),
        scalars(),
    )
    expected = expected_update(param, grad, factors, numbers, stochastic=True, shard=shard)
    update(param, grad, shape, factors, numbers, stochastic=True, shard=shard)
    assert_same_bits(param, expected)


@pytest.mark.parametrize("at", [0, 4095, 4096, 8000])
@pytest.mark.parametrize("value", [1e30, math.nan, math.inf])
def test_a_single_exception_among_ordinary_elements(value, at):
    """A gradient or a product that is not finite keeps its element, and no other."""
    shape = (1, 8, 1024)
    param, grad, numbers = matrix(shape, torch.float32, 5), matrix(shape, torch.float32, 1), scalars()
    of_rows, of_columns = factors_of(shape)
    of_rows[at // 1024] = 1e10
    grad.view(-1)[at] = value
    p = param.clone()
    update(p, grad, shape, (of_rows, of_columns), numbers)
    assert_same_bits(p, expected_update(param, grad, (of_rows, of_columns), numbers))
    assert (p == param).sum() == 1 or value == 1e30


def test_found_inf_leaves_the_parameter():
    for shape in ((1, 8, 1024), (1, 7, 1001)):
        param, grad = matrix(shape, torch.bfloat16, 5), matrix(shape, torch.bfloat16, 1)
        before = param.clone()
        update(param, grad, shape, factors_of(shape), scalars(found_inf=1.0))
        assert_same_bits(param, before)


@every_shape
def test_sums_and_norms_in_any_order_of_blocks(shape):
    """Close to float64, and the same bits whatever block runs first."""
    matrices, rows, columns = shape
    factors, numbers = factors_of(shape), scalars(**CLIPPING)
    for dtype in DTYPES:
        grad = matrix(shape, dtype, 1)
        results = []
        for order in (0, 1, 2):
            host.set_block_order(order)
            results.append((*sums(grad, shape, numbers), norm(grad, shape, factors, numbers)))
        g = reference.factored_gradient(grad, NONE, NONE, **CLIPPING).double().square()
        torch.testing.assert_close(results[0][0], 1 + g.sum(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(results[0][1], 1 + g.view(matrices, rows, columns).sum(1), rtol=1e-12, atol=0)
        f = reference.factored_gradient(grad, *factors, **CLIPPING).double().square()
        assert results[0][2].item() == pytest.approx(1 + f.sum().item(), rel=1e-6)
        for others in results[1:]:
            assert all(map(torch.equal, others, results[0]))


def test_a_strip_of_many_tiles():
    """More tiles than blocks: a block goes down some of them, and the last ones have fewer."""
    for rows, columns in ((16 * host.SUM_BLOCKS * 3 + 5, 300), (16 * host.SUM_BLOCKS, 256), (4000, 256)):
        grad = matrix((1, rows, columns), torch.bfloat16, 1)
        of_rows, of_columns = sums(grad, (1, rows, columns), scalars())
        squares = grad.double().square()
        torch.testing.assert_close(of_rows, 1 + squares.sum(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(of_columns[0], 1 + squares.sum(0), rtol=1e-12, atol=0)


def test_what_is_not_finite_shows_in_its_sums_only():
    for shape in ((1, 40, 300), (9, 3, 3)):
        grad = matrix(shape, torch.float32, 1)
        grad[3, 1], grad[-1, -1] = math.nan, -math.inf
        of_rows, of_columns = sums(grad, shape, scalars(**CLIPPING))
        assert of_rows.isnan().nonzero().flatten().tolist() == [3, len(grad) - 1]
        assert of_columns.isnan().sum() == 2
        assert not norm(grad, shape, (NONE, NONE), scalars(**CLIPPING)).isfinite()


@pytest.mark.parametrize("shape", [(500, 3, 3), (70, 32, 32)], ids=str)
def test_many_small_matrices_take_one_launch(shape):
    grad, factors, numbers = matrix(shape, torch.float32, 1), factors_of(shape), scalars()
    assert launches_of(lambda: sums(grad, shape, numbers)) == 1
    assert launches_of(lambda: norm(grad, shape, factors, numbers)) == 1
    assert launches_of(lambda: update(grad.clone(), grad, shape, factors, numbers)) == 1


def test_nothing_is_launched_for_nothing():
    empty = torch.zeros(0, 4)
    shape = (1, 0, 4)
    assert launches_of(lambda: update(empty, empty, shape, (NONE, NONE), scalars())) == 0
    assert launches_of(lambda: norm(empty, shape, (NONE, NONE), scalars())) == 0
    assert launches_of(lambda: sums(empty, shape, scalars())) == 0
