"""Misuse is an error that says what was expected, never a wrong number; and the optimizer is usable afterwards."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import Options, assert_same_bits, loss_of, transformer, vector, weights_of
from support.textbook import Textbook
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lomo_kernels import Lomo
from lomo_kernels.optim import graph

CLIPPING = pytest.mark.parametrize("clip_grad_norm", [None, 1.0], ids=["one-pass", "two-pass"])


def trains_as_the_textbook(optimizer: Lomo, model: nn.Module, **settings: Any) -> None:
    """The next steps are right: nothing of what went wrong is left in gradients, norms or flags."""
    textbook = Textbook(model, **settings)
    for step in range(2):
        optimizer.backward(loss_of(model, step))
        textbook.step(loss_of(textbook.model, step), norm=optimizer.last_grad_norm)
        assert optimizer.last_grad_norm.item() == pytest.approx(textbook.norm, rel=1e-6)
    assert_same_bits(weights_of(model), weights_of(textbook.model))


# ---- Arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [-1.0, math.nan, math.inf, -math.inf, "0.1", None, True, 1j, [0.1], torch.ones(2)], ids=str
)
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("when", ["argument", "group", "later", "load", "added"])
def test_learning_rate_and_decay(name: str, value: Any, when: str) -> None:
    w = vector(1.0)
    with pytest.raises((ValueError, TypeError), match=name):
        if when == "argument":
            Lomo([w], **{name: value})
        elif when == "group":
            Lomo([{"params": [w], name: value}])
        else:
            optimizer = Lomo([w], lr=0.5)
            if when == "later":
                optimizer.param_groups[0][name] = value
                optimizer.backward(w.sum())
            elif when == "added":
                optimizer.add_param_group({"params": [vector(1.0)], name: value})
            else:
                state = optimizer.state_dict()
                state["param_groups"][0][name] = value
                optimizer.load_state_dict(state)
    assert w.item() == 1.0


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, "1", True, torch.ones(2), torch.tensor(1)], ids=str)
@pytest.mark.parametrize("when", ["argument", "group", "later"])
def test_clip_grad_value(value: Any, when: str) -> None:
    w = vector(1.0)
    with pytest.raises((ValueError, TypeError), match="clip_grad_value"):
        if when == "argument":
            Lomo([w], clip_grad_value=value)
        elif when == "group":
            Lomo([{"params": [w], "clip_grad_value": value}])
        else:
            optimizer = Lomo([w], lr=0.5)
            optimizer.param_groups[0]["clip_grad_value"] = value
            optimizer.backward(w.sum())
    assert w.item() == 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("clip_grad_norm", value) for value in (0.0, -1.0, math.nan, "1", True)),
        *(("loss_scale", value) for value in (0.0, -1.0, math.nan, math.inf, "static", True, torch.tensor(2.0))),
        *(("rounding", value) for value in ("up", None, 1)),
        *(("nonfinite", value) for value in ("ignore", None, True)),
        *(("clip_passes", value) for value in ("three", 2)),
        *(("seed", value) for value in (0.5, "0", None, True, 2**63, -(2**63) - 1)),
    ],
    ids=str,
)
def test_other_arguments(name: str, value: Any) -> None:
    w = vector(1.0)
    with pytest.raises((ValueError, TypeError), match=name):
        Lomo([w], **{name: value})
    Lomo([w])  # what was refused holds nothing


def test_unknown_arguments() -> None:
    with pytest.raises(TypeError, match="momentum"):
        Lomo([vector(1.0)], momentum=0.9)


@pytest.mark.parametrize("value", [-1.0, math.nan, "0.1", None])
def test_learning_rate_of_fused_backward(value: Any) -> None:
    w = vector(1.0)
    optimizer = Lomo([w], lr=0.5)
    with pytest.raises((ValueError, TypeError), match="lr"):
        optimizer.fused_backward(w.sum(), lr=value)
    assert (w.item(), optimizer.step_count.item()) == (1.0, 0)


def test_process_group_that_is_no_group() -> None:
    with pytest.raises(TypeError, match=r"process_group is a object, expected a torch\.distributed\.ProcessGroup"):
        Lomo([vector(1.0)], process_group=object())


def test_process_group_before_there_is_one() -> None:
    with pytest.raises(TypeError, match=r"process_group is None.*init_process_group.*leave process_group out"):
        Lomo([vector(1.0)], process_group=dist.group.WORLD)


@pytest.mark.parametrize("wrong", ["three", 1])
def test_clip_passes(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r'clip_passes is .*expected "two" or "one"'):
        Lomo([vector(1.0)], clip_passes=wrong)


def test_fused_layers_need_the_model() -> None:
    with pytest.raises(ValueError, match="fused_layers=model"):
        Lomo([vector(1.0)], fused_layers=True)
    with pytest.raises(TypeError, match="fused_layers is a str, expected True, False or the model"):
        Lomo([vector(1.0)], fused_layers="yes")


# ---- Parameters -----------------------------------------------------------------------------------------------------


def test_nothing_to_train() -> None:
    for empty in ([], nn.Module(), iter(())):
        with pytest.raises(ValueError, match="no parameters"):
            Lomo(empty)


@pytest.mark.parametrize("wrong", [3, "params", torch.ones(3), {"a": 1}, [3], ["a"], [[vector(1.0)]]], ids=str)
def test_not_parameters(wrong: Any) -> None:
    message = r"model_or_params is a (int|Tensor), expected|parameter 0 is a (int|str|list), expected a parameter"
    with pytest.raises(TypeError, match=message):
        Lomo(wrong)


def test_a_parameter_twice() -> None:
    w, v = vector(1.0), vector(1.0)
    for twice in ([w, v, w], [{"params": [w]}, {"params": [v, w]}], [("a", w), ("b", w)]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match="is given twice; each parameter has one place in one group"):
                Lomo(twice)
    Lomo([w, v])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Parameter(torch.ones(2, dtype=torch.float64)), TypeError, "float64"),
        (lambda: nn.Parameter(torch.ones(2, dtype=torch.complex64)), TypeError, "complex64"),
        (lambda: nn.Parameter(torch.ones(2)) * 2, ValueError, "leaf"),
        (lambda: nn.Parameter(torch.eye(2).to_sparse()), ValueError, "sparse"),
        (lambda: nn.UninitializedParameter(), ValueError, "lazy|initialised"),
    ],
    ids=["float64", "complex", "non-leaf", "sparse", "uninitialised"],
)
@pytest.mark.parametrize("later", [False, True])
def test_parameters_it_cannot_train(make: Callable[[], Tensor], error: type, message: str, later: bool) -> None:
    good = vector(1.0)
    with pytest.raises(error, match=message) as caught:
        if later:
            Lomo([("good", good)]).add_param_group({"params": [("bad.one", make())]})
        else:
            Lomo([("good", good), ("bad.one", make())])
    assert "bad.one" in str(caught.value)
    del caught
    gc.collect()
    Lomo([good])


def test_a_failed_constructor_holds_no_parameters() -> None:
    """Its traceback may keep it alive for long, as in a notebook."""
    good, bad = vector(1.0), nn.Parameter(torch.ones(1, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"parameter 1 has dtype torch\.float64") as kept:
        Lomo([{"params": [good]}, {"params": [bad]}])
    optimizer = Lomo([good], lr=0.5)
    optimizer.backward(good.sum())
    assert good.item() == 0.5
    assert kept.value is not None


def test_a_module_with_a_lazy_part() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"1\.weight"):
        Lomo(model)
    model(torch.ones(1, 2))
    Lomo(model, lr=0.1).backward(model(torch.ones(1, 2)).sum())


def test_a_float64_model_is_named() -> None:
    model = transformer()
    model.blocks[1].double()
    with pytest.raises(TypeError, match=r"blocks\.1\.norm1\.weight has dtype torch\.float64"):
        Lomo(model)


def test_a_parameter_that_becomes_float64_later() -> None:
    model = transformer()
    optimizer = Lomo(model, lr=0.1)
    model.norm.double()
    with pytest.raises(TypeError, match=r"norm\.weight"):
        optimizer.backward(model.embedding.weight.sum())
    model.norm.float()
    trains_as_the_textbook(optimizer, model, lr=0.1)


def test_sparse_gradients() -> None:
    """Of nn.Embedding(sparse=True)."""
    for clip_grad_norm in (None, 1.0):
        model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 1))
        optimizer = Lomo(model, lr=0.1, clip_grad_norm=clip_grad_norm, clip_passes="two")
        before = weights_of(model)
        with pytest.raises(RuntimeError, match=r"0\.weight.*sparse=False"):
            optimizer.backward(model(torch.arange(3)).sum())
        assert torch.equal(model[0].weight, before["0.weight"])
        if clip_grad_norm:
            assert_same_bits(weights_of(model), before)
        assert all(param.grad is None for param in model.parameters())


@pytest.mark.filterwarnings("ignore:Lomo.step")
@pytest.mark.parametrize("sparse_first", [False, True])
def test_sparse_gradients_in_step(sparse_first: bool) -> None:
    """All gradients are there before the first update, so nothing needs to be updated in vain."""
    layers = [nn.Linear(4, 1), nn.Embedding(9, 4, sparse=True)]
    dense, sparse = layers
    model = nn.ModuleList(reversed(layers) if sparse_first else layers)
    optimizer = Lomo(model, lr=0.1)
    before = weights_of(model)
    dense(sparse(torch.arange(3))).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    assert_same_bits(weights_of(model), before)


def test_meta_parameters() -> None:
    """A model without storage can be planned with, or is refused; it is not trained by surprise later."""
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    try:
        optimizer = Lomo(model, lr=0.1, clip_grad_norm=1.0, clip_passes="two")
    except (ValueError, NotImplementedError) as error:
        assert "meta" in str(error)
    else:
        optimizer.backward(model(torch.ones(1, 3, device="meta")).sum())
        assert model.weight.grad is None


# ---- Two optimizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["remove", "with", "collected"])
def test_a_second_optimizer_after_the_first(way: str) -> None:
    model = transformer()
    first = Lomo(model, lr=0.1)
    first.backward(loss_of(model, 5))
    if way == "remove":
        first.remove()
    elif way == "with":
        with first:
            pass
    del first
    gc.collect()
    second = Lomo(model, lr=0.2, clip_grad_norm=1.0, clip_passes="two")
    trains_as_the_textbook(second, model, lr=0.2, clip_grad_norm=1.0)


def test_a_collected_optimizer_leaves_plain_parameters_behind() -> None:
    model = transformer()
    optimizer = Lomo(model, lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # makes a reference cycle
    del optimizer
    gc.collect()
    assert all(not param._post_accumulate_grad_hooks for param in model.parameters())
    before = weights_of(model)
    loss_of(model, 0).backward()
    assert_same_bits(weights_of(model), before)
    assert model.head.weight.grad is not None


@pytest.mark.filterwarnings("ignore:Lomo.step")
def test_remove_twice_and_use_after() -> None:
    w = vector(1.0)
    optimizer = Lomo([w], lr=0.5)
    optimizer.remove()
    optimizer.remove()
    w.sum().backward()
    assert (w.item(), w.grad.item()) == (1.0, 1.0)
    for use in (
        lambda: optimizer.backward(w.sum()),
        lambda: optimizer.fused_backward(w.sum(), lr=1.0),
        lambda: optimizer.grad_norm(w.sum()),
        lambda: optimizer.step(),
        lambda: optimizer.add_param_group({"params": [vector(1.0)]}),
    ):
        with pytest.raises(RuntimeError, match=r"remove\(\)"):
            use()
    assert w.item() == 1.0


def test_use_after_remove_does_not_touch_the_successor() -> None:
    w = vector(1.0)
    first = Lomo([w], lr=0.5)
    first.remove()
    second = Lomo([w], lr=0.25)
    first.remove()
    second.backward(w.sum())
    assert w.item() == 0.75


# ---- Losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["backward", "grad_norm", "fused_backward", "accumulated"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda w: 3.0, TypeError, "float"),
        (lambda w: None, TypeError, "NoneType"),
        (lambda w: [w.sum()], TypeError, "list"),
        (lambda w: w * 2, ValueError, r"\[2\]"),
        (lambda w: w[:0], ValueError, r"\[0\]"),
        (lambda w: torch.tensor(1), ValueError, "int64"),
        (lambda w: torch.tensor(1.0), RuntimeError, "does not depend"),
        (lambda w: w.sum().detach(), RuntimeError, "does not depend"),
    ],
    ids=["number", "none", "list", "vector", "empty", "integer", "constant", "detached"],
)
def test_not_a_loss(wrong: Callable[[Tensor], Any], error: type, message: str, method: str) -> None:
    w = vector(1.0, 1.0)
    optimizer = Lomo([w], lr=0.5, clip_grad_norm=9.0, clip_passes="two")
    with pytest.raises(error, match=message):
        if method == "fused_backward":
            optimizer.fused_backward(wrong(w), lr=1.0)
        elif method == "accumulated":
            with optimizer.accumulate():
                optimizer.backward(wrong(w))
        else:
            getattr(optimizer, method)(wrong(w))
    assert optimizer.step_count.item() == 0
    optimizer.backward(w.sum())
    assert w.tolist() == [0.5, 0.5]


def test_a_loss_made_without_gradients() -> None:
    model = transformer()
    optimizer = Lomo(model, lr=0.1)
    with torch.no_grad():
        loss = loss_of(model, 0)
    with pytest.raises(RuntimeError, match="no_grad"):
        optimizer.backward(loss)


@CLIPPING
def test_the_same_loss_twice(clip_grad_norm: float | None) -> None:
    model = transformer()
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=clip_grad_norm, clip_passes="two")
    loss = loss_of(model, 0)
    optimizer.backward(loss)
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="second time"):
        optimizer.backward(loss)
    assert_same_bits(weights_of(model), before)
    trains_as_the_textbook(optimizer, model, lr=0.1, clip_grad_norm=clip_grad_norm)


# ---- Weights that change between forward and backward ---------------------------------------------------------------


@CLIPPING
def test_a_weight_changed_by_hand(clip_grad_norm: float | None) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=clip_grad_norm, clip_passes="two")
    loss = model(torch.ones(1, 3)).sum()
    with torch.no_grad():
        model[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        optimizer.backward(loss)


@pytest.mark.filterwarnings("ignore:Lomo.step")
@CLIPPING
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("way", ["backward", "fused_backward", "step"])
def test_a_loss_from_before_the_last_step(way: str, large: bool, clip_grad_norm: float | None) -> None:
    """The update counts as a change of the weight: autograd refuses a graph that saved the old one."""
    size = 200 if large else 3
    model = nn.Sequential(nn.Linear(size, size), nn.Linear(size, size))
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=clip_grad_norm, clip_passes="two")
    first, second = (model(torch.ones(1, size)).sum() for _ in range(2))
    versions = [param._version for param in model.parameters()]
    if way == "backward":
        optimizer.backward(first)
    elif way == "fused_backward":
        optimizer.fused_backward(first, lr=0.1)
    else:
        first.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(param._version > before for param, before in zip(model.parameters(), versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        optimizer.backward(second)


# ---- A gradient that comes twice ------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One layer in two checkpoints, and layers large enough to be updated at once before and after them."""

    def __init__(self, reentrant: bool, size: int = 150) -> None:
        super().__init__()
        self.first, self.shared, self.last = (nn.Linear(size, size) for _ in range(3))
        self.reentrant = reentrant
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = checkpoint(self.shared, x, use_reentrant=self.reentrant) if self.enabled else self.shared(x)
        return self.last(x).square().mean()


