"""Two backwards through one graph that do not give the same: refused before a weight changes, and told why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.models import assert_same_bits, on_gradient_pass, weights_of
from support.textbook import Textbook64
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lomo_kernels import Lomo

LR = 0.5
VOCAB = 50
CLIP: dict[str, Any] = {"clip_grad_norm": 0.05, "clip_passes": "two"}
#: What runs backward twice, and what once. With the latter every loss here trains.
TWICE: dict[str, dict[str, Any]] = {
    "clip": CLIP,
    "dynamic": {"loss_scale": "dynamic", "clip_passes": "two"},
    "clip, static": CLIP | {"loss_scale": 1024.0},
    "fused, clip": CLIP | {"fused_layers": True},
}
ONCE: dict[str, dict[str, Any]] = {
    "plain": {},
    "static": {"loss_scale": 1024.0},
    "one": CLIP | {"clip_passes": "one"},
    "dynamic, one": {"loss_scale": "dynamic", "clip_passes": "one"},
    "fused, one": CLIP | {"clip_passes": "one", "fused_layers": True},
}


class OverwritingCrossEntropy(torch.autograd.Function):
    """The gradient is written over the saved logits, as Triton kernels do: no version counter moves."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        return F.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        logits.data.copy_((logits.softmax(-1) - F.one_hot(labels, logits.shape[-1])) / len(labels) * grad)
        return logits, None


