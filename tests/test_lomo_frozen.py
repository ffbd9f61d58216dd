"""Frozen parameters of dtypes, layouts and devices that no kernel takes, beside parameters that are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import assert_same_bits, weights_of
from support.textbook import Textbook
from torch import Tensor, nn

from lomo_kernels import Lomo

LR = 0.5
RULES: dict[str, dict[str, Any]] = {
    "hook": {},
    "two": {"clip_grad_norm": 0.05, "clip_passes": "two"},
    "one": {"clip_grad_norm": 0.05, "clip_passes": "one"},
}

KINDS: dict[str, Callable[[], Tensor]] = {
    "int8": lambda: torch.ones(3, 3, dtype=torch.int8),
    "uint8, none": lambda: torch.ones(0, dtype=torch.uint8),
    "bool": lambda: torch.ones((), dtype=torch.bool),
    "int64": lambda: torch.arange(5),
    "float8": lambda: torch.ones(3, 3).to(torch.float8_e4m3fn),
    "float64": lambda: torch.ones(3, 3, dtype=torch.float64),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed rows": lambda: torch.eye(3).to_sparse_csr(),
    "expanded": lambda: torch.ones(1).expand(4),
    "meta": lambda: torch.ones(3, 3, device="meta"),
}


class Adapted(nn.Module):
    """A frozen base first, whose device and dtype are the model's first, and trained layers below and above 64 KiB."""

    def __init__(self, base: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Parameter(base, requires_grad=False)
        self.layers = nn.Sequential(nn.Linear(8, 160), nn.Tanh(), nn.Linear(160, 162), nn.Tanh(), nn.Linear(162, 1))
        self.layers.to(dtype)

    def __deepcopy__(self, memo: Any) -> Adapted:
        """torch copies no sparse parameter."""
        twin = Adapted(self.base.detach(), self.layers[0].weight.dtype)
        twin.layers.load_state_dict(self.layers.state_dict())
        return twin

    def forward(self, step: int) -> Tensor:
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        return self.layers(x.to(self.layers[0].weight.dtype)).float().square().mean()


def trained_alike(model: Adapted, optimizer: Lomo, textbook: Textbook, steps: range, fused: bool = False) -> None:
    for step in steps:
        optimizer.backward(model(step))
        textbook.step(textbook.model(step), norm=optimizer.last_grad_norm)
        if fused:
            for name, weight in model.layers.named_parameters():
                expected = textbook.model.layers.get_parameter(name)
                torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
        else:
            assert_same_bits(weights_of(model.layers), weights_of(textbook.model.layers))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_frozen_parameters_are_left_alone(kind: str, rule: str, fused: bool) -> None:
    base = KINDS[kind]()
    model = Adapted(base)
    before = model.base._version
    optimizer = Lomo(model, LR, fused_layers=fused, **RULES[rule])
    trained_alike(model, optimizer, Textbook(model, lr=LR, **RULES[rule]), range(3), fused)
    assert model.base._version == before and model.base.grad is None
    assert optimizer.step_count.device.type == "cpu" and optimizer.step_count.item() == 3


@pytest.mark.parametrize("kind", KINDS)
def test_they_keep_their_place(kind: str) -> None:
    """Random bits and a state dict go by a parameter's index. Saved and resumed twice."""
    model = Adapted(KINDS[kind](), torch.bfloat16)
    textbook = Textbook(model, lr=LR, rounding="stochastic", seed=3)
    optimizer = Lomo(model, LR, rounding="stochastic", seed=3)
    for resumed in range(3):
        trained_alike(model, optimizer, textbook, range(2 * resumed, 2 * resumed + 2))
        state = optimizer.state_dict()
        assert state["lomo"]["parameters"][0] == ["base", list(model.base.shape)]
        optimizer = Lomo(model, LR, rounding="stochastic")
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("kind", KINDS)
def test_the_summary_lists_them(kind: str) -> None:
    model = Adapted(KINDS[kind]())
    line = next(line for line in Lomo(model).summary().splitlines() if line.startswith("base"))
    assert str(model.base.dtype).removeprefix("torch.") in line
    assert line.split()[-2:] == ["none", "frozen"]


@pytest.mark.parametrize("kind", ["float64", "complex", "float8", "expanded"])
@pytest.mark.parametrize("rule", RULES)
def test_unfreezing_one_that_no_kernel_takes_is_refused(kind: str, rule: str) -> None:
    model = Adapted(KINDS[kind]())
    optimizer = Lomo(model, LR, **RULES[rule])
    textbook = Textbook(model, lr=LR, **RULES[rule])
    trained_alike(model, optimizer, textbook, range(1))
    before = weights_of(model.layers)
    model.base.requires_grad_(True)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match="base"):
            optimizer.backward(model(1) + (model.base.detach() if kind == "float8" else model.base).abs().float().sum())
        assert_same_bits(weights_of(model.layers), before)
    with pytest.raises((TypeError, ValueError), match="base"):
        Lomo(model, LR)
    model.base.requires_grad_(False)
    trained_alike(model, optimizer, textbook, range(1, 3))


