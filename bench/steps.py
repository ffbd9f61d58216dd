"""``python -m bench.steps``: what does clipping inside backward cost, and save, against SGD that keeps its gradients?

Whole steps of a small Llama in bfloat16, one thread: seconds, interleaved round by round, and the peak of live bytes
above the weights. Writes ``bench/results/steps-<instruction set>-<date>.json``.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from lomo_kernels import Lomo, tiled
from lomo_kernels.demo.model import ByteLlama, Config

from .measure import allocations, interleave, peak_of, ratios, write

CONFIG = Config(layers=8, d_model=1024, heads=16, kv_heads=16, ffn=2816, vocab=2048)
LR = 1e-3
CLIP = 1.0
BASE = "SGD, clip_grad_norm_"
FORWARD = "forward alone"  # what computing every block's inputs once more would cost at least

#: Ours. All but the last two clip by the global norm.
MODES: dict[str, dict[str, Any]] = {
    "one backward, fused": {"clip_grad_norm": CLIP, "fused_layers": True, "clip_passes": "one"},
    "two, fused": {"clip_grad_norm": CLIP, "fused_layers": True},
    "two": {"clip_grad_norm": CLIP},
    "stochastic, one backward, fused": {
        "clip_grad_norm": CLIP,
        "fused_layers": True,
        "clip_passes": "one",
        "rounding": "stochastic",
    },
    "no clipping, fused": {"fused_layers": True},
    "no clipping": {},
}


class Case(NamedTuple):
    tokens: int
    checkpoints: bool
    rounds: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens" + (", checkpoints" if self.checkpoints else "")


CASES = (Case(256, False, 15), Case(64, False, 9), Case(1024, False, 3), Case(256, True, 7), Case(1024, True, 3))


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


def contestants(case: Case) -> dict[str, Callable[[int], Any]]:
    """Each is one step, forward to update, on a model of its own."""
    makers: dict[str, Callable[[nn.Module], Callable[[torch.Tensor], None]]] = {
        BASE: lambda model: _sgd(model, clip=True),
        "SGD": lambda model: _sgd(model, clip=False),
        FORWARD: lambda model: lambda loss: None,
    }
    if not missing_peers():
        makers["lomo_optim, clip_grad_norm"] = _lomo_optim
    for name, options in MODES.items():
        makers[f"Lomo, {name}"] = lambda model, options=options: Lomo(model, lr=LR, **options).backward
    steps: dict[str, Callable[[int], Any]] = {}
    for name, make in makers.items():
        model = ByteLlama(CONFIG).to(torch.bfloat16)
        model.checkpoint_blocks = case.checkpoints
        generator = torch.Generator().manual_seed(0)
        windows = [torch.randint(CONFIG.vocab, (1, case.tokens + 1), generator=generator) for _ in range(4)]
        step = make(model)
        steps[name] = lambda n, model=model, step=step, windows=windows: step(model.loss(windows[n % 4]))
    return steps


def peak(step: Callable[[int], Any]) -> int:
    """Most live bytes of a step above what was there before: activations, gradients, factors, copies."""
    gc.collect()
    tiled.buffer.memory = torch.empty(0)  # a tile that stayed counts too
    return peak_of(allocations(lambda: step(0)))


def measured(case: Case) -> dict[str, Any]:
    steps = contestants(case)
    seconds = interleave(steps, rounds=case.rounds)
    section: dict[str, Any] = {}
    print(f"\n{case}: ms, ratio to {BASE} (quartiles), peak MiB above the weights")
    for name, samples in seconds.items():
        ratio = ratios(samples, seconds[BASE])
        bytes_ = peak(steps[name])
        section[name] = {"seconds": samples, "ratio_to_sgd_and_clip": ratio, "peak_bytes": bytes_}
        spread = f"{ratio['median']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})"
        print(f"{name:38} {statistics.median(samples) * 1e3:8.1f}  {spread}  {bytes_ / 2**20:8.1f}", flush=True)
    return section


def main() -> None:
    """Runs every case: some 15 minutes."""
    torch.set_num_threads(1)
    for name in missing_peers():
        print(f"{name} is not installed: lomo_optim is missing from the tables (pip install 'lomo_kernels[bench]')")
    weights = sum(param.nbytes for param in ByteLlama(CONFIG).to(torch.bfloat16).parameters())
    sections = {"model": CONFIG.__dict__ | {"weight_bytes": weights}, "missing": missing_peers()}
    sections["steps"] = {str(case): measured(case) for case in CASES}
    print(f"\nwritten to {write(sections, 'steps').name}")


if __name__ == "__main__":
    main()
