"""What does a captured step save? A whole step of a small Llama as a CUDA graph, next to the same step run eagerly."""

from __future__ import annotations

import pytest
import torch

from lomo_kernels.demo.model import ByteLlama, Config

from .buffers import Probe
from .methods import METHODS, cannot

CONFIG = Config(layers=8, d_model=512, heads=8, kv_heads=8, ffn=1408, vocab=256)
TOKENS = {"short": [512], "full": [512]}
CONTESTANTS = ("Lomo", "Lomo, clipping, two passes", "Lomo, fused", "Lomo, clipping, one pass, fused")


def test_captured(paired, device, contestant, tokens):
    if device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    assert not cannot(contestant, torch.bfloat16, device)
    model = ByteLlama(CONFIG).to(device, torch.bfloat16)
    update = METHODS[contestant](model, torch.tensor(1e-6, dtype=torch.float64, device=device))
    windows = torch.randint(CONFIG.vocab, (1, tokens + 1), device=device)

    def step(_: int = 0) -> None:
        update(model.loss(windows))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    case = {"model": "8 layers, width 512", "tokens": tokens}
    paired(contestant, case, lambda _: graph.replay(), Probe("the eager step", step))
