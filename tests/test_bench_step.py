"""The benches of whole steps and hooks: what they would measure is right, and what cannot run is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bench import bench_hooks, bench_step, methods
from bench.bench_step import Case, Trained
from bench.methods import METHODS, Method
from bench.results import BASE, FORWARD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_computes_what_it_is_named_after(name: str, dtype: torch.dtype) -> None:
    if lacking := methods.missing_peer(name):
        pytest.skip(lacking[1])
    assert not methods.cannot(name, dtype, "cpu")


def _sgd(model: nn.Module, lr: float, clip: float) -> methods.Step:
    def step(loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        torch.optim.SGD(list(model.parameters())[:-1], lr=lr).step()

    return step


@pytest.mark.parametrize(
    ("method", "what", "because"),
    [
        (METHODS["SGD"], {"clipped": True}, "not clipped"),
        (METHODS[BASE], {}, "clipped"),
        (lambda model, lr: METHODS["SGD"](model, 1.1 * lr), {}, "another learning rate"),
        (lambda model, lr: _sgd(model, lr, 1.0), {"clipped": True}, "the last parameter stays"),
        (METHODS["SGD"], {"adamw": True}, "another rule"),
        (lambda model, lr: METHODS["SGD"](model, torch.nan), {}, "no numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_method_is_found(method: Method, what: dict[str, bool], because: str) -> None:
    assert "elements of" in methods.wrong(method, torch.bfloat16, "cpu", **what), because


def test_the_fused_path_is_taken_where_it_is_right() -> None:
    class Wrong(torch.optim.SGD):
        def __init__(self, params: list[nn.Parameter], lr: float, fused: bool = False, foreach: bool = False) -> None:
            super().__init__(params, lr=2 * lr if fused else lr)

    assert methods.fastest(torch.optim.SGD, torch.float32, "cpu") == {"fused": True}
    assert methods.fastest(Wrong, torch.float32, "cpu") == {"foreach": True}


CASE = Case("tiny", 16)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> bench_step.ByteLlama:
    monkeypatch.setitem(bench_step.MODELS, "tiny", methods.TINY)
    return bench_step.ByteLlama(methods.TINY).to(bench_step.DTYPE)


def test_memory_of_a_step_is_what_stands_above_the_weights(model: bench_step.ByteLlama) -> None:
    trained = {name: Trained(name, model, CASE, "cpu") for name in (BASE, "AdamW", "hook, add_", FORWARD)}
    memory = {name: one.memory for name, one in trained.items()}
    weights = sum(param.nbytes for param in model.parameters())
    assert all(of["weights"] == weights for of in memory.values())
    assert memory[BASE]["states"] == 0 and memory[BASE]["peak"] >= weights
    assert memory["AdamW"]["states"] == pytest.approx(2 * weights, rel=0.02)  # and each parameter's step
    assert memory["AdamW"]["peak"] >= 3 * weights  # states count into the peak
    # Not Lomo: it gathers gradients as small as these.
    assert memory["hook, add_"]["peak"] < memory[BASE]["peak"] - weights // 3


def test_methods_train_the_same_weights(model: bench_step.ByteLlama) -> None:
    before = model.embedding.weight.clone()
    trained = Trained("SGD", model, CASE, "cpu")
    bench_step.METHODS["SGD"](model, 1.0)(model.loss(trained.windows[0]))
    assert not torch.equal(model.embedding.weight, before)
    after = trained.loss(trained.windows[0]).item()
    assert after == model.loss(trained.windows[0]).item()


class Told(Exception):
    """What is missing, and why."""


def tell(what: str, why: str) -> None:
    raise Told(what, why)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_who_does_not_fit_is_named(model: bench_step.ByteLlama, checkpointing: bool) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore")

    case = CASE._replace(checkpointing=checkpointing)
    with pytest.raises(Told) as told:
        bench_step.test_step(full, tell, case, "Lomo", {}, model, None, "cpu")
    assert told.value.args == (f"Lomo, {case}", "CUDA out of memory.")


def test_who_is_not_installed_is_named(model: bench_step.ByteLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "missing_peer", lambda name: (name, "not installed"))
    with pytest.raises(Told) as told:
        bench_step.test_step(pytest.fail, tell, CASE, "lomo_optim", {}, model, None, "cpu")
    assert told.value.args == ("lomo_optim", "not installed")


def test_a_wrong_method_of_ours_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "Lomo", METHODS["SGD, clip_grad_norm_"])
    with pytest.raises(AssertionError, match="elements of"):
        methods.cannot("Lomo", torch.bfloat16, "cpu")


@pytest.mark.parametrize("name", [bench_hooks.BARE, "Lomo"])
def test_a_backward_of_small_parameters_runs(name: str) -> None:
    bench_hooks.backward_of((4,), torch.float32, 5, name, "cpu")(0)


def test_the_hook_that_walks_all_parameters_is_left_out_where_they_are_many() -> None:
    with pytest.raises(Told) as told:
        bench_hooks.test_backward(pytest.fail, tell, (4,), "float32", 2000, "cpu", "lomo_optim")
    what, why = told.value.args
    assert what == "lomo_optim, 2000 parameters" and "left out" in why