class Attention(torch.autograd.Function):
    """A product whose backward writes over an input that it saved, as in-place backwards of attention do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        of_x = grad * y
        y.data.copy_(grad * x)
        return of_x, y


def model_of(width: int = 16) -> nn.Sequential:
    """Of width 200 the middle matrix has 160 KiB and is updated at once."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(VOCAB, width), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, VOCAB))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (20,), generator=generator), torch.randint(VOCAB, (20,), generator=generator)


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def overwriting(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return OverwritingCrossEntropy.apply(model(x), y)


def overwriting_beside_another(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A sum of losses has no part that runs once."""
    logits = model(x)
    return OverwritingCrossEntropy.apply(logits, y) + 0.0 * logits.square().mean()


def overwriting_attention(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    hidden = model[2](model[1](model[0](x)))
    return F.cross_entropy(model[3](Attention.apply(hidden.sin(), hidden.cos())), y)


def dropout_drawn_anew(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    hidden = checkpoint(
        lambda h: F.dropout(model[1](h), 0.5), model[0](x), use_reentrant=False, preserve_rng_state=False
    )
    return F.cross_entropy(model[3](hidden), y)


def selective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    def contexts() -> Any:
        return create_selective_checkpoint_contexts(
            lambda ctx, op, *args, **kwargs: (
                CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE
            )
        )

    return F.cross_entropy(model[3](checkpoint(model[1:3], model[0](x), use_reentrant=False, context_fn=contexts)), y)


def offloaded_once(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    away: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> int:
        away[len(away)] = tensor.detach().clone()
        return len(away) - 1

    with saved_tensors_hooks(pack, lambda key: away.pop(key)):
        hidden = model[2](model[1](model[0](x)))
    return F.cross_entropy(model[3](hidden), y)


DIFFERENT: dict[str, Loss] = {
    "cross entropy": overwriting_beside_another,
    "attention": overwriting_attention,
    "dropout": dropout_drawn_anew,
}
ONLY_ONCE: dict[str, Loss] = {"selective checkpoint": selective, "one-shot offload": offloaded_once}


def steps_are_those_of_sgd(
    model: nn.Module, optimizer: Lomo, loss: Loss, clip: float | None, seeds: range = range(4)
) -> None:
    """Each step next to float64's, from a loss that is autograd's own."""
    for seed in seeds:
        exact = Textbook64(model, lr=LR, clip_grad_norm=clip)
        optimizer.backward(loss(model, *batch(seed)))
        exact.step(plain(exact.model, *batch(seed)))
        assert optimizer.last_grad_norm.item() == pytest.approx(exact.norm, rel=1e-5)
        for (name, param), wanted in zip(model.named_parameters(), exact.model.parameters(), strict=True):
            assert (param.double() - wanted).abs().max().item() < 1e-5, name


def refused(optimizer: Lomo, model: nn.Module, loss: Tensor, match: str) -> None:
    before = weights_of(model)
    steps, scale = optimizer.step_count.item(), optimizer.loss_scale.item()
    with pytest.raises(RuntimeError, match=match):
        optimizer.backward(loss)
    assert_same_bits(weights_of(model), before)
    assert all(param.grad is None for param in model.parameters())
    assert optimizer.last_step_outcome == "unchanged"
    assert (optimizer.step_count.item(), optimizer.loss_scale.item()) == (steps, scale)


# ---- Backwards that differ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 200])
@pytest.mark.parametrize("options", TWICE.values(), ids=TWICE)
@pytest.mark.parametrize("loss", DIFFERENT.values(), ids=DIFFERENT)
def test_two_passes_that_differ_are_refused(loss: Loss, options: dict[str, Any], width: int) -> None:
    model = model_of(width)
    optimizer = Lomo(model, lr=LR, **options)
    for seed in range(2):  # and again
        refused(optimizer, model, loss(model, *batch(seed)), r'different gradients of .*overwrites.*clip_passes="one"')
    steps_are_those_of_sgd(model, optimizer, plain, options.get("clip_grad_norm"))


@pytest.mark.parametrize("options", ONCE.values(), ids=ONCE)
@pytest.mark.parametrize("loss", [overwriting, overwriting_attention, selective, offloaded_once])
def test_one_pass_trains_with_them(loss: Loss, options: dict[str, Any]) -> None:
    model = model_of()
    optimizer = Lomo(model, lr=LR, **options)
    for seed in range(3):
        exact = Textbook64(model, lr=LR, clip_grad_norm=options.get("clip_grad_norm"))
        optimizer.backward(loss(model, *batch(seed)))
        twin = exact.model
        exact.step((overwriting_attention if loss is overwriting_attention else plain)(twin, *batch(seed)))
        for (name, param), wanted in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (param.double() - wanted).abs().max().item() < 1e-5, name


def test_half_precision_by_default() -> None:
    """Its default is dynamic loss scaling, which may run backward twice: with such a loss no weight ever moved."""
    model = model_of().half()
    optimizer = Lomo(model, lr=LR, clip_passes="two")
    refused(optimizer, model, overwriting_beside_another(model, *batch(0)), 'clip_passes="one"')


def test_a_hook_that_adds_noise() -> None:
    model = model_of()
    model[1].weight.register_hook(lambda grad: grad + torch.randn_like(grad) * 1e-2)
    optimizer = Lomo(model, lr=LR, **CLIP)
    refused(optimizer, model, plain(model, *batch(0)), r"of 1\.weight: its norm is first")


def test_grad_norm_looks_too() -> None:
    model = model_of()
    optimizer = Lomo(model, lr=LR, **CLIP)
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="different gradients"):
        optimizer.grad_norm(overwriting(model, *batch(0)))
    assert_same_bits(weights_of(model), before)


def test_a_loss_that_begins_to_overwrite_later() -> None:
    """A graph of another shape is looked at again; after that only one that is new."""
    model = model_of()
    optimizer = Lomo(model, lr=LR, **CLIP)
    passes: list[int] = []
    on_gradient_pass(model[1].weight, lambda number, grad: passes.append(number))
    counts = []
    losses: list[Loss] = [plain, plain, lambda m, x, y: plain(m, x, y) * 0.5, plain, lambda m, x, y: plain(m, x, y) * 2]
    for seed, loss in enumerate(losses):
        passes.clear()
        optimizer.backward(loss(model, *batch(seed)))
        counts.append(len(passes))
    assert counts == [3, 2, 3, 2, 2]
    refused(optimizer, model, overwriting_beside_another(model, *batch(9)), "OverwritingCrossEntropy")


def test_a_step_that_overflows_is_not_compared_and_the_next_one_is() -> None:
    model = model_of()
    optimizer = Lomo(model, lr=LR, loss_scale="dynamic", clip_passes="two")
    passes: list[int] = []
    on_gradient_pass(model[1].weight, lambda number, grad: passes.append(number))
    optimizer.backward(plain(model, *batch(0)) * 1e38)
    assert (len(passes), optimizer.skipped_steps.item()) == (
        1 + 1,
        1,
    )  # a norm pass, and an update that changes nothing
    passes.clear()
    optimizer.backward(plain(model, *batch(0)) * 2.0)
    assert len(passes) == 3


def test_many_shapes_cost_a_bounded_number_of_passes() -> None:
    """A model whose graph is another at every step (experts, lengths)."""
    w = nn.Parameter(torch.ones(3))
    optimizer = Lomo([w], lr=0.0, clip_grad_norm=1.0, clip_passes="two")
    passes: list[int] = []
    on_gradient_pass(w, lambda number, grad: passes.append(number))
    for length in range(1, 101):
        x = w
        for _ in range(length):
            x = x * 1.0
        optimizer.backward(x.sum())
    assert len(passes) == 2 * 100 + 64
    passes.clear()
    optimizer.backward(w.exp().sum())  # another kind of node
    assert len(passes) == 3


@pytest.mark.parametrize("given", ["model", "parameters"])
@pytest.mark.parametrize(("options", "reentrant"), [(CLIP, False), (CLIP, True), ({}, True)])
def test_a_second_look_leaves_no_trace(options: dict[str, Any], reentrant: bool, given: str) -> None:
    """A resumed run begins with one, and has to go on as the run that it resumes: random numbers, batch norms."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(8, 150), nn.BatchNorm1d(150), nn.Linear(150, 150)

        def forward(self, x: Tensor) -> Tensor:
            block = nn.Sequential(self.first, self.norm, nn.Dropout(0.2))
            return self.last(checkpoint(block, x, use_reentrant=reentrant)).square().mean()

    def optimizer_of(model: nn.Module) -> Lomo:
        return Lomo(model if given == "model" else model.parameters(), lr=LR, **options)

    torch.manual_seed(1)
    run = Net()
    x = torch.randn(5, 8, requires_grad=reentrant)
    optimizer = optimizer_of(run)
    optimizer.backward(run(x))
    resumed = copy.deepcopy(run)
    successor = optimizer_of(resumed)
    successor.load_state_dict(optimizer.state_dict())
    after = []
    for model, stepper in ((run, optimizer), (resumed, successor)):
        torch.manual_seed(2)
        for _ in range(2):
            stepper.backward(model(x))
        after.append({**{name: value.clone() for name, value in model.state_dict().items()}, "": torch.rand(3)})
    assert_same_bits(*after)


# ---- Backwards that come once only ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", TWICE.values(), ids=TWICE)
@pytest.mark.parametrize("loss", ONLY_ONCE.values(), ids=ONLY_ONCE)
def test_a_graph_that_allows_one_backward(loss: Loss, options: dict[str, Any]) -> None:
    model = model_of(200)
    optimizer = Lomo(model, lr=LR, **options)
    for seed in range(2):
        refused(optimizer, model, loss(model, *batch(seed)), '(failed, and|allows one) .*clip_passes="one"')
    steps_are_those_of_sgd(model, optimizer, plain, options.get("clip_grad_norm"))


def test_an_error_of_the_users_is_not_taken_for_one_of_these() -> None:
    class Failure(Exception):
        pass

    def fail(number: int, grad: Tensor) -> None:
        if number == 1:
            raise Failure

    model = model_of()
    optimizer = Lomo(model, lr=LR, **CLIP)
    on_gradient_pass(model[1].weight, fail)
    with pytest.raises(Failure):
        optimizer.backward(plain(model, *batch(0)))
    steps_are_those_of_sgd(model, optimizer, plain, CLIP["clip_grad_norm"])


@pytest.mark.parametrize("options", [{}, {"fused_layers": True}], ids=["plain", "fused"])
def test_reentrant_checkpoints_look_before_one_pass(options: dict[str, Any]) -> None:
    """Which takes two backwards as well."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = checkpoint(model[1:], model[0](x), use_reentrant=True)
        return OverwritingCrossEntropy.apply(logits, y) + 0.0 * logits.square().mean()

    model = model_of()
    optimizer = Lomo(model, lr=LR, **options)
    refused(optimizer, model, loss(model, *batch(0)), "different gradients.*use_reentrant=False")
    steps_are_those_of_sgd(model, optimizer, plain, None)


# ---- Liger's cross entropy ------------------------------------------------------------------------------------------

LIGER = """
import torch, torch.nn.functional as F
from torch import nn
from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss
from lomo_kernels import Lomo
from support.textbook import Textbook64

def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 130), nn.Linear(130, 130), nn.Tanh(), nn.Linear(130, 20))

