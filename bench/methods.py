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
from lomo_kernels.plan import methods as plan
from lomo_kernels.plan.methods import CLIP, LOMO_OPTIM_NEEDS, Attach, lacking, lomo, plain

from .results import BASE, clips, ours

Step = Callable[[Tensor], object]  # takes the loss
Method = Callable[[nn.Module, float], Step]  # attaches itself to a model, with a learning rate


def step_of(attach: Attach) -> Method:
    return lambda model, lr: attach(model, lr).update


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

    def attach(model: nn.Module, lr: float) -> Step:
        import optimi

        triton = next(model.parameters()).is_cuda
        optimizer = getattr(optimi, kind)(model.parameters(), lr=lr, gradient_release=True, triton=triton, **options)
        optimi.prepare_for_gradient_release(model, optimizer)
        return Tensor.backward

    return attach


def keeping(share: float) -> Method:
    """`Lomo` that keeps this share of the bytes of all gradients."""

    def attach(model: nn.Module, lr: float) -> Step:
        whole = sum(param.nbytes for param in model.parameters())
        return Lomo(model, lr=lr, clip_grad_norm=CLIP, clip_memory=int(share * whole)).backward

    return attach


def clipped_by_tensor(model: nn.Module, lr: float) -> Step:
    """Without the first hundred steps, in which it clips nothing."""
    optimizer = Lomo(model, lr=lr, clip_tensor=1.04)
    strategy = optimizer._training.state.strategy
    assert isinstance(strategy, TensorClipStrategy)
    strategy.clip._left = 0
    return optimizer.backward


SGD, ADAM = torch.optim.SGD, torch.optim.AdamW
ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}  # torch's defaults
STOCHASTIC = lomo(clip_grad_norm=CLIP, clip_passes="one", fused_layers=True, rounding="stochastic")
PLANNED = {
    name: method
    for name, method in plan.METHODS.items()
    if not name.endswith(("master", "foreach", "split")) and not name.startswith("AdaLomo")
}
#: What clips with a budget for all that waits for the norm, and what does without the norm of all gradients.
CLIPPING: dict[str, Method] = {
    "Lomo, clipping, 1/4 kept": keeping(0.25),
    "Lomo, clipping, 1/2 kept": keeping(0.5),
    "Lomo, clipping, 3/4 kept": keeping(0.75),
    "Lomo, clip_tensor": clipped_by_tensor,
    "AdaLomo": step_of(lomo(rule="adalomo")),
}
#: By names that say what they do: results.clips, and "AdamW".
METHODS: dict[str, Method] = {
    BASE: step_of(plain(SGD, CLIP, foreach=True)),
    "AdamW, clip_grad_norm_": step_of(plain(ADAM, CLIP, fused=True)),
    "optimi SGD, release": released("SGD"),
    "optimi AdamW, release": released("AdamW", **ADAMW),
    "hook, add_": hooked,
    **{name: step_of(method.attach) for name, method in PLANNED.items()},
    "Lomo, clipping, one pass, fused, stochastic": step_of(STOCHASTIC),
    **CLIPPING,
}

LLAMA_107M = Config(layers=8, d_model=1024, heads=16, kv_heads=16, ffn=2816, vocab=2048)  # on a CPU; over ranks, too
STEEP = 256.0  # times the loss
TINY = Config(layers=2, d_model=64, heads=4, kv_heads=2, ffn=96, vocab=64)


@functools.cache
def wrong(name: str, method: Method, dtype: torch.dtype, device: str) -> str:
    """What is wrong with the first step, on a tiny model, of a method of this name. Empty if nothing is.

    Expected is torch's step in float64 from the gradients of a plain backward in `dtype`, within four units of the last
    place of `dtype`: a coefficient, a gradient and a weight are each rounded to it.
    """
    model = ByteLlama(TINY).to(device, dtype)
    windows = torch.randint(TINY.vocab, (1, 33), generator=torch.Generator().manual_seed(0)).to(device)
    params = dict(model.named_parameters())
    # A steep loss, which clipping makes a difference to, and steps of the size of weights.
    grads = torch.autograd.grad(STEEP * model.loss(windows), list(params.values()))
    before = [param.detach().double() for param in params.values()]
    expected = [nn.Parameter(weight.clone()) for weight in before]
    for weight, grad in zip(expected, grads, strict=True):
        weight.grad = grad.double()
    if clips(name):
        assert nn.utils.clip_grad_norm_(expected, CLIP) > 2 * CLIP, "nothing to clip"
    if "AdaLomo" in name:  # its rule is Adafactor's
        torch.optim.Adafactor(expected, lr=1.0, weight_decay=0.0).step()
    else:
        (ADAM if "AdamW" in name else SGD)(expected, lr=1.0).step()
    method(model, 1.0)(STEEP * model.loss(windows))
    for (param_name, param), weight, old in zip(params.items(), expected, before, strict=True):
        limit = 4 * torch.finfo(dtype).eps * (old.abs() + (weight - old).abs().max())
        differ = ((param.double() - weight).abs() > limit) | ~param.isfinite()
        if differ.any():
            return f"{int(differ.sum())} of {param.numel()} elements of {param_name} are off by more than four units"
    return ""


def missing_peer(name: str) -> str:
    """Why the peer that an implementation's name begins with is not installed. Empty if it is."""
    for peer, packages in {"optimi": ("optimi",), "lomo_optim": LOMO_OPTIM_NEEDS}.items():
        if name.startswith(peer) and (absent := lacking(packages)):
            return f"{peer}: {' and '.join(absent)} not installed: pip install '.[bench]' in the source folder"
    return ""


def cannot(name: str, dtype: torch.dtype, device: str) -> str:
    """Why the method cannot run: a missing peer, or a wrong result. Empty if it can."""
    if absent := missing_peer(name):
        return absent
    reason = wrong(name, METHODS[name], dtype, device)
    assert not (reason and ours(name)), reason
    return reason and f"{name}, {str(dtype).removeprefix('torch.')}, {device}: {reason}"