@pytest.mark.parametrize("rule", RULES)
def test_one_that_was_cast_and_unfrozen_is_trained(rule: str) -> None:
    model = Adapted(KINDS["float64"]())
    optimizer = Lomo(model, LR, **RULES[rule])
    textbook = Textbook(model, lr=LR, **RULES[rule])
    trained_alike(model, optimizer, textbook, range(2))
    for one in (model, textbook.model):
        one.float()
        one.base.requires_grad_(True)
    optimizer.backward(model(2) + model.base.square().sum())
    textbook.step(textbook.model(2) + textbook.model.base.square().sum(), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(model), weights_of(textbook.model))
    assert not torch.equal(model.base, torch.ones(3, 3))


def test_one_added_later() -> None:
    model = Adapted(KINDS["int8"]())
    textbook = Textbook(model.layers, lr=LR)
    optimizer = Lomo(model.layers, LR)
    optimizer.add_param_group({"params": [("base", model.base)], "lr": 0.0})
    optimizer.backward(model(0))
    torch.manual_seed(0)
    other = Adapted(KINDS["int8"]())
    other.layers = textbook.model
    textbook.step(other(0), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(model.layers), weights_of(textbook.model))


def test_a_model_of_nothing_else() -> None:
    """Nothing to train, so a step has nothing to do; torch's optimizers take such a model as well."""
    optimizer = Lomo([nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)])
    optimizer.step()
    assert optimizer.step_count.item() == 0


@pytest.mark.parametrize("fused", [False, True], ids=["hooks", "fused"])
@pytest.mark.parametrize("rule", RULES)
def test_one_that_is_frozen_between_forward_and_backward(rule: str, fused: bool) -> None:
    """As with autograd, which drops its gradient then: it stays, and the norm is that of the others."""
    models = [Adapted(KINDS["int8"]()) for _ in range(2)]
    optimizer = Lomo(models[0].layers, LR, fused_layers=fused, **RULES[rule])
    sgd = torch.optim.SGD(models[1].layers.parameters(), LR)
    before = models[0].layers[2].weight.detach().clone()
    losses = [model(0) for model in models]
    for model in models:
        model.layers[2].weight.requires_grad_(False)
    optimizer.backward(losses[0])
    losses[1].backward()
    total = nn.utils.clip_grad_norm_(models[1].layers.parameters(), RULES[rule].get("clip_grad_norm", torch.inf))
    sgd.step()
    assert torch.equal(models[0].layers[2].weight, before)
    assert optimizer.last_grad_norm.item() == pytest.approx(total.item(), rel=1e-5)
    torch.testing.assert_close(weights_of(models[0]), weights_of(models[1]), rtol=1e-5, atol=1e-6)
    assert all(param.grad is None for param in models[0].parameters())
    models[0].layers[2].weight.requires_grad_(True)
    optimizer.backward(models[0](1))
    assert not torch.equal(models[0].layers[2].weight, before)
