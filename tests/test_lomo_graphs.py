"""Fused layers in random graphs, and with everything else that may happen to a model, against float64 and autograd."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.models import assert_same_bits, weights_of
from support.textbook import EPSILON
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lomo_kernels import Lomo
from lomo_kernels.layers import factor_sinks

WIDTH = 24  # weights larger than what is kept of one or two of their uses, and smaller than that of more
VOCAB = 25

Rule = dict[str, Any]
#: Without clipping, and with it in one backward and in two.
WAYS: dict[str, Rule] = {
    "plain": {},
    "one": {"clip_grad_norm": 0.1, "clip_passes": "one"},
    "two": {"clip_grad_norm": 0.1, "clip_passes": "two"},
}


# ---- One step, next to autograd -------------------------------------------------------------------------------------


class Expected:
    """What one step has to give: from a plain copy of the model in `dtype`, its gradients, and float64.

    Made before the step; the copy is in ``.model``, for a loss that is computed as the model's is.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = torch.float64) -> None:
        self.model = copy.deepcopy(model)
        if dtype is not None:
            self.model.to(dtype)

    def after(self, lr: float, rule: Rule) -> dict[str, Tensor]:
        """The weights after a step from what stands in ``.grad``; also sets `norm` and `largest`, of the gradients."""
        params = dict(self.model.named_parameters())
        grads = {name: param.grad.double() for name, param in params.items() if param.grad is not None}
        self.norm = sum(grad.square().sum().item() for grad in grads.values()) ** 0.5
        coefficient = min(1.0, rule["clip_grad_norm"] / (self.norm + EPSILON)) if rule.get("clip_grad_norm") else 1.0
        bound = rule.get("clip_grad_value") or float("inf")
        decay = 1.0 - lr * rule.get("weight_decay", 0.0)
        weights = {name: param.detach().double() for name, param in params.items()}
        for name, grad in grads.items():
            weights[name] = weights[name] * decay - lr * coefficient * grad.clamp(-bound, bound)
        self.largest = (
            lr * coefficient * max((grad.abs().max().item() for grad in grads.values() if grad.numel()), default=0.0)
        )
        return weights


def check_step(
    model: nn.Module,
    optimizer: Lomo,
    rule: Rule,
    loss_of: Callable[[nn.Module], Tensor],
    *,
    step: Callable[[], None] | None = None,
    error: float = 2e-5,
    norm_error: float = 1e-5,
    dtype: torch.dtype | None = torch.float64,
) -> None:
    """One step of the optimizer (`step`, by default backward from the loss) next to the same by autograd.

    Args:
        error: bound on a weight's, in units of the step's largest element; for the last bit of the weight see below.
    """
    expected = Expected(model, dtype)
    loss_of(expected.model).backward()
    if step is None:
        optimizer.backward(loss_of(model))
    else:
        step()
    lr = optimizer.param_groups[0]["lr"]
    after = expected.after(lr, rule)
    assert optimizer.last_grad_norm.item() == pytest.approx(expected.norm, rel=norm_error, abs=1e-12)
    for name, param in model.named_parameters():
        assert param.grad is None, f"{name} has a gradient"
        if not param.numel():
            continue
        last_bit = {torch.float32: 2e-7, torch.bfloat16: 2**-7}[param.dtype] * after[name].abs()
        excess = ((param.detach().double() - after[name]).abs() - last_bit).max().item()
        assert excess <= error * expected.largest, f"{name} is off by {excess:.1e}, {expected.largest:.1e} is the step"


