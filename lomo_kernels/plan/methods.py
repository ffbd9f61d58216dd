"""Ways to train, as classes that exist: each is attached to a model and takes a step from a loss."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..optim import Lomo

LR = 1e-3  # of simulations: no figure depends on it
CLIP = 1.0
LOMO_OPTIM_NEEDS = ("lomo_optim", "transformers")  # the second it does not say itself


class Attached(NamedTuple):
    """A method on one model."""

    update: Callable[[Tensor], Any]  # from the loss to the changed weights
    states: Callable[[], Iterable[Tensor]]  # what stays between steps


Attach = Callable[[nn.Module, float], Attached]  # to a model, with a learning rate


class Method(NamedTuple):
    """A way to train any model."""

    attach: Attach
    steps: int = 1  # of which the last is like all that would follow
    makes_states: bool = False  # in its first step, from ``.grad``


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = optimizer.state.values()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def plain(make: Callable[..., torch.optim.Optimizer], clip: float | None = None, **options: Any) -> Attach:
    """A torch optimizer on the model's own weights."""

    def attach(model: nn.Module, lr: float) -> Attached:
        params = list(model.parameters())
        optimizer = make(params, lr=lr, **options)

        def update(loss: Tensor) -> None:
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(params, clip, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return Attached(update, lambda: _tensors(optimizer))

    return attach


def with_master_weights(make: Callable[..., torch.optim.Optimizer]) -> Attach:
    """A torch optimizer on float32 copies of 16-bit weights: mixed precision training, the paper's AdamW and SGD.

    A gradient is widened, used and freed, one weight after the other: no way that keeps master weights and gradients
    takes less.
    """

    def attach(model: nn.Module, lr: float) -> Attached:
        entries = []
        for param in model.parameters():
            master = nn.Parameter(param.detach().float())
            entries.append((param, master, make([master], lr=lr)))

        @torch.no_grad()
        def step() -> None:
            for param, master, optimizer in entries:
                if param.grad is not None:
                    master.grad = param.grad.float()
                    param.grad = None
                    optimizer.step()
                    master.grad = None
                    param.copy_(master)

        def update(loss: Tensor) -> None:
            loss.backward()
            step()

        def states() -> list[Tensor]:
            masters = [master for _, master, _ in entries]
            return [*masters, *(tensor for *_, optimizer in entries for tensor in _tensors(optimizer))]

        return Attached(update, states)

    return attach


def lomo(**options: Any) -> Attach:
    """`Lomo` with these options."""

    def attach(model: nn.Module, lr: float) -> Attached:
        optimizer = Lomo(model, lr=lr, **options)
        return Attached(optimizer.backward, lambda: _tensors(optimizer))

    return attach


def lomo_optim(clip: float | None = None) -> Attach:
    """The paper's own code, where `LOMO_OPTIM_NEEDS` are installed."""

    def attach(model: nn.Module, lr: float) -> Attached:
        from lomo_optim import Lomo as Original

        optimizer = Original(model, lr=lr, clip_grad_norm=clip)

        def update(loss: Tensor) -> None:
            if clip:
                optimizer.grad_norm(loss)
            optimizer.fused_backward(loss, lr)

        return Attached(update, lambda: [])

    return attach


def lacking(packages: Iterable[str]) -> list[str]:
    """Those that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


_clip: dict[str, Any] = {"clip_grad_norm": CLIP}

METHODS: dict[str, Method] = {
    "AdamW, fp32 master": Method(with_master_weights(torch.optim.AdamW), makes_states=True),
    "SGD, fp32 master": Method(with_master_weights(torch.optim.SGD)),
    "AdamW": Method(plain(torch.optim.AdamW, fused=True), makes_states=True),
    "AdamW, foreach": Method(plain(torch.optim.AdamW, foreach=True), makes_states=True),
    "SGD": Method(plain(torch.optim.SGD, foreach=True)),
    "lomo_optim": Method(lomo_optim()),
    "lomo_optim, clipping": Method(lomo_optim(clip=CLIP), steps=2),
    "Lomo": Method(lomo()),
    "Lomo, fused": Method(lomo(fused_layers=True)),
    "Lomo, split": Method(lomo(rounding="split")),
    "Lomo, clipping, two passes": Method(lomo(**_clip, clip_passes="two")),
    "Lomo, clipping, two passes, fused": Method(lomo(**_clip, clip_passes="two", fused_layers=True)),
    "Lomo, clipping, one pass": Method(lomo(**_clip, clip_passes="one")),
    "Lomo, clipping, one pass, fused": Method(lomo(**_clip, clip_passes="one", fused_layers=True)),
    "AdaLomo": Method(lomo(rule="adalomo")),
    "AdaLomo, fused": Method(lomo(rule="adalomo", fused_layers=True)),
}

#: Those that FSDP2 leaves possible: gradients are reduced before they reach a hook, so layers cannot be fused.
SHARDED = tuple(name for name in METHODS if not name.startswith("lomo_optim") and not name.endswith("fused"))
