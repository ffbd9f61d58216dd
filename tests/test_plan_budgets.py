"""What a budget of `clip_memory` keeps, takes and computes: simulated, recorded and counted by hand."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lomo_kernels.composite.tiled import CROSSOVER
from lomo_kernels.demo.model import Config
from lomo_kernels.plan import METHODS, default_dtype, llama, loss_of, record, simulate
from lomo_kernels.plan.budgets import BudgetStep, method_of, simulate_budget
from lomo_kernels.plan.kernels import KERNELS
from lomo_kernels.plan.products import formulas

CONFIG = Config(layers=3, d_model=256, heads=4, kv_heads=2, ffn=512, vocab=1024)
LOSS = loss_of(2, 64)

fused_or_not = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
checkpointing = pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpoints"])


@fused_or_not
@checkpointing
@pytest.mark.parametrize("passes", ["one", "two"])
def test_the_ends_are_the_methods_of_one_and_two_passes(passes: str, fused: bool, checkpointing: bool) -> None:
    build = llama(CONFIG, checkpointing=checkpointing)
    method = METHODS[f"Lomo, clipping, {passes} pass{'es' * (passes == 'two')}{', fused' * fused}"]
    step = simulate_budget(build, LOSS, 0 if passes == "two" else None, fused=fused)
    assert step.peak == simulate(build, LOSS, method)
    assert (step.kept == 0) == (passes == "two")


@fused_or_not
@checkpointing
def test_a_partial_budget_is_simulated_exactly(fused: bool, checkpointing: bool) -> None:
    """Every storage of a real step on the CPU that runs a part of backward twice, in its category."""
    build = llama(CONFIG, checkpointing=checkpointing)
    budget = simulate_budget(build, LOSS, None, fused=fused, kernels="cpu").kept // 2
    step = simulate_budget(build, LOSS, budget, fused=fused, kernels="cpu")
    assert 0.8 * budget < step.kept <= budget
    assert step.peak == record(build, LOSS, method_of(budget, fused=fused), workspaces=KERNELS["cpu"].workspaces)


@pytest.mark.parametrize("fused", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "fused"])
@pytest.mark.parametrize(
    "checkpointing", [pytest.param(False, marks=pytest.mark.slow), True], ids=["kept", "checkpoints"]
)
def test_a_larger_budget_computes_less(fused: bool, checkpointing: bool) -> None:
    """And with checkpoints takes more memory. Without, what the part that runs twice has saved counts, too: it stays
    until the norm is known, while the first gradients come."""
    build = llama(dataclasses.replace(CONFIG, layers=4), checkpointing=checkpointing)
    everything = simulate_budget(build, LOSS, None, fused=fused)
    line = [simulate_budget(build, LOSS, int(share * everything.kept), fused=fused) for share in (0, 0.25, 0.5, 0.75)]
    kept, flops = ([getattr(step, name) for step in [*line, everything]] for name in ("kept", "flops"))
    assert kept == sorted(set(kept))
    assert flops == sorted(set(flops), reverse=True)
    if checkpointing:
        peaks = [step.peak.peak for step in line]
        assert peaks == sorted(set(peaks))


# ---- Operations, counted by hand -------------------------------------------------------------------------------------

WIDTHS = (64, 32, 48)


def chain() -> nn.Module:
    with default_dtype(torch.bfloat16):
        return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(WIDTHS)))


def chain_loss(tokens: int) -> Callable[[nn.Module], Tensor]:
    def loss(model: nn.Module) -> Tensor:
        return model(torch.ones(tokens, WIDTHS[0], dtype=torch.bfloat16)).square().mean()

    return loss


def of_chain(clip_memory: float | None, *, fused: bool, tokens: int, kernels: str = "cpu") -> BudgetStep:
    return simulate_budget(chain, chain_loss(tokens), clip_memory, fused=fused, kernels=kernels)


PRODUCTS = [2 * a * b for a, b in itertools.pairwise(WIDTHS)]  # of one token, for each layer
FORWARD = WEIGHTS = sum(PRODUCTS)
INPUTS = PRODUCTS[1]  # the first layer's input needs no gradient


@pytest.mark.parametrize("tokens", [4, 100])
def test_plain_layers_form_each_weights_product_once_a_backward(tokens: int) -> None:
    assert of_chain(None, fused=False, tokens=tokens).flops == tokens * (FORWARD + WEIGHTS + INPUTS)
    assert of_chain(0, fused=False, tokens=tokens).flops == tokens * (FORWARD + 2 * (WEIGHTS + INPUTS))


def test_torch_counts_the_same_of_plain_layers() -> None:
    model = chain()
    with FlopCounterMode(display=False) as counter:
        chain_loss(4)(model).backward()
    assert of_chain(None, fused=False, tokens=4).flops == counter.get_total_flops()


def inner_products(tokens: int) -> int:
    """Of tokens i <= j, of a layer's inputs and of its grad_outputs."""
    return sum(tokens**2 * (a + b) for a, b in itertools.pairwise(WIDTHS))


@pytest.mark.parametrize("tokens", [CROSSOVER - 1, CROSSOVER])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gpu_takes_a_norm_from_products_if_many_tokens_have_16_bits(dtype: torch.dtype, tokens: int) -> None:
    width = 10 * CROSSOVER  # inner products are far cheaper
    factors = [torch.empty(tokens, width, dtype=dtype, device="meta")]
    operations = formulas("cuda")[torch.ops.lomo_kernels.linear_sq_norm_](None, factors, factors)
    by_tiles = tokens == CROSSOVER and dtype is torch.bfloat16
    assert operations == (2 * tokens * width**2 if by_tiles else tokens**2 * 2 * width)


@pytest.mark.parametrize(
    "kernels, tokens, norm",
    [
        ("cpu", 15, inner_products(15)),
        ("gpu", 4, inner_products(4)),
        ("gpu", 15, 15 * WEIGHTS),  # fewer multiplications do not make up for a GPU's few programs
    ],
)
def test_fused_layers_form_a_product_for_the_update_and_take_the_norm_apart(
    kernels: str, tokens: int, norm: int
) -> None:
    one, two = (of_chain(budget, fused=True, tokens=tokens, kernels=kernels) for budget in (None, 0))
    assert one.flops == tokens * (FORWARD + INPUTS + WEIGHTS) + norm
    assert two.flops == tokens * (FORWARD + 2 * INPUTS + WEIGHTS) + norm


def test_gradients_that_are_smaller_than_factors_are_formed_once() -> None:
    """With 0 none is kept, and each backward forms what it needs."""
    assert of_chain(None, fused=True, tokens=100).flops == 100 * (FORWARD + INPUTS + WEIGHTS)
    assert of_chain(0, fused=True, tokens=100).flops == 100 * (FORWARD + 2 * (INPUTS + WEIGHTS))
