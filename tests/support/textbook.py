"""SGD as a textbook has it: every gradient in full, then the norm, then the update. What `Lomo` must equal."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lomo_kernels import reference

EPSILON = 1e-6  # of clip_grad_norm_


class Textbook:
    """Plain SGD on a copy of a model, with the arithmetic of `lomo_kernels.reference`: equal to Lomo in every bit.

    The global norm is in float64 over all parameters. Lomo's own sum may differ from it by 1e-6, hence the float32
    coefficient in its last bit; `step` takes Lomo's norm to rule that out (the tests compare the norms, too).

    Args:
        model: is copied.
        loss_scale: None, a number, or "dynamic": 2**16 at first, halved by a step that overflows (which changes nothing
            else), doubled by 2000 in a row that do not.
        clip_passes: Lomo's; all the same here.
        groups: lists of parameter names, each with the options that differ from the others; default one group of all.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.0,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        loss_scale: float | str | None = None,
        clip_passes: str = "two",
        groups: Sequence[tuple[list[str], dict[str, Any]]] | None = None,
        rule: str = "sgd",
    ) -> None:
        self.model = copy.deepcopy(model)
        self.rule = rule
        defaults = {"lr": lr, "weight_decay": weight_decay, "clip_grad_value": clip_grad_value}
        named = dict(self.model.named_parameters())
        self.groups = [
            defaults | options | {"params": [named[name] for name in names]}
            for names, options in (groups or [(list(named), {})])
        ]
        self.clip_grad_norm = clip_grad_norm
        self.stochastic = rounding == "stochastic"
        split = [param for param in self.model.parameters() if rounding == "split" and param.dtype is torch.bfloat16]
        self.low = {id(param): torch.zeros_like(param, dtype=torch.int16) for param in split}
        self.seed = seed
        self.dynamic = loss_scale == "dynamic"
        self.loss_scale = 2.0**16 if self.dynamic else 1.0 if loss_scale is None else loss_scale
        self.good_steps = 0  # in a row
        self.steps = self.skipped = 0
        self.norm = 0.0

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Adds gradients, with the loss scale in them, to ``.grad``."""
        loss.backward(torch.full_like(loss, self.loss_scale))

    def step(self, loss: Tensor, norm: Tensor | None = None) -> None:
        """Backward, update and zero_grad. `norm`: to clip with, where it is not this one's own."""
        self.backward(loss)
        self.apply(norm)
        self.zero_grad()

    @torch.no_grad()
    def apply(self, norm: Tensor | None = None) -> None:
        """The update from what stands in ``.grad``. A gradient that is not finite anywhere changes no weight."""
        params = [param for group in self.groups for param in group["params"]]
        total = sum(
            reference.sum_of_squares(param.grad, 1.0 / self.loss_scale).item()
            for param in params
            if param.grad is not None
        )
        self.norm = math.sqrt(total)
        step, self.steps = self.steps, self.steps + 1
        if not math.isfinite(self.norm):
            self.skipped += 1
            self._move_scale(overflowed=True)
            return
        coefficient = 1.0
        if self.clip_grad_norm is not None:
            used = self.norm if norm is None else norm.item()
            coefficient = min(1.0, self.clip_grad_norm / (used + EPSILON))
        index = 0
        for group in self.groups:
            for param in group["params"]:
                if param.grad is not None:
                    numbers = {
                        "lr": group["lr"],
                        "weight_decay": group["weight_decay"],
                        "inv_scale": 1.0 / self.loss_scale,
                        "clip_value": math.inf if group["clip_grad_value"] is None else group["clip_grad_value"],
                        "clip_coef": coefficient,
                        "rule": self.rule,
                    }
                    if id(param) in self.low:
                        low = self.low[id(param)]
                        new, new_low = reference.updated_split(param, low, param.grad, **numbers)
                        low.copy_(new_low)
                    else:
                        keys = {"seed": self.seed, "parameter_id": index, "step": step}
                        new = reference.updated(param, param.grad, **numbers, stochastic=self.stochastic, **keys)
                    param.copy_(new)
                index += 1
        self._move_scale(overflowed=False)

    def _move_scale(self, overflowed: bool) -> None:
        if not self.dynamic:
            return
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.loss_scale /= 2
        elif self.good_steps == 2000:
            self.loss_scale, self.good_steps = self.loss_scale * 2, 0


class Textbook64:
    """The same in float64 from the forward on, with nothing of this library: five lines anyone can check."""

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.0,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        clip_passes: str = "two",
    ) -> None:
        self.model = copy.deepcopy(model).double()
        self.lr, self.weight_decay = lr, weight_decay
        self.clip_grad_norm, self.clip_grad_value = clip_grad_norm, clip_grad_value
        self.norm = 0.0

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        with torch.enable_grad():
            loss.backward()
        params = [param for param in self.model.parameters() if param.grad is not None]
        self.norm = math.sqrt(sum(param.grad.square().sum().item() for param in params))
        limit = math.inf if self.clip_grad_norm is None else self.clip_grad_norm
        bound = math.inf if self.clip_grad_value is None else self.clip_grad_value
        for param in params:
            grad = param.grad.clamp(-bound, bound) * min(1.0, limit / (self.norm + EPSILON))
            param.mul_(1.0 - self.lr * self.weight_decay).sub_(self.lr * grad)
            param.grad = None
