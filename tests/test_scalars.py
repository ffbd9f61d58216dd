"""The vector of an update's scalars, however it is made."""

import pytest
import torch

from lomo_kernels.ops import scalars
from lomo_kernels.ops.scalars import NAMES, STEP, vector

CPU = torch.device("cpu")
NUMBERS = {"lr": 0.3, "weight_decay": 0.1, "inv_scale": 0.5, "clip_value": 2.0, "clip_coef": 0.7, "found_inf": 1.0}


def bits(made: torch.Tensor) -> list[int]:
    return made.view(torch.int64).tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("step", [0, 1, 2**62 + 3, -1])
@pytest.mark.parametrize("name", [*NUMBERS, "step"])
def test_a_tensor_gives_the_bits_of_its_number(name: str, step: int, dtype: torch.dtype) -> None:
    numbers = {key: torch.tensor(value, dtype=dtype).item() for key, value in NUMBERS.items()} | {"step": step}
    tensor = torch.tensor([numbers[name]], dtype=torch.int64 if name == "step" else dtype)
    made = vector("test", CPU, numbers | {name: tensor})
    assert bits(made) == bits(vector("test", CPU, numbers))
    assert made.double().is_contiguous() and made.view(torch.int64)[STEP] == step
    if name != "step":
        tensor.fill_(9.0)  # the vector is a copy
        assert bits(made) == bits(vector("test", CPU, numbers))


def test_what_a_device_fills_is_what_the_host_makes() -> None:
    """A GPU's constants, here on the CPU."""
    for numbers in (list(scalars.NEUTRAL), [*NUMBERS.values(), 0.0], [0.0] * len(NAMES)):
        assert bits(torch.cat(scalars._filled(CPU, numbers))) == bits(scalars._on_host(numbers, 0))


def test_a_device_without_memory_gets_a_vector_of_its_own() -> None:
    meta = torch.device("meta")
    made = vector("test", meta, {"lr": torch.zeros(1, dtype=torch.float64, device=meta), "step": 3})
    assert made.is_meta and made.shape == (len(NAMES),) and made.dtype == torch.float64
