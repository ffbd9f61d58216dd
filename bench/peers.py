"""The optimizers that Lomo is measured against, each at its best setting, and those that are not installed.

`PEERS` says how each is set, for the page of results; `methods.py` sets those of whole steps. `foreach` and `fused` are
torch's fast paths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lomo_kernels.plan.methods import LOMO_OPTIM_NEEDS, lacking

PEERS = {
    "vector_norm": "`torch.linalg.vector_norm(grad)`",
    "vector_norm, float32": "`torch.linalg.vector_norm(grad, dtype=torch.float32)`",
    "foreach_norm": "`torch._foreach_norm`, what `clip_grad_norm_(foreach=True)` calls",
    "_foreach_norm": "`torch._foreach_norm`, likewise",
    "_foreach_add_": "`torch._foreach_add_(params, grads, alpha=-lr)`, what `torch.optim.SGD(foreach=True)` calls",
    "addmm_": "`weight.addmm_(grad_output.T, input, alpha=-lr)`, no gradient either; it rounds as torch's product does",
    "add_": "`param.add_(grad, alpha=-lr)`, what a hook of one's own does",
    "index_add_": "`weight.index_add_(0, indices, grad_output, alpha=-lr)`, no dense gradient either",
    "mul_, add_": "a hook of one's own with decoupled weight decay: `param.mul_(1 - lr * wd).add_(grad, alpha=-lr)`",
    "SGD foreach": "`torch.optim.SGD(foreach=True)`, which steps one parameter here, as in a hook: with small ones its "
    "time is that of its Python; in whole steps it has all at once",
    "SGD fused": "`torch.optim.SGD(fused=True)`, where its results are right, likewise",
    "optimi SGD": "`optimi.SGD` with Kahan summation, its default for 16-bit weights (it keeps one more tensor of the "
    "weight's size, and is the more exact for it); on GPUs its Triton kernels",
    "optimi SGD, no Kahan": "`optimi.SGD(kahan_sum=False)`, otherwise the same",
    "lomo_optim": "`lomo_optim.Lomo`, the paper's authors' code, with float32 copies; among kernels its update alone, "
    "of norms its hook's very line",
    # Whole steps and hooks. All train 16-bit weights with no others beside them.
    "SGD": "`torch.optim.SGD(fused=True)` where its results are right, else `foreach=True`; simulated with the latter",
    "SGD, clip_grad_norm_": "`torch.optim.SGD`, as without clipping, after `clip_grad_norm_(foreach=True)`",
    "AdamW": "`torch.optim.AdamW(fused=True)` where its results are right, else `foreach=True`; simulated with the "
    "former; both moments in the weights' dtype",
    "AdamW, clip_grad_norm_": "`torch.optim.AdamW`, as without clipping, after `clip_grad_norm_(foreach=True)`",
    "AdamW, foreach": "`torch.optim.AdamW(foreach=True)`, otherwise as above",
    "AdamW, fp32 master": "`torch.optim.AdamW` on float32 copies of the weights, one after the other: a gradient is "
    "widened, used and freed",
    "SGD, fp32 master": "`torch.optim.SGD` on float32 copies of the weights, likewise",
    "optimi SGD, release": "`optimi.SGD` with `prepare_for_gradient_release`; Kahan summation, its default for 16-bit "
    "weights (one more tensor of the weight's size, and the more exact for it); on GPUs its Triton kernels; it cannot "
    "clip by the norm",
    "optimi AdamW, release": "`optimi.AdamW`, likewise, with the betas, eps and weight decay that are torch's defaults",
    "hook, add_": "`register_post_accumulate_grad_hook` with `param.add_(grad, alpha=-lr)`; it cannot clip by the norm",
    "DDP, SGD": "`DistributedDataParallel(gradient_as_bucket_view=True)` and `torch.optim.SGD(foreach=True)`",
    "DDP, SGD, clip_grad_norm_": "`DistributedDataParallel` and `torch.optim.SGD`, as without clipping, after "
    "`clip_grad_norm_(foreach=True)`",
    "FSDP2, SGD, clip_grad_norm_": "`fully_shard` and `torch.optim.SGD(foreach=True)`, DTensor has no other, after "
    "`clip_grad_norm_(foreach=True)`",
    "lomo_optim, clipping": "`grad_norm(loss)`, then `fused_backward(loss, lr)`: two backwards",
}
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
