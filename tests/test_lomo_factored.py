"""Rules with factors: "tensor", "rows" and "adalomo", against a plain statement in float64."""

from __future__ import annotations

import copy
import importlib.util
import math
import pickle
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.factored import RULES, FactoredTextbook, Kinds, assert_equal, tokens
from support.models import Options, assert_same_bits, gives, loss_of, on_gradient_pass, transformer, vector, weights_of
from support.ways import WAYS
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils._python_dispatch import TorchDispatchMode

from lomo_kernels import AdaLomo, Lomo
from lomo_kernels.optim.factored_rules import NUMBERS, FactoredRule, Factors, Sums, TensorRule
from lomo_kernels.optim.managed_parameter import ManagedParameter
from lomo_kernels.optim.rule_state import RuleState


class CountCalls(TorchDispatchMode):
    """Counts the calls of operators by name, except views and new tensors without numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func._schema.name.startswith("aten::empty"):
            self.counts[func._schema.name] += 1
        return result

    @property
    def ours(self) -> dict[str, int]:
        return {name: count for name, count in self.counts.items() if name.startswith("lomo_kernels::")}


# ---- The rules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"clip_grad_norm": 0.5, "clip_memory": 0},
        {"clip_grad_norm": 0.5, "clip_memory": None},
        {"clip_grad_norm": 0.5, "clip_memory": 50_000},
        {"clip_grad_value": 0.01},
        {"loss_scale": 64.0},
        {"loss_scale": "dynamic", "clip_grad_value": 0.01, "clip_grad_norm": 0.5},
    ],
    ids=str,
)
def test_steps_are_those_of_the_rule(options: dict[str, Any], rule: str) -> None:
    model = Kinds()
    shared = {name: value for name, value in options.items() if name not in ("loss_scale", "clip_memory")}
    book = FactoredTextbook(model, rule, lr=0.003, **shared)
    optimizer = Lomo(model, lr=0.003, rule=rule, **options)
    for step in range(6):
        optimizer.backward(model(tokens(step)))
        book.step(book.model(tokens(step)))
        assert all(param.grad is None for param in model.parameters())
        assert optimizer.last_grad_norm.item() == pytest.approx(book.norm, rel=1e-6)
    assert_equal(model, book)


@pytest.mark.parametrize("clip_grad_value", [None, 0.01])
@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_is_read_no_more_often_than_the_rule_needs(rule: str, clip_grad_value: float | None) -> None:
    """The norm is the root of the rows' sums, unless a clip value has changed these."""
    model = nn.ModuleList(nn.Linear(150, 150, bias=False) for _ in range(3))
    optimizer = Lomo(model, rule=rule, clip_grad_value=clip_grad_value)
    with CountCalls() as calls:
        optimizer.backward(sum(gives(layer.weight, torch.ones(150, 150)) for layer in model))
    of_norm, of_size = 3 * (clip_grad_value is not None), 3 * (rule == "adalomo")
    expected = {"factor_sums_": 3, "factored_update_": 3, "factored_sq_norm_": of_size, "sq_norm_": of_norm + of_size}
    expected |= {"factor_sums_total_": 3, "inverse_rms": 3 - of_size}
    expected |= dict.fromkeys(("adalomo_factors", "adalomo_scale_", "replace_states_"), of_size)
    assert calls.ours == {f"lomo_kernels::{name}": count for name, count in expected.items() if count}
    assert optimizer.last_grad_norm.item() == pytest.approx(3**0.5 * 150)


@pytest.mark.parametrize(("rule", "most"), [("tensor", 7), ("rows", 6), ("adalomo", 10)])
def test_a_further_parameter_takes_few_operators(rule: str, most: int) -> None:
    """Each is a launch with the CUDA library, where the host is the limit; sums of large gradients are two. One is the
    loss's. The rows' sums are added up once."""
    counts = []
    for layers in (4, 12):
        params = [nn.Parameter(torch.ones(150, 150)) for _ in range(layers)]
        optimizer = Lomo(params, rule=rule)
        loss = sum(gives(param, torch.ones(150, 150)) for param in params)
        with CountCalls() as calls:
            optimizer.backward(loss)
        counts.append(calls.counts)
    further = {name: count / 8 for name, count in (counts[1] - counts[0]).items()}
    assert further["lomo_kernels::factor_sums_total_"] == 1
    assert sum(further.values()) <= most, further


