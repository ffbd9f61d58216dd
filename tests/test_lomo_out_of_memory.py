"""Memory that runs out inside a native kernel: `torch.OutOfMemoryError`, as everywhere else in torch.

torch's stable ABI turns it into a RuntimeError that says which call failed.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from faults import memory
from support.models import assert_same_bits, weights_of
from torch import nn

from lomo_kernels import Lomo
from lomo_kernels.optim import clip_memory

WIDTH = 160
#: What a kernel of CUDA's library raises that copies a gradient which is not contiguous.
CONTIGUOUS = 'torch_call_dispatcher( "aten::contiguous", "", stack.data()) API call failed at torch/csrc/stable/ops.h'
SIZES = "aoti_torch_get_sizes(get(), &sizes) API call failed at torch/csrc/stable/tensor_inl.h, line 90"

Trained = tuple[Lomo, nn.Module]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """An optimizer and its model after two steps, of which an automatic budget keeps some gradients."""
    monkeypatch.setattr(clip_memory, "_free", lambda device: 2 * WIDTH * WIDTH * 4)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)))
    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=0.1, fused_layers=True)
    for _ in range(2):
        step(optimizer, model)
    return optimizer, model


def step(optimizer: Lomo, model: nn.Module) -> None:
    optimizer.backward(model(torch.linspace(-1, 1, 8 * WIDTH).view(8, WIDTH)).square().sum())


def failing(optimizer: Lomo, model: nn.Module, message: str) -> None:
    """A step in whose backward something raises RuntimeError."""

    def fail(module: nn.Module, grads: object) -> None:
        raise RuntimeError(message)

    handle = model[0].register_full_backward_pre_hook(fail)
    try:
        step(optimizer, model)
    finally:
        handle.remove()


def test_in_every_kernel(trained: Trained) -> None:
    """Every allocation of a step fails once. Some are a native kernel's."""
    optimizer, model = trained
    memory.disarm()
    step(optimizer, model)
    native = 0
    for number in range(memory.disarm()):
        share = optimizer._training.clip_budget._share
        memory.arm(number, "OutOfMemoryError")
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with pytest.raises(torch.OutOfMemoryError) as raised:
                step(optimizer, model)
        memory.disarm()
        cause = raised.value.__cause__
        if cause is not None:
            native += 1
            assert type(cause) is RuntimeError and "aten::new_empty" in str(cause)
            assert "memory ran out" in str(raised.value)
            assert any("keeps half as many bytes" in str(one.message) for one in warned)
            assert optimizer._training.clip_budget._share == share / 2
            assert optimizer.last_step_outcome == "unchanged"
    assert native >= 4


def test_in_a_kernel_of_cuda(trained: Trained) -> None:
    optimizer, model = trained
    before = weights_of(model)
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"memory ran out.*aten::contiguous"),
        pytest.warns(UserWarning, match="keeps half as many bytes"),
    ):
        failing(optimizer, model, CONTIGUOUS)
    assert_same_bits(weights_of(model), before)


@pytest.mark.parametrize(
    ("message", "gpu"),
    [(SIZES, "none"), (CONTIGUOUS, "broken"), ('"aten::contiguous" failed', "none")],
    ids=["another call", "a GPU that fails in every call", "an error of torch's own"],
)
def test_other_errors_stay(trained: Trained, monkeypatch: pytest.MonkeyPatch, message: str, gpu: str) -> None:
    optimizer, model = trained

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    if gpu == "broken":
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RuntimeError) as raised:
        failing(optimizer, model, message)
    assert type(raised.value) is RuntimeError and raised.value.__cause__ is None
    assert optimizer._training.clip_budget._share == 1.0


def test_in_the_backward_that_only_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step of a graph runs one backward more. Its error does not say that the graph allows one backward."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=0.1, clip_memory=0)
    calls = 0

    def second(module: nn.Module, grads: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError(CONTIGUOUS)

    model[0].register_full_backward_pre_hook(second)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        optimizer.backward(model(torch.ones(2, WIDTH)).sum())
    assert calls == 2 and "a second backward" not in str(raised.value)