x, y = torch.arange(6), torch.arange(6).flip(0)
liger = LigerCrossEntropyLoss()
for weight in (1.0, 0.5):
    for name, options in (
        ("two", dict(clip_grad_norm=0.05, clip_passes="two")),
        ("part", dict(clip_grad_norm=0.05, clip_memory=40_000)),
        ("dynamic", dict(loss_scale="dynamic", clip_passes="two")),
        ("one", dict(clip_grad_norm=0.05, clip_passes="one")),
        ("dynamic one", dict(loss_scale="dynamic", clip_passes="one")),
        ("plain", dict()),
    ):
        model = model_of()
        optimizer = Lomo(model, lr=0.5, **options)
        for step in range(3):
            exact = Textbook64(model, lr=0.5, clip_grad_norm=options.get("clip_grad_norm"))
            optimizer.backward(liger(model(x), y) * weight)
            exact.step(F.cross_entropy(exact.model(x), y) * weight)
            for param, wanted in zip(model.parameters(), exact.model.parameters(), strict=True):
                assert (param.double() - wanted).abs().max().item() < 1e-6, (name, weight, step)
model = model_of()
optimizer = Lomo(model, lr=0.5, clip_grad_norm=0.05, clip_passes="two")
before = [param.detach().clone() for param in model.parameters()]
try:
    optimizer.backward(liger(model(x), y) * 0.5 + 0.0 * model[1].weight.sum())
