"""Ways to train a model, each at its best setting: what follows a forward, from backward to update.

bench/results/README.md says how each is set. All compute SGD, or AdamW with torch's defaults.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lomo_kernels import Lomo
from lomo_kernels.demo.model import ByteLlama, Config
from lomo_kernels.optim.update_strategy import TensorClipStrategy
from lomo_kernels.plan.methods import CLIP, LOMO_OPTIM_NEEDS, lacking, lomo, lomo_optim, plain

from .results import BASE, clips, ours

ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}

Step = Callable[[Tensor], object]  # takes the loss
Method = Callable[[nn.Module, float], Step]  # attaches itself to a model, with a learning rate


def stepped(kind: type[torch.optim.Optimizer], clip: float | None = None) -> Method:
    def make(model: nn.Module, lr: float) -> Step:
        param = next(model.parameters())
        fast = fastest(kind, param.dtype, param.device.type)
        return plain(kind, lr=lr, clip=clip, **fast)(model).update

    return make


@functools.cache
def fastest(kind: type[torch.optim.Optimizer], dtype: torch.dtype, device: str) -> dict[str, bool]:
    """The fused path if its first step is right: torch 2.13's SGD is wrong with 16 bits on CPUs."""

    def fused(model: nn.Module, lr: float) -> Step:
        return plain(kind, lr=lr, fused=True)(model).update

    try:
        return {"foreach": True} if wrong(fused, dtype, device, adamw=issubclass(kind, ADAM)) else {"fused": True}
    except RuntimeError:  # torch has no fused path for this dtype and device
        return {"foreach": True}


def hooked(model: nn.Module, lr: float) -> Step:
    @torch.no_grad()
    def update(param: Tensor) -> None:
        assert param.grad is not None
        param.add_(param.grad, alpha=-lr)
        param.grad = None

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(update)
    return Tensor.backward


def released(kind: str, **options: Any) -> Method:
    """An optimizer of optimi's, which its hooks step: they neither clip nor, unless asked, use its Triton kernels."""

    def make(model: nn.Module, lr: float) -> Step:
        import optimi

        triton = next(model.parameters()).is_cuda
        optimizer = getattr(optimi, kind)(model.parameters(), lr=lr, gradient_release=True, triton=triton, **options)
        optimi.prepare_for_gradient_release(model, optimizer)
        return Tensor.backward

    return make


def attached(method: Callable[..., Any], **options: Any) -> Method:
    """One of the simulator's methods."""
    return lambda model, lr: method(lr=lr, **options)(model).update


def keeping(share: float) -> Method:
    """`Lomo` that keeps this share of the bytes of all gradients."""

    def make(model: nn.Module, lr: float) -> Step:
        whole = sum(param.nbytes for param in model.parameters())
        return lomo(lr=lr, clip_grad_norm=CLIP, clip_memory=int(share * whole))(model).update

    return make


def clipped_by_tensor(model: nn.Module, lr: float) -> Step:
    """Without the first hundred steps, in which it clips nothing."""
    optimizer = Lomo(model, lr=lr, clip_tensor=1.04)
    strategy = optimizer._training.state.strategy
    assert isinstance(strategy, TensorClipStrategy)
    strategy.clip._left = 0
    return optimizer.backward


SGD, ADAM = torch.optim.SGD, torch.optim.AdamW

TWO, ONE = ({"clip_grad_norm": CLIP, "clip_passes": passes} for passes in ("two", "one"))

#: By names that say what they do: results.clips, and "AdamW".
METHODS: dict[str, Method] = {
    BASE: stepped(SGD, CLIP),
    "SGD": stepped(SGD),
    "AdamW, clip_grad_norm_": stepped(ADAM, CLIP),
    "AdamW": stepped(ADAM),
    "optimi SGD, release": released("SGD"),
    "optimi AdamW, release": released("AdamW", **ADAMW),
    "hook, add_": hooked,
    "lomo_optim": attached(lomo_optim),
    "lomo_optim, clipping": attached(lomo_optim, clip=CLIP),
    "Lomo": attached(lomo),
    "Lomo, fused": attached(lomo, fused_layers=True),
    "Lomo, clipping, two passes": attached(lomo, **TWO),
    "Lomo, clipping, two passes, fused": attached(lomo, fused_layers=True, **TWO),
    "Lomo, clipping, one pass": attached(lomo, **ONE),
    "Lomo, clipping, one pass, fused": attached(lomo, fused_layers=True, **ONE),
    "Lomo, clipping, one pass, fused, stochastic": attached(lomo, fused_layers=True, rounding="stochastic", **ONE),
}

