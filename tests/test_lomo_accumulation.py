"""Gradient accumulation is exact: the norm, the clipping and the rounding are of the sum."""

from __future__ import annotations

import pytest
import torch
from support.models import Options, assert_same_bits, gives, loss_of, transformer, vector, weights_of
from support.textbook import Textbook
from torch import nn

from lomo_kernels import Lomo

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULES = {
    "plain": {},
    "norm": {"clip_grad_norm": 0.3, "clip_passes": "two"},
    "all": {
        "clip_grad_norm": 0.3,
        "clip_grad_value": 0.01,
        "weight_decay": 0.1,
        "rounding": "stochastic",
        "clip_passes": "two",
    },
    "one": {"clip_grad_norm": 0.3, "weight_decay": 0.1, "clip_passes": "one"},
}
PARTS = 3


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("checkpoint", ["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulate_is_a_step_of_the_sum(dtype: torch.dtype, checkpoint: str, rule: str) -> None:
    model = transformer(Options(dtype=dtype, tied=True, checkpoint=checkpoint, unused=True))
    textbook = Textbook(model, lr=0.3, loss_scale="dynamic" if dtype is torch.float16 else None, **RULES[rule])
    optimizer = Lomo(model, lr=0.3, **RULES[rule])
    for step in range(3):
        before = weights_of(model)
        for part in range(PARTS - 1):
            with optimizer.accumulate():
                optimizer.backward(loss_of(model, 10 * step + part) / PARTS)
            textbook.backward(loss_of(textbook.model, 10 * step + part) / PARTS)
            assert_same_bits(weights_of(model), before)
            assert optimizer.step_count.item() == step
        optimizer.backward(loss_of(model, 10 * step + PARTS - 1) / PARTS)
        textbook.step(loss_of(textbook.model, 10 * step + PARTS - 1) / PARTS, norm=optimizer.last_grad_norm)
        assert_same_bits(weights_of(model), weights_of(textbook.model))
        assert optimizer.step_count.item() == step + 1
        assert all(param.grad is None for param in model.parameters())
        assert optimizer.last_grad_norm.item() == pytest.approx(textbook.norm, rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_backwards_pile_up_and_the_next_backward_applies_them(dtype: torch.dtype, rule: str) -> None:
    model = transformer(Options(dtype=dtype))
    textbook = Textbook(model, lr=0.3, **RULES[rule])
    optimizer = Lomo(model, lr=0.3, **RULES[rule])
    for step in range(2):
        for part in range(PARTS):
            (loss_of(model, 10 * step + part) / 4).backward()
            textbook.backward(loss_of(textbook.model, 10 * step + part) / 4)
        optimizer.backward(loss_of(model, 10 * step + 9) / 4)
        textbook.step(loss_of(textbook.model, 10 * step + 9) / 4, norm=optimizer.last_grad_norm)
        assert all(param.grad is None for param in model.parameters())
    assert_same_bits(weights_of(model), weights_of(textbook.model))


@pytest.mark.filterwarnings("ignore:Lomo.step")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulate_then_step(dtype: torch.dtype, rule: str) -> None:
    """A trainer that calls step() at the end of each step, with all parts accumulated."""
    model = transformer(Options(dtype=dtype))
    textbook = Textbook(model, lr=0.3, loss_scale="dynamic" if dtype is torch.float16 else None, **RULES[rule])
    optimizer = Lomo(model, lr=0.3, **RULES[rule])
    for step in range(2):
        for part in range(PARTS):
            with optimizer.accumulate():
                optimizer.backward(loss_of(model, 10 * step + part) / PARTS)
            textbook.backward(loss_of(textbook.model, 10 * step + part) / PARTS)
        optimizer.step()
        optimizer.zero_grad()
        textbook.apply(norm=optimizer.last_grad_norm)
        textbook.zero_grad()
    assert_same_bits(weights_of(model), weights_of(textbook.model))
    assert optimizer.loss_scale.item() == textbook.loss_scale


def test_the_parts_equal_the_whole_batch() -> None:
    """Against nothing but arithmetic: the gradient of a mean is the mean of the gradients."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 5), torch.randn(8, 3)
    results = []
    for parts in (1, 2, 4, 8):
        torch.manual_seed(1)
        model = nn.Linear(5, 3)
        optimizer = Lomo(model, lr=0.5, clip_grad_norm=0.1, clip_passes="two")
        for step in range(3):
            for part, (a, b) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
                loss = (model(a) - b).square().mean() / parts
                if part < parts - 1:
                    with optimizer.accumulate():
                        optimizer.backward(loss)
                else:
                    optimizer.backward(loss)
            assert optimizer.step_count.item() == step + 1
        results.append(model.weight.detach())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


def test_parts_that_reach_different_parameters() -> None:
    held = nn.ParameterList([vector(0.0, 0.0), vector(0.0), vector(0.0)])
    a, b, c = held
    textbook = Textbook(held, lr=1.0, clip_grad_norm=1.0)
    optimizer = Lomo(held, lr=1.0, clip_grad_norm=1.0, clip_passes="two")
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([-3.0])
    with optimizer.accumulate():
        optimizer.backward(gives(a, one))
    assert b.grad is None
    optimizer.backward(gives(b, two))
    textbook.backward(gives(textbook.model[0], one))
    textbook.step(gives(textbook.model[1], two), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(held), weights_of(textbook.model))
    assert c.item() == 0.0
    assert optimizer.last_grad_norm.item() == pytest.approx(14**0.5, rel=1e-6)


def test_the_sum_counts_not_the_parts() -> None:
    """Each part is far over the bound, their sum is not."""
    w = vector(0.0)
    optimizer = Lomo([w], lr=1.0, clip_grad_norm=1.0, clip_grad_value=0.6, clip_passes="two")
    with optimizer.accumulate():
        optimizer.backward(gives(w, torch.tensor([100.0])))
    optimizer.backward(gives(w, torch.tensor([-99.5])))
    assert w.item() == -0.5
    assert optimizer.last_grad_norm.item() == 0.5


def test_consuming_in_two_passes_where_nothing_is_kept_and_one_where_something_is() -> None:
    """A graph of a single backward (no retain_graph) is enough for the kept kind. A new graph is run once more."""
    passes = []
    w = vector(0.0)
    w.register_hook(lambda grad: passes.append(1))
    optimizer = Lomo([w], lr=1.0, clip_grad_norm=1.0, clip_passes="two")
    for count, kept in ((3, False), (1, True), (2, False)):
        if kept:
            gives(w, torch.ones(1)).backward()
        passes.clear()
        optimizer.backward(gives(w, torch.ones(1)))
        assert len(passes) == count


def test_an_error_inside_accumulate_ends_it() -> None:
    w = vector(0.0)
    optimizer = Lomo([w], lr=1.0)
    with pytest.raises(KeyError), optimizer.accumulate():
        raise KeyError
    optimizer.backward(gives(w, torch.ones(1)))
    assert w.item() == -1.0


def test_accumulate_nests() -> None:
    w = vector(0.0)
    optimizer = Lomo([w], lr=1.0)
    with optimizer.accumulate():
        with optimizer.accumulate():
            optimizer.backward(gives(w, torch.ones(1)))
        optimizer.backward(gives(w, torch.ones(1)))
        assert w.item() == 0.0
    optimizer.backward(gives(w, torch.ones(1)))
    assert w.item() == -3.0


def test_accumulate_alone_is_no_step() -> None:
    w = vector(0.0)
    optimizer = Lomo([w], lr=1.0, clip_grad_norm=1.0, clip_passes="two")
    with optimizer.accumulate():
        optimizer.backward(gives(w, torch.ones(1)))
    assert (w.item(), optimizer.step_count.item(), w.grad.item()) == (0.0, 0, 1.0)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_grad_drops_the_parts(dtype: torch.dtype, set_to_none: bool) -> None:
    w = vector(0.0, dtype=dtype)
    optimizer = Lomo([w], lr=1.0, clip_grad_norm=9.0, clip_passes="two")
    with optimizer.accumulate():
        optimizer.backward(w.float().sum() * 0.5)
    optimizer.zero_grad(set_to_none=set_to_none)
    optimizer.backward(w.float().sum() * 0.25)
    assert w.item() == -0.25
    assert w.grad is None


@pytest.mark.filterwarnings("ignore:Lomo.step")
def test_zeros_that_zero_grad_left_are_gradients() -> None:
    """As torch has it: the tensors stay, the next backward adds to them, and their parameters' weights decay."""
    models = [nn.ParameterList([vector(1.0), vector(2.0), vector(3.0)]) for _ in range(3)]
    optimizers = [
        Lomo(models[0], lr=0.5, weight_decay=0.25),
        Lomo(models[1], lr=0.5, weight_decay=0.25),
        torch.optim.SGD(models[2].parameters(), lr=0.5, weight_decay=0.25),
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        (model[0] + model[1]).sum().backward()
        tensors = [param.grad for param in model]
        optimizer.zero_grad(set_to_none=False)
        assert [param.grad for param in model] == tensors == [torch.zeros(1), torch.zeros(1), None]
        assert all(param.grad is grad for param, grad in zip(model, tensors, strict=True))
    for model, optimizer in zip(models[1:], optimizers[1:], strict=True):
        model[0].sum().backward()
        optimizer.step()
    optimizers[0].backward(models[0][0].sum())
    assert [[param.item() for param in model] for model in models] == [[0.375, 1.75, 3.0]] * 3
    assert all(param.grad is None for param in models[0])


@pytest.mark.parametrize("then", ["backward", "plain", "accumulate"])
@pytest.mark.parametrize("first", ["plain", "accumulate"])
def test_zeros_carry_any_loss_scale(first: str, then: str) -> None:
    """float16 gradients that are below its smallest number without the scale, before and after zeros."""
    w, v = (vector(0.0, dtype=torch.float16) for _ in range(2))
    optimizer = Lomo([w, v], lr=2.0**20)

    def small() -> torch.Tensor:
        return w.float().sum() * 2.0**-26

    if first == "plain":
        (w.float() + v.float()).sum().backward()
    else:
        with optimizer.accumulate():
            optimizer.backward((w.float() + v.float()).sum())
    optimizer.zero_grad(set_to_none=False)
    if then == "plain":
        optimizer.param_groups[0]["lr"] = 1.0
        (w.float().sum() * 0.5).backward()  # an own plain backward: no scale, nor in the one that adds to it
        optimizer.backward(w.float().sum() * 0.25)
        assert (w.item(), v.item()) == (-0.75, 0.0)
        return
    if then == "accumulate":
        with optimizer.accumulate():
            optimizer.backward(small())
            optimizer.backward(small())
        optimizer.backward(small() * 2)
    else:
        optimizer.backward(small() * 4)
    assert (w.item(), v.item()) == (-(2.0**-4), 0.0)
    assert w.grad is None and v.grad is None


def test_accumulating_in_fused_backward() -> None:
    w = vector(0.0)
    optimizer = Lomo([w], lr=9.0)
    with optimizer.accumulate():
        optimizer.fused_backward(gives(w, torch.ones(1)), lr=7.0)
    optimizer.fused_backward(gives(w, torch.ones(1)), lr=0.5)
    assert w.item() == -1.0


def test_an_overflow_in_one_part_skips_the_whole_step() -> None:
    model = transformer(Options(dtype=torch.float16))
    optimizer = Lomo(model, lr=0.3)
    before = weights_of(model)
    with optimizer.accumulate():
        optimizer.backward(loss_of(model, 0) * 1e6)
    optimizer.backward(loss_of(model, 1))
    assert_same_bits(weights_of(model), before)
    assert (optimizer.skipped_steps.item(), optimizer.loss_scale.item()) == (1, 2.0**15)
    assert all(param.grad is None for param in model.parameters())
    optimizer.backward(loss_of(model, 1))
    assert optimizer.skipped_steps.item() == 1


def test_loading_a_state_dict_amid_a_step_does_not_change_the_scale_of_its_parts() -> None:
    """Parts that carry the old scale are unscaled by it, or refused; not unscaled by the new one."""
    w = vector(0.0, dtype=torch.float16)
    optimizer = Lomo([w], lr=1.0)
    state = optimizer.state_dict()
    state["lomo"]["loss_scale"].fill_(2.0**10)
    with optimizer.accumulate():
        optimizer.backward(w.float().sum() * 0.125)
    optimizer.load_state_dict(state)
    try:
        optimizer.backward(w.float().sum() * 0.125)
    except RuntimeError as error:
        assert "scale" in str(error)
    else:
        assert w.item() == -0.25