# ---- Random graphs --------------------------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """Twice its input, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class _Undefined(torch.autograd.Function):
    """Its input, to which it gives no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


class RandomGraph(nn.Module):
    """A list of instructions over a growing list of activations [batch, tokens, WIDTH]."""

    def __init__(self, program: list[tuple[str, int, int, int]], seed: int) -> None:
        super().__init__()
        self.program = program
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.padded = nn.Embedding(VOCAB, WIDTH, padding_idx=1)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.head.weight = self.embedding.weight
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=i != 1) for i in range(3))
        self.twin = nn.Linear(WIDTH, WIDTH)
        self.twin.weight = self.linears[0].weight
        self.alone = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))  # for reentrant checkpoints
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.positions = nn.Parameter(torch.zeros(4, WIDTH))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) * 0.2)
        self.frozen.weight.requires_grad_(False)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """`x` [batch, tokens, WIDTH], `index` [batch, tokens]."""
        values, losses = [x], [self.norm(x).square().sum()]
        reentrant = list(self.alone)
        for kind, first, second, which in self.program:
            a, b = values[first % len(values)], values[second % len(values)]
            linear = self.linears[which % 3]
            if kind == "penalty":
                losses.append(linear.weight.square().mean() + self.embedding.weight[1:3].mean())
            elif kind == "discarded":
                self.twin(linear(a))
            elif kind == "reentrant" and reentrant and a.requires_grad:
                values.append(checkpoint(reentrant.pop(), a, use_reentrant=True).tanh())
            else:
                values.append(getattr(self, "do_" + kind, self.do_linear)(a, b, linear, index))
        return sum(losses) + sum(value.square().sum() for value in values[1:]) / 8

    def do_linear(self, a: Tensor, b: Tensor, linear: nn.Module, index: Tensor) -> Tensor:
        return linear(a).tanh()

    def do_twin(self, a: Tensor, b: Tensor, linear: nn.Module, index: Tensor) -> Tensor:
        return self.twin(a).tanh() + linear(b).sigmoid()

    def do_embedding(self, a: Tensor, b: Tensor, linear: nn.Module, index: Tensor) -> Tensor:
        return self.embedding(index) + self.padded(index.flip(-1))

    def do_head(self, a: Tensor, b: Tensor, linear: nn.Module, index: Tensor) -> Tensor:
        return self.head(a).softmax(-1) @ self.embedding.weight  # and the same weight in a plain use

    def do_transposed(self, a: Tensor, b: Tensor, linear: nn.Module, index: Tensor) -> Tensor:
        return (a @ linear.weight).tanh()

    def do_mixed(self, a: Tensor, b: Tensor, linear: nn.Module, index: Tensor) -> Tensor:
        return self.norm(a) * b.sigmoid()

    def do_custom(self, a: Tensor, b: Tensor, linear: nn.Module, index: Tensor) -> Tensor:
        return linear(Doubled.apply(a)).tanh() + Doubled.apply(linear(b)).tanh()

    def do_undefined(self, a: Tensor, b: Tensor, linear: nn.Module, index: Tensor) -> Tensor:
        return _Undefined.apply(linear(a)).tanh() + _Undefined.apply(self.padded(index))

    def do_attention(self, a: Tensor, b: Tensor, linear: nn.Module, index: Tensor) -> Tensor:
        q, k, v = (layer(a) for layer in self.linears)
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    def do_recomputed(self, a: Tensor, b: Tensor, linear: nn.Module, index: Tensor) -> Tensor:
        def block(z: Tensor) -> Tensor:
            return linear(self.twin(z).tanh()) + self.embedding(index)

        return checkpoint(block, a, use_reentrant=False).tanh()

    def do_detached(self, a: Tensor, b: Tensor, linear: nn.Module, index: Tensor) -> Tensor:
        return linear(a).detach().tanh() + linear(b.detach()).tanh()

    def do_inplace(self, a: Tensor, b: Tensor, linear: nn.Module, index: Tensor) -> Tensor:
        return linear(a).relu_() + linear(b).mul_(0.5).tanh_()

    def do_added_in_place(self, a: Tensor, b: Tensor, linear: nn.Module, index: Tensor) -> Tensor:
        return linear(a).add_(linear(b)).tanh()  # both have one grad_output

    def do_strided(self, a: Tensor, b: Tensor, linear: nn.Module, index: Tensor) -> Tensor:
        return linear(a.transpose(0, 1)).transpose(0, 1).tanh()

    def do_expanded(self, a: Tensor, b: Tensor, linear: nn.Module, index: Tensor) -> Tensor:
        return linear(a.sum(0, keepdim=True).tanh().expand_as(a)) + linear(b).sum(1, keepdim=True).tanh()

    def do_positions(self, a: Tensor, b: Tensor, linear: nn.Module, index: Tensor) -> Tensor:
        """Inputs that are a parameter, a view of one, and the weight itself."""
        of_views = linear(self.positions[: a.shape[1]]) + linear(linear.weight.T).sum(0)
        return (a + self.twin(self.positions).sum(0) + of_views).tanh()

    def do_first_token(self, a: Tensor, b: Tensor, linear: nn.Module, index: Tensor) -> Tensor:
        return linear(a[:, :1]).tanh() + b

    def do_one_vector(self, a: Tensor, b: Tensor, linear: nn.Module, index: Tensor) -> Tensor:
        return linear(a.sum((0, 1))).tanh() + self.embedding(index.sum() % VOCAB) + b

    def do_frozen(self, a: Tensor, b: Tensor, linear: nn.Module, index: Tensor) -> Tensor:
        return self.frozen(a).tanh()


KINDS = [name.removeprefix("do_") for name in vars(RandomGraph) if name.startswith("do_")]
KINDS += ["penalty", "discarded", "reentrant"]
instructions = st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9), st.integers(0, 2))


def inputs(seed: int, shape: tuple[int, int], dtype: torch.dtype, *, wants_grad: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, WIDTH, generator=generator).to(dtype).requires_grad_(wants_grad)
    return x, torch.randint(VOCAB, shape, generator=generator)


def loss_on(
    seed: int, shape: tuple[int, int], *, wants_grad: bool = False, autocast: bool = False
) -> Callable[[nn.Module], Tensor]:
    def loss_of(model: nn.Module) -> Tensor:
        x, index = inputs(seed, shape, next(model.parameters()).dtype, wants_grad=wants_grad)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x, index).to(torch.promote_types(x.dtype, torch.float32))

    return loss_of


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    program=st.lists(instructions, min_size=1, max_size=8),
    shapes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=2, max_size=2),
    passes=st.sampled_from(["one", "two"]),
    clip_grad_norm=st.sampled_from([None, 1e-3, 0.1, 100.0]),
    clip_grad_value=st.sampled_from([None, 1e-2]),
    weight_decay=st.sampled_from([0.0, 0.3]),
    loss_scale=st.sampled_from([None, 128.0, "dynamic"]),
    kind=st.sampled_from(["float32", "float32", "bfloat16", "stochastic", "autocast"]),
    wants_grad=st.booleans(),
    way=st.sampled_from(["backward", "backward", "accumulate", "step"]),
)
def test_random_graphs(
    program: list[tuple[str, int, int, int]],
    shapes: list[tuple[int, int]],
    passes: str,
    loss_scale: Any,
    kind: str,
    wants_grad: bool,
    way: str,
    **rule: Any,
) -> None:
    low = kind in ("bfloat16", "stochastic")
    model = RandomGraph(program, seed=len(program)).to(torch.bfloat16 if low else torch.float32)
    # What runs in bfloat16 has an error of its own, in autograd and here: of 2**-8 in each of some uses of a weight.
    tolerances: dict[str, Any] = {} if kind == "float32" else {"error": 0.05, "norm_error": 0.02, "dtype": None}
    with Lomo(
        model,
        lr=0.1,
        clip_passes=passes,
        fused_layers=True,
        loss_scale=loss_scale,
        rounding="stochastic" if kind == "stochastic" else "nearest",
        **rule,
    ) as optimizer:
        for seed, shape in enumerate(shapes):
            parts = [loss_on(seed, shape, wants_grad=wants_grad, autocast=kind == "autocast")]
            if way != "backward":
                parts.append(loss_on(seed + 9, (2, 3), autocast=kind == "autocast"))

            def step(parts: list[Callable[[nn.Module], Tensor]] = parts) -> None:
                if way == "step":
                    for part in parts:
                        part(model).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    return
                with optimizer.accumulate():
                    for part in parts[:-1]:
                        optimizer.backward(part(model))
                optimizer.backward(parts[-1](model))

            check_step(
                model, optimizer, rule, lambda m, parts=parts: sum(part(m) for part in parts), step=step, **tolerances
            )
        assert optimizer.skipped_steps.item() == 0


# ---- What else may happen to a model --------------------------------------------------------------------------------


class Net(nn.Module):
    """An embedding tied to the head, a layer used twice, a layer after which an activation works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.twice = nn.Linear(WIDTH, WIDTH, bias=False)
        self.inplace = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.Softplus(), nn.Linear(WIDTH, WIDTH), nn.ELU(inplace=True)
        )
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        x = torch.tanh(self.first(x + self.embedding(index)))
        return self.head(self.inplace(self.twice(torch.tanh(self.twice(x)))))


