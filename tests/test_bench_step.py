"""The benches of whole steps and hooks: what they would measure is right, and what cannot run is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from bench import bench_ranks, bench_training, methods
from bench.bench_training import ByteLlama, Trained
from bench.methods import METHODS, Method
from bench.results import BASE, FORWARD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_computes_what_it_is_named_after(name: str, dtype: torch.dtype) -> None:
    if lacking := methods.missing_peer(name):
        pytest.skip(lacking)
    assert not methods.cannot(name, dtype, "cpu")


def _sgd(model: nn.Module, lr: float, clip: float) -> methods.Step:
    def step(loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        torch.optim.SGD(list(model.parameters())[:-1], lr=lr).step()

    return step


@pytest.mark.parametrize(
    ("method", "name", "because"),
    [
        (METHODS["SGD"], BASE, "not clipped"),
        (METHODS[BASE], "SGD", "clipped"),
        (lambda model, lr: METHODS["SGD"](model, 1.1 * lr), "SGD", "another learning rate"),
        (lambda model, lr: _sgd(model, lr, 1.0), BASE, "the last parameter stays"),
        (METHODS["SGD"], "AdamW", "another rule"),
        (METHODS["AdamW"], "AdaLomo", "another rule"),
        (lambda model, lr: METHODS["SGD"](model, torch.nan), "SGD", "no numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_method_is_found(method: Method, name: str, because: str) -> None:
    assert "elements of" in methods.wrong(name, method, torch.bfloat16, "cpu"), because


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[ByteLlama]:
    monkeypatch.setitem(bench_training.MODELS, "tiny", methods.TINY)
    yield bench_training.llama("tiny", "cpu")
    bench_training.llama.cache_clear()
    bench_training.baseline.cache_clear()


def test_memory_of_a_step_is_what_stands_above_the_weights(model: ByteLlama) -> None:
    names = (BASE, "AdamW", "hook, add_", FORWARD)
    memory = {name: Trained(name, model, 16, False, "cpu").memory for name in names}
    weights = sum(param.nbytes for param in model.parameters())
    assert all(of["weights"] == weights for of in memory.values())
    assert memory[BASE]["states"] == 0 and memory[BASE]["peak"] >= weights
    assert memory["AdamW"]["states"] == pytest.approx(2 * weights, rel=0.02)  # and each parameter's step
    assert memory["AdamW"]["peak"] >= 3 * weights  # states count into the peak
    # Not Lomo: it gathers gradients as small as these.
    assert memory["hook, add_"]["peak"] < memory[BASE]["peak"] - weights // 3


def test_methods_train_the_same_weights(model: ByteLlama) -> None:
    before = model.embedding.weight.clone()
    trained = Trained("SGD", model, 16, False, "cpu")
    METHODS["SGD"](model, 1.0)(model.loss(trained.windows[0]))
    assert not torch.equal(model.embedding.weight, before)
    assert trained.loss(trained.windows[0]).item() == model.loss(trained.windows[0]).item()


def test_who_does_not_fit_is_named(model: ByteLlama) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore")

    with pytest.raises(pytest.skip.Exception, match=r"^Lomo, tiny, 16 tokens, checkpointing: CUDA out of memory\.$"):
        bench_training.test_step(full, "tiny", 16, True, "Lomo", "cpu")


def test_who_is_not_installed_is_named(model: ByteLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "missing_peer", lambda name: f"{name}: not installed")
    with pytest.raises(pytest.skip.Exception, match="lomo_optim: not installed"):
        bench_training.test_step(pytest.fail, "tiny", 16, False, "lomo_optim", "cpu")


def test_a_wrong_method_of_ours_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "Lomo", METHODS["SGD, clip_grad_norm_"])
    with pytest.raises(AssertionError, match="elements of"):
        methods.cannot("Lomo", torch.bfloat16, "cpu")


@pytest.mark.parametrize("name", [bench_training.BARE, "Lomo"])
def test_a_backward_of_small_parameters_runs(name: str) -> None:
    bench_training.backward_of((4,), torch.float32, 5, name, "cpu")(0)


@pytest.mark.slow
def test_two_ranks_take_the_same_steps() -> None:
    """Those of all implementations are compared where they start; rank 1 follows as rank 0 asks, and ends."""
    with bench_ranks.started(bench_ranks.data_parallel, "27M", 8) as rank:
        before = rank.trained["Lomo"].model.embedding.weight.clone()
        rank.take("Lomo", 1)
        assert not torch.equal(rank.trained["Lomo"].model.embedding.weight, before)
        memory = {name: rank.memory(name) for name in rank.trained}
        ddp, two, one = (memory[name] for name in (bench_ranks.AVERAGED[0], *list(bench_ranks.OPTIONS)[1:]))
        weights = sum(param.nbytes for param in rank.trained["Lomo"].model.parameters())
        assert ddp["states"] == weights < ddp["peak"]
        assert two["peak"] < weights < one["peak"] + 2**20  # one pass keeps all gradients, two keep none


def one_of_them_is_wrong(build: Callable[[], ByteLlama]) -> dict[str, bench_ranks.Trained]:
    right, wrong = build(), build()
    step = bench_ranks.step_of("DDP, SGD", right)
    return {
        "SGD": bench_ranks.Trained(right, lambda window: step(right.loss(window))),
        "Lomo": bench_ranks.Trained(wrong, lambda window: None),
    }


def test_ranks_that_take_another_step_are_not_timed() -> None:
    with (
        pytest.raises(AssertionError, match="Lomo: another step than that of SGD"),
        bench_ranks.started(one_of_them_is_wrong, "27M", 8),
    ):
        pytest.fail("was started")


def test_a_rival_whose_step_is_wrong_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "hook, add_", lambda model, lr: METHODS["SGD"](model, 2 * lr))
    with pytest.raises(pytest.skip.Exception, match=r"hook, add_, bfloat16, cpu: .* elements of"):
        bench_training.test_step(pytest.fail, "17M", 16, False, "hook, add_", "cpu")
    with pytest.raises(pytest.skip.Exception, match=r"hook, add_, float32, cpu: .* elements of"):
        bench_training.test_hooks(pytest.fail, "4", "float32", 5, "cpu", "hook, add_")