#: How much of what all gradients take may wait for the norm.
SHARES = {"1/4": 0.25, "1/2": 0.5, "3/4": 0.75}
METHODS |= {f"Lomo, clipping, {share} kept": keeping(number) for share, number in SHARES.items()}
#: What does without the norm of all gradients.
OWN_NORMS = ("Lomo, clip_tensor", "AdaLomo")
METHODS |= dict(zip(OWN_NORMS, (clipped_by_tensor, attached(lomo, rule="adalomo")), strict=True))

LLAMA_107M = Config(layers=8, d_model=1024, heads=16, kv_heads=16, ffn=2816, vocab=2048)  # on a CPU; over ranks, too
TINY = Config(layers=2, d_model=64, heads=4, kv_heads=2, ffn=96, vocab=64)


@functools.cache
def wrong(
    method: Method,
    dtype: torch.dtype,
    device: str,
    *,
    clipped: bool = False,
    adamw: bool = False,
    adalomo: bool = False,
) -> str:
    """What is wrong with a method's first step on a tiny model; empty where nothing is. A bench of wrong results is
    worth nothing.

    Expected is the step in float64 from the gradients of a plain backward in `dtype`, within four units of the last
    place of `dtype`: a coefficient, a gradient and a weight are each rounded to it.
    """
    model = ByteLlama(TINY).to(device, dtype)
    windows = torch.randint(TINY.vocab, (1, 33), generator=torch.Generator().manual_seed(0)).to(device)
    params = dict(model.named_parameters())
    before = {name: param.detach().double() for name, param in params.items()}
    # A steep loss, which clipping makes a difference to, and steps of the size of weights.
    grads = torch.autograd.grad(64 * model.loss(windows), list(params.values()))
    lr = 4.0
    coefficient = 1.0
    if clipped:
        norm = sum(grad.double().square().sum() for grad in grads) ** 0.5
        assert norm > 2 * CLIP, "nothing to clip"
        coefficient = CLIP / (norm + 1e-6)
    method(model, lr)(64 * model.loss(windows))
    unit = torch.finfo(dtype).eps
    for (name, param), grad in zip(params.items(), grads, strict=True):
        change = coefficient * grad.double()
        if adamw:  # the first step: both moments are the gradient's own
            change = change / (change.abs() + ADAMW["eps"]) + ADAMW["weight_decay"] * before[name]
        if adalomo:
            change = first_of_adalomo(change, before[name])
        expected = before[name] - lr * change
        differ = (param.double() - expected).abs() > 4 * unit * (before[name].abs() + lr * change.abs().max())
        if differ.any() or not param.isfinite().all():
            return f"{int(differ.sum())} of {param.numel()} elements of {name} are off by more than four units"
    return ""


def first_of_adalomo(grad: Tensor, weight: Tensor) -> Tensor:
    """What AdaLomo's first step takes off, over the learning rate. Both float64."""
    squares = grad.square() + 1e-30
    change = grad / squares.sqrt()
    if grad.dim() > 1:
        row, column = squares.mean(1, keepdim=True), squares.mean(0)
        change = grad / (row / row.mean()).sqrt() / column.sqrt()
    size, of_weight = (some.square().mean().sqrt() for some in (change, weight))
    return change / size.clamp(min=1.0) * of_weight.clamp(min=1e-3)


def missing_peer(contestant: str) -> tuple[str, str] | None:
    """The peer that a contestant's name begins with, and why, where it is not installed."""
    for peer, packages in {"optimi": ("optimi",), "lomo_optim": LOMO_OPTIM_NEEDS}.items():
        if contestant.startswith(peer) and (absent := lacking(packages)):
            return peer, f"{' and '.join(absent)} not installed: pip install '.[bench]' in the source folder"
    return None


def cannot(name: str, dtype: torch.dtype, device: str) -> tuple[str, str] | None:
    """What is missing, a peer or a right result, and why, where the method cannot run."""
    if absent := missing_peer(name):
        return absent
    reason = wrong(METHODS[name], dtype, device, clipped=clips(name), adamw="AdamW" in name, adalomo=name == "AdaLomo")
    assert not (reason and ours(name)), reason
    return (f"{name}, {str(dtype).removeprefix('torch.')}, {device}", reason) if reason else None
