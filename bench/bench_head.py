"""What does a head with its loss cost, in time and memory: whole logits, torch's chunks of tokens, blocks of classes?

A Llama shape whose head is two thirds of its products, in bfloat16 on synthetic tokens, one sequence, forward to
update. The rest of the step is the same.
"""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lomo_kernels import Lomo, linear_cross_entropy
from lomo_kernels.composite import head, tiled
from lomo_kernels.demo.model import ByteLlama, Config
from lomo_kernels.plan.methods import CLIP

from .measure import Baseline, memory_of

pytestmark = pytest.mark.timeout(1800)

LR = 1e-6
CONFIG = Config(layers=2, d_model=512, heads=8, kv_heads=8, ffn=1408, vocab=32000)
WHOLE, TORCHS, BLOCKS = "Lomo, logits whole", "Lomo, F.linear_cross_entropy in chunks", "Lomo, linear_cross_entropy"
GROUPS = {"no clipping": {}, "clipping, two passes": {"clip_grad_norm": CLIP, "clip_passes": "two"}}


def cases(device, full):
    """On a CPU torch's chunks of 16-bit tokens take some ten times as long: one case of them will do."""
    sizes = (256, 1024) if full else (256,)
    steps = itertools.product(["39M"], sizes, GROUPS, (WHOLE, BLOCKS))
    return {"head": {"model, tokens, group, implementation": [("39M", 256, "no clipping", TORCHS), *steps]}}


def loss_of(implementation: str, model: ByteLlama, windows: Tensor) -> Tensor:
    targets = windows[:, 1:].flatten()
    if implementation == WHOLE:
        return model.loss(windows)
    x, weight = model.hidden(windows[:, :-1]).flatten(0, 1), model.head.weight
    if implementation == BLOCKS:
        return linear_cross_entropy(x, weight, targets)
    return F.linear_cross_entropy(x, weight, targets, options=nn.LinearCrossEntropyOptions(allow_retain_graph=True))


class Trained:
    """A way to find the loss, attached to a model of its own; and the memory that its step needs above the weights."""

    def __init__(self, implementation: str, tokens: int, group: str, device: str) -> None:
        model = copy.deepcopy(llama()).to(device)
        generator = torch.Generator().manual_seed(0)
        self.windows = torch.randint(CONFIG.vocab, (4, 1, tokens + 1), generator=generator).to(device)
        self.loss = functools.partial(loss_of, implementation, model)
        self.optimizer = Lomo(model, lr=LR, fused_layers=True, **GROUPS[group])
        self.step(0)
        tiled.buffer.memory = head.scratch.memory = torch.empty(0)  # a tile that stayed counts too
        _, peak = memory_of(lambda: self.step(1), device)
        self.memory = {"weights": sum(param.nbytes for param in model.parameters()), "states": 0, "peak": peak}

    def step(self, number: int) -> None:
        self.optimizer.backward(self.loss(self.windows[number % len(self.windows)]))


@functools.lru_cache(maxsize=1)
def llama() -> ByteLlama:
    return ByteLlama(CONFIG).to(torch.bfloat16)


@functools.lru_cache(maxsize=1)
def baseline(tokens: int, group: str, device: str) -> Baseline:
    return Baseline(WHOLE, Trained(WHOLE, tokens, group, device).step)


def test_head(paired, model, tokens, group, implementation, device):
    if implementation == TORCHS and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("F.linear_cross_entropy came with torch 2.13")
    trained = Trained(implementation, tokens, group, device)
    paired(trained.step, baseline(tokens, group, device), memory=trained.memory)
