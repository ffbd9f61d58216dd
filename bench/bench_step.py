"""What does a whole training step cost, in time and memory, next to SGD with `clip_grad_norm_`?

Llama shapes in bfloat16 on synthetic tokens, one sequence, forward to update.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os

import pytest
import torch
from torch import nn

from lomo_kernels.composite import tiled
from lomo_kernels.demo.model import ByteLlama, Config
from lomo_kernels.plan import SHAPES

from .buffers import Baseline
from .measure import memory_of
from .methods import LLAMA_107M, METHODS, OWN_NORMS, SHARES, cannot
from .results import BASE, FORWARD

pytestmark = pytest.mark.timeout(1800)

LR = 1e-6  # weights stay as they are, more or less: one set of them serves every implementation
DTYPE = torch.bfloat16
#: By their number of parameters. The last two are TinyLlama and LLaMA-7B.
MODELS = {
    "17M": Config(layers=1, d_model=1024, heads=16, kv_heads=16, ffn=2816, vocab=2048),
    "30M": Config(layers=2, d_model=1024, heads=16, kv_heads=16, ffn=2816, vocab=2048),
    "107M": LLAMA_107M,
    "1.1B": SHAPES["llama-1b"],
    "6.7B": SHAPES["llama-7b"],
}
LEFT_OUT = {*OWN_NORMS, *(f"Lomo, clipping, {share} kept" for share in SHARES)}  # see bench_clipping.py
# A forward is what computing every block's inputs once more costs at least.
IMPLEMENTATIONS = (*(name for name in METHODS if name not in LEFT_OUT), FORWARD)
#: On a CPU with many tokens, and with the tuned malloc: all would take two hours.
FEW = (
    *(BASE, "AdamW, clip_grad_norm_", "lomo_optim, clipping", "Lomo, fused"),
    *("Lomo, clipping, two passes, fused", "Lomo, clipping, one pass, fused"),
)
COLUMNS = "model, tokens, checkpointing, implementation"


def parameters(device, full):
    if device == "cuda":
        models, sizes = (("1.1B", "6.7B"), (256, 1024, 4096)) if full else (("1.1B",), (256,))
        cases = dict.fromkeys(itertools.product(models, sizes, (False, True)), IMPLEMENTATIONS)
    elif os.environ.get("MALLOC_MMAP_MAX_") == "0":
        cases = {("107M" if full else "17M", 256, False): FEW}
    elif full:
        cases = {("107M", 256, checkpointing): IMPLEMENTATIONS for checkpointing in (False, True)}
        cases |= dict.fromkeys([("30M", 1024, False), ("30M", 1024, True), ("17M", 4096, False)], FEW)
    else:
        cases = {("17M", 256, False): IMPLEMENTATIONS}
    return {COLUMNS: [(*case, implementation) for case in cases for implementation in cases[case]]}


class Trained:
    """A method attached to a model of its own with the weights of `whole`; and the memory it needs above them."""

    def __init__(self, name: str, whole: ByteLlama, tokens: int, checkpointing: bool, device: str) -> None:
        model = copy.deepcopy(whole, {id(param): nn.Parameter(param.detach()) for param in whole.parameters()})
        model.checkpoint_blocks = checkpointing
        generator = torch.Generator().manual_seed(0)
        vocab = len(whole.embedding.weight)
        self.windows = torch.randint(vocab, (4, 1, tokens + 1), generator=generator).to(device)
        self.loss = model.loss
        self.after = METHODS[name](model, LR) if name in METHODS else lambda loss: None
        tiled.buffer.memory = torch.empty(0)  # a tile that stayed counts too
        states, _ = memory_of(lambda: self.step(0), device)
        left, peak = memory_of(lambda: self.step(1), device)
        weights = sum(param.nbytes for param in whole.parameters())
        assert abs(left) < max(0.01 * weights, 2**20), f"{name}: each step leaves {left} bytes behind"
        self.memory = {"weights": weights, "states": states, "peak": states + peak}

    def step(self, number: int) -> None:
        self.after(self.loss(self.windows[number % len(self.windows)]))


@functools.lru_cache(maxsize=1)
def llama(model: str, device: str) -> ByteLlama:
    """Of random weights, made on the device: drawing 6.7B numbers on a CPU takes minutes."""
    with torch.device("meta"):
        whole = ByteLlama(MODELS[model]).to(DTYPE)
    whole.to_empty(device=device)
    with torch.no_grad():
        for param in whole.parameters():
            param.normal_(std=0.02) if param.ndim == 2 else param.fill_(1.0)
    return whole


@functools.lru_cache(maxsize=1)
def baseline(model: str, tokens: int, checkpointing: bool, device: str) -> Baseline | None:
    """SGD with `clip_grad_norm_`. On a small GPU it may not fit."""
    try:
        return Baseline(BASE, Trained(BASE, llama(model, device), tokens, checkpointing, device).step)
    except torch.OutOfMemoryError:
        return None


def test_step(paired, model, tokens, checkpointing, implementation, device):
    if implementation in METHODS and (lacking := cannot(implementation, DTYPE, device)):
        pytest.skip(lacking)
    other = baseline(model, tokens, checkpointing, device)
    try:
        trained = Trained(implementation, llama(model, device), tokens, checkpointing, device)
        paired(trained.step, other, memory=trained.memory)
    except torch.OutOfMemoryError as error:
        case = f"{implementation}, {model}, {tokens} tokens" + ", checkpointing" * checkpointing
        pytest.skip(f"{case}: {str(error).splitlines()[0]}")
