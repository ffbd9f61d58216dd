"""What does a captured step save? A whole step of a small Llama as a CUDA graph, next to the same step run eagerly."""

from __future__ import annotations

import pytest
import torch

from lomo_kernels.demo.model import ByteLlama, Config

from .buffers import Baseline
from .methods import METHODS, cannot

CONFIG = Config(layers=8, d_model=512, heads=8, kv_heads=8, ffn=1408, vocab=256)
IMPLEMENTATIONS = ("Lomo", "Lomo, clipping, two passes", "Lomo, fused", "Lomo, clipping, one pass, fused")


def parameters(device, full):
    return {"implementation": IMPLEMENTATIONS, "model": ["8 layers, width 512"], "tokens": [512]}


def test_captured(paired, device, implementation, model, tokens):
    if device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    assert not cannot(implementation, torch.bfloat16, device)
    llama = ByteLlama(CONFIG).to(device, torch.bfloat16)
    update = METHODS[implementation](llama, torch.tensor(1e-6, dtype=torch.float64, device=device))
    windows = torch.randint(CONFIG.vocab, (1, tokens + 1), device=device)

    def step(_=0):
        update(llama.loss(windows))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    paired(lambda _: graph.replay(), Baseline("the eager step", step))