@pytest.fixture
def inputs() -> Tensor:
    return torch.linspace(-1, 1, 300).view(2, 150)


@CLIPPING
@pytest.mark.parametrize("scale", [None, "dynamic"])
def test_two_reentrant_checkpoints_sharing_a_parameter(
    inputs: Tensor, clip_grad_norm: float | None, scale: str | None
) -> None:
    """Its gradient comes in two parts, of which neither is the gradient: an error, before any weight has changed."""
    model = Shared(reentrant=True)
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=clip_grad_norm, loss_scale=scale, clip_passes="two")
    for _ in range(2):
        before = weights_of(model)
        with pytest.raises(RuntimeError, match=r"shared\.(weight|bias) came twice.*use_reentrant=False"):
            optimizer.backward(model(inputs))
        assert_same_bits(weights_of(model), before)
        assert all(param.grad is None for param in model.parameters()), "the part is no gradient to go on with"
    model.reentrant = False
    settings = {"lr": 0.1, "clip_grad_norm": clip_grad_norm, "loss_scale": scale, "clip_passes": "two"}
    textbook = Textbook(model, **settings)
    optimizer.backward(model(inputs))
    textbook.step(textbook.model(inputs), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(model), weights_of(textbook.model))


@CLIPPING
def test_checkpoints_turned_on_after_the_first_step(inputs: Tensor, clip_grad_norm: float | None) -> None:
    """As gradient_checkpointing_enable() does in mid-run."""
    model = Shared(reentrant=True)
    model.enabled = False
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=clip_grad_norm, clip_passes="two")
    optimizer.backward(model(inputs))
    model.enabled = True
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="came twice"):
        optimizer.backward(model(inputs))
    assert_same_bits(weights_of(model), before)


