"""Beside the rest of torch: compilers, autocast, scalers, trainers, threads, other optimizers, hooks of one's own."""

from __future__ import annotations

import copy
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.models import Options, assert_same_bits, batch, gives, loss_of, transformer, vector, weights_of
from support.textbook import Textbook
from torch import Tensor, nn

from lomo_kernels import AdaLomo, Lomo

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLIPPING = pytest.mark.parametrize("clip_grad_norm", [None, 0.3], ids=["one-pass", "two-pass"])


def compare(
    model: nn.Module, loss: Callable[[nn.Module, int], Tensor], steps: int = 3, lr: float = 0.3, **settings: Any
) -> None:
    """Trains `model` and demands the textbook's weights."""
    textbook = Textbook(model, lr=lr, **settings)
    optimizer = Lomo(model, lr=lr, **settings)
    for step in range(steps):
        optimizer.backward(loss(model, step))
        textbook.step(loss(textbook.model, step), norm=optimizer.last_grad_norm)
        assert_same_bits(weights_of(model), weights_of(textbook.model))
        assert optimizer.last_grad_norm.item() == pytest.approx(textbook.norm, rel=1e-6)
    assert optimizer.skipped_steps.item() == 0


# ---- Leaves that the optimizer does not manage ----------------------------------------------------------------------


@CLIPPING
@pytest.mark.parametrize("loss_scale", [None, 64.0, "dynamic"])
def test_a_backbone_beside_a_head_of_another_optimizer(loss_scale: Any, clip_grad_norm: float | None) -> None:
    """The head's .grad is its gradient: once, not once for each pass, and without the loss scale."""
    model = transformer()
    backbone = [param for name, param in model.named_parameters() if name != "head.weight"]
    optimizer = Lomo(backbone, lr=0.3, clip_grad_norm=clip_grad_norm, loss_scale=loss_scale, clip_passes="two")
    adam = torch.optim.AdamW([model.head.weight], lr=1e-3)
    expected = torch.autograd.grad(loss_of(model, 0), model.head.weight)[0]
    optimizer.backward(loss_of(model, 0))
    torch.testing.assert_close(model.head.weight.grad, expected, rtol=1e-6, atol=0)
    adam.step()
    adam.zero_grad()