def net() -> Net:
    torch.manual_seed(1)
    return Net()


def given_batch(seed: int, model: nn.Module, *, wants_grad: bool = False) -> tuple[Tensor, Tensor]:
    return inputs(seed, (2, 3), next(model.parameters()).dtype, wants_grad=wants_grad)


def net_loss(model: nn.Module, seed: int = 0) -> Tensor:
    x, index = given_batch(seed, model)
    return F.cross_entropy(model(x, index).flatten(0, 1), index.flatten().flip(0)) * 3


def functional_loss(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    x, index = given_batch(3, model)
    return lambda params: torch.func.functional_call(model, params, (x, index), tie_weights=True).square().sum()


def detached(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach() for name, param in model.named_parameters()}


def penalty(model: nn.Module, of: str = "input", seed: int = 0) -> Tensor:
    """A loss that holds a gradient."""
    x, index = given_batch(seed, model, wants_grad=True)
    out = model(x, index).square().mean()
    wanted = [x] if of == "input" else [model.first.weight, model.embedding.weight]
    return out + sum(g.square().sum() for g in torch.autograd.grad(out, wanted, create_graph=True))


def _per_sample(model: nn.Module) -> Any:
    xs, indices = given_batch(4, model)

    def loss(params: dict[str, Tensor], x: Tensor, index: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (x[None], index[None])).square().sum()

    return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(detached(model), xs, indices)


def _jvp(model: nn.Module) -> Any:
    params = detached(model)
    return torch.func.jvp(functional_loss(model), (params,), ({k: torch.ones_like(v) for k, v in params.items()},))


def _dual(model: nn.Module) -> Any:
    x, index = given_batch(5, model)
    with torch.autograd.forward_ad.dual_level():
        out = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), index)
        return torch.autograd.forward_ad.unpack_dual(out).tangent


