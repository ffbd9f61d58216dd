"""What fraction of memory bandwidth does the update reach? (`python -m bench` gives paired ratios.)"""

import itertools

import pytest
import torch

from .kernels import DTYPES, update_contestants


@pytest.fixture(scope="module", params=DTYPES)
def contestants(request):
    torch.set_num_threads(1)
    return update_contestants(DTYPES[request.param])


NAMES = ["probe", "sgd_ nearest", "sgd_ nearest, every scalar", "sgd_ stochastic", "add_", "mul_, add_", "SGD foreach"]


@pytest.mark.parametrize("name", NAMES)
def test_update(benchmark, contestants, name):
    numbers = itertools.count()
    benchmark.pedantic(lambda: contestants[name](next(numbers)), rounds=15, warmup_rounds=1)
