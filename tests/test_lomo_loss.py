"""A step of two backwards runs the loss's own nodes once, and losses that overwrite what they saved are right in it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.models import VOCAB, Block, assert_same_bits, weights_of
from support.textbook import Textbook
from test_lomo_clip_memory import Hidden
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from lomo_kernels import Lomo
from lomo_kernels.optim.autograd import Start
from lomo_kernels.optim.loss_chain import LossChain, loss_chain_of

WIDTH = 16
SEQ = 6
BUDGETS: list[Any] = [0, 5000, 12_000, None]
CLIP: dict[str, Any] = {"lr": 0.1, "clip_grad_norm": 0.3}
ran: list[str] = []  # backwards of `InPlaceCrossEntropy`


class InPlaceCrossEntropy(torch.autograd.Function):
    """As Liger's: forward writes the gradient over the logits, and backward multiplies this memory by its gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits.float(), labels)
        grad = (logits.float().softmax(-1) - F.one_hot(labels, logits.shape[-1])) / len(labels)
        logits.data.copy_(grad)
        ctx.save_for_backward(logits.detach())
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (saved,) = ctx.saved_tensors
        ran.append("in place")
        saved.data.mul_(grad.to(saved.dtype))
        return saved, None


LossFunction = Callable[[Tensor, Tensor], Tensor]


def in_place(logits: Tensor, labels: Tensor) -> Tensor:
    return InPlaceCrossEntropy.apply(logits, labels)


LOSSES: dict[str, LossFunction] = {
    "in place": in_place,
    "in place, halved": lambda logits, labels: in_place(logits, labels) / 2,
    "torch": F.cross_entropy,
    "mean": lambda logits, labels: logits.mean(),  # whose gradient is one number, expanded
    "cast": lambda logits, labels: F.cross_entropy(logits.double(), labels),
}


IN_PLACE = [LOSSES["in place"], LOSSES["in place, halved"]]


class Model(nn.Module):
    """Embedding, blocks, head. Returns the loss of the logits."""

    def __init__(self, loss: LossFunction = in_place, *, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, 0.0) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.loss, self.reentrant = loss, reentrant

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.logits(tokens), labels.flatten())

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.flatten(0, 1))  # a matrix, whose matmul is the first node that runs in every backward


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (2, SEQ), generator=generator), torch.randint(VOCAB, (2, SEQ), generator=generator)


def train(model: nn.Module, steps: int = 3, **options: Any) -> dict[str, Tensor]:
    """The weights after several steps, and the norm of the last one."""
    optimizer = Lomo(model, **(CLIP | options))
    for step in range(steps):
        optimizer.backward(model(*batch(step)))
    assert all(param.grad is None for param in model.parameters())
    return weights_of(model) | {"norm": optimizer.last_grad_norm.clone()}


def assert_budgets_agree(make: Callable[[], nn.Module], **options: Any) -> None:
    results = [train(make(), clip_memory=budget, **options) for budget in BUDGETS]
    for weights in results[:-1]:
        assert_same_bits(weights, results[-1])