except RuntimeError as error:
    assert "LigerCrossEntropyFunctionBackward" in str(error) and 'clip_passes="one"' in str(error), error
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
else:
    raise AssertionError("of a sum of losses, none runs once")
print("exact")
"""


def test_cross_entropy_of_liger(run_python: Any) -> None:
    """The kernel itself, interpreted. It writes over the logits, again in backward unless its gradient is exactly 1."""
    pytest.importorskip("triton", reason="liger-kernel runs on Triton")
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: it is in the extra 'test'")
    done = run_python(LIGER, TRITON_INTERPRET="1")
    assert done.stdout.strip().endswith("exact"), done.stderr[-3000:]


LIGER_FUSED = """
import torch, torch.nn.functional as F
from torch import nn
from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
from lomo_kernels import Lomo
from support.textbook import Textbook64

class Model(nn.Module):
    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.middle, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.middle(self.embedding(x)).tanh()

x, y = torch.arange(6), torch.arange(6).flip(0)
liger, with_z = LigerFusedLinearCrossEntropyLoss(), LigerFusedLinearCrossEntropyLoss(lse_square_scale=0.1)

def loss_of(model, factor, liger=liger):
    loss = liger(model.head.weight, model(x), y, model.head.bias)
    return loss if factor == 1.0 else loss * factor

for factor, tied, options in (
    (0.5, False, dict()),
    (0.5, True, dict(clip_grad_norm=0.05, clip_memory=None)),
    (0.5, False, dict(clip_grad_norm=0.05, clip_memory=None, fused_layers=True)),
    (1.0, True, dict(clip_grad_norm=0.05, clip_memory=0)),
    (0.5, True, dict(clip_grad_norm=0.05, clip_memory=0, fused_layers=True)),
    (0.5, False, dict(clip_grad_norm=0.05, clip_memory=600)),  # as "auto", if not all fit
    (0.5, False, dict(loss_scale="dynamic", clip_passes="two")),
    (0.5, True, dict(clip_grad_norm=0.05, clip_memory=0, z=0.1, fused_layers=True)),
    (1.0, False, dict(clip_grad_norm=0.05, clip_memory=600, z=0.1, fused_layers=True)),
):
    model, z = Model(tied), options.pop("z", 0.0)
    optimizer = Lomo(model, lr=0.5, **options)
    for step in range(4):
        exact = Textbook64(model, lr=0.5, clip_grad_norm=options.get("clip_grad_norm"))
        logits = exact.model.head(exact.model(x))
        optimizer.backward(loss_of(model, factor, with_z if z else liger))
        exact.step((F.cross_entropy(logits, y) + z * logits.logsumexp(1).square().mean()) * factor)
        for param, wanted in zip(model.parameters(), exact.model.parameters(), strict=True):
            assert (param.double() - wanted).abs().max().item() < 1e-6, (factor, tied, options, step)
            assert param.grad is None
    assert ("a call that is not fused" in optimizer.summary()) is (z != 0)
