"""What every engine promises: several ranks train as one process does. `support.engines.ENGINES` has the engines."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.engines import (
    CLIPPED,
    ENGINES,
    LR,
    equals_one_process,
    everywhere,
    mean_loss,
    model_and_book,
    norms_equal_one_process,
    resumed_equals_one_process,
)
from support.factored import FEW_RULES, RULES, rule_state
from support.models import Options, assert_close, assert_same_bits, batch, same_bits
from support.processes import Failed, Processes

from lomo_kernels import Lomo

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason='needs DeepSpeed: pip install "deepspeed>=0.19.8,<0.20"'
)
NAMES = [pytest.param(name, marks=[needs_deepspeed] if name == "ZeRO-3" else []) for name in ENGINES]
OF_RULES = [pytest.param({"rule": rule.values[0], "lr": 0.003}, marks=rule.marks) for rule in FEW_RULES]
EVERY_ENGINE = pytest.mark.parametrize("engine", NAMES)


@pytest.fixture
def call(ranks: Any, ranks_with_deepspeed: Any) -> Callable[..., list[Any]]:
    """call(world, function, engine, ...): ``function(rank, engine, ...)`` on every rank."""

    def call(world: int, function: Callable[..., Any], engine: str, *arguments: Any) -> list[Any]:
        of = ranks_with_deepspeed if engine == "ZeRO-3" else ranks
        return of(world).call(function, engine, *arguments)

    return call


# ---- Steps ----------------------------------------------------------------------------------------------------------


def steps(rank: int, engine: str, settings: dict[str, Any]) -> None:
    equals_one_process(ENGINES[engine], settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        CLIPPED,
        CLIPPED | {"clip_passes": "one"},
        pytest.param({"clip_grad_norm": 1e6, "clip_passes": "two"}, marks=pytest.mark.slow),
        pytest.param({"clip_grad_value": 1e-2}, marks=pytest.mark.slow),
        {"clip_grad_value": 1e-2, "clip_grad_norm": 0.1, "loss_scale": "dynamic", "clip_passes": "two"},
        {"loss_scale": 1024.0},
    ],
    ids=str,
)
@EVERY_ENGINE
def test_two_ranks(call: Any, engine: str, settings: dict[str, Any]) -> None:
    call(2, steps, engine, settings)


#: Of rules with factors, at a learning rate that suits an update of size 1.
FACTORED = [
    {},
    {"clip_grad_norm": 0.3, "weight_decay": 0.1, "clip_passes": "one"},
    {"clip_grad_value": 1e-2, "loss_scale": "dynamic", "clip_passes": "two"},
]


@pytest.mark.parametrize("rule", FEW_RULES)
@EVERY_ENGINE
def test_rules_with_factors(call: Any, engine: str, rule: str) -> None:
    """Sums along rows and columns are those of the whole, averaged gradient."""
    for settings in FACTORED:
        call(2, steps, engine, settings | {"rule": rule, "lr": 0.003})
    call(4, steps, engine, {"rule": rule, "lr": 0.003})


@EVERY_ENGINE
def test_four_ranks(call: Any, engine: str) -> None:
    """No model dimension but the widths is divisible by four, and the vocabulary not by two."""
    call(4, steps, engine, CLIPPED)


def norms(rank: int, engine: str) -> None:
    norms_equal_one_process(ENGINES[engine])


@pytest.mark.parametrize("world", [2, 4])
@EVERY_ENGINE
def test_norms_of_whole_parameters(call: Any, engine: str, world: int) -> None:
    """`grad_norms`, over shards and copies."""
    call(world, norms, engine)


def accumulation(rank: int, engine: str, how: str, settings: dict[str, Any]) -> None:
    that = ENGINES[engine]
    settings = {"lr": 0.1} | settings  # with 0.3 rounding alone comes to more than 1e-6
    model, book = model_and_book(that, settings)
    spread = that.spread(model)
    optimizer = that.lomo(spread, clip_passes="two", **settings)
    count, mine = that.batches()
    module = that.module(spread)
    for step in range(5):
        for part in range(3):
            book.backward(mean_loss(book.model, 3 * step + part, count))
            loss = module(*batch(count * (3 * step + part) + mine))
            if how == "step":
                loss.backward()
            else:
                with optimizer.accumulate() if part < 2 else nullcontext():
                    optimizer.backward(loss)
        book.apply()
        book.zero_grad()
        if how == "step":
            grads = {name: param.grad for name, param in module.named_parameters() if param.requires_grad}
            kept = {name: grad.clone() for name, grad in grads.items()}
            optimizer.step()
            named = dict(module.named_parameters())
            for name, grad in grads.items():
                assert named[name].grad is grad and torch.equal(grad, kept[name]), name
            optimizer.zero_grad()
        assert optimizer.last_grad_norm.item() == pytest.approx(book.norm, rel=1e-6)
        assert all(param.grad is None for param in module.parameters())
    assert_close(that.weights(spread), book.model, atol=2e-6 if "rule" in settings else 1e-6)


@pytest.mark.parametrize("settings", [{}, {"clip_grad_norm": 0.3}, *OF_RULES], ids=str)
@pytest.mark.parametrize("how", ["accumulate", "step"])
@EVERY_ENGINE
def test_accumulation(call: Any, engine: str, how: str, settings: dict[str, Any]) -> None:
    call(2, accumulation, engine, how, settings)


# ---- Steps that are skipped -----------------------------------------------------------------------------------------


def all_skip(rank: int, engine: str, dtype: torch.dtype, bad: float, settings: dict[str, Any]) -> None:
    """Where ranks have batches of their own, only rank 1 sees what is bad."""
    that = ENGINES[engine]
    spread = that.spread(that.make(Options(dtype=dtype)))
    optimizer = that.lomo(spread, **{"lr": LR} | settings)
    count, mine = that.batches()
    module = that.module(spread)
    optimizer.backward(module(*batch(mine)))
    before, scale = that.weights(spread), optimizer.loss_scale.item()
    state = rule_state(optimizer)
    optimizer.backward(module(*batch(mine)) * (bad if mine == count - 1 else 1.0))
    assert optimizer.skipped_steps.item() == 1 and not optimizer.last_grad_norm.isfinite()
    scaled = dtype is torch.float16 or "loss_scale" in settings
    if settings or scaled:
        assert_same_bits(that.weights(spread), before)
        assert_same_bits(rule_state(optimizer), state)
    assert all(weight.isfinite().all() for weight in that.weights(spread).values())
    assert optimizer.loss_scale.item() == (scale / 2 if scaled else scale)
    optimizer.backward(module(*batch(mine)))
    assert optimizer.skipped_steps.item() == 1 and optimizer.step_count.item() == 3
    after = that.weights(spread)
    assert not same_bits(after["head.weight"], before["head.weight"])
    state = rule_state(optimizer)
    for other, of_other in zip(everywhere(after), everywhere(state), strict=True):
        assert_same_bits(after, other)
        assert_same_bits(state, of_other)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_grad_norm": 0.3, "clip_passes": "two"},
        {"clip_grad_norm": 0.3, "clip_passes": "one"},
        {"loss_scale": "dynamic", "clip_passes": "two"},
        *OF_RULES,
    ],
    ids=str,
)
@EVERY_ENGINE
def test_all_skip_what_one_rank_cannot_do(call: Any, engine: str, settings: dict[str, Any]) -> None:
    for dtype, bad in ((torch.float32, math.nan), (torch.float32, math.inf), (torch.float16, math.inf)):
        call(2, all_skip, engine, dtype, bad, settings)


# ---- Bits, and a run that is resumed --------------------------------------------------------------------------------


def resumed(rank: int, engine: str, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    resumed_equals_one_process(ENGINES[engine], dtype, settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@EVERY_ENGINE
def test_a_resumed_run_has_the_bits_of_one_process(call: Any, engine: str, dtype: torch.dtype) -> None:
    call(2, resumed, engine, dtype, {"clip_grad_norm": 1e6, "clip_passes": "two"})
    call(4, resumed, engine, dtype, {})
    for rule in RULES:
        call(2, resumed, engine, dtype, {"rule": rule})


@EVERY_ENGINE
def test_a_resumed_run_of_split_weights_has_the_bits_of_one_process(call: Any, engine: str) -> None:
    call(2, resumed, engine, torch.bfloat16, {"rounding": "split", "clip_grad_norm": 1e6, "clip_passes": "two"})
    call(4, resumed, engine, torch.bfloat16, {"rounding": "split"})
    call(2, resumed, engine, torch.bfloat16, {"rounding": "split", "rule": "rows"})


# ---- `clip_memory`: all keep every gradient, or none does, also if only some have room for theirs -------------------


def keep_alike(rank: int, engine: str, share: float) -> None:
    that = ENGINES[engine]

    def made(**options: Any) -> tuple[Any, Lomo]:
        spread = that.spread(that.make(Options()))
        return spread, that.lomo(spread, lr=0.1, clip_grad_norm=0.3, **options)

    _, whole = made()
    # Under FSDP2 rank 0 has the larger shards. Between both ranks' needs, only rank 1 has room for its gradients.
    needs = everywhere(sum(managed.bytes for managed in whole._training.managed_params))
    budget = min(needs) + share * (max(needs) - min(needs)) + (share - 0.5)
    spread, optimizer = made(clip_memory=budget)
    twin, reference = made(clip_memory=0)
    backwards: list[int] = []
    _, mine = that.batches()

    def count(_: Any, __: Any, output: torch.Tensor) -> None:  # not at the loss, which may run once
        output.register_hook(lambda _: backwards.append(1))

    that.module(spread).blocks[0].register_forward_hook(count)
    for step in range(3):
        optimizer.backward(that.module(spread)(*batch(10 * mine + step)))
        reference.backward(that.module(twin)(*batch(10 * mine + step)))
    fits = budget >= max(needs)
    assert len(backwards) == 3 if fits else len(backwards) > 5, "one for each step, or two and the comparison"
    weights = that.weights(twin)
    if len(needs) == 2:
        assert_same_bits(that.weights(spread), weights)
    for name, weight in that.weights(
        spread
    ).items():  # four ranks add up in an order that a message's other parts decide
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@EVERY_ENGINE
def test_ranks_keep_gradients_alike(call: Any, engine: str, share: float) -> None:
    call(2, keep_alike, engine, share)


@EVERY_ENGINE
def test_four_ranks_keep_gradients_alike(call: Any, engine: str) -> None:
    call(4, keep_alike, engine, 0.5)


# ---- What is refused ------------------------------------------------------------------------------------------------


def ranks_that_differ(rank: int, engine: str) -> None:
    that = ENGINES[engine]
    spread = that.spread(that.make())
    for words, options in {
        "seeds": {"seed": rank},
        "options": {"clip_memory": rank * 1000, "clip_grad_norm": 1.0},
        "hyperparameters": {"weight_decay": 0.1 * rank},
    }.items():
        with pytest.raises(ValueError, match=f"{words} on rank 1 and on rank 0 differ"):
            that.lomo(spread, lr=LR, **options)
    that.module(spread).norm.weight.requires_grad_(rank == 0)
    with pytest.raises(ValueError, match="frozen parameters on rank 1 and on rank 0 differ"):
        that.lomo(spread, lr=LR)


def fused(rank: int, engine: str) -> None:
    that = ENGINES[engine]
    spread = that.spread(that.make())
    with pytest.raises(ValueError, match="has to be summed first"):
        that.lomo(spread, lr=LR, fused_layers=True)
    that.lomo(spread, lr=LR)  # nothing was claimed


@pytest.mark.parametrize("check", [ranks_that_differ, fused], ids=lambda check: check.__name__)
@EVERY_ENGINE
def test_refused(call: Any, engine: str, check: Callable[[int, str], None]) -> None:
    call(2, check, engine)


# ---- A rank that dies or hangs in the middle of a step: the others get an error, within the group's timeout ---------

TIMEOUT = 3.0  # seconds


def stops(rank: int, engine: str, what: str) -> None:
    """Raises a RuntimeError that says after how many seconds the other rank was given up."""
    that = ENGINES[engine]
    spread = that.spread(that.make(Options()))
    module = that.module(spread)
    optimizer = that.lomo(spread, lr=0.1, clip_grad_norm=1.0, clip_passes="two")
    optimizer.backward(module(*batch(rank)))
    if rank == 1:

        def stop(*_: Any) -> None:
            os._exit(1) if what == "dies" else time.sleep(3600)

        module.blocks[0].register_full_backward_hook(stop)
    loss = module(*batch(rank))
    began = time.monotonic()
    try:
        optimizer.backward(loss)
    except RuntimeError as error:
        raise RuntimeError(f"after {time.monotonic() - began:.3f} s") from error


@pytest.mark.parametrize("what", ["dies", pytest.param("hangs", marks=pytest.mark.slow)])
@EVERY_ENGINE
def test_the_others_get_an_error(engine: str, what: str) -> None:
    processes = Processes(2, timeout=TIMEOUT)
    try:
        results = processes.outcomes(stops, engine, what)
    finally:
        processes.close()
    assert isinstance(results[0], Failed)
    after = re.search(r"RuntimeError: after ([0-9.]+) s", results[0].text)
    # The other one is waited for some milliseconds after backward began; the rest is for a machine that is busy.
    assert after and float(after[1]) < TIMEOUT + 5.0, results[0].text
    assert results[1].text == {"dies": "died", "hangs": "still at it"}[what]