# ---- The same steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("loss_scale", [None, 64.0, "dynamic"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_steps_are_those_of_a_textbook(
    loss: LossFunction, loss_scale: Any, reentrant: bool | None, budget: Any
) -> None:
    model = Model(loss, reentrant=reentrant)
    textbook = Textbook(model, **CLIP, loss_scale=loss_scale)
    optimizer = Lomo(model, **CLIP, loss_scale=loss_scale, clip_memory=budget)
    for step in range(4):
        ran.clear()
        optimizer.backward(model(*batch(step)))
        assert len(ran) == (loss in IN_PLACE)
        textbook.step(textbook.model(*batch(step)), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(model), weights_of(textbook.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["hooks", "fused"])
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_budget_gives_the_same_bits(
    loss: LossFunction, reentrant: bool | None, fused: bool, dtype: torch.dtype
) -> None:
    results = [
        train(Model(loss, reentrant=reentrant).to(dtype), clip_memory=budget, fused_layers=fused)
        for budget in BUDGETS[
            fused:
        ]  # with 0 a fused layer has no gradient; otherwise it has if its factors are larger
    ]
    for weights in results[:-1]:
        assert_same_bits(weights, results[-1])


@pytest.mark.parametrize("options", [{}, {"fused_layers": True}], ids=["hooks", "fused"])
def test_reentrant_checkpoints_without_a_norm(options: dict[str, Any]) -> None:
    """A backward that changes nothing goes before the update."""
    model = Model(reentrant=True)
    textbook = Textbook(model, lr=0.1)
    optimizer = Lomo(model, lr=0.1, **options)
    for step in range(3):
        ran.clear()
        optimizer.backward(model(*batch(step)))
        assert len(ran) == 1
        textbook.step(textbook.model(*batch(step)))
    if options:
        for name, weight in weights_of(model).items():
            torch.testing.assert_close(weight, weights_of(textbook.model)[name], rtol=1e-5, atol=1e-6)
    else:
        assert_same_bits(weights_of(model), weights_of(textbook.model))


@pytest.mark.parametrize("clip_memory", [0, 5000], ids=str)
def test_a_loss_runs_once_in_each_step(clip_memory: int) -> None:
    """Also in the first step, which compares two norm passes, and in the one that finds out what fits."""
    model = Model()
    optimizer = Lomo(model, **CLIP, clip_memory=clip_memory)
    for step in range(4):
        ran.clear()
        optimizer.backward(model(*batch(step)))
        assert ran == ["in place"]


# ---- What stands where the passes begin ------------------------------------------------------------------------------


def halve(grad: Tensor) -> Tensor:
    return grad * 0.5


def halve_in_place(grad: Tensor) -> None:
    grad.mul_(0.5)


@pytest.mark.parametrize("hook", [halve, halve_in_place, lambda grad: None], ids=["other", "in place", "looks"])
@pytest.mark.parametrize("where", ["tensor", "prehook", "both"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_hooks_on_the_logits(loss: LossFunction, where: str, hook: Any) -> None:
    """Each backward calls them, as a plain one does. They see the loss's gradient as it was."""

    def hooked(logits: Tensor, labels: Tensor) -> Tensor:
        if where in ("tensor", "both"):
            logits.register_hook(hook)
        if where in ("prehook", "both"):
            logits.grad_fn.register_prehook(lambda grads: None if (made := hook(grads[0])) is None else (made,))
        return loss(logits, labels)

    assert_budgets_agree(lambda: Model(hooked))
    model = Model(hooked)
    textbook = Textbook(model, **CLIP)
    optimizer = Lomo(model, **CLIP, clip_memory=0)
    optimizer.backward(model(*batch(0)))
    textbook.step(textbook.model(*batch(0)), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(model), weights_of(textbook.model))


def test_a_hook_may_keep_its_gradient() -> None:
    """Its memory is freed for everyone else only."""
    kept: list[Tensor] = []

    def hooked(logits: Tensor, labels: Tensor) -> Tensor:
        logits.register_hook(kept.append)
        return F.cross_entropy(logits, labels)

    model = Model(hooked)
    twin = copy.deepcopy(model)
    twin.loss = F.cross_entropy
    optimizer = Lomo(model, **CLIP, clip_memory=0)
    logits = twin.logits(batch(0)[0])
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, batch(0)[1].flatten()), logits)
    optimizer.backward(model(*batch(0)))
    assert len(kept) >= 3
    for grad in kept:
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("loss", [F.cross_entropy, in_place], ids=["torch", "in place"])
@pytest.mark.parametrize("where", ["root", "head", "loss"])
def test_full_backward_hooks_of_modules(where: str, loss: LossFunction) -> None:
    """On the root module, whose output is the loss; on the head; on the module of the loss. They run in every backward,
    and so does what lies between them and the loss."""

    def make() -> nn.Module:
        model = Model(CrossEntropy(loss))
        module = {"root": model, "head": model.head, "loss": model.loss}[where]
        if where == "loss":
            module.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0.5, None))
        else:
            module.register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 0.5,))
        return model

    if loss is in_place and where == "root":  # halved in each backward
        with pytest.raises(RuntimeError, match="different gradients"):
            train(make(), clip_memory=0)
    else:
        assert_budgets_agree(make)


class CrossEntropy(nn.Module):
    def __init__(self, function: LossFunction) -> None:
        super().__init__()
        self.function = function

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.function(logits, labels)


def test_a_loss_without_gradient_is_an_error() -> None:
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    model = Model(lambda logits, labels: Nothing.apply(logits))
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="no gradient came"):
        Lomo(model, **CLIP, clip_memory=0).backward(model(*batch(0)))
    assert_same_bits(weights_of(model), before)


# ---- Losses that hide a layer ----------------------------------------------------------------------------------------


