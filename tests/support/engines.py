"""The engines under test: how each spreads a model over processes, and how its whole parameters are read back.

tests/test_distributed_contract.py runs every test with every entry of `ENGINES`. A new engine is a subclass and an
entry.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lomo_kernels import Lomo
from support.factored import RULES, FactoredTextbook
from support.models import (
    Options,
    Planted,
    assert_close,
    assert_same_bits,
    batch,
    loss_of,
    same_bits,
    transformer,
    transformer_of_vectors,
    weights_of,
    whole_weights,
)
from support.textbook import Textbook

LR = 0.3
#: Gradients that would be zero without rounding: softmax does not see a key's bias. AdaLomo makes steps of them.
ROUNDING_ONLY = ("blocks.0.qkv.bias", "blocks.1.qkv.bias")
CLIPPED = {"clip_grad_norm": 0.3, "weight_decay": 0.01, "clip_passes": "two"}


class Engine:
    """What is spread is the whole model on one rank, if a subclass does not say otherwise."""

    options = Options()  # of the contract's model

    def make(self, options: Options | None = None) -> nn.Module:
        """The model before it is spread: the same on every rank."""
        torch.manual_seed(0)
        return transformer_of_vectors(options or self.options)

    def spread(self, model: nn.Module) -> Any:
        """What `Lomo` and the other methods take."""
        return model

    def lomo(self, spread: Any, **settings: Any) -> Lomo:
        return Lomo(spread, **settings)

    def module(self, spread: Any) -> nn.Module:
        """What is called with a batch."""
        return spread

    def weights(self, spread: Any) -> dict[str, Tensor]:
        """Copies of all parameters, whole."""
        return whole_weights(spread)

    def batches(self) -> tuple[int, int]:
        """Over how many batches a step goes, and which of them is this rank's."""
        return dist.get_world_size(), dist.get_rank()


class DataParallel(Engine):
    """Ranks start with different weights: the first one's count."""

    options = Options(width=128, layers=1)  # with gradients that travel alone

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    @property
    def group(self) -> dist.ProcessGroup:
        return self._group or dist.group.WORLD

    def make(self, options: Options | None = None) -> nn.Module:
        return transformer(options or self.options)

    def spread(self, model: nn.Module) -> nn.Module:
        if dist.get_rank(self.group):
            with torch.no_grad():
                for param in model.parameters():
                    param.mul_(0.5)
        return model

    def lomo(self, spread: Any, **settings: Any) -> Lomo:
        return Lomo(spread, process_group=self.group, **settings)

    def batches(self) -> tuple[int, int]:
        return dist.get_world_size(self.group), dist.get_rank(self.group)


class FSDP2(Engine):
    def spread(self, model: nn.Module) -> nn.Module:
        fsdp(model)
        return model


class TensorParallel(Engine):
    """All ranks have the same batches."""

    def make(self, options: Options | None = None) -> nn.Module:
        return transformer(options or self.options)

    def spread(self, model: nn.Module) -> nn.Module:
        if isinstance(model, Planted):
            place(model, line(), [Shard(1)])
        else:
            tensor_parallel(model, line())
        return model

    def batches(self) -> tuple[int, int]:
        return 1, 0


class ZeRO3(Engine):
    def spread(self, model: nn.Module) -> Any:
        return initialize(model)

    def module(self, spread: Any) -> nn.Module:
        return spread.module

    def weights(self, spread: Any) -> dict[str, Tensor]:
        """Gathered. Persistent parameters are freed by this, as by nothing in a step."""
        import deepspeed

        named = dict(spread.module.named_parameters())
        with deepspeed.zero.GatheredParameters(list(named.values())):
            return {name: param.detach().clone() for name, param in named.items()}


ENGINES: dict[str, Engine] = {
    "data parallel": DataParallel(),
    "FSDP2": FSDP2(),
    "tensor parallel": TensorParallel(),
    "ZeRO-3": ZeRO3(),
}


# ---- How they spread ------------------------------------------------------------------------------------------------


# Once per process: the groups of each new mesh take 0.1 s on every rank, and threads that never end.


@functools.cache
def line() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


@functools.cache
def square(first: str, second: str) -> DeviceMesh:
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=(first, second))


def fsdp(model: nn.Module, mesh: DeviceMesh | None = None, **options: Any) -> None:
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)


def place(model: Planted, mesh: DeviceMesh, placements: list[Placement]) -> None:
    """Rows are what a parameter without such a dimension is cut into."""
    for layer in model.layers:
        dim = layer.weight.dim()
        fitting = [one if one.is_replicate() or one.dim < dim else Shard(0) for one in placements]
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, fitting))