@CLIPPING
@pytest.mark.parametrize("kind", ["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("loss_scale", [None, 64.0])
def test_leaves_of_others_inside_checkpoints(
    request: pytest.FixtureRequest, loss_scale: Any, kind: str, clip_grad_norm: float | None
) -> None:
    """Adapters in every block, say. An error is right, too, where autograd leaves no other way."""
    if kind == "reentrant":
        limit = "a known limit (docs/limits.md): the graph inside a reentrant checkpoint does not exist before backward"
        request.applymarker(pytest.mark.xfail(reason=limit))
    model = transformer(Options(checkpoint=kind))
    others = {name: p for name, p in model.named_parameters() if name.endswith(("up.weight", "up.bias"))}
    ours = [param for name, param in model.named_parameters() if name not in others]
    plain = transformer(Options(checkpoint=kind))
    loss_of(plain, 0).backward()
    expected = {name: param.grad for name, param in plain.named_parameters()}
    optimizer = Lomo(ours, lr=0.3, clip_grad_norm=clip_grad_norm, loss_scale=loss_scale, clip_passes="two")
    before = weights_of(model)
    try:
        optimizer.backward(loss_of(model, 0))
    except RuntimeError as error:
        assert "reentrant" in str(error)
        assert_same_bits(weights_of(model), before)
        return
    for name, param in others.items():
        torch.testing.assert_close(param.grad, expected[name], rtol=1e-6, atol=1e-9)


@CLIPPING
@pytest.mark.parametrize("loss_scale", [None, 64.0])
def test_gradients_add_to_those_of_others(loss_scale: Any, clip_grad_norm: float | None) -> None:
    a, b = vector(0.0), vector(0.0)
    b.grad = torch.tensor([1.0])
    optimizer = Lomo([a], lr=1.0, clip_grad_norm=clip_grad_norm, loss_scale=loss_scale, clip_passes="two")
    optimizer.backward((a + b / 4).sum())
    assert b.grad.item() == 1.25
    with optimizer.accumulate():
        optimizer.backward((a + b / 4).sum())
    assert b.grad.item() == 1.5
    optimizer.backward((a + b / 4).sum())
    assert b.grad.item() == 1.75


@CLIPPING
def test_gradients_of_inputs(clip_grad_norm: float | None) -> None:
    """For a saliency map, or for whatever produced them."""
    model = nn.Linear(3, 1)
    x = torch.ones(2, 3, requires_grad=True)
    expected = model.weight.detach().clone().expand(2, 3)
    optimizer = Lomo(model, lr=0.3, clip_grad_norm=clip_grad_norm, clip_passes="two")
    optimizer.backward(model(x).sum())
    assert torch.equal(x.grad, expected)


# ---- Kinds of models ------------------------------------------------------------------------------------------------


@CLIPPING
def test_channels_last(clip_grad_norm: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    assert not model[2].weight.is_contiguous()
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    compare(model, lambda m, step: m(x).square().mean(), clip_grad_norm=clip_grad_norm)
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_that_are_not_contiguous(dtype: torch.dtype, rounding: str) -> None:
    held = nn.ParameterList(
        nn.Parameter(p.to(dtype))
        for p in (torch.randn(6, 5).t(), torch.randn(4, 3, 2).permute(2, 0, 1), torch.randn(300, 70).t())
    )
    assert not any(param.is_contiguous() for param in held)
    grads = [torch.randn(param.shape) * 0.1 for param in held]
    textbook = Textbook(held, lr=0.3, rounding=rounding, loss_scale="dynamic" if dtype is torch.float16 else None)
    optimizer = Lomo(held, lr=0.3, rounding=rounding)
    for _ in range(2):
        optimizer.backward(sum(gives(w, g) for w, g in zip(held, grads, strict=True)))
        textbook.step(sum(gives(w, g) for w, g in zip(textbook.model, grads, strict=True)))
    assert_same_bits(weights_of(held), weights_of(textbook.model))


@CLIPPING
def test_embedding_bag_and_padding(clip_grad_norm: float | None) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.EmbeddingBag(9, 4), nn.Embedding(9, 4, padding_idx=0)])
    tokens = torch.tensor([[1, 2, 0], [3, 3, 8]])
    pad = model[1].weight[0].detach().clone()

    def loss(m: nn.Module, step: int) -> Tensor:
        return (m[0](tokens) * m[1](tokens).sum(1)).sum()

    compare(model, loss, clip_grad_norm=clip_grad_norm)
    assert torch.equal(model[1].weight[0], pad)


@CLIPPING
def test_recurrent_layers_and_a_module_used_twice(clip_grad_norm: float | None) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.GRU(4, 5), nn.Linear(5, 5), nn.BatchNorm1d(5)])
    x = torch.randn(7, 3, 4)

    def loss(m: nn.Module, step: int) -> Tensor:
        out = m[0](x)[0]
        return m[2](m[1](torch.tanh(m[1](out))).mean(0)).square().sum() + m[1](out).mean()

    compare(model, loss, clip_grad_norm=clip_grad_norm)


@CLIPPING
def test_parameters_tied_between_modules(clip_grad_norm: float | None) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model[2].weight = model[0].weight
    model[1].bias = model[0].bias
    x = torch.randn(2, 4)
    compare(model, lambda m, step: m[2](m[1](m[0](x)).tanh()).square().sum(), clip_grad_norm=clip_grad_norm)
    assert model[2].weight is model[0].weight


@CLIPPING
def test_parametrized_weights(clip_grad_norm: float | None) -> None:
    torch.manual_seed(0)
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    x = torch.randn(2, 4)
    compare(model, lambda m, step: m(x).square().sum(), clip_grad_norm=clip_grad_norm)


@CLIPPING
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_losses_of_one_element(shape: tuple[int, ...], clip_grad_norm: float | None) -> None:
    for dtype in DTYPES:
        model = transformer(Options(dtype=dtype))
        scale = "dynamic" if dtype is torch.float16 else None
        compare(model, lambda m, s: loss_of(m, s).view(shape), 1, clip_grad_norm=clip_grad_norm, loss_scale=scale)


@CLIPPING
def test_a_batch_of_zero_loss(clip_grad_norm: float | None) -> None:
    model = transformer()
    optimizer = Lomo(model, lr=0.3, clip_grad_norm=clip_grad_norm, clip_passes="two")
    before = weights_of(model)
    optimizer.backward(loss_of(model, 0) * 0.0)
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]), name
    assert optimizer.last_grad_norm.item() == 0.0
    assert optimizer.skipped_steps.item() == 0


@CLIPPING
def test_custom_functions_and_gradients_that_share_memory(clip_grad_norm: float | None) -> None:
    """`a + b` hands one tensor to both as their gradient."""
    torch.manual_seed(0)
    held = nn.ParameterList(nn.Parameter(torch.randn(200, 100)) for _ in range(3))
    x = torch.randn(200, 100)
    compare(held, lambda m, step: ((m[0] + m[1] - m[2].expand(1, -1, -1)[0]) * x).sum(), clip_grad_norm=clip_grad_norm)


