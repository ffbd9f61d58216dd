"""`clip_tensor` (AdaGC), stated plainly in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from lomo_kernels import Lomo

FACTOR = 1.04
WARM = 3  # steps, in most tests


class AdaGC:
    """The rule in float64, on a copy of a model."""

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        weight_decay: float = 0.0,
        warm_up: int = WARM,
    ) -> None:
        self.model = copy.deepcopy(model).double()
        self.lr, self.weight_decay, self.warm_up = lr, weight_decay, warm_up
        self.clip_grad_norm = math.inf if clip_grad_norm is None else clip_grad_norm
        self.clip_grad_value = math.inf if clip_grad_value is None else clip_grad_value
        self.means = [math.inf for _ in self.model.parameters()]
        self.coefs = [1.0 for _ in self.means]
        self.steps = 0

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        with torch.enable_grad():
            loss.backward()
        params = list(self.model.parameters())
        norms = [0.0 if param.grad is None else param.grad.norm().item() for param in params]
        total = math.hypot(*norms)
        warm = self.steps < self.warm_up
        self.steps += 1
        for index, (param, norm) in enumerate(zip(params, norms, strict=True)):
            mean = self.means[index]
            if param.grad is None or norm == 0:
                coef = 1.0
            elif warm:
                coef = min(1.0, self.clip_grad_norm / (total + 1e-6))
                self.means[index] = min(mean, coef * norm)
            else:
                coef = min(1.0, FACTOR * mean / norm)
                self.means[index] = norm if math.isinf(mean) else 0.99 * mean + 0.01 * coef * norm
            self.coefs[index] = coef
            if param.grad is not None:
                clamped = param.grad.clamp(-self.clip_grad_value, self.clip_grad_value)
                param.mul_(1 - self.lr * self.weight_decay).sub_(self.lr * coef * clamped)
            param.grad = None


def assert_equal(optimizer: Lomo, model: nn.Module, book: AdaGC, atol: float = 2e-6) -> None:
    for (name, param), expected in zip(model.named_parameters(), book.model.parameters(), strict=True):
        assert (param.double() - expected).abs().max().item() <= atol, name
    assert means_of(optimizer) == pytest.approx(book.means, rel=1e-4)


def means_of(optimizer: Lomo) -> list[float]:
    return [
        optimizer.state[param]["clip_norm_mean"].item() for group in optimizer.param_groups for param in group["params"]
    ]
