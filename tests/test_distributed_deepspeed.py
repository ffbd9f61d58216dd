"""DeepSpeed's ZeRO-3, in real processes over gloo, against SGD on one process with a float64 norm."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.models import (
    Options,
    assert_close,
    assert_same_bits,
    batch,
    loss_of,
    same_bits,
    transformer_of_vectors,
    weights_of,
)
from support.processes import Collectives, Processes, by_world, lowest_peak
from support.textbook import Textbook
from torch import Tensor, nn
from torch.nn import functional as F

from lomo_kernels import Lomo

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip('needs DeepSpeed: pip install "deepspeed>=0.19.8,<0.20"', allow_module_level=True)

LR = 0.3
CLIPPED = {"clip_grad_norm": 0.3, "weight_decay": 0.01, "clip_passes": "two"}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[int], Processes]]:
    """As that of conftest.py, with processes of their own: DeepSpeed exchanges functions of torch."""
    yield from by_world()


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


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """All parameters, gathered. Persistent ones are freed by this, as by nothing in a step."""
    import deepspeed

    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: param.detach().clone() for name, param in named.items()}


class Borrowing(nn.Module):
    """Uses a parameter of another module, as tied heads are often written: DeepSpeed calls it external."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(19, 6)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 6)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.out(self.norm(self.embedding(tokens)))
        return F.cross_entropy(F.linear(x, self.embedding.weight).view(-1, 19), targets.view(-1))


#: Name: (model, or its options; what `initialize` takes).
WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (Options(), {}),
    "all persistent": (Options(), {"threshold": 10**6}),
    "none persistent": (Options(), {"threshold": 0}),
    "padded": (Options(width=7), {}),  # no parameter divides by two or four
    "offload": (Options(), {"offload_param": {"device": "cpu"}}),
    "tied": (Options(tied=True), {}),
    "borrowed": (Borrowing, {}),
    "frozen": (Options(frozen=("embedding", "positions", "blocks.0.up", "blocks.1.norm1")), {}),
    "unused": (Options(unused=True), {}),
    "checkpoint": (Options(checkpoint="non-reentrant"), {}),
    "reentrant": (Options(checkpoint="reentrant"), {}),
    "reentrant and frozen": (Options(checkpoint="reentrant", frozen=("blocks.0", "gain")), {}),
}


def model_of(way: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    made, zero = WAYS[way]
    return transformer_of_vectors(made) if isinstance(made, Options) else made(), zero


def train(rank: int, way: str, settings: dict[str, Any]) -> None:
    model, zero = model_of(way)
    book = Textbook(model, lr=LR, **{name: value for name, value in settings.items() if name != "loss_scale"})
    before = weights_of(book.model)
    engine = initialize(model, **zero)
    optimizer = Lomo(engine, lr=LR, **settings)
    world = dist.get_world_size()
    for step in range(5):
        losses = [loss_of(book.model, world * step + n) for n in range(world)]
        loss = engine.module(*batch(world * step + rank))
        assert loss.item() == pytest.approx(losses[rank].item(), abs=2e-6)
        book.step(sum(losses) / world)
        optimizer.backward(loss)
        assert optimizer.last_grad_norm.item() == pytest.approx(book.norm, rel=1e-6)
        assert all(param.grad is None for param in model.parameters())
        with torch.no_grad():  # an evaluation interrupts what DeepSpeed has recorded
            assert engine.module(*batch(7)).item() == pytest.approx(loss_of(book.model, 7).item(), abs=2e-6)
    weights, expected = whole_weights(engine), weights_of(book.model)
    for name, param in model.named_parameters():
        assert (weights[name] - expected[name]).abs().max().item() <= 1e-6, name
        moved = param.requires_grad and not name.startswith("spare")
        assert moved != torch.equal(expected[name], before[name]), name
    assert optimizer.step_count.item() == 5 and optimizer.skipped_steps.item() == 0


def made_in_parts(rank: int) -> None:
    torch.manual_seed(0)
    book = Textbook(Borrowing(), lr=LR, clip_grad_norm=0.3)
    torch.manual_seed(0)
    engine = initialize(Borrowing)
    optimizer = Lomo(engine, lr=LR, clip_grad_norm=0.3, clip_passes="two")
    for step in range(5):
        book.step(sum(loss_of(book.model, 2 * step + n) for n in range(2)) / 2)
        optimizer.backward(engine.module(*batch(2 * step + rank)))
    assert_close(whole_weights(engine), book.model)


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks(ranks: Any, way: str) -> None:
    ranks(2).call(train, way, CLIPPED)


@pytest.mark.parametrize("way", ["plain", "padded"])
def test_four_ranks(ranks: Any, way: str) -> None:
    ranks(4).call(train, way, CLIPPED)


def test_a_model_made_in_parts(ranks: Any) -> None:
    ranks(2).call(made_in_parts)


def test_one_rank(ranks: Any) -> None:
    ranks(1).call(train, "plain", CLIPPED)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_grad_norm": 1e6, "clip_passes": "two"},
        CLIPPED | {"clip_passes": "one"},
        {"clip_grad_value": 1e-2, "clip_grad_norm": 0.1, "loss_scale": "dynamic", "clip_passes": "two"},
    ],
    ids=str,
)
def test_settings(ranks: Any, settings: dict[str, Any]) -> None:
    ranks(2).call(train, "plain", settings)


