"""What does a whole training step cost, in time and memory, next to SGD with `clip_grad_norm_`?

Llama shapes in bfloat16 on synthetic tokens, one sequence, forward to update.
"""

from __future__ import annotations

import copy
import gc
from typing import NamedTuple

import pytest
import torch
from torch import nn

from lomo_kernels.composite import tiled
from lomo_kernels.demo.model import ByteLlama, Config
from lomo_kernels.plan import SHAPES

from .buffers import Probe
from .measure import memory_of
from .methods import LLAMA_107M, METHODS, OWN_NORMS, SHARES, cannot
from .results import BASE, FORWARD

pytestmark = pytest.mark.timeout(1800)

LR = 1e-6  # weights stay as they are, more or less: one set of them serves every contestant
LEFT_OUT = {*OWN_NORMS, *(f"Lomo, clipping, {share} kept" for share in SHARES)}  # see bench_clipping.py
# A forward is what computing every block's inputs once more costs at least.
CONTESTANTS = (*(name for name in METHODS if name not in LEFT_OUT), FORWARD)
DTYPE = torch.bfloat16

#: By their number of parameters. The last two are TinyLlama and LLaMA-7B.
MODELS = {
    "17M": Config(layers=1, d_model=1024, heads=16, kv_heads=16, ffn=2816, vocab=2048),
    "30M": Config(layers=2, d_model=1024, heads=16, kv_heads=16, ffn=2816, vocab=2048),
    "107M": LLAMA_107M,
    "1.1B": SHAPES["llama-1b"],
    "6.7B": SHAPES["llama-7b"],
}
#: Who runs on a CPU at 1024 and 4096 tokens, and with the tuned malloc: all of them would take two hours.
FEW = (
    BASE,
    "AdamW, clip_grad_norm_",
    "lomo_optim, clipping",
    "Lomo, fused",
    "Lomo, clipping, two passes, fused",
    "Lomo, clipping, one pass, fused",
)
FEWEST = tuple(name for name in FEW if "clip" in name and "AdamW" not in name)


class Case(NamedTuple):
    model: str
    tokens: int
    checkpointing: bool = False
    contestants: tuple[str, ...] = CONTESTANTS

    def __str__(self) -> str:
        return f"{self.model}, {self.tokens} tokens" + (", checkpointing" if self.checkpointing else "")


CASES = {
    "cpu": {
        "short": [Case("17M", 256)],
        "full": [
            Case("107M", 256),
            Case("107M", 256, True),
            Case("30M", 1024, False, FEW),
            Case("30M", 1024, True, FEW),
            Case("17M", 4096, False, FEWEST),
        ],
    },
    "cuda": {
        "short": [Case("1.1B", 256)],
        "full": [
            Case(model, tokens, checkpointing)
            for model in ("1.1B", "6.7B")
            for tokens in (256, 1024, 4096)
            for checkpointing in (False, True)
        ],
    },
}


class Trained:
    """A method attached to a model of its own, whose weights are the given model's; and what it needs above them."""

    def __init__(self, name: str, whole: ByteLlama, case: Case, device: str) -> None:
        model = copy.deepcopy(whole, {id(param): nn.Parameter(param.detach()) for param in whole.parameters()})
        model.checkpoint_blocks = case.checkpointing
        generator = torch.Generator().manual_seed(0)
        shape = (4, 1, case.tokens + 1)
        self.windows = torch.randint(MODELS[case.model].vocab, shape, generator=generator).to(device)
        self.loss = model.loss
        self.after = METHODS[name](model, LR) if name in METHODS else lambda loss: None
        tiled.buffer.memory = torch.empty(0)  # a tile that stays counts too
        states, _ = memory_of(lambda: self.step(0), device)
        left, peak = memory_of(lambda: self.step(1), device)
        weights = sum(param.nbytes for param in whole.parameters())
        assert abs(left) < max(0.01 * weights, 2**20), f"{name}: each step leaves {left} bytes behind"
        self.memory = {"weights": weights, "states": states, "peak": states + peak}

    def step(self, number: int) -> None:
        self.after(self.loss(self.windows[number % len(self.windows)]))


@pytest.fixture(scope="module")
def llama(case, device):
    """Of random weights, made where it is wanted: drawing 6.7B numbers on a CPU takes minutes."""
    with torch.device("meta"):
        model = ByteLlama(MODELS[case.model]).to(DTYPE)
    model.to_empty(device=device)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.02) if param.ndim == 2 else param.fill_(1.0)
    yield model
    gc.collect()  # hooks and models refer to each other


@pytest.fixture(scope="module")
def base(llama, case, device):
    """What steps are held to. On a small GPU it may not fit."""
    try:
        return Trained(BASE, llama, case, device)
    except torch.OutOfMemoryError:
        return None


def test_step(paired, missing, case, contestant, setting, llama, base, device):
    tuned = setting.get("malloc") == "tuned"  # python -m bench asks again with an allocator that keeps memory
    if contestant not in (FEW if tuned else case.contestants):
        pytest.skip("left out: with all methods it would take too long")
    if contestant in METHODS and (lacking := cannot(contestant, DTYPE, device)):
        missing(*lacking)
    described = {"model": case.model, "tokens": case.tokens, "checkpointing": case.checkpointing}
    try:
        trained = Trained(contestant, llama, case, device)
        paired(contestant, described, trained.step, base and Probe(BASE, base.step), memory=trained.memory)
    except torch.OutOfMemoryError as error:
        missing(f"{contestant}, {case}", str(error).splitlines()[0])