class HidingModel(Model):
    """The loss function has a layer inside, which the graph does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(VOCAB, VOCAB, bias=False)
        self.loss = lambda logits, labels: Hidden.apply(logits, self.inside).square().mean()


@pytest.mark.parametrize("fused", [False, True], ids=["hooks", "fused"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_loss_that_hides_a_layer_runs_in_every_backward(tied: bool, fused: bool) -> None:
    results = []
    for budget in BUDGETS[fused:]:
        model = HidingModel()
        if tied:
            model.inside.weight = nn.Parameter(torch.eye(VOCAB))
        results.append(train(model, clip_memory=budget, fused_layers=fused))
    for weights in results[:-1]:
        assert_same_bits(weights, results[-1])


@pytest.mark.parametrize("budget", [0, 5000])
def test_a_hidden_layer_that_is_unfrozen_later(budget: int) -> None:
    model = HidingModel()
    hidden = model.inside.weight.requires_grad_(False)
    optimizer = Lomo(model, **CLIP, clip_memory=budget)
    for step in range(3):
        optimizer.backward(model(*batch(step)))
    hidden.requires_grad_(True)
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=r"does not show inside\.weight, .*run this batch again"):
        optimizer.backward(model(*batch(3)))
    assert_same_bits(weights_of(model), before)
    assert all(param.grad is None for param in model.parameters())
    twin = HidingModel()
    twin.load_state_dict(model.state_dict())
    reference = Lomo(twin, **CLIP, clip_memory=None)
    for step in range(3, 6):
        optimizer.backward(model(*batch(step)))
        reference.backward(twin(*batch(step)))
    assert_same_bits(weights_of(model), weights_of(twin))


@pytest.mark.parametrize("visible", [False, True])
def test_an_unmanaged_layer_inside_a_loss(visible: bool) -> None:
    """Its gradient is that of one backward, also if the graph shows another use of it."""

    def loss_of(model: HidingModel, step: int) -> Tensor:
        tokens, _ = batch(step)
        logits = model.logits(tokens)
        return Hidden.apply(model.inside(logits) if visible else logits, model.inside).square().mean()

    model = HidingModel()
    managed = [param for name, param in model.named_parameters() if name != "inside.weight"]
    optimizer = Lomo(managed, **CLIP, clip_memory=0)
    for step in range(3):
        twin = HidingModel()
        twin.load_state_dict(model.state_dict())
        model.inside.weight.grad = None
        optimizer.backward(loss_of(model, step))
        loss_of(twin, step).backward()
        torch.testing.assert_close(model.inside.weight.grad, twin.inside.weight.grad)


# ---- Which nodes run once --------------------------------------------------------------------------------------------


def names_of(loss: Tensor) -> list[str]:
    chain = loss_chain_of(loss)
    return [] if chain is None else [name.rstrip("0123456789") for name in chain.names]


def test_the_part_that_runs_once() -> None:
    w, x = torch.ones(3, 3, requires_grad=True), torch.ones(2, 3)
    labels = torch.tensor([0, 1])
    logits = x.requires_grad_() @ w
    assert names_of(F.cross_entropy(logits, labels)) == ["NllLossBackward", "LogSoftmaxBackward"]
    chain = loss_chain_of(F.cross_entropy(logits, labels))
    assert chain is not None
    assert chain.end == get_gradient_edge(logits)
    assert names_of(F.cross_entropy(logits.double().view(2, 3), labels) / 2) == [
        "DivBackward",
        "NllLossBackward",
        "LogSoftmaxBackward",
        "ViewBackward",
        "ToCopyBackward",
    ]
    assert names_of(logits.sum() + w.sum()) == [], "auxiliary losses"
    assert names_of((logits.sum() + w.sum()) * 2) == ["MulBackward"]
    assert names_of(logits[0, 0] * logits[1, 1]) == []
    assert names_of(w.sum()) == [], "a leaf comes next"
    assert names_of(w.exp().sum()) == ["SumBackward"], "and nodes of leaves run in every backward"
    assert names_of(torch.ones((), requires_grad=True)) == []
    head = nn.Linear(3, 3)
    head.register_full_backward_hook(lambda *_: None)
    assert names_of(F.cross_entropy(head(logits), labels)) == ["NllLossBackward", "LogSoftmaxBackward"]
    assert names_of(checkpoint(torch.sum, logits, use_reentrant=True)) == []
    deep = logits.sum()
    for _ in range(100):
        deep = deep * 2
    assert len(names_of(deep)) == 64


def test_a_loss_of_several_outputs_and_auxiliary_losses() -> None:
    def twofold(logits: Tensor, labels: Tensor) -> Tensor:
        first, second = logits.float().split(len(labels) // 2)
        return F.cross_entropy(first, labels[: len(first)]) + 0.1 * second.square().mean()

    assert_budgets_agree(lambda: Model(twofold))


# ---- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 5000])
def test_what_the_loss_saved_is_freed_before_the_first_gradient(budget: int) -> None:
    saved: list[Any] = []

    def watched(logits: Tensor, labels: Tensor) -> Tensor:
        log_probabilities = logits.float().log_softmax(-1)
        saved.append(weakref.ref(log_probabilities.untyped_storage()))
        return F.nll_loss(log_probabilities, labels)

    model = Model(watched)
    optimizer = Lomo(model, **CLIP, clip_memory=budget)
    alive: list[bool] = []
    model.head.weight.register_hook(lambda _: alive.append(saved[-1]() is not None))
    for step in range(3):
        loss = model(*batch(step))
        assert saved[-1]() is not None
        optimizer.backward(loss)
    assert len(alive) >= 6
    assert not any(alive)


@pytest.mark.parametrize("budget", [0, 5000, None], ids=str)
@pytest.mark.parametrize("loss", [F.cross_entropy, in_place], ids=["torch", "in place"])
def test_no_gradient_of_the_logits_outlives_the_head(loss: LossFunction, budget: Any) -> None:
    """Neither in the last backward, nor, except for one copy, in those before."""
    copies: list[Any] = []
    alive: list[int] = []

    def watched(logits: Tensor, labels: Tensor) -> Tensor:
        logits.register_hook(lambda grad: copies.append(weakref.ref(grad.untyped_storage())))
        return loss(logits, labels)

    model = Model(watched)
    model.embedding.weight.register_hook(lambda _: alive.append(sum(ref() is not None for ref in copies)))
    optimizer = Lomo(model, **CLIP, clip_memory=budget)
    optimizer.backward(model(*batch(0)))  # which looks whether a loss hides a layer: it may need this memory again
    alive.clear()
    for step in range(1, 3):
        optimizer.backward(model(*batch(step)))
    assert alive
    assert not any(alive)


@pytest.mark.parametrize("budget", [0, 5000])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_kept_gradient_is_freed_when_the_last_backward_has_used_it(
    loss: LossFunction, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when it ends, as autograd does it."""
    kept: list[Any] = []
    alive: list[bool] = []

    def run(self: LossChain, *args: Any, **options: Any) -> Start:
        start = run_chain(self, *args, **options)
        assert start.grad is not None
        kept.append(weakref.ref(start.grad.untyped_storage()))
        return start

    run_chain = LossChain.run
    monkeypatch.setattr(LossChain, "run", run)
    model = Model(loss)
    model.head.weight.register_hook(lambda _: alive.append(kept[-1]() is not None))
    optimizer = Lomo(model, **CLIP, clip_memory=budget)
    for step in range(2):
        alive.clear()
        optimizer.backward(model(*batch(step)))
        assert alive == [True] * (2 - step) + [False], "norm passes, and the update"