# ---- What DeepSpeed does beside the optimizer ------------------------------------------------------------------------


def persistent(rank: int) -> None:
    """Small parameters that are whole on every rank at all times have the new values as soon as a step has ended."""
    model, _ = model_of("plain")
    book = Textbook(model, lr=LR, clip_grad_norm=0.3)
    engine = initialize(model)
    optimizer = Lomo(engine, lr=LR, clip_grad_norm=0.3, clip_passes="two")
    small = {name: param for name, param in model.named_parameters() if param.ds_persist}
    assert "blocks.0.norm1.weight" in small and "head.weight" not in small
    optimizer.backward(engine.module(*batch(rank)))
    before = {name: param.detach().clone() for name, param in small.items()}
    optimizer.backward(engine.module(*batch(2 + rank)))
    for step in range(2):
        book.step(sum(loss_of(book.model, 2 * step + n) for n in range(2)) / 2)
    for name, param in small.items():
        assert param.shape == param.ds_shape
        assert not torch.equal(param, before[name]), name
        assert (param - book.model.get_parameter(name)).abs().max().item() <= 1e-6, name


def freed(rank: int) -> None:
    """Large parameters are freed after each backward, also those of modules whose input needs no gradient."""
    model, _ = model_of("frozen")
    engine = initialize(model, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0)
    optimizer = Lomo(engine, lr=LR, clip_grad_norm=0.3, clip_passes="two")
    for _ in range(3):
        loss = engine.module(*batch(rank))
        optimizer.grad_norm(loss)
        assert not [name for name, param in model.named_parameters() if param.numel() and not param.ds_persist]
        optimizer.fused_backward(loss, LR)
        assert not [name for name, param in model.named_parameters() if param.numel() and not param.ds_persist]


def prefetching(rank: int, settings: dict[str, Any]) -> None:
    """DeepSpeed gathers ahead once it has seen a step twice: two backwards in each must not confuse it."""
    model, _ = model_of("plain")
    engine = initialize(model)
    optimizer = Lomo(engine, lr=LR, **settings)
    for step in range(4):
        optimizer.backward(engine.module(*batch(2 * step + rank)))
    coordinator = engine.optimizer.get_param_coordinator()
    assert coordinator.is_complete_trace()


def test_persistent_parameters_change(ranks: Any) -> None:
    ranks(2).call(persistent)


def test_large_parameters_are_freed(ranks: Any) -> None:
    ranks(2).call(freed)


@pytest.mark.parametrize("settings", [{}, CLIPPED, CLIPPED | {"clip_passes": "one"}], ids=str)
def test_prefetching_goes_on(ranks: Any, settings: dict[str, Any]) -> None:
    ranks(2).call(prefetching, settings)


# ---- Traffic and memory ----------------------------------------------------------------------------------------------