# ---- Hooks of one's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False], ids=["registered-before", "registered-after"])
def test_hooks_of_the_users_own(before: bool) -> None:
    """Tensor hooks come first and may change the gradient. A post-accumulate hook sees it where it came before ours."""
    w = vector(0.0)
    seen: list[Any] = []

    def register() -> None:
        w.register_hook(lambda grad: grad * 2)
        w.register_post_accumulate_grad_hook(lambda p: seen.append(None if p.grad is None else p.grad.item()))

    if before:
        register()
    optimizer = Lomo([w], lr=1.0)
    if not before:
        register()
    optimizer.backward(w.sum() * 0.25)
    assert w.item() == -0.5
    assert seen == [0.5 if before else None]
    optimizer.remove()
    w.sum().backward()
    assert seen[1:] == [2.0], "remove() takes only the optimizer's own hooks"


@CLIPPING
def test_module_hooks_see_every_pass(clip_grad_norm: float | None) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    seen = []
    model[1].register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape))
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=clip_grad_norm, clip_passes="two")
    for first in (True, False):  # the first step with a graph runs its norm pass twice
        seen.clear()
        optimizer.backward(model(torch.ones(2, 3)).sum())
        assert len(seen) == (1 if clip_grad_norm is None else 2 + first)


# ---- Autocast and scalers -------------------------------------------------------------------------------------------


@CLIPPING
def test_autocast_sees_new_weights_within_one_context(clip_grad_norm: float | None) -> None:
    """Autocast keeps bfloat16 copies of float32 weights until its context ends; a step must throw them away."""
    model = transformer()
    textbook = Textbook(model, lr=0.3, clip_grad_norm=clip_grad_norm)
    optimizer = Lomo(model, lr=0.3, clip_grad_norm=clip_grad_norm, clip_passes="two")
    with torch.autocast("cpu", torch.bfloat16):
        for step in range(3):
            optimizer.backward(loss_of(model, step))
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(textbook.model, step)
        textbook.step(loss)
    for ours, theirs in zip(model.parameters(), textbook.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Lomo.step")
def test_autocast_sees_new_weights_after_step() -> None:
    model = nn.Linear(4, 1, bias=False)
    optimizer = Lomo(model, lr=1.0)
    x = torch.ones(1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        before.sum().backward()
        optimizer.step()
        after = model(x)
    assert before.item() - after.item() == pytest.approx(4.0, abs=0.05)


@pytest.mark.filterwarnings("ignore:Lomo.step")
def test_grad_scaler_with_plain_backwards() -> None:
    """torch's scaler on float32 weights: it unscales .grad, and leaves out step() after an overflow."""
    model = transformer()
    textbook = Textbook(model, lr=0.3, clip_grad_norm=0.3)
    optimizer = Lomo(model, lr=0.3, clip_grad_norm=0.3, clip_passes="two")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(4):
        bad = step == 1
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step) * (float("inf") if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if not bad:
            textbook.step(loss_of(textbook.model, step), norm=optimizer.last_grad_norm)
    assert optimizer.step_count.item() == 3
    for ours, theirs in zip(model.parameters(), textbook.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# ---- Trainers -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Lomo.step")
@CLIPPING
def test_a_closure_with_a_plain_backward(clip_grad_norm: float | None) -> None:
    """As LBFGS wants it, and Lightning's automatic optimization has it."""
    model = transformer()
    textbook = Textbook(model, lr=0.3, clip_grad_norm=clip_grad_norm)
    optimizer = Lomo(model, lr=0.3, clip_grad_norm=clip_grad_norm, clip_passes="two")
    for step in range(3):

        def closure(step: int = step) -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        expected = loss_of(textbook.model, step)
        assert optimizer.step(closure).item() == expected.item()
        textbook.step(expected, norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(model), weights_of(textbook.model))
    assert optimizer.step_count.item() == 3


@CLIPPING
def test_a_closure_that_calls_our_backward(clip_grad_norm: float | None) -> None:
    """A Lightning strategy whose backward is ours: step(closure) then is no second step, and warns of nothing."""
    model = transformer()
    textbook = Textbook(model, lr=0.3, clip_grad_norm=clip_grad_norm)
    optimizer = Lomo(model, lr=0.3, clip_grad_norm=clip_grad_norm, clip_passes="two")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, step)
                optimizer.backward(loss)
                return loss.detach()

            optimizer.step(closure)
            textbook.step(loss_of(textbook.model, step), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(model), weights_of(textbook.model))
    assert optimizer.step_count.item() == 3


@CLIPPING
def test_a_loop_written_for_any_optimizer(clip_grad_norm: float | None) -> None:
    """backward, step and zero_grad, of which the last two find nothing to do."""
    model = transformer()
    textbook = Textbook(model, lr=0.3, clip_grad_norm=clip_grad_norm)
    optimizer = Lomo(model, lr=0.3, clip_grad_norm=clip_grad_norm, clip_passes="two")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            optimizer.backward(loss_of(model, step))
            optimizer.step()
            optimizer.zero_grad()
            textbook.step(loss_of(textbook.model, step), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(model), weights_of(textbook.model))


# ---- Compilers ------------------------------------------------------------------------------------------------------

BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")],
    ),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.norm(self.first(x)))).square().mean()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


