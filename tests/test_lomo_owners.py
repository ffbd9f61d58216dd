"""A gradient goes to the optimizer whose backward made it, and a parameter has one optimizer: the newest."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.models import assert_same_bits, gives, same_bits, vector, weights_of
from support.textbook import Textbook
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lomo_kernels import Lomo
from lomo_kernels.layers import linear

LR = 0.5
NORM = 0.05
RULES: dict[str, dict[str, Any]] = {
    "hook": {},
    "two": {"clip_grad_norm": NORM, "clip_passes": "two"},
    "one": {"clip_grad_norm": NORM, "clip_passes": "one"},
}
BY_RULE = pytest.mark.parametrize("rule", RULES)
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
SCALES = pytest.mark.parametrize("scale", [None, 64.0, "dynamic"])
CHECKPOINTS = pytest.mark.parametrize("hidden", [False, True], ids=["visible", "in a reentrant checkpoint"])


def perceptron(inputs: int, outputs: int) -> nn.Module:
    """Its second weight has 101 KiB, above the 64 KiB up to which gradients wait for a list call; the others less."""
    return nn.Sequential(nn.Linear(inputs, 160), nn.Tanh(), nn.Linear(160, 162), nn.Tanh(), nn.Linear(162, outputs))


def generator_and_discriminator() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return perceptron(4, 8), perceptron(8, 1)


def data(step: int) -> tuple[Tensor, Tensor]:
    """Real samples [16, 8] and noise [16, 4]."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(16, 8, generator=generator), torch.randn(16, 4, generator=generator)