def _batched(model: nn.Module) -> Any:
    x, index = given_batch(6, model, wants_grad=True)
    out = model(x, index)[0, 0]
    return torch.autograd.grad(out, [x, *model.parameters()], torch.eye(VOCAB, dtype=x.dtype), is_grads_batched=True)


def _input_grads(model: nn.Module) -> Any:
    x, index = given_batch(7, model, wants_grad=True)
    return torch.autograd.grad(model(x, index).square().sum(), x)


def _backward_to_inputs_only(model: nn.Module) -> Any:
    x, index = given_batch(7, model, wants_grad=True)
    model(x, index).square().sum().backward(inputs=[x, model.twice.weight])
    result = x.grad, model.twice.weight.grad
    model.twice.weight.grad = None
    return result


def _plain_backward(model: nn.Module) -> Any:
    net_loss(model, 8).backward()
    result = [param.grad for param in model.parameters()]
    model.zero_grad()
    return result


def _hessian(model: nn.Module) -> Any:
    x, index = given_batch(8, model)
    return torch.autograd.functional.hessian(lambda z: model(z, index).square().sum(), x)


def _evaluation(model: nn.Module) -> Any:
    with torch.no_grad():
        first = net_loss(model, 9)
    with torch.inference_mode():
        return first, net_loss(model, 9).clone()


def _traced(model: nn.Module) -> Any:
    traced = torch.jit.trace(model, given_batch(10, model))
    loss = traced(*given_batch(11, model)).square().sum()
    return torch.autograd.grad(loss, list(model.parameters()))


def _fx(model: nn.Module) -> Any:
    traced = torch.fx.symbolic_trace(model)
    assert "twice" in [node.target for node in traced.graph.nodes if node.op == "call_module"], "layers are leaves"
    loss = traced(*given_batch(11, model)).square().sum()
    return torch.autograd.grad(loss, list(model.parameters()))


def _exported(model: nn.Module) -> Any:
    return torch.export.export(model, given_batch(10, model)).module()(*given_batch(10, model)).detach()


def _copied(model: nn.Module) -> Any:
    twin = copy.deepcopy(model)
    assert [type(a) for a in twin.modules()] == [type(a) for a in Net().modules()]
    return _plain_backward(twin)