@pytest.mark.parametrize("rule", RULES)
def test_other_layouts(rule: str) -> None:
    """Channels last, and a transposed weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    model.weight = nn.Parameter(torch.randn(7, 4).T)
    book = FactoredTextbook(model, rule, lr=0.01)
    optimizer = Lomo(model, lr=0.01, rule=rule)
    for step in range(4):
        x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(step))
        for net, train in ((model, optimizer.backward), (book.model, book.step)):
            train((net(x.to(net.weight.dtype)).mean((2, 3)) @ net.weight).square().sum())
    assert_equal(model, book)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_way_to_a_step_gives_the_same_bits(dtype: torch.dtype, rule: str) -> None:
    weights = []
    for way in WAYS:
        model = transformer(Options(width=144, dtype=dtype))
        optimizer = Lomo(model, lr=0.01, rule=rule, rounding="stochastic", loss_scale=None)
        for step in range(4):
            way(optimizer, partial(loss_of, model, step), 0.01)
        weights.append(weights_of(model))
    for others in weights[1:]:
        assert_same_bits(others, weights[0])


@pytest.mark.parametrize("rule", RULES)
def test_one_backward_and_nothing_read(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer(Options(width=144))
    optimizer = Lomo(model, lr=0.01, rule=rule)
    backwards: list[int] = []
    on_gradient_pass(model.head.weight, lambda number, grad: backwards.append(number))
    monkeypatch.setattr(Tensor, "item", lambda _: pytest.fail("the host waited"))
    for step in range(3):
        optimizer.backward(loss_of(model, step))
    assert backwards == [0, 1, 2]


@pytest.mark.parametrize("rule", RULES)
def test_a_zero_gradient_changes_nothing(rule: str) -> None:
    params = [vector(1.0, 2.0), nn.Parameter(torch.ones(3, 4))]
    optimizer = Lomo(params, lr=0.1, rule=rule)
    for _ in range(2):
        optimizer.backward(sum((param * 0.0).sum() for param in params))
    assert params[0].tolist() == [1.0, 2.0]
    assert torch.equal(params[1], torch.ones(3, 4))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_parameter_whose_gradient_is_not_finite_is_kept(bad: float, rule: str) -> None:
    params = [vector(1.0, 2.0), nn.Parameter(torch.ones(3, 4))]
    book = [param.detach().clone() for param in params]
    optimizer = Lomo(params, lr=0.1, rule=rule, weight_decay=0.1)
    optimizer.backward(sum(param.square().sum() for param in params))
    before = [param.detach().clone() for param in params]
    state = copy.deepcopy({index: dict(optimizer.state[param]) for index, param in enumerate(params)})
    optimizer.backward(params[0].square().sum() + (params[1] * torch.tensor([bad, 1.0, 1.0, 1.0])).sum())
    assert not torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1])
    assert not torch.equal(book[1], before[1])
    for name in ("row", "column"):
        if name in state[1]:
            assert torch.equal(optimizer.state[params[1]][name], state[1][name])
    assert optimizer.skipped_steps.item() == 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [1e5, 1e9, 1e20, 1e38])
def test_a_large_gradient_is_an_update_and_nothing_more(size: float, rule: str) -> None:
    """With a row of zeros, whose running mean is 1e-30. From 1e20 on, the others' squares do not fit into a state."""
    param = nn.Parameter(torch.ones(4, 5))
    book = FactoredTextbook(nn.ParameterList([param]), rule, lr=0.1)
    optimizer = Lomo([param], lr=0.1, rule=rule)
    grad = torch.randn(4, 5).clamp(-1, 1)
    grad[2] = 0.0
    for factor in (size, size):
        before = param.detach().clone()
        optimizer.backward(gives(param, grad * factor))
        book.step((book.model[0] * (grad * factor).double()).sum())
        update = before - param.detach()
        assert (update[grad != 0] * grad[grad != 0] > 0).all()
        assert update.square().mean().sqrt() < 0.11
        if rule != "adalomo" or size < 1e19:
            assert_equal(nn.ParameterList([param]), book)
    assert all(state.isfinite().all() for state in optimizer.state[param].values() if isinstance(state, Tensor))