def is_real(logits: Tensor, label: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def losses(
    g: nn.Module, d: nn.Module, step: int, hidden: bool = False
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The discriminator's loss and the generator's, to be computed in this order. The first one's graph reaches the
    generator, as in a loop that forgets to detach."""
    real, noise = data(step)

    def through(x: Tensor) -> Tensor:
        return checkpoint(d, x, use_reentrant=True) if hidden else d(x)

    return (
        lambda: is_real(d(real), 1.0) + is_real(d(g(noise)), 0.0),
        lambda: is_real(through(g(noise)), 1.0),
    )


def textbook_step(own: Textbook, other: Textbook, loss: Tensor, optimizer: Lomo) -> None:
    """One step of `own` alone, with the clip coefficient of `optimizer`: `other` gets nothing."""
    own.step(loss, norm=optimizer.last_grad_norm)
    other.zero_grad()


def assert_trained_alike(models: tuple[nn.Module, ...], textbooks: tuple[Textbook, ...], fused: bool) -> None:
    for model, textbook in zip(models, textbooks, strict=True):
        assert all(param.grad is None for param in model.parameters())
        if not fused:
            assert_same_bits(weights_of(model), weights_of(textbook.model))
            continue
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight, textbook.model.get_parameter(name), rtol=1e-5, atol=1e-6)


# ---- Whose gradient -------------------------------------------------------------------------------------------------


@BY_RULE
@FUSED
@SCALES
@CHECKPOINTS
def test_two_optimizers_in_turn(rule: str, fused: bool, scale: Any, hidden: bool) -> None:
    """A GAN's loop as the README has it: backward takes the place of zero_grad() and step()."""
    models = g, d = generator_and_discriminator()
    books = book_g, book_d = tuple(Textbook(model, lr=LR, loss_scale=scale, **RULES[rule]) for model in models)
    opt_g, opt_d = (Lomo(model, LR, loss_scale=scale, fused_layers=fused, **RULES[rule]) for model in models)
    for step in range(3):
        loss_d, loss_g = losses(g, d, step, hidden)
        textbook_d, textbook_g = losses(book_g.model, book_d.model, step)
        opt_d.backward(loss_d())
        textbook_step(book_d, book_g, textbook_d(), opt_d)
        assert_trained_alike(models, books, fused)
        opt_g.backward(loss_g())
        textbook_step(book_g, book_d, textbook_g(), opt_g)
        assert_trained_alike(models, books, fused)


@BY_RULE
@FUSED
@pytest.mark.parametrize("scale", [None, 64.0])
@CHECKPOINTS
def test_accumulating_leaves_nothing_to_the_other(rule: str, fused: bool, scale: Any, hidden: bool) -> None:
    models = g, d = generator_and_discriminator()
    books = book_g, book_d = tuple(Textbook(model, lr=LR, loss_scale=scale, **RULES[rule]) for model in models)
    opt_g, opt_d = (Lomo(model, LR, loss_scale=scale, fused_layers=fused, **RULES[rule]) for model in models)
    for step in range(2):
        with opt_g.accumulate():
            opt_g.backward(losses(g, d, 10 + step, hidden)[1]())
        book_g.backward(losses(book_g.model, book_d.model, 10 + step)[1]())
        book_d.zero_grad()
        assert all(param.grad is None for param in d.parameters())
        assert all(param.grad is not None for param in g.parameters())
        kept = [param.grad.clone() for param in g.parameters()]
        opt_d.backward(losses(g, d, step)[0]())  # its graph reaches the generator
        assert all(map(same_bits, kept, (param.grad for param in g.parameters())))
        kept_by_book = [param.grad for param in book_g.model.parameters()]
        book_g.zero_grad()
        textbook_step(book_d, book_g, losses(book_g.model, book_d.model, step)[0](), opt_d)
        opt_g.backward(losses(g, d, step, hidden)[1]())
        for param, grad in zip(book_g.model.parameters(), kept_by_book, strict=True):
            param.grad = grad
        textbook_step(book_g, book_d, losses(book_g.model, book_d.model, step)[1](), opt_g)
        assert_trained_alike(models, books, fused)


@BY_RULE
@FUSED
@CHECKPOINTS
@pytest.mark.parametrize(("scale", "way"), [(None, "plain"), (64.0, "accumulate"), ("dynamic", "plain")])
def test_what_the_other_has_accumulated_keeps_every_bit(
    rule: str, fused: bool, hidden: bool, scale: Any, way: str
) -> None:
    g, d = generator_and_discriminator()
    opt_g, opt_d = (Lomo(model, LR, loss_scale=scale, fused_layers=fused, **RULES[rule]) for model in (g, d))
    book = Textbook(d, lr=LR, loss_scale=scale, **RULES[rule])
    real, _ = data(5)
    if way == "plain":
        is_real(d(real), 1.0).backward()
    else:
        with opt_d.accumulate():
            opt_d.backward(is_real(d(real), 1.0))
    objects = [param.grad for param in d.parameters()]
    bits = [grad.clone() for grad in objects]
    for step in range(2):
        opt_g.backward(losses(g, d, step, hidden)[1]())
    assert all(param.grad is grad for param, grad in zip(d.parameters(), objects, strict=True))
    assert all(map(same_bits, objects, bits))
    if way == "plain" and scale is not None:
        return
    opt_d.backward(is_real(d(real), 1.0))
    book.backward(is_real(book.model(real), 1.0))
    book.step(is_real(book.model(real), 1.0), norm=opt_d.last_grad_norm)
    for name, weight in d.named_parameters():
        torch.testing.assert_close(weight, book.model.get_parameter(name), rtol=1e-5, atol=1e-6)


@BY_RULE
def test_fused_layers_of_the_other_form_no_gradient(rule: str) -> None:
    """It would be dropped."""
    g, d = generator_and_discriminator()
    opt_g, opt_d = (Lomo(model, LR, fused_layers=True, **RULES[rule]) for model in (g, d))
    with mock.patch.object(linear, "gradient_of", wraps=linear.gradient_of) as formed:
        opt_g.backward(losses(g, d, 0)[1]())
        weights = {id(call.args[1]) for call in formed.call_args_list}
        assert weights.isdisjoint(id(param) for param in d.parameters())
        losses(g, d, 0)[1]().backward()  # a plain backward: each of both models' layers
        weights = {id(call.args[1]) for call in formed.call_args_list}
        assert weights == {id(layer.weight) for model in (g, d) for layer in (model[0], model[2], model[4])}
    opt_d.zero_grad()


@BY_RULE
@FUSED
def test_three_optimizers_on_three_parts_of_one_model(rule: str, fused: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(160, 160) for _ in range(3)))
    textbook = Textbook(model, lr=LR, **RULES[rule])
    optimizers = [Lomo(part, LR, fused_layers=fused, **RULES[rule]) for part in model]
    x = torch.randn(8, 160)
    for step in range(6):
        own = optimizers[step % 3]
        own.backward(model(x).square().mean())
        textbook.backward(textbook.model(x).square().mean())
        for index, part in enumerate(textbook.model):
            if index != step % 3:
                part.zero_grad()
        textbook.apply(own.last_grad_norm)
        textbook.zero_grad()
        assert_trained_alike((model,), (textbook,), fused)


@BY_RULE
@pytest.mark.parametrize("standing", [False, True])
def test_parameters_unfrozen_after_the_other_optimizer_was_made(rule: str, standing: bool) -> None:
    """A discriminator that is frozen while the generator trains, and was so when its optimizer was made."""
    g, d = generator_and_discriminator()
    d.requires_grad_(False)
    opt_g, _ = (Lomo(model, LR, **RULES[rule]) for model in (g, d))
    d.requires_grad_(True)
    if standing:
        for param in d.parameters():
            param.grad = torch.ones_like(param)
    opt_g.backward(losses(g, d, 0)[1]())
    for param in d.parameters():
        assert param.grad is None if not standing else torch.equal(param.grad, torch.ones_like(param))


@BY_RULE
def test_a_parameter_that_no_lomo_manages_gets_the_gradient_of_one_backward(rule: str) -> None:
    g, d = generator_and_discriminator()
    plain = torch.autograd.grad(losses(g, d, 0)[1](), list(d.parameters()))
    opt_d = Lomo(d, LR)
    opt_d.remove()
    opt_g = Lomo(g, LR, loss_scale=64.0, **RULES[rule])
    opt_g.backward(losses(g, d, 0)[1]())
    for param, grad in zip(d.parameters(), plain, strict=True):
        torch.testing.assert_close(param.grad, grad, rtol=1e-6, atol=1e-9)
    opt_g.backward(losses(g, d, 0)[1]())
    assert all(param.grad is not None for param in d.parameters())


def test_a_plain_backward_in_another_thread_meanwhile() -> None:
    """Two trainings in one process: the one that accumulates by plain backwards loses nothing to the other's step."""
    a, b = vector(1.0), vector(2.0)
    first, second = Lomo([a], LR), Lomo([b], LR)

    def train_the_other(grad: Tensor) -> None:
        thread = threading.Thread(target=lambda: gives(b, torch.tensor([0.25])).backward())
        thread.start()
        thread.join()

    handle = a.register_hook(train_the_other)
    first.backward(gives(a, torch.tensor([1.0])))
    handle.remove()
    assert (a.item(), b.grad.item()) == (0.5, 0.25)
    second.backward(gives(b, torch.tensor([0.5])))
    assert b.item() == 2.0 - LR * 0.75


@BY_RULE
def test_a_step_inside_a_step_of_another_optimizer(rule: str) -> None:
    """The inner one's graph reaches the outer one's parameter, which is not to be updated with that."""
    a, b = vector(0.0), vector(0.0)
    outer, inner = Lomo([a], 1.0, **RULES[rule]), Lomo([b], 1.0)
    calls = []

    def train_the_other(grad: Tensor) -> None:
        if not calls:
            calls.append(1)
            with torch.enable_grad():
                inner.backward(gives(b, torch.tensor([0.25])) + gives(a, torch.tensor([8.0])))

    handle = a.register_hook(train_the_other)
    outer.backward(gives(a, torch.tensor([0.03125])))
    handle.remove()
    assert (a.item(), b.item()) == (-0.03125, -0.25)
    assert a.grad is None and b.grad is None


@BY_RULE
@CHECKPOINTS
def test_an_error_inside_backward_leaves_what_the_other_has_accumulated(rule: str, hidden: bool) -> None:
    g, d = generator_and_discriminator()
    armed: list[nn.Parameter] = []

    def fail(param: nn.Parameter) -> None:
        if any(param is one for one in armed):
            raise KeyError("stop")

    for param in (d[0].bias, d[2].weight, g[4].bias):  # before the optimizers' hooks: what was set aside is still so
        param.register_post_accumulate_grad_hook(fail)
    opt_g, _ = (Lomo(model, LR, **RULES[rule]) for model in (g, d))
    is_real(d(data(1)[0]), 1.0).backward()
    bits = [param.grad.clone() for param in d.parameters()]
    for stop in (d[0].bias, d[2].weight, g[4].bias):
        armed[:] = [stop]
        with pytest.raises(KeyError, match="stop"):
            opt_g.backward(losses(g, d, 0, hidden)[1]())
        assert all(map(same_bits, bits, (param.grad for param in d.parameters())))


@pytest.mark.filterwarnings("error")
def test_step_says_when_another_optimizers_backward_left_it_nothing() -> None:
    """Two optimizers for two parts of one model, and one backward: the other's step() would train nothing, unseen."""
    a, b = vector(0.0), vector(0.0)
    first, second = Lomo([a], 1.0), Lomo([b], 1.0)
    second.step()  # a step without gradients is none, as ever
    first.backward(gives(a, torch.tensor([1.0])) + gives(b, torch.tensor([1.0])))
    first.step()
    with pytest.warns(UserWarning, match="found no gradients.*another Lomo"):
        second.step()
    for _ in range(2):  # the habit of calling step() after backward(), in whatever order
        second.backward(gives(b, torch.tensor([1.0])))
        first.backward(gives(a, torch.tensor([1.0])) + gives(b, torch.tensor([1.0])))
        first.step()
        second.step()
    assert (a.item(), b.item()) == (-3.0, -2.0)


# ---- The newest optimizer of a parameter ----------------------------------------------------------------------------


@FUSED
@BY_RULE
def test_a_newer_optimizer_takes_over(fused: bool, rule: str) -> None:
    """A notebook's cell run twice, with a step in between."""
    torch.manual_seed(0)
    model = perceptron(8, 1)
    x = torch.randn(16, 8)
    first = Lomo(model, lr=0.1, fused_layers=True, clip_grad_norm=1.0, clip_passes="two")
    first.backward(model(x).square().mean())
    state = first.state_dict()
    second = Lomo(model, lr=LR, fused_layers=fused, **RULES[rule])
    textbook = Textbook(model, lr=LR, **RULES[rule])
    before = weights_of(model)
    for use in (
        lambda: first.backward(model(x).square().mean()),
        lambda: first.fused_backward(model(x).square().mean(), lr=0.1),
        lambda: first.grad_norm(model(x).square().mean()),
        lambda: first.step(),
        lambda: first.add_param_group({"params": [vector(1.0)]}),
    ):
        with pytest.raises(RuntimeError, match="replaced by a newer Lomo"):
            use()
    assert_same_bits(weights_of(model), before)
    assert str(first.state_dict()) == str(state)
    for _ in range(2):
        second.backward(model(x).square().mean())
        textbook.step(textbook.model(x).square().mean(), norm=second.last_grad_norm)
        assert_trained_alike((model,), (textbook,), fused)
        first.remove()  # which takes nothing from the newer one
        with pytest.raises(RuntimeError, match="replaced by a newer Lomo"):
            first.step()


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_replaced_optimizer_that_is_collected_takes_nothing_along(fused: bool) -> None:
    model = perceptron(8, 1)
    first = Lomo(model, lr=0.1, fused_layers=True)
    second = Lomo(model, lr=LR, fused_layers=fused)
    textbook = Textbook(model, lr=LR)
    del first
    gc.collect()
    second.backward(model(data(0)[0]).square().mean())
    textbook.step(textbook.model(data(0)[0]).square().mean())
    assert_trained_alike((model,), (textbook,), fused)


@pytest.mark.parametrize("later", [False, True], ids=["constructor", "add_param_group"])
def test_an_overlap_ends_the_older_optimizer_as_a_whole(later: bool) -> None:
    a, b, c, d = (vector(0.0) for _ in range(4))
    older, unconcerned = Lomo([a, b], 1.0), Lomo([d], 1.0)
    if later:
        newer = Lomo([c], 1.0)
        newer.add_param_group({"params": [b]})
    else:
        newer = Lomo([c, b], 1.0)
    with pytest.raises(RuntimeError, match=r"replaced by a newer Lomo.*some or all of its parameters"):
        older.backward(a.sum() + b.sum())
    newer.backward(a.sum() + b.sum() + c.sum() + d.sum())
    assert [param.item() for param in (a, b, c, d)] == [0.0, -1.0, -1.0, 0.0]
    assert a.grad.item() == 1.0  # nobody's now: an ordinary leaf
    assert d.grad is None
    unconcerned.backward(d.sum())
    Lomo([a], 1.0).backward(a.sum())  # which finds the gradient of before
    assert (a.item(), d.item()) == (-2.0, -1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: Lomo([w, vector(1.0, dtype=torch.float64)]), "parameter 1 has dtype torch.float64"),
        (lambda w: Lomo([{"params": [w]}, {"params": [w]}]), "parameter 1 is given twice"),
        (lambda w: Lomo([w], lr=-1.0), "lr is -1.0"),
        (lambda w: Lomo([w], fused_layers=nn.Linear(2, 2)), "fused_layers is a module with none of the parameters"),
        (lambda w: Lomo([w], process_group=None), "process_group is None"),
        (lambda w: Lomo([vector(1.0)]).add_param_group({"params": [w], "lr": -1.0}), "lr is -1.0"),
        (lambda w: Lomo([vector(1.0)]).add_param_group({"params": [w, w]}), "parameter 2 is given twice"),
    ],
)
def test_a_construction_that_fails_leaves_the_older_optimizer(make: Callable[[Tensor], Any], message: str) -> None:
    w = vector(1.0)
    older = Lomo([w], lr=0.25)
    with pytest.raises((TypeError, ValueError), match=message):
        make(w)
    older.backward(w.sum())
    assert w.item() == 0.75