DETOURS: dict[str, Callable[[nn.Module], Any]] = {
    "evaluation": _evaluation,
    "gradient of the inputs": _input_grads,
    "gradient of the weights": lambda model: torch.autograd.grad(net_loss(model, 2), list(model.parameters())),
    "gradient of one weight": lambda model: torch.autograd.grad(net_loss(model, 2), model.head.weight),
    "batched gradients": _batched,
    "plain backward": _plain_backward,
    "backward to some": _backward_to_inputs_only,
    "double backward": lambda model: torch.autograd.grad(penalty(model), list(model.parameters())),
    "double backward of weights": lambda model: torch.autograd.grad(
        penalty(model, "weights"), list(model.parameters())
    ),
    "hessian": _hessian,
    "functional call": lambda model: functional_loss(model)(detached(model)),
    "functional gradient": lambda model: torch.func.grad(functional_loss(model))(detached(model)),
    "gradient of each sample": _per_sample,
    "jacobian": lambda model: torch.func.jacrev(functional_loss(model))(detached(model)),
    "jvp": _jvp,
    "dual numbers": _dual,
    "trace": _traced,
    "fx": _fx,
    "export": _exported,
    "copy": _copied,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("detour", DETOURS)
def test_detours_are_those_of_the_plain_model(detour: str, way: str) -> None:
    """Between a forward and its backward: the result is the plain model's, no weight changes, and the step is right."""
    model = net()
    optimizer = Lomo(model, lr=0.1, fused_layers=True, **WAYS[way])
    for step in range(2):
        before, twin = weights_of(model), copy.deepcopy(model)
        loss = net_loss(model, step)
        expected = DETOURS[detour](twin)
        torch.testing.assert_close(DETOURS[detour](model), expected, rtol=1e-4, atol=1e-5)
        assert_same_bits(weights_of(model), before)
        assert all(param.grad is None for param in model.parameters())
        check_step(
            model,
            optimizer,
            WAYS[way],
            lambda m, step=step: net_loss(m, step),
            step=lambda loss=loss: optimizer.backward(loss),
        )


@pytest.mark.parametrize("of", ["input", "weights"])
@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_in_the_loss(way: str, of: str) -> None:
    model = net()
    optimizer = Lomo(model, lr=0.1, fused_layers=True, **WAYS[way])
    for step in range(3):
        check_step(model, optimizer, WAYS[way], lambda m, step=step: penalty(m, of, step))


@pytest.mark.parametrize("detour", ["gradient of the weights", "gradient of one weight", "gradient of the inputs"])
@pytest.mark.parametrize("way", ["one", "two"])
def test_autograd_grad_inside_the_backward_of_a_step(way: str, detour: str) -> None:
    """A hook that asks for gradients of the same weights, while their factors are being taken."""
    model = net()
    optimizer = Lomo(model, lr=0.3, fused_layers=True, **WAYS[way])
    expected = DETOURS[detour](copy.deepcopy(model))
    results: list[Any] = []
    asking = False

    def ask(*_: Any) -> None:
        nonlocal asking
        if not asking:
            asking = True
            with torch.enable_grad():
                results.append(DETOURS[detour](model))
            asking = False

    handle = model.inplace[0].register_full_backward_hook(ask)
    check_step(model, optimizer, WAYS[way], lambda m: net_loss(m), step=lambda: optimizer.backward(net_loss(model)))
    # Two passes: the first step of a graph looks twice. One more by the copy that check_step compares with.
    assert len(results) == {"one": 1, "two": 3}[way] + 1
    torch.testing.assert_close(results[0], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1], expected, rtol=1e-5, atol=1e-6)  # of the norm's pass, or the only one
    handle.remove()


