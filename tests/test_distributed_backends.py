"""Every engine with the backend of its device, gloo on the CPU and NCCL on a GPU, in a group of one rank: what only
streams can break. A reduction of one rank changes nothing, so the weights have to be those of one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import assert_same_bits, weights_of, whole_weights
from support.processes import Processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lomo_kernels import Lomo

#: Of a GPU: many times what a kernel here takes, so that a stream that does not wait uses what is not there yet.
CYCLES = 50_000_000


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def one_rank(request: pytest.FixtureRequest) -> Iterator[Processes]:
    processes = Processes(1, backend=request.param)
    yield processes
    processes.close()


def late(tensor: Tensor) -> None:
    """Keeps the current stream of a GPU busy before it goes on."""
    if tensor.is_cuda:
        torch.cuda._sleep(CYCLES)


def layers(device: str) -> nn.Sequential:
    """Of equal sizes, so that memory freed too early is the next one's; the matrices travel alone, the biases wait."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(6))).to(device)


def spread(model: nn.Sequential, engine: str) -> dict[str, Any]:
    """Returns what `Lomo` has to be told."""
    if engine == "group":
        for param in model.parameters():
            param.register_hook(late)  # the gradient is not there yet when its reduction is started
        return {"process_group": dist.group.WORLD}
    for layer in model:
        fully_shard(layer)
        if engine == "all-reduce hook":  # the update's stream is another than the one whose memory the shard is
            layer.set_all_reduce_hook(late)
    fully_shard(model)
    return {}


def train(rank: int, engine: str, settings: dict[str, Any]) -> None:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    model, alone = layers(device), layers(device)
    ours = Lomo(model, lr=0.1, **spread(model, engine), **settings)
    theirs = Lomo(alone, lr=0.1, **settings)
    before = weights_of(alone)
    for step in range(3):
        x = torch.randn(8, 256, generator=torch.Generator().manual_seed(step)).to(device)
        ours.backward(model(x).square().sum())
        theirs.backward(alone(x).square().sum())
    weights = whole_weights(model)
    assert_same_bits(weights, weights_of(alone))
    assert all(weight.isfinite().all() and not torch.equal(weight, before[name]) for name, weight in weights.items())


@pytest.mark.parametrize(
    "settings",
    [{}, {"clip_grad_norm": 0.5, "clip_passes": "two"}, {"clip_grad_norm": 0.5, "clip_passes": "one"}],
    ids=str,
)
@pytest.mark.parametrize("engine", ["group", "fsdp", "all-reduce hook"])
def test_one_rank(one_rank: Processes, engine: str, settings: dict[str, Any]) -> None:
    one_rank.call(train, engine, settings)
