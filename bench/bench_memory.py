"""What memory does each method need, and which part saved what?

The paper's Table 1: LLaMA-7B, sequence 512, batch 8, simulated without its memory (`lomo_kernels.plan`), by category;
and a model that really runs here beside its simulation.
"""

from __future__ import annotations

from itertools import product

import pytest

from lomo_kernels.demo.model import Config
from lomo_kernels.plan import METHODS, SHAPES, llama, loss_of, simulate
from lomo_kernels.plan.paper import BATCH, MODEL, SEQUENCE

from .measure import SCRATCH, second_step_peak
from .methods import missing_peer

CHUNK = 256  # tokens whose logits exist at a time, if the loss is in chunks
#: The paper's three rows: they are simulated, too, with the attention and the RMSNorm that transformers had then.
OF_2023 = ("AdamW, fp32 master", "SGD, fp32 master", "lomo_optim")
#: What really runs: on a CPU a small model, on a GPU one that fits. Its name, shape and sequence.
RUN = {
    "cpu": ("8 layers, width 512", Config(layers=8, d_model=512, heads=8, kv_heads=8, ffn=1408, vocab=4096), 256),
    "cuda": ("llama-1b", SHAPES["llama-1b"], 512),
}
COLUMNS = "model, sequence, batch, checkpointing, chunk, kernels, implementation"


def cases(device, full):
    paper, (model, _, sequence) = [(MODEL, SEQUENCE, BATCH)], RUN[device]
    cases = [*product(paper, [True, False][: 1 + full], [None], [None], METHODS)]
    if full:
        cases += product(paper, [True], [CHUNK], [None], METHODS)
        cases += product(paper, [False, True], [None], ["of 2023"], OF_2023)
    cases += product([(model, sequence, 1)], [False, True], [None], [None], METHODS)
    return {"memory": {COLUMNS: [(*shape, *others) for shape, *others in cases]}}


def test_memory(benchmark, device, model, sequence, batch, checkpointing, chunk, kernels, implementation):
    if lacking := missing_peer(implementation):
        pytest.skip(lacking)
    runs, method = model != MODEL, METHODS[implementation]
    build = llama(RUN[device][1] if runs else SHAPES[model], checkpointing=checkpointing)
    loss = loss_of(batch, sequence, chunk)
    variant = "unfused" if kernels else "cpu" if runs and device == "cpu" else "gpu"
    peak = benchmark.pedantic(simulate, args=(build, loss, method), kwargs={"kernels": variant})
    benchmark.extra_info |= {"memory": peak.at_peak, "most": peak.most}
    if runs:
        benchmark.extra_info["measured"] = real = second_step_peak(build, loss, method, device)
        # On a CPU kernels take up to 1.1% for themselves (tests/test_plan.py).
        slack = SCRATCH if device == "cuda" else 0.03 * peak.peak
        assert peak.peak - peak.at_peak["workspace"] - slack <= real <= peak.peak + slack
