"""A whole training step: what does clipping by the global norm cost inside backward, against SGD that keeps gradients?"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lomo_kernels import Lomo
from lomo_kernels.demo.model import ByteLlama, Config

# A Llama's proportions at the width that the issue of one backward was measured at.
CONFIG = Config(layers=8, d_model=1024, heads=16, kv_heads=16, ffn=2816, vocab=2048)
TOKENS = 256
LR = 1e-3
CLIP = 1.0

#: Our modes. All but the last two clip by the global norm.
MODES: dict[str, dict[str, Any]] = {
    "one, fused": {"clip_grad_norm": CLIP, "fused_layers": True, "clip_passes": "one"},
    "two, fused": {"clip_grad_norm": CLIP, "fused_layers": True, "clip_passes": "two"},
    "one": {"clip_grad_norm": CLIP, "clip_passes": "one"},
    "two": {"clip_grad_norm": CLIP, "clip_passes": "two"},
    "no clipping, fused": {"fused_layers": True},
    "no clipping": {},
}


def _model() -> ByteLlama:
    return ByteLlama(CONFIG).to(torch.bfloat16)


def _sgd(model: nn.Module, clip: bool) -> Callable[[torch.Tensor], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, foreach=True)

    def step(loss: torch.Tensor) -> None:
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _lomo_optim(model: nn.Module) -> Callable[[torch.Tensor], None]:
    from lomo_optim import Lomo as Original

    optimizer = Original(model, lr=LR, clip_grad_norm=CLIP)

    def step(loss: torch.Tensor) -> None:
        optimizer.grad_norm(loss)
        optimizer.fused_backward(loss, LR)

    return step


def missing_peers() -> list[str]:
    """lomo_optim also needs transformers."""
    return [name for name in ("lomo_optim", "transformers") if importlib.util.find_spec(name) is None]


def contestants(tokens: int = TOKENS, modes: dict[str, dict[str, Any]] = MODES) -> dict[str, Callable[[int], Any]]:
    """Each is one step, forward to update, on a model of its own."""
    steps: dict[str, Callable[[int], Any]] = {}

    def add(name: str, model: ByteLlama, step: Callable[[torch.Tensor], None]) -> None:
        generator = torch.Generator().manual_seed(0)
        windows = [torch.randint(CONFIG.vocab, (1, tokens + 1), generator=generator) for _ in range(4)]
        steps[name] = lambda n: step(model.loss(windows[n % 4]))

    model = _model()
    add("SGD, clip_grad_norm_", model, _sgd(model, clip=True))
    model = _model()
    add("SGD", model, _sgd(model, clip=False))
    if not missing_peers():
        model = _model()
        add("lomo_optim", model, _lomo_optim(model))
    for name, options in modes.items():
        model = _model()
        add(f"Lomo {name}", model, Lomo(model, lr=LR, **options).backward)
    return steps
