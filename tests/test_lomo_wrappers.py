"""Schedulers that set a momentum, and wrappers that frameworks make of the optimizer's class."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import assert_same_bits, vector, weights_of
from support.textbook import Textbook
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR

from lomo_kernels import Lomo

# ---- Momentum -------------------------------------------------------------------------------------------------------


def model_and_data() -> tuple[nn.Module, Tensor]:
    """The second weight has 101 KiB, above the 64 KiB up to which gradients wait for a list call."""
    torch.manual_seed(0)
    layers = nn.Linear(8, 160), nn.Tanh(), nn.Linear(160, 162), nn.Tanh(), nn.Linear(162, 1)
    return nn.Sequential(*layers), torch.randn(16, 8)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "one cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=0.5, total_steps=8),
    "cyclic": lambda optimizer: CyclicLR(optimizer, base_lr=0.05, max_lr=0.5, step_size_up=2),
}
BY_SCHEDULER = pytest.mark.parametrize("scheduler", SCHEDULERS)


@BY_SCHEDULER
@pytest.mark.parametrize("settings", [{}, {"clip_grad_norm": 0.05, "clip_passes": "two"}], ids=["hook", "two"])
def test_schedulers_that_cycle_momentum_by_default(scheduler: str, settings: dict[str, Any]) -> None:
    """Learning rates are the scheduler's; that its momentum is not used is said once. Saved and resumed twice."""
    model, x = model_and_data()
    optimizer, textbook = Lomo(model, **settings), Textbook(model, lr=0.0, **settings)
    schedule = SCHEDULERS[scheduler](optimizer)
    expected = SCHEDULERS[scheduler](torch.optim.SGD([vector(1.0)], momentum=0.9))
    messages: list[str] = []
    for step in range(6):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            textbook.groups[0]["lr"] = optimizer.param_groups[0]["lr"]
            assert optimizer.param_groups[0]["lr"] == expected.get_last_lr()[0]
            optimizer.backward(model(x).square().mean())
            textbook.step(textbook.model(x).square().mean(), norm=optimizer.last_grad_norm)
            schedule.step()
        expected.optimizer.step()
        expected.step()
        messages += [str(one.message) for one in caught if "momentum" in str(one.message)]
        assert_same_bits(weights_of(model), weights_of(textbook.model))
        if step in (2, 4):
            states = optimizer.state_dict(), schedule.state_dict()
            optimizer = Lomo(model, **settings)
            schedule = SCHEDULERS[scheduler](optimizer)
            optimizer.load_state_dict(states[0])
            schedule.load_state_dict(states[1])
    assert len(messages) == 3  # one for each optimizer
    assert "cycle_momentum=False" in messages[0]


@BY_SCHEDULER
def test_no_warning_without_a_momentum(scheduler: str, recwarn: pytest.WarningsRecorder) -> None:
    w = vector(1.0)
    optimizer = Lomo([w], lr=0.5)
    kind = {"one cycle": OneCycleLR, "cyclic": CyclicLR}[scheduler]
    limits = {"max_lr": 0.5, "total_steps": 4} if scheduler == "one cycle" else {"base_lr": 0.1, "max_lr": 0.5}
    schedule = kind(optimizer, **limits, cycle_momentum=False)
    for _ in range(3):
        optimizer.backward(w.sum())
        schedule.step()
    assert not [one for one in recwarn if "omentum" in str(one.message)]


def test_a_momentum_of_the_users_own_is_warned_of() -> None:
    w, v = vector(1.0), vector(1.0)
    optimizer = Lomo([{"params": [w]}, {"params": [v], "momentum": 0.9}], lr=0.5)
    with pytest.warns(UserWarning, match=r"param_groups\[1\]\['momentum'\] is 0\.9, which is not used"):
        optimizer.backward(w.sum() + v.sum())
    w.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="Lomo.step")
        optimizer.step()
    assert (w.item(), v.item()) == (0.0, 0.5)


# ---- Wrappers -------------------------------------------------------------------------------------------------------


class Wrapper:
    """As Lightning's LightningOptimizer and Fabric's: a subclass of the optimizer's class that reads from it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Wrapped" + type(optimizer).__name__, (type(self), type(optimizer)), {})

    def __getattr__(self, item: str) -> Any:
        return getattr(self._optimizer, item)


class CopyingWrapper:
    """As LightningOptimizer was until 1.9: it takes over the optimizer's attributes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.__dict__ = {name: value for name, value in vars(optimizer).items() if name not in ("step", "__del__")}
        self.__class__ = type("Wrapped" + type(optimizer).__name__, (type(self), type(optimizer)), {})
        self._optimizer = optimizer


USES: dict[str, Callable[[Any, Tensor], Any]] = {
    "backward": lambda wrapper, w: wrapper.backward(w.sum()),
    "fused_backward": lambda wrapper, w: wrapper.fused_backward(w.sum(), lr=0.5),
    "grad_norm": lambda wrapper, w: wrapper.grad_norm(w.sum()),
    "accumulate": lambda wrapper, w: wrapper.accumulate().__enter__(),
    "remove": lambda wrapper, w: wrapper.remove(),
    "add_param_group": lambda wrapper, w: wrapper.add_param_group({"params": [vector(1.0)]}),
    "load_state_dict": lambda wrapper, w: wrapper.load_state_dict(wrapper.state_dict()),
}


@pytest.mark.parametrize("kind", [Wrapper, CopyingWrapper])
@pytest.mark.parametrize("use", USES)
def test_a_wrapper_is_refused(kind: Callable[[Lomo], Any], use: str) -> None:
    """What it writes lands on the wrapper, and the hooks look at the optimizer."""
    w = vector(1.0)
    optimizer = Lomo([w], lr=0.5)
    wrapper = kind(optimizer)
    with pytest.raises(RuntimeError, match=r"WrappedLomo around the optimizer.*\.optimizer"):
        USES[use](wrapper, w)
    assert (w.item(), w.grad, len(optimizer.param_groups)) == (1.0, None, 1)
    optimizer.backward(w.sum())
    assert (w.item(), optimizer.step_count.item()) == (0.5, 1)


@pytest.mark.parametrize("kind", [Wrapper, CopyingWrapper])
@pytest.mark.filterwarnings("ignore:Lomo.step")
def test_what_a_wrapper_may_do(kind: Callable[[Lomo], Any]) -> None:
    """Reading, and zero_grad(), which loops call on it."""
    w = vector(1.0)
    optimizer = Lomo([w], lr=0.5, loss_scale=4.0)
    wrapper = kind(optimizer)
    with optimizer.accumulate():
        optimizer.backward(w.sum())
    wrapper.zero_grad()
    assert w.grad is None
    w.sum().backward()  # no longer a part that carries the scale
    optimizer.step()
    assert w.item() == 0.5
    assert wrapper.last_grad_norm is optimizer.last_grad_norm and wrapper.loss_scale.item() == 4.0
    assert str(wrapper.state_dict()) == str(optimizer.state_dict())
    assert wrapper.summary() == optimizer.summary()