def test_no_newer_optimizer_amid_a_step() -> None:
    w, v = vector(1.0), vector(1.0)
    older, other = Lomo([w], lr=0.25), Lomo([v], lr=0.25)
    seen = []

    def replace(_: Tensor) -> None:
        for make in (lambda: Lomo([w]), lambda: other.add_param_group({"params": [w]})):
            with pytest.raises(RuntimeError, match="amid a step"):
                make()
            seen.append(len(other.param_groups))

    w.register_hook(replace)
    older.backward(w.sum())
    other.backward(v.sum())
    assert (w.item(), v.item(), seen) == (0.75, 0.75, [1, 1])


@pytest.mark.parametrize("way", ["replaced", "removed", "collected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_left_to_the_next_optimizer_carry_no_loss_scale(way: str, dtype: torch.dtype) -> None:
    """accumulate() leaves 65536 times the gradient, which only its own optimizer knows."""
    w = vector(1.0, dtype=dtype)
    older = Lomo([w], loss_scale="dynamic", clip_passes="two")
    with older.accumulate():
        older.backward(gives(w, torch.tensor([0.125])))
    if way == "removed":
        older.remove()
    if way == "collected":
        del older
        gc.collect()
    newer = Lomo([w], lr=0.5, loss_scale=None)
    assert w.grad.item() == 0.125
    newer.backward(gives(w, torch.tensor([0.125])))
    assert w.item() == 0.875


def test_accumulated_gradients_take_no_memory_after_their_step() -> None:
    """The optimizer knows them by a reference of its own, which has to go with them."""
    w = vector(1.0)
    optimizer = Lomo([w], loss_scale=4.0)
    for end in (lambda: optimizer.backward(w.sum()), optimizer.zero_grad):
        with optimizer.accumulate():
            optimizer.backward(w.sum())
        grads = [grad.untyped_storage() for grad in (w.grad,)]
        end()
        assert w.grad is None
        assert torch._C._storage_Use_Count(grads[0]._cdata) == 1


# ---- Parameters whose memory is exchanged ---------------------------------------------------------------------------


@pytest.fixture
def swapping() -> Any:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


MOVES: dict[str, Callable[[nn.Module], Any]] = {
    "cpu": lambda model: model.cpu(),
    "back and forth": lambda model: model.double().float(),
    "three times": lambda model: model.cpu().cpu().cpu(),
    "load_state_dict": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
    "bfloat16": lambda model: model.bfloat16(),
}


@BY_RULE
@FUSED
@pytest.mark.parametrize("move", MOVES)
def test_a_model_whose_tensors_are_swapped(rule: str, fused: bool, move: str, swapping: None) -> None:
    """torch forgets a swapped parameter's hooks, though it still lists them."""
    torch.manual_seed(0)
    model = perceptron(8, 1)
    textbook = Textbook(model, lr=LR, **RULES[rule])
    optimizer = Lomo(model, LR, fused_layers=fused, **RULES[rule])
    for step in range(3):
        x = data(step)[0].to(model[0].weight.dtype)
        optimizer.backward(model(x).square().mean())
        textbook.step(textbook.model(x).square().mean(), norm=optimizer.last_grad_norm)
        if not fused:
            assert_trained_alike((model,), (textbook,), fused)
        if step < 2:
            ids = [id(param) for param in model.parameters()]
            MOVES[move](model)
            assert ids == [id(param) for param in model.parameters()]
            MOVES[move](textbook.model)
            textbook.groups[0]["params"] = list(textbook.model.parameters())
    assert all(param.grad is None for param in model.parameters())
    tolerance = 0.1 if move == "bfloat16" else 1e-5
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, textbook.model.get_parameter(name), rtol=tolerance, atol=tolerance / 10)


def test_one_parameter_swapped_again_and_again() -> None:
    """Its memory may come back to the very address it had."""
    w = vector(0.0)
    optimizer = Lomo([w], 1.0)
    for step in range(1, 20):
        for _ in range(step % 3):
            torch.utils.swap_tensors(w, nn.Parameter(w.detach().clone()))
        optimizer.backward(w.sum())
        assert w.item() == -step


@pytest.mark.parametrize("scale", [64.0, "dynamic"])
def test_accumulated_gradients_that_are_swapped_keep_their_scale(scale: Any, swapping: None) -> None:
    torch.manual_seed(0)
    model = perceptron(8, 1)
    textbook = Textbook(model, lr=LR, loss_scale=scale)
    optimizer = Lomo(model, LR, loss_scale=scale, clip_passes="two")
    x = data(0)[0]
    with optimizer.accumulate():
        optimizer.backward(model(x).square().mean())
    textbook.backward(textbook.model(x).square().mean())
    model.double().float()
    optimizer.backward(model(x).square().mean())
    textbook.step(textbook.model(x).square().mean(), norm=optimizer.last_grad_norm)
    assert_trained_alike((model,), (textbook,), fused=False)


@BY_RULE
def test_the_other_optimizers_parameters_are_swapped(rule: str, swapping: None) -> None:
    g, d = generator_and_discriminator()
    opt_g, opt_d = (Lomo(model, LR, **RULES[rule]) for model in (g, d))
    opt_d.backward(losses(g, d, 0)[0]())
    d.cpu()
    opt_g.backward(losses(g, d, 0)[1]())
    assert all(param.grad is None for param in d.parameters())


def test_nothing_of_the_optimizer_is_in_a_copy_or_a_pickle(tmp_path: Any) -> None:
    model = perceptron(8, 1)
    optimizer = Lomo(model, LR)
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "model")
    loaded = torch.load(tmp_path / "model", weights_only=False)
    assert b"lomo" not in (tmp_path / "model").read_bytes()
    for other in (twin, loaded):
        assert all(not vars(param) and not param._post_accumulate_grad_hooks for param in other.parameters())
        x = data(0)[0]
        optimizer.backward(model(x).square().mean() + other(x).square().mean())
        assert all(param.grad is not None for param in other.parameters())  # an ordinary leaf
        Lomo(other, LR)
    optimizer.step()  # was not replaced


def test_a_note_that_an_interrupt_left_is_not_believed() -> None:
    """Otherwise plain backwards would bring no gradients to other optimizers' parameters from then on."""
    a, b = vector(0.0), vector(0.0)
    first, second = Lomo([a], 1.0), Lomo([b], 1.0)
    stash = torch._C._stash_obj_in_tls
    with mock.patch.object(torch._C, "_stash_obj_in_tls", lambda key, value: value is None or stash(key, value)):
        first.backward(a.sum())
    b.sum().backward()
    assert b.grad.item() == 1.0
    second.backward(b.sum())
    assert b.item() == -2.0
