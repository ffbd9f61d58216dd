"""What memory does each method need, and which part saved what?

The paper's Table 1: LLaMA-7B, sequence 512, batch 8, simulated without its memory (`lomo_kernels.plan`), by category;
and a model that really runs here beside its simulation.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from lomo_kernels.composite import tiled
from lomo_kernels.demo.model import Config
from lomo_kernels.plan import METHODS, SHAPES, Peak, llama, loss_of, simulate

from . import paper
from .measure import SCRATCH, memory_of, peak_on_gpu
from .methods import missing_peer

CONTESTANTS = tuple(METHODS)
CHUNK = 256  # tokens whose logits exist at a time, where the loss is in chunks
#: With checkpointing, and with the loss in chunks.
MODES = {
    "short": [{"checkpointing": True}],
    "full": [
        {"checkpointing": False},
        {"checkpointing": True},
        {"checkpointing": True, "chunk": CHUNK},
        {"checkpointing": False, "kernels": "of 2023"},
        {"checkpointing": True, "kernels": "of 2023"},
    ],
}
#: The paper's three rows: they are what is simulated with the attention and the RMSNorm that transformers had then.
OF_2023 = ("AdamW, fp32 master", "SGD, fp32 master", "lomo_optim")

#: What really runs: on a CPU a small model, on a GPU one that fits.
RUN = {
    "cpu": ("8 layers, width 512", Config(layers=8, d_model=512, heads=8, kv_heads=8, ffn=1408, vocab=4096), 256),
    "cuda": ("llama-1b", SHAPES["llama-1b"], 512),
}


def case_of(model: str, sequence: int, batch: int, how: str, mode: dict[str, Any]) -> dict[str, Any]:
    return {"model": model, "sequence": sequence, "batch": batch, "how": how, **mode}


def simulated(
    contestant: str, config: Config, sequence: int, batch: int, mode: dict[str, Any], kernels: str = "gpu"
) -> Peak:
    build = llama(config, checkpointing=mode["checkpointing"])
    kernels = "unfused" if "kernels" in mode else kernels
    return simulate(build, loss_of(batch, sequence, mode.get("chunk")), METHODS[contestant], kernels=kernels)


def measured(contestant: str, config: Config, sequence: int, mode: dict[str, Any], device: str) -> int:
    """The peak of a step that is really taken, after a first one: on the CPU torch's profiler sees every allocation,
    also inside operators; a GPU's allocator counts them."""
    build, loss = llama(config, checkpointing=mode["checkpointing"]), loss_of(1, sequence)
    if device == "cuda":
        return peak_on_gpu(build, loss, METHODS[contestant])
    gc.collect()
    model = build()
    attached = METHODS[contestant].attach(model)

    def step() -> None:
        attached.update(loss(model))

    step()
    tiled.buffer.memory = torch.empty(0)  # a tile that stayed counts too
    there = sum(tensor.nbytes for tensor in (*model.parameters(), *attached.states()))
    return there + memory_of(step, device)[1]


@pytest.fixture(autouse=True)
def _installed(contestant, missing):
    if lacking := missing_peer(contestant):
        missing(*lacking)


def test_table_1(record, contestant, mode):
    if "kernels" in mode and contestant not in OF_2023:
        pytest.skip("only the paper's rows are simulated with the kernels of 2023")
    config = SHAPES[paper.MODEL]
    peak = simulated(contestant, config, paper.SEQUENCE, paper.BATCH, mode)
    case = case_of(paper.MODEL, paper.SEQUENCE, paper.BATCH, "simulated", mode)
    record(contestant, case, memory=peak.at_peak, most=peak.most)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointing"])
def test_a_real_run_takes_what_was_simulated(record, contestant, checkpointing, device):
    name, config, sequence = RUN[device]
    mode = {"checkpointing": checkpointing}
    peak = simulated(contestant, config, sequence, 1, mode, "cpu" if device == "cpu" else "gpu")
    real = measured(contestant, config, sequence, mode, device)
    record(contestant, case_of(name, sequence, 1, "simulated", mode), memory=peak.at_peak, most=peak.most)
    record(contestant, case_of(name, sequence, 1, "measured", mode), memory={"all": real})
    # On a CPU kernels take up to 1.1% for themselves (tests/test_plan.py).
    slack = SCRATCH if device == "cuda" else 0.03 * peak.peak
    assert peak.peak - peak.at_peak["workspace"] - slack <= real <= peak.peak + slack