#: All that a step can be: two backwards, an update in the hook, gradients kept, a part of them; fused layers, which a
#: compiled model runs as plain ones; a rule with factors.
COMPILED: list[tuple[type[Lomo], dict[str, Any]]] = [
    (Lomo, {"clip_grad_norm": 0.1, "clip_memory": 0}),
    (Lomo, {"weight_decay": 0.1}),
    (Lomo, {"clip_grad_norm": 0.1}),
    (Lomo, {"clip_grad_norm": 0.1, "clip_memory": 200}),
    (Lomo, {"clip_tensor": 1.04, "loss_scale": "dynamic", "clip_memory": 0}),
    (AdaLomo, {}),
    (Lomo, {"fused_layers": True}),
    (Lomo, {"fused_layers": True, "clip_grad_norm": 0.1}),
    (Lomo, {"fused_layers": True, "clip_grad_norm": 0.1, "clip_memory": 0}),
]
ONE_BACKWARD = r"compiled this model for one backward \(donated buffers\)"


def inputs(step: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step))


def compiled_net(backend: str = "aot_eager") -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Net()
    return model, torch.compile(model, backend=backend, fullgraph=True)


def check_steps(compiled: Any, optimizer: Lomo, eager: nn.Module, expected: Lomo, steps: int = 2) -> None:
    """`compiled` and a copy of its model, each with an optimizer: their steps are equal."""
    for step in range(steps):
        optimizer.backward(compiled(inputs(step)))
        expected.backward(eager(inputs(step)))
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert ours.grad is None


@pytest.mark.filterwarnings(f"ignore:.*{ONE_BACKWARD}")
@pytest.mark.parametrize("donates", [False, True], ids=["retained", "donates"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_is_the_eager_one(fresh_compiler: None, backend: str, donates: bool) -> None:
    """In every way to a step, with torch's settings as they are, and without a graph break.

    A plain backward compiles it to write over saved tensors. So does any first forward with inductor.
    """
    model, compiled = compiled_net(backend)
    if donates:
        compiled(inputs(9)).backward()
        model.zero_grad()
    for make, settings in COMPILED:
        eager = copy.deepcopy(model)
        with make(model, lr=0.1, **settings) as optimizer, make(eager, lr=0.1, **settings) as expected:
            check_steps(compiled, optimizer, eager, expected)


def test_a_backward_that_is_compiled_to_run_once(fresh_compiler: None) -> None:
    """Gradients are kept, with one warning. What cannot run once is refused."""
    model, compiled = compiled_net()
    eager = copy.deepcopy(model)
    optimizer, expected = (Lomo(m, lr=0.1, clip_grad_norm=0.1, clip_memory=0) for m in (model, eager))
    compiled(inputs(9)).backward()
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match=ONE_BACKWARD) as warned:
        check_steps(compiled, optimizer, eager, expected)
    assert [warning.filename for warning in warned] == [__file__]
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=r"torch\._functorch\.config\.donated_buffer = False"):
        optimizer.grad_norm(compiled(inputs(2)))
    assert_same_bits(weights_of(model), before)
    check_steps(compiled, optimizer, eager, expected)


def test_a_compiled_training_step_ends_its_graph_before_the_optimizer(fresh_compiler: None) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    torch.manual_seed(0)
    model = Net()
    eager = copy.deepcopy(model)
    with Lomo(model, lr=0.1, clip_grad_norm=0.1) as optimizer, Lomo(eager, lr=0.1, clip_grad_norm=0.1) as expected:
        train = torch.compile(lambda x: optimizer.backward(model(x)), backend="aot_eager")
        for step in range(2):
            train(inputs(step))
            expected.backward(eager(inputs(step)))
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert len(counters["graph_break"]) == 1, counters["graph_break"]


# ---- Threads --------------------------------------------------------------------------------------------------------


