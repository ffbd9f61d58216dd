"""`Lomo.grad_norms`: every parameter's own norm, in every mode, against float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support.models import Options, gives, loss_of, transformer, vector
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lomo_kernels import Lomo

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clamped": {"clip_grad_value": 1e-4},
    "two": {"clip_grad_norm": 1e-3, "clip_passes": "two"},
    "one": {"clip_grad_norm": 1e-3, "clip_passes": "one"},
    "scaled": {"loss_scale": 512.0},
    "by tensor": {"clip_tensor": 1.04},
    "adalomo": {"rule": "adalomo"},
    "dynamic": {"loss_scale": "dynamic", "clip_grad_norm": 1e-3, "clip_passes": "one"},
}
LARGE = Options(width=136, layers=1, unused=True, frozen=("positions",))  # with gradients above 64 KiB, and without any


def expected(model: nn.Module, seed: int) -> dict[str, float]:
    """Norms of a plain backward's gradients."""
    other = copy.deepcopy(model)
    loss_of(other, seed).backward()
    named = other.named_parameters()
    return {name: 0.0 if p.grad is None else p.grad.double().norm().item() for name, p in named}


def assert_norms(optimizer: Lomo, theirs: dict[str, float], rel: float = 1e-6) -> None:
    norms = optimizer.grad_norms()
    assert list(norms) == list(theirs)
    for name, norm in norms.items():
        assert (norm.dtype, norm.shape) == (torch.float64, ())
        assert norm.item() == pytest.approx(theirs[name], rel=rel), name
    total = math.sqrt(sum(value**2 for value in theirs.values()))
    assert optimizer.last_grad_norm.item() == pytest.approx(total, rel=rel)


@pytest.mark.parametrize("fused", [False, True], ids=["hooks", "fused"])
@pytest.mark.parametrize("options", OPTIONS)
def test_every_mode(options: str, fused: bool) -> None:
    model = transformer(LARGE)
    optimizer = Lomo(model, lr=0.1, fused_layers=fused, **OPTIONS[options])
    for step in range(2):
        theirs = expected(model, step)
        assert theirs["spare.weight"] == theirs["positions"] == 0.0 < theirs["head.weight"]
        optimizer.backward(loss_of(model, step))
        assert_norms(optimizer, theirs, rel=1e-5)


@pytest.mark.filterwarnings("ignore:Lomo.step")
@pytest.mark.parametrize("clip_grad_norm", [None, 1e-3])
@pytest.mark.parametrize("way", ["step", "accumulate", "fused_backward", "grad_norm"])
def test_every_way_of_a_step(way: str, clip_grad_norm: float | None) -> None:
    model = transformer(LARGE)
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=clip_grad_norm, loss_scale=4.0, clip_passes="two")
    theirs = expected(model, 0)
    if way == "step":
        loss_of(model, 0).backward()
        optimizer.step()
    elif way == "accumulate":
        with optimizer.accumulate():
            optimizer.backward(loss_of(model, 0) / 4)
        optimizer.backward(loss_of(model, 0) * 0.75)
    elif way == "fused_backward":
        optimizer.fused_backward(loss_of(model, 0), lr=0.1)
    else:
        optimizer.grad_norm(loss_of(model, 0))
    assert_norms(optimizer, theirs, rel=1e-5)


def test_a_gradient_that_is_not_finite_is_the_one_that_is_named() -> None:
    a, b = vector(0.0), vector(0.0)
    optimizer = Lomo([("a", a), ("b", b)], clip_grad_norm=1.0, clip_passes="two")
    optimizer.backward(gives(a, torch.tensor([3.0])) + gives(b, torch.tensor([math.inf])))
    norms = optimizer.grad_norms()
    assert norms["a"].item() == 3.0 and not norms["b"].isfinite()


def test_they_are_copies_of_the_last_step() -> None:
    a, b = vector(0.0), vector(0.0)
    optimizer = Lomo([a, b])
    assert {name: norm.item() for name, norm in optimizer.grad_norms().items()} == {"parameter 0": 0, "parameter 1": 0}
    optimizer.backward(gives(a, torch.tensor([3.0])) + gives(b, torch.tensor([4.0])))
    first = optimizer.grad_norms()
    optimizer.backward(gives(b, torch.tensor([5.0])))
    assert [norm.item() for norm in first.values()] == [3.0, 4.0]
    assert [norm.item() for norm in optimizer.grad_norms().values()] == [0.0, 5.0]


@pytest.mark.parametrize("grad_norm", [False, True])
@pytest.mark.parametrize("fused", [False, True], ids=["hooks", "fused"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_that_broke_off_leaves_none(options: str, fused: bool, grad_norm: bool) -> None:
    """Neither its own, of some parameters, nor those of all in the step before it."""
    model = transformer(LARGE)
    optimizer = Lomo(model, lr=0.1, fused_layers=fused, **OPTIONS[options])
    optimizer.backward(loss_of(model, 0))
    theirs = {name: norm.item() for name, norm in optimizer.grad_norms().items()}
    with pytest.raises(TypeError):
        optimizer.backward(1.0)  # type: ignore[arg-type]
    assert_norms(optimizer, theirs)  # it was refused before it began
    if grad_norm:
        optimizer.grad_norm(loss_of(model, 1))

    def fails(_: Tensor) -> None:
        raise KeyError("theirs")

    handle = next(param for name, param in model.named_parameters() if name == "embedding.weight").register_hook(fails)
    with pytest.raises(KeyError):
        optimizer.fused_backward(loss_of(model, 1), lr=0.1)
    assert_norms(optimizer, dict.fromkeys(theirs, 0.0))
    handle.remove()
    theirs = expected(model, 2)
    optimizer.backward(loss_of(model, 2))
    assert_norms(optimizer, theirs, rel=1e-5)


def test_parameters_of_one_name_are_told_apart() -> None:
    """Two models, one optimizer."""
    models = nn.Linear(1, 1), nn.Linear(1, 1)
    optimizer = Lomo([{"params": list(model.named_parameters())} for model in models])
    assert list(optimizer.grad_norms()) == ["weight", "bias", "weight (parameter 2)", "bias (parameter 3)"]


class Reads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a tensor"
        return func(*args, **(kwargs or {}))


def test_the_host_reads_nothing() -> None:
    model = transformer()
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=1.0, clip_passes="two")
    optimizer.backward(loss_of(model, 0))
    with Reads():
        norms = optimizer.grad_norms()
    assert all(isinstance(norm, Tensor) for norm in norms.values())
    with pytest.raises(AssertionError, match="the host reads"), Reads():
        norms["gain"].item()


def test_a_post_accumulate_hook_that_comes_after_has_no_gradient() -> None:
    """Documented in docs/limits.md; `grad_norms`, or a tensor hook, has what such a hook would look for."""
    model = transformer()
    optimizer = Lomo(model, lr=0.1)
    seen: list[Any] = []
    model.gain.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad))
    model.gain.register_hook(lambda grad: seen.append(grad.clone()))
    optimizer.backward(loss_of(model, 0))
    grad, after = seen
    assert after is None
    assert optimizer.grad_norms()["gain"].item() == pytest.approx(abs(grad.item()))
