"""DeepSpeed's ZeRO-3, in real processes over gloo, against SGD on one process with a float64 norm."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.engines import CLIPPED, ENGINES, LR, ZeRO3, equals_one_process, initialize, resumed_equals_one_process
from support.factored import RULES, rule_state
from support.models import (
    Options,
    Planted,
    assert_close,
    assert_same_bits,
    batch,
    loss_of,
    transformer_of_vectors,
    weights_of,
)
from support.processes import Collectives, Processes, lowest_peak
from support.textbook import Textbook
from torch import Tensor, nn
from torch.nn import functional as F

from lomo_kernels import Lomo

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip('needs DeepSpeed: pip install "deepspeed>=0.19.8,<0.20"', allow_module_level=True)


@pytest.fixture(scope="module")
def ranks(ranks_with_deepspeed: Callable[[int], Processes]) -> Callable[[int], Processes]:
    return ranks_with_deepspeed


def whole_weights(engine: Any) -> dict[str, Tensor]:
    return ENGINES["ZeRO-3"].weights(engine)


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


class Way(ZeRO3):
    """`zero`: what `initialize` takes."""

    def __init__(self, options: Options | None = None, **zero: Any) -> None:
        self.options, self._zero = options or Options(), zero

    def spread(self, model: nn.Module) -> Any:
        return initialize(model, **self._zero)


class Borrowed(Way):
    def make(self, options: Options | None = None) -> nn.Module:
        torch.manual_seed(0)
        return Borrowing()


class Groups(Way):
    def lomo(self, spread: Any, **settings: Any) -> Lomo:
        return Lomo(spread.module.named_parameters(), process_group=spread, **settings)


#: Beside that of the contract.
WAYS = {
    "parameter groups": Groups(),
    "all persistent": Way(threshold=10**6),
    "none persistent": Way(threshold=0),
    "padded": Way(Options(width=7)),  # no parameter divides by two or four
    "offload": Way(offload_param={"device": "cpu"}),
    "tied": Way(Options(tied=True)),
    "borrowed": Borrowed(),
    "frozen": Way(Options(frozen=("embedding", "positions", "blocks.0.up", "blocks.1.norm1"))),
    "unused": Way(Options(unused=True)),
    "checkpoint": Way(Options(checkpoint="non-reentrant")),
    "reentrant": Way(Options(checkpoint="reentrant")),
    "reentrant and frozen": Way(Options(checkpoint="reentrant", frozen=("blocks.0", "gain"))),
}


def train(rank: int, way: str, settings: dict[str, Any]) -> None:
    equals_one_process(WAYS[way], settings)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "rule"), [(way, rule) for way in WAYS for rule in RULES if (way, rule) != ("parameter groups", "rows")]
)
def test_rules_with_factors(ranks: Any, way: str, rule: str) -> None:
    """Parts that end within rows. Groups do not say what is an embedding, whose columns "rows" scales."""
    ranks(2).call(train, way, {"rule": rule, "lr": 0.003, "weight_decay": 0.1})
    if way == "padded":
        ranks(4).call(train, way, {"rule": rule, "lr": 0.003})


def test_four_ranks(ranks: Any) -> None:
    ranks(4).call(train, "padded", CLIPPED)


def test_a_model_made_in_parts(ranks: Any) -> None:
    ranks(2).call(made_in_parts)


def test_one_rank(ranks: Any) -> None:
    ranks(1).call(train, "parameter groups", CLIPPED)
    ranks(1).call(train, "parameter groups", {"rule": "adalomo", "lr": 0.003})


# ---- What DeepSpeed does beside the optimizer ------------------------------------------------------------------------


def persistent(rank: int) -> None:
    """Small parameters that are whole on every rank at all times have the new values as soon as a step has ended."""
    model = ENGINES["ZeRO-3"].make()
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
    model = WAYS["frozen"].make()
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
    model = ENGINES["ZeRO-3"].make()
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
    model = ENGINES["ZeRO-3"].make()
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


class Persistence(ZeRO3):
    """The resumed run has another number of persistent parameters."""

    def __init__(self) -> None:
        self._thresholds = iter((50, 0))

    def spread(self, model: nn.Module) -> Any:
        return initialize(model, threshold=next(self._thresholds))


def resumed_with_others_persistent(rank: int, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    resumed_equals_one_process(Persistence(), dtype, settings)


def test_low_precision(ranks: Any) -> None:
    ranks(2).call(low_precision)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_resumed_with_other_persistent_parameters(ranks: Any, dtype: torch.dtype) -> None:
    ranks(2).call(resumed_with_others_persistent, dtype, {"clip_grad_norm": 1e6, "clip_passes": "two"})
    ranks(4).call(resumed_with_others_persistent, dtype, {})
    ranks(4).call(resumed_with_others_persistent, dtype, {"rule": "adalomo"})


def some_steps(rank: int, saved: tuple[dict[str, Tensor], dict[str, Any]] | None, steps: range) -> Any:
    model = Planted(torch.bfloat16)
    if saved is not None:
        model.load_state_dict(saved[0])
    engine = initialize(model)
    optimizer = Lomo(engine, seed=3 if saved is None else 5, **ADALOMO)
    if saved is not None:
        optimizer.load_state_dict(saved[1])
    for step in steps:
        optimizer.backward(engine.module(step))
    return whole_weights(engine), optimizer.state_dict()


ADALOMO: dict[str, Any] = {"rule": "adalomo", "lr": 1e-3, "rounding": "stochastic", "loss_scale": None}


def test_a_rules_state_goes_on_on_more_ranks_and_on_one(ranks: Any) -> None:
    alone, last = Planted(torch.bfloat16), Planted(torch.bfloat16)
    theirs, ours = Lomo(alone, seed=3, **ADALOMO), Lomo(last, seed=7, **ADALOMO)
    saved = ranks(2).call(some_steps, None, range(2))[0]
    weights, state = ranks(4).call(some_steps, saved, range(2, 4))[0]
    last.load_state_dict(weights)
    ours.load_state_dict(state)
    for step in range(5):
        theirs.backward(alone(step))
    ours.backward(last(4))
    assert_same_bits(weights_of(last), weights_of(alone))
    assert_same_bits(rule_state(ours), rule_state(theirs))


# ---- Uses that are refused -------------------------------------------------------------------------------------------


def module_without_engine(rank: int) -> None:
    model = ENGINES["ZeRO-3"].make()
    engine = initialize(model)
    for given in (engine.module, list(model.parameters())):
        with pytest.raises(ValueError, match=r"Lomo\(engine, \.\.\.\)"):
            Lomo(given, lr=LR)
    with pytest.raises(ValueError, match="none of the DeepSpeed engine's"):
        Lomo([nn.Parameter(torch.zeros(3))], lr=LR, process_group=engine)
    with pytest.raises(ValueError, match="leave process_group out"):
        Lomo(engine, lr=LR, process_group=dist.group.WORLD)
    Lomo(engine, lr=LR)  # nothing was claimed


def forward_of_the_engine(rank: int) -> None:
    model = ENGINES["ZeRO-3"].make()
    engine = initialize(model)
    optimizer = Lomo(engine, lr=LR)
    before = whole_weights(engine)
    with pytest.raises(RuntimeError, match=r"engine\.module\(\.\.\.\) in place of engine"):
        optimizer.backward(engine(*batch(rank)))
    assert_same_bits(whole_weights(engine), before)


def other_engines(rank: int) -> None:
    with pytest.raises(ValueError, match=r'stage 0.*"zero_optimization": {"stage": 3}.*process_group='):
        Lomo(initialize(ENGINES["ZeRO-3"].make(), stage=0), lr=LR)
    with pytest.raises(ValueError, match="stage 3 and a DeepSpeedZeroOptimizer_Stage3; initialize it with"):
        import deepspeed

        model = ENGINES["ZeRO-3"].make()
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
        Lomo(initialize(ENGINES["ZeRO-3"].make(), config={"communication_data_type": "fp32"}), lr=LR)
    config = {"gradient_clipping": 1.0, "gradient_accumulation_steps": 2}
    with pytest.raises(
        ValueError, match=r"gradient_clipping \(use Lomo's clip_grad_norm\), gradient_accumulation_steps"
    ):
        Lomo(initialize(ENGINES["ZeRO-3"].make(), config=config), lr=LR)


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
            model = ENGINES["ZeRO-3"].make()
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
        model = ENGINES["ZeRO-3"].make()
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