@pytest.mark.parametrize("way", WAYS)
def test_hooks_on_modules_and_weights(way: str) -> None:
    """Each sees and does what it does with a plain layer."""
    model = net()
    optimizer = Lomo(model, lr=0.3, fused_layers=True, **WAYS[way])
    seen: list[str] = []
    handles = [
        model.first.register_forward_pre_hook(lambda _, args: (seen.append("pre"), (args[0] * 2,))[1]),
        model.first.register_forward_hook(lambda _, __, out: (seen.append("forward"), out * 3)[1]),
        model.twice.register_full_backward_hook(lambda _, grads, __: (seen.append("backward"), (grads[0] * 0.5,))[1]),
        model.inplace[0].register_full_backward_pre_hook(lambda _, grads: (grads[0] * 2,)),
        model.twice.weight.register_hook(lambda grad: (seen.append("tensor"), grad * 2)[1]),
        model.embedding.weight.register_hook(lambda grad: grad * torch.arange(VOCAB).view(-1, 1)),
    ]

    def hooked(m: nn.Module) -> Tensor:
        if m is not model:  # copies of modules keep their hooks, copies of tensors do not
            m.twice.weight.register_hook(lambda grad: grad * 2)
            m.embedding.weight.register_hook(lambda grad: grad * torch.arange(VOCAB).view(-1, 1))
        return net_loss(m)

    check_step(model, optimizer, WAYS[way], hooked)
    assert {"pre", "forward", "backward", "tensor"} == set(seen)
    for handle in handles:
        handle.remove()
    check_step(model, optimizer, WAYS[way], net_loss)


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
def test_compiled_models(fresh_compiler: None, way: str, when: str, backend: str) -> None:
    """Compiled and called before the layers are fused, or after."""
    model = net()
    compiled = torch.compile(model, backend=backend)
    if when == "before":
        net_loss(compiled)
    optimizer = Lomo(model, lr=0.3, fused_layers=True, **WAYS[way])
    for step in range(2):
        check_step(model, optimizer, WAYS[way], lambda m, step=step: net_loss(compiled if m is model else m, step))
    check_step(model, optimizer, WAYS[way], lambda m: net_loss(m) + (net_loss(compiled if m is model else m, 3)))


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


@pytest.mark.parametrize("way", WAYS)
def test_parametrizations_put_on_and_taken_off(way: str) -> None:
    parametrize = nn.utils.parametrize
    model = net()
    parametrize.register_parametrization(model.first, "weight", Symmetric())
    optimizer = Lomo(model, lr=0.3, fused_layers=True, **WAYS[way])
    check_step(model, optimizer, WAYS[way], net_loss)
    parametrize.register_parametrization(model.twice, "weight", Symmetric())
    check_step(model, optimizer, WAYS[way], net_loss)
    parametrize.remove_parametrizations(model.twice, "weight", leave_parametrized=False)
    check_step(model, optimizer, WAYS[way], net_loss)
    parametrize.register_parametrization(model.inplace[0], "weight", Symmetric())
    optimizer.remove()
    parametrize.remove_parametrizations(model.inplace[0], "weight")
    net_loss(model).backward()
    assert all(param.grad is not None for param in model.parameters())
    model.zero_grad()
    again = Lomo(model, lr=0.3, fused_layers=True, **WAYS[way])
    assert "4 of 8 trained parameters" in again.summary(), "all but the one that is still parametrized"
    check_step(model, again, WAYS[way], net_loss)


@pytest.mark.parametrize("way", WAYS)
def test_weights_frozen_and_thawed_between_steps(way: str) -> None:
    model = net()
    model.first.requires_grad_(False)
    optimizer = Lomo(model, lr=0.3, fused_layers=True, **WAYS[way])
    for freeze, thaw in ((model.twice, model.first), (model.embedding, model.twice), (model.first, model.embedding)):
        check_step(model, optimizer, WAYS[way], net_loss)
        freeze.requires_grad_(False)
        thaw.requires_grad_(True)
        before = freeze.weight.detach().clone()
        check_step(model, optimizer, WAYS[way], net_loss)
        assert torch.equal(freeze.weight, before)
    loss = net_loss(model)
    model.twice.requires_grad_(False)  # its forward was before: the gradient comes all the same
    optimizer.backward(loss)
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("loss_scale", [None, 64.0])
@pytest.mark.parametrize("way", WAYS)
def test_two_optimizers_on_two_parts(way: str, loss_scale: float | None) -> None:
    """Neither leaves a gradient on the other's parameters, and each takes its own."""
    model = net()
    part = [*model.first.parameters(), *model.inplace.parameters()]
    rest = [model.twice.weight, model.embedding.weight]
    a = Lomo(part, lr=0.3, fused_layers=model, loss_scale=loss_scale, **WAYS[way])
    b = Lomo(rest, lr=0.2, fused_layers=model, loss_scale=loss_scale, **WAYS[way])
    for step in range(2):
        expected = Expected(model)
        net_loss(expected.model, step).backward()
        grads = {name: param.grad for name, param in expected.model.named_parameters()}
        of_rest = ("twice.weight", "embedding.weight")
        a.backward(net_loss(model, step))
        assert all(param.grad is None for param in rest)
        norm = sum(g.square().sum().item() for name, g in grads.items() if name not in of_rest) ** 0.5
        assert a.last_grad_norm.item() == pytest.approx(norm, rel=1e-5)
        assert all(param.grad is None for param in part)
        b.zero_grad()
        check = Expected(model)
        net_loss(check.model, step).backward()
        b.backward(net_loss(model, step))
        norm = sum(check.model.get_parameter(name).grad.square().sum().item() for name in of_rest) ** 0.5
        assert b.last_grad_norm.item() == pytest.approx(norm, rel=1e-5)
        assert all(param.grad is None for param in rest)
        a.zero_grad()