def initialize(
    model: nn.Module | Callable[[], nn.Module], threshold: int = 50, config: dict[str, Any] | None = None, **zero: Any
) -> Any:
    """A DeepSpeed engine, of a model or of what makes one, which is then cut into parts while it is made.

    Parameters of up to `threshold` elements are persistent: always whole on every rank.
    """
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    # Collectives of its own for CPUs, which take a minute to compile; gloo has all that is needed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings = {"stage": 3, "stage3_param_persistence_threshold": threshold, **zero}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": settings, **(config or {})}
    if not isinstance(model, nn.Module):
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = model()
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


# ---- What many tests ask --------------------------------------------------------------------------------------------


def everywhere(value: Any) -> list[Any]:
    """Of all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def mean_loss(model: nn.Module, step: int, count: int) -> Tensor:
    """Over all batches of a step, on one process."""
    return sum(loss_of(model, count * step + n) for n in range(count)) / count


def model_and_book(
    engine: Engine, settings: dict[str, Any], model: nn.Module | None = None
) -> tuple[nn.Module, Textbook | FactoredTextbook]:
    """A model that is not spread yet, and what trains a copy of it on one process with the same settings."""
    of_book = {name: value for name, value in settings.items() if name != "loss_scale"}
    if settings.get("rule") not in RULES:
        model = model or engine.make()
        return model, Textbook(model, **of_book)
    options = replace(engine.options, frozen=(*engine.options.frozen, *ROUNDING_ONLY))
    model = model or engine.make(options)
    return model, FactoredTextbook(model, **of_book)


def equals_one_process(engine: Engine, settings: dict[str, Any], model: nn.Module | None = None) -> None:
    """Five steps, with the norms and losses of each, and an evaluation between them."""
    settings = {"lr": LR} | settings
    model, book = model_and_book(engine, settings, model)
    before = weights_of(book.model)
    spread = engine.spread(model)
    optimizer = engine.lomo(spread, **settings)
    count, mine = engine.batches()
    module = engine.module(spread)
    for step in range(5):
        loss = module(*batch(count * step + mine))
        assert loss.item() == pytest.approx(loss_of(book.model, count * step + mine).item(), abs=2e-6)
        book.step(mean_loss(book.model, step, count))
        optimizer.backward(loss)
        assert optimizer.last_grad_norm.item() == pytest.approx(book.norm, rel=1e-6)
        assert all(param.grad is None for param in module.parameters())
        with torch.no_grad():
            assert module(*batch(7)).item() == pytest.approx(loss_of(book.model, 7).item(), abs=2e-6)
    assert_close(engine.weights(spread), book.model, atol=2e-6 if settings.get("rule") in RULES else 1e-6)
    for name, param in book.model.named_parameters():
        moved = param.requires_grad and not name.startswith("spare")
        assert moved != torch.equal(param, before[name]), name
    assert optimizer.step_count.item() == 5 and optimizer.skipped_steps.item() == 0


def norms_equal_one_process(engine: Engine) -> None:
    """`grad_norms`, over shards and copies."""
    model = engine.make()
    alone = Lomo(book := engine.make(), lr=LR, clip_grad_norm=0.3, clip_passes="two")
    spread = engine.spread(model)
    ours = engine.lomo(spread, lr=LR, clip_grad_norm=0.3, clip_passes="two")
    count, mine = engine.batches()
    for step in range(2):
        ours.backward(engine.module(spread)(*batch(count * step + mine)))
        alone.backward(mean_loss(book, step, count))
        actual, expected = (
            {name: norm.item() for name, norm in optimizer.grad_norms().items()} for optimizer in (ours, alone)
        )
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-7)
        assert all(other == actual for other in everywhere(actual)), "every rank has the same bits"


def resumed_equals_one_process(engine: Engine, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    """A run that is interrupted and resumed has all bits of one process: random ones are the whole parameter's."""
    options = {"lr": 1e-3, "rounding": "stochastic", "seed": 3, "loss_scale": None, **settings}
    alone = Planted(dtype)
    theirs = Lomo(alone, **options)
    spread = engine.spread(Planted(dtype))
    ours = engine.lomo(spread, **options)
    for step in range(4):
        theirs.backward(alone(step))
        if step == 2:
            state, weights = ours.state_dict(), engine.weights(spread)
            model = Planted(dtype)
            model.load_state_dict(weights)
            spread = engine.spread(model)
            ours = engine.lomo(spread, **options | {"seed": 5})
            ours.load_state_dict(state)
        ours.backward(engine.module(spread)(step))
    assert_same_bits(engine.weights(spread), weights_of(alone))
    assert not same_bits(alone.layers[4].weight, Planted(dtype).layers[4].weight)
    assert ours.last_grad_norm.item() == pytest.approx(theirs.last_grad_norm.item(), rel=1e-9)
    assert ours.step_count.item() == 4
