"""The rules with factors, stated plainly in float64, and a model with parameters of all kinds for them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lomo_kernels import Lomo

RULES = ["tensor", "rows", "adalomo"]
#: For tests of several ranks. AdaLomo's messages have all that those of the other two have.
FEW_RULES = [pytest.param("adalomo"), *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("tensor", "rows"))]


class FactoredTextbook:
    """The rules in float64, on a copy of a model."""

    def __init__(
        self,
        model: nn.Module,
        rule: str,
        *,
        lr: float,
        weight_decay: float = 0.0,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        clip_passes: str = "two",
    ) -> None:
        self.model = copy.deepcopy(model).double()
        self.rule, self.lr, self.weight_decay = rule, lr, weight_decay
        self.clip_grad_norm = math.inf if clip_grad_norm is None else clip_grad_norm
        self.clip_grad_value = math.inf if clip_grad_value is None else clip_grad_value
        modules = self.model.modules()
        self.embeddings = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
        self.state: dict[int, tuple[Any, Any]] = {}
        self.steps = 0
        self.norm = 0.0

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, loss: Tensor) -> None:
        self.backward(loss)
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """The update from what stands in ``.grad``, which is dropped."""
        self.steps += 1
        params = [param for param in self.model.parameters() if param.grad is not None]
        norm = self.norm = math.sqrt(sum(param.grad.square().sum().item() for param in params))
        for param in params:
            g = param.grad.clamp(-self.clip_grad_value, self.clip_grad_value)
            g = g * min(1.0, self.clip_grad_norm / (norm + 1e-6))
            u = getattr(self, self.rule)(param, g)
            param.mul_(1 - self.lr * self.weight_decay).sub_(self.lr * u)
            param.grad = None

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def tensor(self, param: Tensor, g: Tensor) -> Tensor:
        return g / (g.square().mean().sqrt() + 1e-12)

    def rows(self, param: Tensor, g: Tensor) -> Tensor:
        if g.dim() < 2:
            return self.tensor(param, g)
        dim = -2 if id(param) in self.embeddings else -1
        return g / (g.square().mean(dim, keepdim=True).sqrt() + 1e-12)

    def adalomo(self, param: Tensor, g: Tensor) -> Tensor:
        beta = 1 - self.steps**-0.8
        squares = g.square() + 1e-30
        if g.dim() < 2:
            mean = beta * self.state.get(id(param), (0.0,))[0] + (1 - beta) * squares
            self.state[id(param)] = (mean, None)
            u = g * mean.rsqrt()
        else:
            row, column = self.state.get(id(param), (0.0, 0.0))
            row = beta * row + (1 - beta) * squares.mean(-1)
            column = beta * column + (1 - beta) * squares.mean(-2)
            self.state[id(param)] = row, column
            u = g * (row / row.mean(-1, keepdim=True)).rsqrt()[..., None] * column.rsqrt()[..., None, :]
        u = u / max(1.0, u.square().mean().sqrt().item())
        return u * max(1e-3, param.square().mean().sqrt().item())


def rule_state(optimizer: Lomo) -> dict[str, Tensor]:
    """Copies of what its rule keeps for each parameter, by names: none of the rules without state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return {
        f"{index} {name}": optimizer.state[param][name].clone()
        for index, param in enumerate(params)
        for name in optimizer._training.state.strategy.states
    }


def assert_equal(model: nn.Module, book: FactoredTextbook, atol: float = 2e-6) -> None:
    for (name, param), expected in zip(model.named_parameters(), book.model.parameters(), strict=True):
        assert (param.double() - expected).abs().max().item() <= atol, name


class Kinds(nn.Module):
    """Parameters of zero to four dimensions, some larger than what waits in lists."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 150)
        self.convolution = nn.Conv1d(1, 6, 3, bias=False)
        self.images = nn.Conv2d(6, 4, (3, 1), bias=True)
        self.wide = nn.Linear(148, 150)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.unused = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).unsqueeze(1)
        x = self.convolution(x).tanh()
        x = self.images(x.unsqueeze(-1).transpose(2, 3).repeat(1, 1, 3, 1)).squeeze(2)
        return (self.wide(x) * self.scale).tanh().square().sum() + self.scale


def tokens(step: int) -> Tensor:
    return torch.randint(30, (8,), generator=torch.Generator().manual_seed(step))