@CLIPPING
def test_a_parameter_shared_only_in_a_later_step(inputs: Tensor, clip_grad_norm: float | None) -> None:
    model = Shared(reentrant=True)
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=clip_grad_norm, clip_passes="two")
    optimizer.backward(checkpoint(model.shared, model.first(inputs), use_reentrant=True).square().mean())
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="came twice"):
        optimizer.backward(model(inputs))
    assert_same_bits(weights_of(model), before)


def test_sharing_that_comes_without_another_checkpoint(inputs: Tensor) -> None:
    """As many checkpoints as before, but now over one layer: layers drawn at random, or a recurrence."""
    model = Shared(reentrant=True)
    optimizer = Lomo(model, lr=0.1)
    x = model.first(inputs)
    for layer in (model.shared, model.last):
        x = checkpoint(layer, x, use_reentrant=True)
    optimizer.backward(x.square().mean())
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="came twice"):
        optimizer.backward(model(inputs))
    assert_same_bits(weights_of(model), before)


def test_checkpoints_turned_on_far_from_the_loss(inputs: Tensor) -> None:
    """Behind a hundred nodes that are not checkpointed."""
    model = Shared(reentrant=True)
    optimizer = Lomo(model, lr=0.1)

    def loss() -> Tensor:
        x = model(inputs)
        for _ in range(100):
            x = x * 1.0
        return x

    model.enabled = False
    optimizer.backward(loss())
    model.enabled = True
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="came twice"):
        optimizer.backward(loss())
    assert_same_bits(weights_of(model), before)