model = Model(False)
optimizer = Lomo(model, lr=0.5, clip_grad_norm=0.05, clip_memory=0)
before = [param.detach().clone() for param in model.parameters()]
try:
    optimizer.backward(loss_of(model, 0.5) + 0.0 * model.middle.weight.sum())
except RuntimeError as error:
    assert "different gradients" in str(error) and "clip_memory=None" in str(error), error
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
else:
    raise AssertionError("of a sum of losses, none runs once")
print("exact")
"""


@pytest.mark.slow
def test_fused_loss_of_liger(run_python: Any) -> None:
    """Its weight's gradient exists since forward, and goes the way of every gradient. Backward multiplies it in place
    unless the loss is used without a factor, and runs once in a step. With fused layers ours stands in, which has no
    z-loss."""
    pytest.importorskip("triton", reason="liger-kernel runs on Triton")
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: it is in the extra 'test'")
    done = run_python(LIGER_FUSED, TRITON_INTERPRET="1")
    assert done.stdout.strip().endswith("exact"), done.stderr[-3000:]


# ---- What is the same ------------------------------------------------------------------------------------------------


def summed_in_another_order(grads: Tensor, seed: int) -> Tensor:
    """The sum over the first dimension, rounded to the dtype after each term, as atomics do it."""
    order = torch.randperm(len(grads), generator=torch.Generator().manual_seed(seed))
    total = torch.zeros_like(grads[0])
    for index in order.tolist():
        total += grads[index]
    return total


@pytest.mark.parametrize("size", [1, 16, 640, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sums_in_another_order_are_the_same(dtype: torch.dtype, size: int) -> None:
    """As GPUs have them. They moved a norm by a third of the tolerance at most."""
    w = nn.Parameter(torch.zeros(size, dtype=dtype))
    grads = torch.randn(100, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    for seed in range(3):
        on_gradient_pass(w, lambda number, grad, seed=seed: summed_in_another_order(grads, 100 * seed + number))
        optimizer = Lomo([w], lr=0.0, clip_grad_norm=1.0, loss_scale=None, clip_passes="two")
        optimizer.backward(w.float().sum())
        optimizer.remove()
        w._backward_hooks.clear()


def test_a_gradient_that_is_nothing_but_rounding_may_be_any_other() -> None:
    """A key's bias: softmax does not depend on it."""
    bias, w = nn.Parameter(torch.zeros(64)), nn.Parameter(torch.zeros(300, 300))
    bias.register_hook(lambda grad: torch.randn(64) * 1e-9)
    optimizer = Lomo([bias, w], lr=0.0, clip_grad_norm=1.0, clip_passes="two")
    optimizer.backward(bias.sum() + w.sum())


@pytest.mark.parametrize("size", [3, 40_000])
@pytest.mark.parametrize("factor", [0.5, 0.99, 1.01, 1e4, 0.0, float("inf"), float("nan")])
def test_a_gradient_that_is_not_the_same(factor: float, size: int) -> None:
    for dtype in (torch.float32, torch.bfloat16) if factor not in (0.99, 1.01) else (torch.float32,):
        w = nn.Parameter(torch.ones(size, dtype=dtype))
        on_gradient_pass(w, lambda number, grad: grad * factor if number else grad)
        optimizer = Lomo([w], lr=1.0, clip_grad_norm=1.0, clip_passes="two")
        with pytest.raises(RuntimeError, match="parameter 0: its norm is first"):
            optimizer.backward(w.float().sum())
        assert (w == 1).all()
