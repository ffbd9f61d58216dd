"""How fast, and how exact, is the sum of squares? (`python -m bench` gives paired ratios.)"""

import itertools

import pytest
import torch

from .kernels import DTYPES, norm_contestants


@pytest.fixture(scope="module", params=DTYPES)
def contestants(request):
    torch.set_num_threads(1)
    return norm_contestants(DTYPES[request.param])


@pytest.mark.parametrize("name", ["probe", "sq_norm_", "vector_norm"])
def test_norm(benchmark, contestants, name):
    numbers = itertools.count()
    benchmark.pedantic(lambda: contestants[name](next(numbers)), rounds=15, warmup_rounds=1)
