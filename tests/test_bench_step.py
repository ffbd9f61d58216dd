"""The benches of whole steps and hooks: what they would measure is right, and what cannot run is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bench import bench_hooks, bench_step, methods, peers
from bench.bench_step import Case, Contest
from bench.methods import METHODS, Method
from bench.results import BASE, FORWARD

FEW = (BASE, "Lomo", "lomo_optim", "hook, add_", FORWARD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_computes_what_it_is_named_after(name: str, dtype: torch.dtype) -> None:
    if lacking := peers.missing(name):
        pytest.skip(lacking[1])
    assert not methods.cannot(name, dtype, "cpu")


def _sgd(model: nn.Module, lr: float, clip: float) -> methods.Step:
    def step(loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        torch.optim.SGD(list(model.parameters())[:-1], lr=lr).step()

    return step


@pytest.mark.parametrize(
    ("method", "because"),
    [
        (Method(METHODS["SGD"].make, clips=True), "not clipped"),
        (Method(METHODS[BASE].make), "clipped"),
        (Method(lambda model, lr: METHODS["SGD"].make(model, 1.1 * lr)), "another learning rate"),
        (Method(lambda model, lr: _sgd(model, lr, 1.0), clips=True), "the last parameter stays"),
        (Method(METHODS["SGD"].make, adamw=True), "another rule"),
        (Method(lambda model, lr: METHODS["SGD"].make(model, torch.nan)), "no numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_method_is_found(method: Method, because: str) -> None:
    assert "elements of" in methods.wrong(method, torch.bfloat16, "cpu"), because


def test_the_fused_path_is_taken_where_it_is_right() -> None:
    class Wrong(torch.optim.SGD):
        def __init__(self, params: list[nn.Parameter], lr: float, fused: bool = False, foreach: bool = False) -> None:
            super().__init__(params, lr=2 * lr if fused else lr)

    assert methods.fastest(torch.optim.SGD, torch.float32, "cpu") == {"fused": True}
    assert methods.fastest(Wrong, torch.float32, "cpu") == {"foreach": True}


def test_a_contest_measures_time_and_memory_of_all_and_names_who_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = ("lomo_optim", "not installed")
    monkeypatch.setattr(peers, "missing", lambda name: gone if name == gone[0] else None)
    contest = Contest(Case("tiny", 16, True, FEW), methods.TINY, "cpu", 2)
    assert contest.missing == {"lomo_optim": ("lomo_optim", "not installed")}
    assert not contest.outcomes and contest.outcome("lomo_optim") is None
    assert contest.outcome("Lomo")
    assert list(contest.outcomes) == [BASE, "Lomo", "hook, add_", FORWARD]
    base = contest.outcomes[BASE]
    weights = contest.weights
    for outcome in contest.outcomes.values():
        assert len(outcome.seconds) == 2
        assert min(outcome.seconds) > 0
        assert outcome.beside_seconds == base.seconds
        assert outcome.memory["weights"] == weights
    assert base.memory["peak"] >= weights
    # Not Lomo: it gathers gradients as small as these.
    assert contest.outcomes["hook, add_"].memory["peak"] < base.memory["peak"] - weights // 3


def test_states_count_into_the_peak() -> None:
    contest = Contest(Case("tiny", 16, False, (BASE, "AdamW")), methods.TINY, "cpu", 1)
    memory = contest.outcome("AdamW").memory
    assert memory["states"] == pytest.approx(2 * contest.weights, rel=0.02)  # and each parameter's step
    assert memory["peak"] >= 3 * contest.weights
    assert contest.outcomes[BASE].memory["states"] == 0


def test_who_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        weights = 2 * sum(param.numel() for param in bench_step.ByteLlama(methods.TINY).parameters())
    monkeypatch.setattr(bench_step, "free_memory", lambda device: 2 * weights)
    contest = Contest(Case("tiny", 16, False, (BASE, "AdamW", "Lomo")), methods.TINY, "cpu", 1)
    assert contest.outcome(BASE) and list(contest.outcomes) == [BASE, "Lomo"]
    assert contest.outcome("AdamW") is None
    what, reason = contest.missing["AdamW"]
    assert what == "AdamW, tiny, 16 tokens"
    assert "GiB are free" in reason


def test_states_that_fill_the_memory_are_measured_in_turns() -> None:
    names = ["SGD", "AdamW", "AdamW, clip_grad_norm_", "optimi SGD, release", "Lomo"]
    assert bench_step.heats(names, weights=1, free=100) == [names]
    assert bench_step.heats(names, weights=1, free=4) == [names[:2], names[2:3], names[3:]]
    assert bench_step.heats(names, weights=1, free=100, most=2) == [names[:2], names[2:4], names[4:]]


@pytest.mark.parametrize("name", [bench_hooks.BARE, "Lomo"])
def test_a_backward_of_small_parameters_is_timed(name: str) -> None:
    assert bench_hooks.backward_of((4,), torch.float32, 5, name, "cpu")(0) > 0


def test_the_hook_that_walks_all_parameters_is_left_out_where_they_are_many() -> None:
    what, reason = bench_hooks.lacks("lomo_optim", 2000, torch.float32, "cpu") or ("", "")
    assert what == "lomo_optim, 2000 parameters"
    assert "left out" in reason