def test_graphs_of_a_steady_size_are_walked_once(inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """To look for reentrant checkpoints takes time for every node."""
    model = Shared(reentrant=False)
    optimizer = Lomo(model, lr=0.1)
    walks: list[object] = []
    monkeypatch.setattr(graph, "nodes_of", lambda loss, nodes_of=graph.nodes_of: walks.append(loss) or nodes_of(loss))
    for step in range(6):
        with torch.no_grad():
            model(inputs)
        loss = model(inputs)
        optimizer.backward(loss * 1.0 if step == 4 else loss)
    assert len(walks) == 4, "in the first two steps, and if the number of nodes is not that of the step before"


def test_a_graph_that_serves_many_steps_is_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss needs no forward, so no nodes are made between steps."""
    walks: list[object] = []
    monkeypatch.setattr(graph, "nodes_of", lambda loss, nodes_of=graph.nodes_of: walks.append(loss) or nodes_of(loss))
    params = [nn.Parameter(torch.ones(3)) for _ in range(4)]
    optimizer = Lomo(params, lr=0.5)
    loss = torch.stack([param.sum() for param in params]).sum()  # keeps no tensor
    for _ in range(5):
        optimizer.backward(loss)
    assert len(walks) == 1
    assert all((param == 1 - 5 * 0.5).all() for param in params)
    optimizer.backward(torch.stack([param.sum() for param in params[1:]]).sum())
    assert len(walks) == 2


def test_accumulation_takes_gradients_in_parts(inputs: Tensor) -> None:
    """Into .grad both parts add up, so what is refused above is right here."""
    model = Shared(reentrant=True)
    textbook = Textbook(model, lr=0.1, clip_grad_norm=1.0)
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=1.0, clip_passes="two")
    with optimizer.accumulate():
        optimizer.backward(model(inputs))
    optimizer.backward(model(inputs))
    textbook.backward(textbook.model(inputs))
    textbook.step(textbook.model(inputs), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(model), weights_of(textbook.model))


@CLIPPING
def test_sharing_without_reentrant_checkpoints_is_fine(inputs: Tensor, clip_grad_norm: float | None) -> None:
    model = Shared(reentrant=False)
    textbook = Textbook(model, lr=0.1, clip_grad_norm=clip_grad_norm)
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=clip_grad_norm, clip_passes="two")
    optimizer.backward(model(inputs))
    textbook.step(textbook.model(inputs), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(model), weights_of(textbook.model))


# ---- Errors in the middle of a step ---------------------------------------------------------------------------------


class Failure(Exception):
    pass


@CLIPPING
@pytest.mark.parametrize("fail_in_pass", [0, 1])
@pytest.mark.parametrize("where", ["head.weight", "blocks.0.qkv.bias", "embedding.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_error_inside_backward_leaves_the_optimizer_usable(
    dtype: torch.dtype, where: str, fail_in_pass: int, clip_grad_norm: float | None
) -> None:
    model = transformer(Options(dtype=dtype))
    settings = {"lr": 0.1, "clip_grad_norm": clip_grad_norm, "clip_passes": "two"}
    optimizer = Lomo(model, **settings)
    calls = 0

    def fail(grad: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_in_pass + 1:
            raise Failure

    handle = dict(model.named_parameters())[where].register_hook(fail)
    before = weights_of(model)
    two = clip_grad_norm is not None or dtype is torch.float16
    if fail_in_pass == 0 or two:
        with pytest.raises(Failure):
            optimizer.backward(loss_of(model, 0))
        if two and fail_in_pass == 0:
            assert_same_bits(weights_of(model), before)
    handle.remove()
    assert all(param.grad is None for param in model.parameters())
    fresh = transformer(Options(dtype=dtype), seed=3)
    model.load_state_dict(fresh.state_dict())
    textbook = Textbook(model, loss_scale="dynamic" if dtype is torch.float16 else None, **settings)
    for step in range(2):
        optimizer.backward(loss_of(model, step))
        textbook.step(loss_of(textbook.model, step), norm=optimizer.last_grad_norm)
    assert_same_bits(weights_of(model), weights_of(textbook.model))
    assert optimizer.loss_scale.item() == textbook.loss_scale


def test_a_parameter_whose_elements_share_memory() -> None:
    with pytest.raises(ValueError, match="share one place in memory"):
        Lomo([vector(1.0), nn.Parameter(torch.ones(1, 300).expand(400, 300))])


@pytest.mark.parametrize("scale", [1e39, 1e-320, 2.0**-25])
def test_a_loss_scale_that_float32_cannot_hold(scale: float) -> None:
    with pytest.raises(ValueError, match="expected a number from"):
        Lomo([vector(1.0)], loss_scale=scale, clip_passes="two")


def test_a_step_inside_a_step() -> None:
    model = transformer()
    optimizer = Lomo(model, lr=0.1)
    handle = model.head.weight.register_hook(lambda grad: optimizer.backward(loss_of(model, 1)))
    with pytest.raises(RuntimeError, match="inside another"):
        optimizer.backward(loss_of(model, 0))
    handle.remove()
    trains_as_the_textbook(optimizer, model, lr=0.1)


def test_a_step_inside_a_step_in_a_thread_of_autograd() -> None:
    """On GPUs hooks run in threads of the engine; a hook that waited for the step would wait for itself."""
    model, told = transformer(), []
    optimizer = Lomo(model, lr=0.1)

    def start_another(_: Tensor) -> None:
        def run() -> None:
            v = vector(1.0)
            v.register_hook(lambda _: optimizer.backward(loss_of(model, 1)))
            try:
                v.sum().backward()
            except RuntimeError as error:
                told.append(str(error))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(timeout=20)

    handle = model.head.weight.register_hook(torch.enable_grad()(start_another))
    optimizer.backward(loss_of(model, 0))
    handle.remove()
    assert len(told) == 1 and "inside another" in told[0]


def test_a_step_of_another_optimizer_inside_a_step() -> None:
    model, w = transformer(), vector(1.0)
    optimizer, inner = Lomo(model, lr=0.1), Lomo([w], lr=0.1)

    @torch.enable_grad()
    def train_the_other(_: Tensor) -> None:
        inner.backward(w.sum())

    textbook = Textbook(model, lr=0.1)
    model.head.weight.register_hook(train_the_other)
    optimizer.backward(loss_of(model, 0))
    textbook.step(loss_of(textbook.model, 0))
    assert_same_bits(weights_of(model), weights_of(textbook.model))
    assert w.item() == pytest.approx(0.9)


def test_step_called_in_a_hook_of_backward() -> None:
    w, v = vector(1.0), vector(1.0)
    optimizer = Lomo([w, v], lr=0.1)
    w.register_hook(lambda grad: optimizer.step())
    v.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="inside another"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.backward(w.sum())


# ---- Param groups behind the optimizer's back -----------------------------------------------------------------------


def test_parameters_put_into_a_group_by_hand() -> None:
    a, b = vector(1.0), vector(1.0)
    optimizer = Lomo([a], lr=0.5)
    optimizer.param_groups[0]["params"].append(b)
    with pytest.raises(RuntimeError, match=r"add_param_group\(\)"):
        optimizer.backward((a + b).sum())
    assert (a.item(), b.item()) == (1.0, 1.0)


def test_a_parameter_exchanged_in_a_group_by_hand() -> None:
    """The new one has no hook and would never be trained."""
    a, b = vector(1.0), vector(1.0)
    optimizer = Lomo([a], lr=0.5)
    optimizer.param_groups[0]["params"][0] = b
    with pytest.raises(RuntimeError, match=r"add_param_group\(\)"):
        optimizer.backward(b.sum())


# ---- Copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy_it", [copy.deepcopy, copy.copy])
def test_copying_the_optimizer_alone(copy_it: Callable[[Lomo], Any]) -> None:
    optimizer = Lomo([vector(1.0)])
    with pytest.raises(TypeError, match=r"copy\.deepcopy\(\(model, optimizer\)\)"):
        copy_it(optimizer)


def test_an_optimizer_pickled_without_its_model_says_so_when_it_is_used() -> None:
    model = transformer()
    loaded = pickle.loads(pickle.dumps(Lomo(model, lr=0.1)))
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="pickled apart"):
        loaded.backward(loss_of(model, 0))
    model.zero_grad()
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="pickle model and optimizer together"):
        loaded.step()
    assert_same_bits(weights_of(model), before)
    assert loaded.step_count.item() == 0


def test_copies_of_the_model_are_free() -> None:
    model = transformer()
    optimizer = Lomo(model, lr=0.1)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        before = weights_of(other)
        optimizer.backward(loss_of(model, 0))
        assert_same_bits(weights_of(other), before)
        theirs = Lomo(other, lr=0.2)
        trains_as_the_textbook(theirs, other, lr=0.2)


# ---- Wrappers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_distributed_data_parallel_is_refused(process_group: None) -> None:
    model = transformer()
    wrapped = nn.parallel.DistributedDataParallel(model)
    for refused in (wrapped, nn.Sequential(wrapped)):
        with pytest.raises(RuntimeError, match="DistributedDataParallel"):
            Lomo(refused)


@pytest.mark.parametrize(
    "view", [lambda w: w.data.t(), lambda w: w.data, lambda w: w.data[1:]], ids=["t", "same", "part"]
)
def test_two_parameters_in_one_memory(view: Any) -> None:
    a = nn.Linear(8, 8, bias=False)
    b = nn.Linear(8, 8, bias=False)
    b.weight = nn.Parameter(view(a.weight))
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight share memory .* make them one parameter"):
        Lomo(nn.Sequential(a, b))
    optimizer = Lomo(a)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.add_param_group({"params": [b.weight]})
    assert len(optimizer.param_groups) == 1


def test_parameters_side_by_side_in_one_memory() -> None:
    flat = torch.zeros(30)
    optimizer = Lomo([nn.Parameter(flat[:10]), nn.Parameter(flat[10:20]), nn.Parameter(flat[20:].view(2, 5))], lr=1.0)
    optimizer.backward(sum(p.sum() for p in optimizer.param_groups[0]["params"]))
    assert torch.equal(flat, torch.full((30,), -1.0))


def test_fused_layers_of_another_model() -> None:
    with pytest.raises(ValueError, match="none of the parameters given"):
        Lomo([vector(1.0)], fused_layers=nn.Linear(2, 2))