def test_a_small_weight_moves_as_one_of_size_eps() -> None:
    param = nn.Parameter(torch.zeros(4, 5))
    book = FactoredTextbook(nn.ParameterList([param]), "adalomo", lr=0.1)
    optimizer = Lomo([param], lr=0.1, rule="adalomo")
    grad = torch.linspace(-1, 1, 20).view(4, 5)
    optimizer.backward(gives(param, grad))
    book.step((book.model[0] * grad.double()).sum())
    assert param.abs().max() > 1e-5
    assert_equal(nn.ParameterList([param]), book, atol=1e-9)


def test_an_eps_that_float32_has_not() -> None:
    """A state of zero would make NaN of a row without gradient."""
    param = nn.Parameter(torch.ones(2, 3))
    optimizer = AdaLomo([param], lr=0.1, eps=(1e-60, 1e-3))
    optimizer.backward(param[0].sum())
    assert (param[0] < 1.0).all()
    assert param[1].tolist() == [1.0, 1.0, 1.0]
    assert (optimizer.state[param]["row"] > 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_autograd_sees_the_update(rule: str) -> None:
    param = nn.Parameter(torch.ones(2, 3))
    optimizer = Lomo([param], lr=0.1, rule=rule)
    stale = (param * param).sum()
    optimizer.backward(param.sum())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_a_skipped_step_does_not_count() -> None:
    model = Kinds()
    book = FactoredTextbook(model, "adalomo", lr=0.003, clip_grad_norm=1.0)
    optimizer = Lomo(model, lr=0.003, rule="adalomo", clip_grad_norm=1.0)
    for step in range(5):
        if step == 2:
            before = weights_of(model)
            optimizer.backward(model(tokens(step)) * math.inf)
            assert_same_bits(weights_of(model), before)
        optimizer.backward(model(tokens(step)))
        book.step(book.model(tokens(step)))
    assert_equal(model, book)


@pytest.mark.parametrize("how", ["in place", "data"])
def test_a_weight_that_somebody_changes_has_another_size(how: str) -> None:
    """The update is scaled by the weight's size. Autograd's version counter does not see changes through ``.data``."""
    model = Kinds()
    book = FactoredTextbook(model, "adalomo", lr=0.003)
    optimizer = Lomo(model, lr=0.003, rule="adalomo")
    for step in range(4):
        if step == 2:
            for net in (model, book.model):
                with torch.no_grad():
                    (net.wide.weight if how == "in place" else net.wide.weight.data).mul_(3.0)
        optimizer.backward(model(tokens(step)))
        book.step(book.model(tokens(step)))
    assert_equal(model, book)


def test_a_step_that_breaks_off_with_a_new_state_is_partial(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = Lomo([nn.Parameter(torch.ones(100, 200))], rule="adalomo")
    param = optimizer.param_groups[0]["params"][0]

    def interrupted(self: RuleState, *arguments: Any) -> None:
        replace(self, *arguments)
        raise KeyboardInterrupt

    replace = RuleState.replace
    monkeypatch.setattr(RuleState, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.backward(param.square().sum())
    assert optimizer.state[param]["row"].all()
    assert optimizer.last_step_outcome == "partial"


@pytest.mark.skipif(importlib.util.find_spec("lomo_optim") is None, reason="needs lomo_optim")
def test_steps_are_those_of_lomo_optim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step number is wrong in the first step only: beta is 1 - 0**0.8, which is 1 as ours for t = 0, and it counts
    its steps before the backward, as we do."""
    from lomo_optim import AdaLomo as Original

    monkeypatch.setattr(Tensor, "cuda", lambda tensor, *_: tensor)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))
    twin = copy.deepcopy(model)
    ours, theirs = AdaLomo(model, lr=0.01), Original(twin, lr=0.01, loss_scale=None)
    for step in range(5):
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step))
        ours.fused_backward(model(x).square().sum(), 0.01)
        theirs.fused_backward(twin(x).square().sum(), 0.01)
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)


# ---- State ----------------------------------------------------------------------------------------------------------


def test_state_is_a_number_for_each_row_and_column() -> None:
    model = Kinds()
    optimizer = Lomo(model, rule="adalomo")
    shapes = {
        name: [list(optimizer.state[param][part].shape) for part in ("row", "column")]
        for name, param in model.named_parameters()
    }
    assert shapes["wide.weight"] == [[1, 150], [1, 148]]
    assert shapes["wide.bias"] == [[0], [1, 150]]
    assert shapes["images.weight"] == [[24, 3], [24, 1]]
    assert shapes["scale"] == [[0], [1, 1]]
    assert all("row" not in state for state in Lomo(model, rule="rows").state.values())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["state_dict", "checkpoint", "deepcopy", "pickle"])
def test_resumed_twice_it_goes_on_bit_for_bit(how: str, rule: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr": 0.01, "rounding": "stochastic", "rule": rule}
    model, twin = (transformer(Options(dtype=torch.bfloat16)) for _ in range(2))
    optimizer, other = Lomo(model, **options), Lomo(twin, **options)
    for step in range(7):
        if step in (2, 4):
            if how == "state_dict":
                twin.load_state_dict(model.state_dict())
                other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            elif how == "checkpoint":
                state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
                dcp.save(state, checkpoint_id=str(tmp_path / str(step)))
                state = dict(zip(("model", "optimizer"), get_state_dict(twin, other), strict=True))
                dcp.load(state, checkpoint_id=str(tmp_path / str(step)))
                set_state_dict(twin, other, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            elif how == "deepcopy":
                twin, other = copy.deepcopy((model, optimizer))
            else:
                twin, other = pickle.loads(pickle.dumps((model, optimizer)))
        optimizer.backward(loss_of(model, step))
        if step >= 2:
            other.backward(loss_of(twin, step))
    assert_same_bits(weights_of(twin), weights_of(model))


def test_a_resumed_step_has_the_bits_of_the_step_that_goes_on() -> None:
    """Sums of a weight's squares in two orders give coefficients of other bits, for one weight of two hundred here."""
    torch.manual_seed(0)
    shapes = torch.randint(30, 130, (400, 2)).tolist()
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    twins = copy.deepcopy(params)
    optimizer, other = (Lomo(some, lr=0.01, rule="adalomo") for some in (params, twins))
    for step in range(2):
        grads = [torch.randn(shape) for shape in shapes]
        optimizer.backward(sum(gives(param, grad) for param, grad in zip(params, grads, strict=True)))
        if step:
            other.backward(sum(gives(param, grad) for param, grad in zip(twins, grads, strict=True)))
        else:
            other.load_state_dict(optimizer.state_dict())
            torch._foreach_copy_([twin.data for twin in twins], [param.data for param in params])
    assert [torch.equal(param, twin) for param, twin in zip(params, twins, strict=True)] == [True] * len(params)


class CountingRule(TensorRule):
    """A user's rule: counts each parameter's steps."""

    states = ("count",)

    def new_state(self, managed: ManagedParameter) -> tuple[Tensor, ...]:
        return (torch.zeros(1),)

    def factors(self, managed: ManagedParameter, sums: Sums, state: tuple[Tensor, ...], step: Tensor) -> Factors:
        return super().factors(managed, sums, state, step)._replace(state=(state[0] + 1,))


@pytest.mark.parametrize("how", ["state_dict", "checkpoint"])
def test_the_state_of_a_users_rule(how: str) -> None:
    model = nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    optimizer, other = Lomo(model, rule=CountingRule()), Lomo(twin, rule=CountingRule())
    optimizer.backward(model(torch.ones(3)).sum())
    if how == "state_dict":
        other.load_state_dict(optimizer.state_dict())
    else:
        state = copy.deepcopy(get_state_dict(model, optimizer)[1])
        set_state_dict(twin, other, model_state_dict=model.state_dict(), optim_state_dict=state)
    assert [other.state[param]["count"].item() for param in twin.parameters()] == [1.0, 1.0]


def test_other_state_dicts_are_refused() -> None:
    model = nn.Linear(3, 2)
    saved = {rule: Lomo(model, rule=rule).state_dict() for rule in ("sgd", *RULES)}
    for rule, other in (("adalomo", "sgd"), ("sgd", "adalomo"), ("rows", "tensor"), ("adalomo", "rows")):
        with pytest.raises(ValueError, match=f"saved with rule '{other}', this optimizer has '{rule}'"):
            Lomo(model, rule=rule).load_state_dict(saved[other])
    optimizer = Lomo(model, rule="adalomo")
    before = copy.deepcopy(optimizer.state_dict()["state"])
    for wrong in (torch.zeros(3), torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 2, device="meta"), None):
        changed = copy.deepcopy(saved["adalomo"])
        changed["state"][0]["row"] = wrong
        with pytest.raises(ValueError, match="row of weight is"):
            optimizer.load_state_dict(changed)
    for number in (math.nan, math.inf, -1.0):
        changed = copy.deepcopy(saved["adalomo"])
        changed["state"][1]["column"][0, 1] = number
        with pytest.raises(ValueError, match="column of bias has an element that no mean can be"):
            optimizer.load_state_dict(changed)
    fewer = copy.deepcopy(saved["adalomo"])
    fewer["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match=r"param_groups\[0\] has 1 parameters in the state dict, 2 here"):
        optimizer.load_state_dict(fewer)
    with pytest.raises(TypeError, match="state of bias is a list, expected a dict"):
        optimizer.load_state_dict(saved["adalomo"] | {"state": saved["adalomo"]["state"] | {1: []}})
    assert str(optimizer.state_dict()["state"]) == str(before)


def test_added_and_cast_parameters() -> None:
    model = transformer()
    optimizer = Lomo(model.blocks, lr=0.01, rule="adalomo")
    optimizer.backward(loss_of(model, 0))
    state = optimizer.state[model.blocks[0].up.weight]["row"].clone()
    optimizer.add_param_group({"params": [("head.weight", model.head.weight)]})
    model.bfloat16()
    optimizer.backward(loss_of(model, 1))
    assert optimizer.state[model.head.weight]["row"].shape == (1, 19)
    assert not torch.equal(optimizer.state[model.blocks[0].up.weight]["row"], state)
    assert (optimizer.state[model.blocks[0].up.weight]["row"] / state).max() < 100


@pytest.mark.parametrize("steps", [0, 1])
def test_an_added_embedding_is_one(steps: int) -> None:
    model = nn.ModuleDict({"linear": nn.Linear(2, 2)})
    optimizer = Lomo(model, lr=1.0, rule="rows")
    for _ in range(steps):
        optimizer.backward(model["linear"](torch.ones(2)).sum())
    model["embedding"] = nn.Embedding.from_pretrained(torch.zeros(2, 2), freeze=False)
    model["bare"] = nn.Embedding(2, 2)
    del model["bare"].weight
    weight = model["embedding"].weight
    optimizer.add_param_group({"params": [("embedding.weight", weight)]})
    optimizer.backward(gives(weight, torch.tensor([[0.0, 1.0], [0.0, 1.0]])))
    assert weight[:, 1].tolist() == [-1.0, -1.0], "a row's would be the root of 2"


@pytest.mark.parametrize("rule", RULES)
def test_ranks_see_that_their_rules_are_equal(rule: str) -> None:
    """They compare what the options look like; an address in it would differ."""
    settings = Lomo(nn.Linear(3, 2), rule=rule)._training.settings
    assert repr(pickle.loads(pickle.dumps(settings)).same_everywhere()) == repr(settings.same_everywhere())


def test_numbers_of_rules_stay_what_checkpoints_have() -> None:
    assert NUMBERS.items() >= {"sgd": 0, "sign": 1, "tensor": 100, "rows": 101, "adalomo": 102}.items()
    assert len(set(NUMBERS.values())) == len(NUMBERS)


# ---- What is refused ------------------------------------------------------------------------------------------------


def test_refused_options() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"expected one of 'sgd', 'sign', .*'tensor', 'rows', 'adalomo'"):
        Lomo(model, rule="adam")
    with pytest.raises(ValueError, match="clip_tensor bounds a gradient"):
        Lomo(model, rule="rows", clip_tensor=1.04)
    refused: dict[str, dict[str, Any]] = {
        r"eps is 0\.001, expected two numbers": {"eps": 1e-3},
        r"eps\[1\] is 0\.0": {"eps": (1e-30, 0.0)},
        r"clip_threshold is -1\.0": {"clip_threshold": -1.0},
    }
    for message, wrong in refused.items():
        with pytest.raises(ValueError, match=message):
            AdaLomo(model, **wrong)
    for rate in (0.8, 0.0, -math.inf, math.nan, True, "-0.8", None):
        with pytest.raises(ValueError, match=r"decay_rate is .*, expected a finite number < 0"):
            AdaLomo(model, decay_rate=rate)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"name of FactoredRule.* is '', expected one of tensor, rows, adalomo"):
        Lomo(model, rule=FactoredRule())