@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_that_is_dropped_gives_the_layers_back(way: str) -> None:
    model = net()
    classes = [type(module) for module in model.modules()]
    optimizer = Lomo(model, lr=0.3, fused_layers=True, **WAYS[way])
    optimizer.backward(net_loss(model, 1))
    loss = net_loss(model)
    expected = _plain_backward_of(copy.deepcopy(model))
    del optimizer
    gc.collect()
    assert [type(module) for module in model.modules()] == classes
    assert not factor_sinks
    loss.backward()  # of a forward that was fused
    for param, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.grad, gradient)
    model.zero_grad()
    check_step(model, Lomo(model, lr=0.3, fused_layers=True, **WAYS[way]), WAYS[way], net_loss)


def _plain_backward_of(model: nn.Module) -> list[Tensor | None]:
    net_loss(model).backward()
    return [param.grad for param in model.parameters()]


@pytest.mark.parametrize("way", WAYS)
def test_a_fused_forward_whose_backward_is_another_optimizers(way: str) -> None:
    model = net()
    first = Lomo(model, lr=0.3, fused_layers=True)
    loss = net_loss(model)
    first.remove()
    second = Lomo(model, lr=0.3, **WAYS[way])
    check_step(model, second, WAYS[way], net_loss, step=lambda: second.backward(loss))
    loss = net_loss(model)
    second.remove()
    third = Lomo(model, lr=0.3, fused_layers=True, **WAYS[way])
    check_step(model, third, WAYS[way], net_loss, step=lambda: third.backward(loss))


class WithoutGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.embedding, self.other = nn.Linear(5, 5), nn.Embedding(5, 5), nn.Linear(5, 5)

    def forward(self) -> Tensor:
        x = self.embedding(torch.tensor([1, 2]))
        return (
            (_Undefined.apply(self.linear(torch.ones_like(x))) + _Undefined.apply(x) + self.other.bias).square().sum()
        )


@pytest.mark.parametrize("way", WAYS)
def test_an_output_without_a_gradient_leaves_its_weight_alone(way: str) -> None:
    """Not even decayed: autograd gives it no gradient, not one of zeros."""
    model = WithoutGradient()
    before = weights_of(model)
    rule = WAYS[way] | {"weight_decay": 0.5}
    check_step(model, Lomo(model, lr=0.3, fused_layers=True, **rule), rule, lambda m: m())
    del before["other.bias"]
    assert_same_bits({name: model.get_parameter(name).detach() for name in before}, before)


class PositionsThroughALayer(nn.Module):
    """A parameter that is a layer's input, and is updated before that layer or after it."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(45, 400) * 0.01)  # no small one: those are updated last
        self.linear, self.after = nn.Linear(400, 400), nn.Linear(400, 400)
        self.early = early

    def forward(self) -> Tensor:
        first = torch.tanh(self.after(self.positions[:] * 2)) if self.early else 0
        return (first + self.linear(self.positions[:])).square().sum()


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_inputs_that_are_views_of_parameters(way: str, early: bool) -> None:
    model = PositionsThroughALayer(early)
    optimizer = Lomo(model, lr=0.3, fused_layers=True, **WAYS[way])
    for _ in range(2):
        check_step(model, optimizer, WAYS[way], lambda m: m())


# ---- Misuse ---------------------------------------------------------------------------------------------------------


class _InPlace(torch.autograd.Function):
    """Twice its input; its backward works in place on what it is given, which autograd forbids and does not notice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.mul_(2)