def train_alone(seed: int, **settings: Any) -> dict[str, Tensor]:
    model = TRANSFORMERS[seed]()
    optimizer = Lomo(model, lr=0.3, rounding="stochastic", seed=seed, **settings)
    for step in range(8):
        optimizer.backward(loss_of(model, 10 * seed + step))
    return weights_of(model)


TRANSFORMERS: dict[int, Callable[[], nn.Module]] = {
    seed: lambda seed=seed: transformer(Options(dtype=torch.bfloat16, tied=True), seed) for seed in (1, 2)
}


@CLIPPING
def test_two_threads_train_two_models(clip_grad_norm: float | None) -> None:
    expected = {seed: train_alone(seed, clip_grad_norm=clip_grad_norm) for seed in (1, 2)}
    models = {seed: make() for seed, make in TRANSFORMERS.items()}  # torch.manual_seed is shared by all threads
    errors: list[BaseException] = []
    start = threading.Barrier(2)

    def run(seed: int) -> None:
        try:
            optimizer = Lomo(
                models[seed], lr=0.3, rounding="stochastic", seed=seed, clip_grad_norm=clip_grad_norm, clip_passes="two"
            )
            start.wait()
            for step in range(8):
                optimizer.backward(loss_of(models[seed], 10 * seed + step))
        except BaseException as error:
            errors.append(error)
            start.abort()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for seed in (1, 2):
        assert_same_bits(weights_of(models[seed]), expected[seed])


def test_a_step_in_another_thread_than_the_constructors() -> None:
    model = transformer()
    textbook = Textbook(model, lr=0.3)
    optimizer = Lomo(model, lr=0.3)
    thread = threading.Thread(target=lambda: optimizer.backward(loss_of(model, 0)))
    thread.start()
    thread.join()
    textbook.step(loss_of(textbook.model, 0))
    assert_same_bits(weights_of(model), weights_of(textbook.model))


def test_two_threads_take_turns_on_one_optimizer() -> None:
    """Two losses over separate parts: whatever the order, both steps are whole."""
    held = nn.ParameterList(nn.Parameter(torch.zeros(1000)) for _ in range(2))
    optimizer = Lomo(held, lr=1.0, clip_grad_norm=1e9, clip_passes="two")
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            for _ in range(20):
                optimizer.backward(held[index].sum())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert optimizer.step_count.item() == 40
    assert all((param == -20).all() for param in held)


# ---- Other ways to ask for gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["grad", "vjp", "functional_call", "hessian"])
def test_functional_gradients_in_between(way: str) -> None:
    model = transformer()
    textbook = Textbook(model, lr=0.3, clip_grad_norm=0.3)
    optimizer = Lomo(model, lr=0.3, clip_grad_norm=0.3, clip_passes="two")
    for step in range(2):
        if way == "grad":
            torch.autograd.grad(loss_of(model, 9), list(model.parameters()), retain_graph=True)
        elif way == "vjp":
            params = {name: param.detach() for name, param in model.named_parameters()}
            torch.func.vjp(lambda p: torch.func.functional_call(model, p, batch(9)), params)[1](torch.tensor(1.0))
        elif way == "functional_call":
            params = {name: param.detach() for name, param in model.named_parameters()}
            torch.func.grad(lambda p: torch.func.functional_call(model, p, batch(9)))(params)
        else:
            first = torch.autograd.grad(loss_of(model, 9), model.gain, create_graph=True)[0]
            torch.autograd.grad(first, model.gain)
        optimizer.backward(loss_of(model, step))
        textbook.step(loss_of(textbook.model, step), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(model), weights_of(textbook.model))


@CLIPPING
def test_a_gradient_penalty(clip_grad_norm: float | None) -> None:
    """A loss that holds gradients of its own (double backward)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def loss(m: nn.Module, step: int) -> Tensor:
        x = torch.linspace(-1, 1, 8).view(2, 4).requires_grad_()
        out = m(x).sum()
        return out + torch.autograd.grad(out, x, create_graph=True)[0].square().sum()

    compare(model, loss, clip_grad_norm=clip_grad_norm)


@CLIPPING
def test_a_graph_kept_for_more(clip_grad_norm: float | None) -> None:
    """A plain backward that keeps its graph, and then ours: both count."""
    w = vector(0.0)
    optimizer = Lomo([w], lr=1.0, clip_grad_norm=None if clip_grad_norm is None else 9.0, clip_passes="two")
    loss = gives(w, torch.tensor([0.5]))
    loss.backward(retain_graph=True)
    optimizer.backward(loss)
    assert w.item() == -1.0
    assert w.grad is None