def traffic(rank: int, settings: dict[str, Any]) -> None:
    model, _ = model_of("plain")
    engine = initialize(model)
    optimizer = Lomo(engine, lr=LR, **settings)
    optimizer.backward(engine.module(*batch(rank)))
    loss = engine.module(*batch(2 + rank))
    with Collectives() as seen:
        optimizer.backward(loss)
    kinds = {kind for kind in seen.sent if "gather" not in kind}
    (scatter,) = (kind for kind in kinds if "reduce_scatter" in kind)
    assert kinds == {"allreduce_", scatter}
    assert seen.sent["allreduce_"] == [1]  # the sum of squares
    passes = 2 if settings.get("clip_passes") == "two" else 1
    padded = sum(2 * param.ds_tensor.numel() for param in model.parameters())
    assert sum(seen.sent[scatter]) == passes * padded
    assert len(seen.sent[scatter]) <= 4 * passes < len(list(model.parameters()))  # small ones travel together


@pytest.mark.parametrize("settings", [{}, CLIPPED | {"clip_passes": "two"}, CLIPPED | {"clip_passes": "one"}], ids=str)
def test_no_gradient_is_reduced_to_every_rank(ranks: Any, settings: dict[str, Any]) -> None:
    ranks(2).call(traffic, settings)


def peak_above_weights(rank: int, count: int, settings: dict[str, Any]) -> int:
    """Of a step of `count` matrices, each large, also in parts."""
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(count)))
    engine = initialize(model, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0)
    optimizer = Lomo(engine, lr=1e-3, **settings)
    x = torch.randn(4, 256)

    def step() -> None:
        optimizer.backward(engine.module(x).square().sum())

    for _ in range(3):
        step()
    with mock.patch("lomo_kernels.optim.engines.zero3.IN_FLIGHT_BYTES", 0):  # one at a time
        return lowest_peak(step)


def test_gradients_do_not_pile_up(ranks: Any) -> None:
    """By a matrix the peak grows by its activations; with one pass and clipping also by its part of the gradient."""

    def grown(settings: dict[str, Any]) -> float:
        few, many = (ranks(2).call(peak_above_weights, count, settings)[0] for count in (4, 12))
        return (many - few) / 8

    matrix = 4 * 256 * 256
    assert grown({}) < matrix / 4
    assert grown({"clip_grad_norm": 1.0, "clip_passes": "two"}) < matrix / 4
    assert matrix / 2 <= grown({"clip_grad_norm": 1.0, "clip_passes": "one"}) < matrix * 3 / 4


# ---- Precision -------------------------------------------------------------------------------------------------------


def low_precision(rank: int) -> None:
    """bfloat16 throughout: what the ranks sum, too. The weights are within what that rounds."""
    model = transformer_of_vectors(Options(dtype=torch.bfloat16))
    book = Textbook(model, lr=LR, clip_grad_norm=0.3)
    engine = initialize(model, config={"bf16": {"enabled": True}})
    optimizer = Lomo(engine, lr=LR, clip_grad_norm=0.3, clip_passes="two")
    before = weights_of(book.model)
    for step in range(5):
        book.step(sum(loss_of(book.model, 2 * step + n) for n in range(2)) / 2)
        optimizer.backward(engine.module(*batch(2 * step + rank)))
        assert optimizer.last_grad_norm.item() == pytest.approx(book.norm, rel=2**-6)
    weights = whole_weights(engine)
    for name, expected in weights_of(book.model).items():
        assert weights[name].dtype is torch.bfloat16
        # Changes below half of a weight's last bit are lost, those of the norms among them.
        assert "norm" in name or not torch.equal(weights[name], before[name]), name
        assert (weights[name] - expected).abs().max() <= 5 * 2**-8 * expected.abs().max(), name


class Planted(nn.Module):
    """Gradients known beforehand and the same on every rank, so that averaging is exact and bits can be compared."""

    SHAPES = ((19, 6), (7,), (5, 4, 3), (1,), (600, 121))  # the last one too large to wait for others

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape).to(dtype)) for shape in self.SHAPES)
        self.layers = nn.ModuleList(One(param) for param in self.weights)

    def forward(self, step: int) -> Tensor:
        return sum(layer(100 * step + index) for index, layer in enumerate(self.layers))


