"""Chains of 10,000s of autograd nodes, which torch frees without recursion unless Python has seen them: so must we."""

from __future__ import annotations

from typing import Any

import pytest

PRELUDE = """
import gc, sys, threading, torch
from torch import nn
from lomo_kernels import Lomo
from support.textbook import Textbook64

def chain(w, n):
    for _ in range(n // 2):
        w = w + w * 1e-9
    return w

def residual(w, n):
    for _ in range(n // 6):
        w = w + ((w * 0.1).sin().cos() * 1e-9).tanh()
    return w

def weights():
    torch.manual_seed(0)
    small, large = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(130, 130))
    return nn.ParameterList([small, large])

def loss_of(params, shape, n):
    return (shape(params[0], n).sum() * params[1].square().mean()).tanh()

def steps(options, shape, n, keep=lambda loss: None, count=3):
    params = weights()
    optimizer = Lomo(params, lr=0.1, **options)
    exact = Textbook64(params, lr=0.1, clip_grad_norm=options.get("clip_grad_norm"))
    for _ in range(count):
        loss = loss_of(params, shape, n)
        optimizer.backward(loss)
        keep(loss)
        exact.step(loss_of(exact.model, shape, 12))  # the rest of the chain changes nothing at 1e-9 a node
        assert abs(optimizer.last_grad_norm.item() - exact.norm) < 1e-3 * exact.norm, n
        for param, wanted in zip(params, exact.model, strict=True):
            assert (param.double() - wanted).abs().max() < 1e-3 * 0.1, n
    return optimizer

def in_a_thread(stack, call):
    failed = []
    def run():
        try:
            call()
        except BaseException as error:
            failed.append(error)
    threading.stack_size(stack)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    threading.stack_size(0)
    assert not failed, failed

MODES = {
    "plain": {},
    "two": {"clip_grad_norm": 0.05, "clip_passes": "two"},
    "one": {"clip_grad_norm": 0.05, "clip_passes": "one"},
    "dynamic": {"loss_scale": "dynamic", "clip_passes": "two"},
    "dynamic one": {"loss_scale": "dynamic", "clip_passes": "one"},
}
"""


def run(run_python: Any, code: str) -> None:
    done = run_python(PRELUDE + code + "\nprint('fine')")
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout.strip().endswith("fine")


@pytest.mark.slow
def test_40000_nodes_and_100000_on_a_small_stack(run_python: Any) -> None:
    run(
        run_python,
        """
for mode in ("plain", "two", "dynamic one"):
    steps(MODES[mode], chain, 40_000, count=2)
in_a_thread(512 * 1024, lambda: steps(MODES["two"], chain, 100_000, count=1))
steps(MODES["two"], chain, 12, count=1)
""",
    )


def test_a_small_stack(run_python: Any) -> None:
    """Of 512 KiB, as threads have on macOS: 2,400 nodes were too many."""
    run(
        run_python,
        """
for options in MODES.values():
    for shape in (chain, residual):
        in_a_thread(512 * 1024, lambda: steps(options, shape, 3_000, count=2))
in_a_thread(512 * 1024, lambda: steps(MODES["two"], residual, 10_000, count=2))
""",
    )


def test_losses_and_activations_that_outlive_their_step(run_python: Any) -> None:
    """They hold the graph, or a part of it, and are freed in any order, after the optimizer or as Python ends."""
    run(
        run_python,
        """
n = 42_000
held = []
steps(MODES["two"], chain, n, held.append, count=2)  # the optimizer is freed before the losses
gc.collect()
held.pop(0)
steps(MODES["two"], chain, 12, count=1)
held.clear()
params = weights()
optimizer = Lomo(params, lr=0.1, clip_grad_norm=0.05)
activation = residual(params[0], n)
optimizer.backward(activation.sum() * params[1].mean())
optimizer.backward(params[0].sum())  # looks for graphs that are free: this one is held by its activation
del activation
optimizer.backward(params[0].sum())
at_exit = residual(params[0], n).sum()
optimizer.backward(at_exit)
""",
    )


def test_what_nobody_holds_is_freed(run_python: Any) -> None:
    run(
        run_python,
        """
import weakref
from lomo_kernels.optim import graph

class Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.kept = torch.ones(5)
        references.append(weakref.ref(ctx.kept))
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g

references = []
w = nn.Parameter(torch.ones(1))
optimizer = Lomo([w], lr=0.1, clip_grad_norm=0.05, clip_passes="two")
for turn in range(4):
    optimizer.backward(chain(Kept.apply(w), 2_000).sum())
    alive = [reference() is not None for reference in references]
    assert alive == [False] * turn + [True], alive
    assert len(graph._deep_graphs) == 1
optimizer.backward(w.sum())
assert not graph._deep_graphs and references[-1]() is None
""",
    )