class _OverwritesInput(torch.autograd.Function):
    """The identity; its backward overwrites what its forward was given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        with torch.no_grad():
            ctx.x.zero_()
        return grad


class Misused(nn.Module):
    """What the layer `last` keeps is altered by something that comes later in backward, when plain layers are done."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.last = nn.Linear(40, 40), nn.Linear(40, 40)
        if way == "grad_output, by a module hook":
            self.first.register_full_backward_hook(lambda _, __, grads: [grad.mul_(2) for grad in grads] and None)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) * 2
        if self.way == "grad_output, by a custom backward":  # both terms have one grad_output
            return _InPlace.apply(h) + self.last(h.tanh())
        if self.way == "grad_output, by a tensor hook":
            branch = h * 1
            branch.register_hook(lambda grad: grad.mul_(2))
            return branch + self.last(h.tanh())
        if self.way == "grad_output, by a module hook":
            return self.last(self.first(x).tanh())
        if self.way == "grad_output, between two uses":
            branch = _InPlace.apply(self.last(h))
            return branch + self.last(h.tanh())
        if self.way == "input":
            return _OverwritesInput.apply(h) + self.last(h)
        raise AssertionError(self.way)


MISUSES = [
    "grad_output, by a custom backward",
    "grad_output, by a tensor hook",
    "grad_output, by a module hook",
    "grad_output, between two uses",
    "input",
]


@pytest.mark.parametrize("tokens", [5, 30])
@pytest.mark.parametrize("passes", ["one", "two"])
@pytest.mark.parametrize("way", MISUSES)
def test_factors_altered_during_backward(way: str, passes: str, tokens: int) -> None:
    """An error before any weight changed, or, where nothing altered is used, what a plain backward gives."""
    torch.manual_seed(0)
    model = Misused(way)
    x = torch.randn(tokens, 40, requires_grad=True)
    optimizer = Lomo(model, lr=0.1, fused_layers=True, clip_grad_norm=0.1, clip_passes=passes)
    before = weights_of(model)
    expected = Expected(model, None)
    expected.model(x).square().sum().backward()
    after = expected.after(0.1, {"clip_grad_norm": 0.1})
    message = ""
    if (passes == "one" and tokens == 5) or (passes == "two" and way == "grad_output, between two uses"):
        layer = "first" if way == "grad_output, by a module hook" else "last"
        message = rf"the {way.split(',')[0]} of the layer of {layer}\.weight.*altered in place.*No weight was changed"
    elif passes == "two" and way == "input":
        message = "modified by an inplace operation"  # by autograd, in the second pass
    if message:
        with pytest.raises(RuntimeError, match=message):
            optimizer.backward(model(x).square().sum())
        assert_same_bits(weights_of(model), before)
    else:  # the gradient, which is smaller than its factors, was formed at once, or its hook was called at once
        optimizer.backward(model(x).square().sum())
        for name, param in model.named_parameters():
            torch.testing.assert_close(param.detach().double(), after[name], rtol=1e-5, atol=1e-6)
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("passes", ["one", "two"])
@pytest.mark.parametrize("layer", ["first", "twice", "head", "inplace.2"])
def test_weights_changed_by_hand_and_graphs_used_up(layer: str, passes: str) -> None:
    model = net()
    optimizer = Lomo(model, lr=0.3, fused_layers=True, clip_grad_norm=0.1, clip_passes=passes)
    x, index = given_batch(0, model, wants_grad=True)
    loss = model(x, index).square().sum()
    with torch.no_grad():
        model.get_submodule(layer).weight.mul_(1.5)
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=r"in place|inplace"):
        optimizer.backward(loss)
    assert_same_bits(weights_of(model), before)
    loss = net_loss(model)
    loss.backward()
    model.zero_grad()
    with pytest.raises(RuntimeError, match="second time"):
        optimizer.backward(loss)
    assert_same_bits(weights_of(model), before)
    check_step(model, optimizer, {"clip_grad_norm": 0.1}, net_loss)