class One(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        grad = torch.randn(self.weight.shape, generator=generator).to(self.weight.dtype)
        return (self.weight.float() * grad.float()).sum()


def same_bits_as_one_process(rank: int, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    """Also of a run that was interrupted and resumed, with another number of persistent parameters."""
    options = {"lr": 1e-3, "rounding": "stochastic", "seed": 3, "loss_scale": None, **settings}
    alone = Planted(dtype)
    theirs = Lomo(alone, **options)
    engine = initialize(Planted(dtype))
    ours = Lomo(engine, **options)
    for step in range(4):
        theirs.backward(alone(step))
        if step == 2:
            state, weights = ours.state_dict(), whole_weights(engine)
            resumed = Planted(dtype)
            resumed.load_state_dict({f"weights.{i}": weights[f"weights.{i}"] for i in range(5)}, strict=False)
            engine = initialize(resumed, threshold=0)
            ours = Lomo(engine, **options | {"seed": 5})
            ours.load_state_dict(state)
        ours.backward(engine.module(step))
    assert_same_bits(whole_weights(engine), weights_of(alone))
    assert not same_bits(alone.weights[4], Planted(dtype).weights[4])
    assert ours.last_grad_norm.item() == pytest.approx(theirs.last_grad_norm.item(), rel=1e-9)
    assert ours.step_count.item() == 4


def test_low_precision(ranks: Any) -> None:
    ranks(2).call(low_precision)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_is_that_of_the_whole_parameter(ranks: Any, dtype: torch.dtype) -> None:
    ranks(2).call(same_bits_as_one_process, dtype, {"clip_grad_norm": 1e6, "clip_passes": "two"})
    ranks(4).call(same_bits_as_one_process, dtype, {})


# ---- Steps that are skipped, and parts of steps ----------------------------------------------------------------------


def all_skip(rank: int, settings: dict[str, Any], bad: float) -> None:
    model, _ = model_of("plain")
    engine = initialize(model)
    optimizer = Lomo(engine, lr=LR, **settings)
    optimizer.backward(engine.module(*batch(rank)))
    before, scale = whole_weights(engine), optimizer.loss_scale.item()
    optimizer.backward(engine.module(*batch(rank)) * (bad if rank == 1 else 1.0))
    assert optimizer.skipped_steps.item() == 1 and not optimizer.last_grad_norm.isfinite()
    if settings:
        assert_same_bits(whole_weights(engine), before)
    assert all(weight.isfinite().all() for weight in whole_weights(engine).values())
    assert optimizer.loss_scale.item() == (scale / 2 if "loss_scale" in settings else scale)
    optimizer.backward(engine.module(*batch(rank)))
    assert optimizer.skipped_steps.item() == 1 and optimizer.step_count.item() == 3
    after = whole_weights(engine)
    assert not same_bits(after["head.weight"], before["head.weight"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_grad_norm": 0.3, "clip_passes": "two"},
        {"clip_grad_norm": 0.3, "clip_passes": "one"},
        {"loss_scale": "dynamic", "clip_passes": "two"},
    ],
    ids=str,
)
def test_one_rank_with_a_nan(ranks: Any, settings: dict[str, Any]) -> None:
    ranks(2).call(all_skip, settings, math.nan)


def accumulation(rank: int, how: str, clip: float | None) -> None:
    model, _ = model_of("plain")
    book = Textbook(model, lr=LR, clip_grad_norm=clip)
    engine = initialize(model)
    # Parameter groups, for once.
    optimizer = Lomo(model.named_parameters(), lr=LR, clip_grad_norm=clip, process_group=engine, clip_passes="two")
    for step in range(5):
        for part in range(3):
            first = 6 * step + 2 * part
            book.backward(sum(loss_of(book.model, first + n) for n in range(2)) / 2)
            loss = engine.module(*batch(first + rank))
            if how == "step":
                loss.backward()
            else:
                with optimizer.accumulate() if part < 2 else nullcontext():
                    optimizer.backward(loss)
        book.apply()
        book.zero_grad()
        if how == "step":
            kept = model.head.weight.grad.clone()
            optimizer.step()
            assert torch.equal(model.head.weight.grad, kept)
            optimizer.zero_grad()
        assert optimizer.last_grad_norm.item() == pytest.approx(book.norm, rel=1e-6)
        assert all(param.grad is None for param in model.parameters())
    assert_close(whole_weights(engine), book.model)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("how", ["accumulate", "step"])
def test_accumulation(ranks: Any, how: str, clip: float | None) -> None:
    ranks(2).call(accumulation, how, clip)


# ---- Uses that are refused -------------------------------------------------------------------------------------------


def module_without_engine(rank: int) -> None:
    model, _ = model_of("plain")
    engine = initialize(model)
    for given in (engine.module, list(model.parameters())):
        with pytest.raises(ValueError, match=r"Lomo\(engine, \.\.\.\)"):
            Lomo(given, lr=LR)
    with pytest.raises(ValueError, match="none of the DeepSpeed engine's"):
        Lomo([nn.Parameter(torch.zeros(3))], lr=LR, process_group=engine)
    with pytest.raises(ValueError, match="leave process_group out"):
        Lomo(engine, lr=LR, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="has to be summed first"):
        Lomo(engine, lr=LR, fused_layers=True)
    Lomo(engine, lr=LR)  # nothing was claimed


def forward_of_the_engine(rank: int) -> None:
    model, _ = model_of("plain")
    engine = initialize(model)
    optimizer = Lomo(engine, lr=LR)
    before = whole_weights(engine)
    with pytest.raises(RuntimeError, match=r"engine\.module\(\.\.\.\) in place of engine"):
        optimizer.backward(engine(*batch(rank)))
    assert_same_bits(whole_weights(engine), before)


def other_engines(rank: int) -> None:
    with pytest.raises(ValueError, match=r'stage 0.*"zero_optimization": {"stage": 3}.*process_group='):
        Lomo(initialize(model_of("plain")[0], stage=0), lr=LR)
    with pytest.raises(ValueError, match="stage 3 and a DeepSpeedZeroOptimizer_Stage3; initialize it with"):
        import deepspeed

        model = model_of("plain")[0]
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,
        }
        engine, *_ = deepspeed.initialize(
            model=model, config=config, optimizer=torch.optim.SGD(model.parameters(), lr=LR)
        )
        Lomo(engine, lr=LR)
    with pytest.raises(ValueError, match=r"communication_data_type \(use nothing"):
        Lomo(initialize(model_of("plain")[0], config={"communication_data_type": "fp32"}), lr=LR)
    config = {"gradient_clipping": 1.0, "gradient_accumulation_steps": 2}
    with pytest.raises(
        ValueError, match=r"gradient_clipping \(use Lomo's clip_grad_norm\), gradient_accumulation_steps"
    ):
        Lomo(initialize(model_of("plain")[0], config=config), lr=LR)


def versions(rank: int) -> None:
    """What pyproject.toml has, and nothing else."""
    initialize(nn.Linear(2, 2))
    from lomo_kernels.optim.engines.zero3 import check_version

    for version in ("0.19.8", "0.19.8+from.source", "0.19.30"):
        check_version(version)
    for version in ("0.18.9", "0.19.3", "0.19.7", "0.20.0"):
        with pytest.raises(ImportError, match=rf"is version {version}, expected .*>=0\.19\.8.*pip install"):
            check_version(version)


def made_before_the_engine(rank: int) -> None:
    for group in (False, dist.group.WORLD):
        for given in (lambda model: model, lambda model: model.parameters()):
            model, _ = model_of("plain")
            optimizer = Lomo(given(model), lr=LR, process_group=group)
            engine = initialize(model)
            before = whole_weights(engine)
            with pytest.raises(RuntimeError, match=r"Make the optimizer after deepspeed\.initialize, from the engine"):
                optimizer.backward(engine.module(*batch(rank)))
            assert_same_bits(whole_weights(engine), before)
            optimizer.remove()


def given_to_the_engine(rank: int) -> None:
    """DeepSpeed's optimizers put parts of their own into param_groups, and no gradient into .grad."""
    initialize(nn.Linear(2, 2))  # sets DeepSpeed up for these processes
    import deepspeed

    for stage in (1, 2, 3):
        model, _ = model_of("plain")
        optimizer = Lomo(model, lr=LR)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
        engine.backward(engine(*batch(rank)))
        with pytest.raises(RuntimeError, match=r"param_groups.* by an engine that was given this optimizer"):
            engine.step()
        optimizer.remove()


@pytest.mark.parametrize(
    "check",
    [
        module_without_engine,
        forward_of_the_engine,
        other_engines,
        versions,
        made_before_the_engine,
        given_to_the_engine,
    ],
    ids=lambda check: check.__name__,
)
def test_refused(ranks: Any, check: Callable[[int], None]) -> None:
    ranks(2).call(check)