@pytest.mark.parametrize("budget", [0, 5000, None], ids=str)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_nothing_of_the_graph_outlives_the_step(loss: LossFunction, budget: Any) -> None:
    """The loss often lives until the next one is there."""
    alive: list[Any] = []

    def watched(logits: Tensor, labels: Tensor) -> Tensor:
        alive.append(weakref.ref(logits.untyped_storage()))
        return loss(logits, labels)

    model = Model(watched)
    model.blocks[0].register_forward_hook(lambda _, __, output: alive.append(weakref.ref(output.untyped_storage())))
    optimizer = Lomo(model, **CLIP, clip_memory=budget)
    for step in range(3):
        alive.clear()
        value = model(*batch(step))
        optimizer.backward(value)
        if step or loss not in IN_PLACE:  # the first step looks whether a loss hides a layer
            assert [ref() for ref in alive] == [None, None]


@pytest.mark.parametrize("budget", [0, 5000])
def test_a_checkpoint_around_head_and_loss_recomputes_once_for_each_backward(budget: int) -> None:
    forwards: list[int] = []

    class Checkpointed(Model):
        def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
            x = self.blocks[0](self.embedding(tokens))
            return checkpoint(self.end, x, labels, use_reentrant=False)

        def end(self, x: Tensor, labels: Tensor) -> Tensor:
            forwards.append(1)
            return F.cross_entropy(self.head(self.blocks[1](x).flatten(0, 1)), labels.flatten())

    model = Checkpointed()
    optimizer = Lomo(model, **CLIP, clip_memory=budget)
    for step in range(3):
        forwards.clear()
        optimizer.backward(model(*batch(step)))
    assert len(forwards) == 3
    assert_budgets_agree(Checkpointed)


def test_a_hook_trains_another_model_with_checkpoints() -> None:
    """Two backwards of its own inside one: its checkpoints recompute for each."""
    model, inner = Model(F.cross_entropy), Model(F.cross_entropy, reentrant=False)
    twin = copy.deepcopy(inner)
    optimizer, inner_optimizer = Lomo(model, **CLIP, clip_memory=0), Lomo(inner, **CLIP, clip_memory=0)
    steps = iter(range(2))

    @torch.enable_grad()
    def train_inner(_: Tensor) -> None:
        if (step := next(steps, None)) is not None:
            inner_optimizer.backward(inner(*batch(step)))

    model.blocks[0].register_forward_hook(lambda _, __, output: output.register_hook(train_inner) and None)
    optimizer.backward(model(*batch(0)))
    reference = Lomo(twin, **CLIP, clip_memory=None)
    for step in range(2):
        reference.backward(twin(*batch(step)))
    assert_same_bits(weights_of(inner), weights_of(twin))
