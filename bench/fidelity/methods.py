"""The methods that the study compares: an update rule of `Lomo`, or an optimizer that people use instead.

A new rule or rounding is one entry of `METHODS` or `PRECISIONS`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from lomo_kernels import AdaLomo, Lomo

CLIP = 1.0  # bound on the global norm

#: dtype of weights, gradients and arithmetic; rounding of the weights
PRECISIONS = {
    "float32": (torch.float32, "nearest"),
    "bf16 nearest": (torch.bfloat16, "nearest"),
    "bf16 stochastic": (torch.bfloat16, "stochastic"),
    "bf16 split": (torch.bfloat16, "split"),
}
NEAREST = ("float32", "bf16 nearest")  # all that torch and lomo_optim can do

Update = Callable[[Tensor, float], object]  # from a loss and a learning rate to changed weights


class Method(NamedTuple):
    """An optimizer as the study runs it.

    `attach(model, rounding, seed)` gives the update. `start` has the learning rate, by task, around which the first
    grid lies. `like` names a method of the same arithmetic, whose learning rate it takes. `warm_up` is the
    number of steps after which the method first differs from another one.
    """

    attach: Callable[[nn.Module, str, int], Update]
    start: dict[str, float]
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    like: str = ""
    warm_up: int = 0


def driven(optimizer: torch.optim.Optimizer, update: Callable[[Tensor], object]) -> Update:
    def step(loss: Tensor, lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr
        update(loss)

    return step


def lomo(kind: type[Lomo] = Lomo, **options: Any) -> Callable[[nn.Module, str, int], Update]:
    def attach(model: nn.Module, rounding: str, seed: int) -> Update:
        optimizer = kind(model, lr=0.0, rounding=rounding, seed=seed, **options)
        return driven(optimizer, optimizer.backward)

    return attach


def torch_optimizer(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[nn.Module, str, int], Update]:
    """With clipping by the global norm; fused except for 16 bits on a CPU, which torch 2.13's SGD gets wrong."""

    def attach(model: nn.Module, rounding: str, seed: int) -> Update:
        params = list(model.parameters())
        fused = params[0].is_cuda or params[0].dtype is torch.float32
        fastest: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
        optimizer = kind(params, lr=0.0, **options, **fastest)

        def update(loss: Tensor) -> None:
            loss.backward()
            nn.utils.clip_grad_norm_(params, CLIP)
            optimizer.step()
            optimizer.zero_grad()

        return driven(optimizer, update)

    return attach


def lomo_optim(kind: str, **options: Any) -> Callable[[nn.Module, str, int], Update]:
    def attach(model: nn.Module, rounding: str, seed: int) -> Update:
        import lomo_optim as peer

        on_gpu = next(model.parameters()).is_cuda
        # Its AdaLomo puts the state on a GPU, whatever the model's device.
        with nullcontext() if on_gpu else mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
            optimizer = getattr(peer, kind)(model, lr=0.0, **options)

        def update(loss: Tensor, lr: float) -> None:
            if "clip_grad_norm" in options:
                optimizer.grad_norm(loss)
            optimizer.fused_backward(loss, lr)

        return update

    return attach


METHODS: dict[str, Method] = {
    "SGD + clip": Method(lomo(clip_grad_norm=CLIP), {"llama": 0.5, "minilm": 1.0}),
    "SGD + tensor clip": Method(
        lomo(clip_grad_norm=CLIP, clip_tensor=1.04), {"llama": 0.5, "minilm": 1.0}, warm_up=100
    ),
    "sign": Method(lomo(rule="sign"), {"llama": 2e-4, "minilm": 1e-4}),
    "rows": Method(lomo(rule="rows"), {"llama": 5e-4, "minilm": 1e-4}),
    "tensor": Method(lomo(rule="tensor"), {"llama": 5e-4, "minilm": 1e-4}),
    "AdaLomo": Method(lomo(AdaLomo), {"llama": 0.02, "minilm": 0.01}),
    "AdamW + clip": Method(
        torch_optimizer(torch.optim.AdamW, weight_decay=0.0), {"llama": 5e-4, "minilm": 5e-4}, NEAREST
    ),
    "lomo_optim LOMO + clip": Method(lomo_optim("Lomo", clip_grad_norm=CLIP), {}, NEAREST, like="SGD + clip"),
    "lomo_optim AdaLomo": Method(lomo_optim("AdaLomo"), {}, NEAREST, like="AdaLomo"),
}
#: What times are relative to.
BASE = torch_optimizer(torch.optim.SGD)


def missing(method: str) -> str:
    """Why a method cannot run here; empty if it can."""
    absent = [name for name in ("lomo_optim", "transformers") if importlib.util.find_spec(name) is None]
    if method.startswith("lomo_optim") and absent:
        return f"{method} needs {' and '.join(absent)}: pip install '.[bench]'"
    return ""


def ours(method: str) -> bool:
    return "AdamW" not in method and not method.startswith("lomo_optim")
