"""The optimizers that Lomo is measured against, each at its best setting, and those that are not installed.

bench/results/README.md says how each is set; `methods.py` sets those of whole steps. `foreach` and `fused` are torch's
fast paths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lomo_kernels.plan.methods import LOMO_OPTIM_NEEDS, lacking

NEEDS = {"optimi": ("optimi",), "lomo_optim": LOMO_OPTIM_NEEDS}
EXTRA = "pip install '.[bench]' in the source folder"


def missing(contestant: str) -> tuple[str, str] | None:
    """The peer ("optimi", "lomo_optim") that a contestant's name begins with, and why, where it is not installed."""
    for peer, packages in NEEDS.items():
        if contestant.startswith(peer) and (absent := lacking(packages)):
            return peer, f"{' and '.join(absent)} not installed: {EXTRA}"
    return None


class OneAtATime:
    """An optimizer's step on one parameter after the other: `step(param)`, with its gradient in `.grad`.

    One optimizer for all, so that thousands of small parameters do not need thousands of optimizers.
    """

    def __init__(self, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], param: nn.Parameter) -> None:
        self.optimizer = make([param])
        self.group = self.optimizer.param_groups[0]

    def step(self, param: nn.Parameter) -> None:
        self.group["params"] = [param]
        self.optimizer.step()


class LomoOptim:
    """lomo_optim's update of one parameter: what its hook does with the first gradient that it finds."""

    def __init__(self, lr: float) -> None:
        from lomo_optim import Lomo

        self.held: list[tuple[str, nn.Parameter]] = [("weight", nn.Parameter(torch.zeros(1)))]
        self.update: Callable[[Any], Any] = Lomo(self, lr=lr).grad_func

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return self.held

    def parameters(self) -> list[nn.Parameter]:
        return [param for _, param in self.held]

    def step(self, param: nn.Parameter) -> None:
        self.held[0] = ("weight", param)
        self.update(None)
