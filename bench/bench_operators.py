"""What fraction of memory bandwidth do updates and norms reach? What do one call for many small tensors, and an update
from a layer's factors, save?"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

from lomo_kernels import ops, reference
from lomo_kernels.composite import tiled
from lomo_kernels.ops.scalars import vector as scalar_vector

from .buffers import Buffers
from .measure import Baseline, Call, scalar
from .methods import missing_peer

DTYPES = ("bfloat16", "float16", "float32")


def cases(device, full):
    sizes = {"dtype": DTYPES, "elements": [2**power for power in ((10, 13, 16, 18, 20, 24, 28) if full else (16, 24))]}
    tokens = {"cpu": [16, 64, 256, 1024, 4096], "cuda": [256, 1024, 4096, 16384]}[device] if full else [256]
    return {
        "ceilings": {"implementation": ["copy", "read", "product"]},
        "update": {"implementation": UPDATES, **sizes},
        "norm": {"implementation": ["sq_norm_", *NORMS], **sizes},
        # The norms of a Llama of 65B are 161 vectors of 8192.
        "lists": {"implementation": LISTS, "dtype": ["bfloat16"], "tensors": [300], "elements": [4096]},
        "linear": {
            "implementation": [*LINEAR, *(FORMS if device == "cuda" else ())],
            "dtype": ["bfloat16", "float32"],
            "tokens": tokens,
        },
        "embedding": {"implementation": EMBEDDING, "dtype": ["bfloat16"], "tokens": [256, 1024, 4096][: 1 + 2 * full]},
    }


@pytest.fixture(scope="module")
def buffers(elements, dtype, device):
    return Buffers(getattr(torch, dtype), elements, device)


# --- ceilings: what does the device itself reach? --------------------------------------------------------------------

BYTES = {"cpu": 2**28, "cuda": 2**31}  # of the copied tensor
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices


def test_ceilings(paired, implementation, device):
    """Products are of random numbers: with zeros a GPU draws less power and runs faster."""
    source, target = (torch.zeros(BYTES[device] // 4, device=device) for _ in range(2))
    a, b = (torch.randn(SIDE[device], SIDE[device], device=device).bfloat16() for _ in range(2))
    call, work = {
        "copy": (lambda _: target.copy_(source), {"moved": 2 * source.nbytes}),
        "read": (lambda _: source.max(), {"moved": source.nbytes}),
        "product": (lambda _: a @ b, {"operations": 2 * SIDE[device] ** 3}),
    }[implementation]
    paired(call, **work)


# --- update ----------------------------------------------------------------------------------------------------------

LR = 1e-3
EVERY = {"weight_decay": 0.01, "inv_scale": 0.5, "clip_value": 3.0, "clip_coef": 0.5}
STREAMS = 3  # reads the parameter and the gradient, writes the parameter


def ours(buffers: Buffers, lr: float, *, rounding: str = "nearest", **scalars: float) -> Call:
    given = {name: scalar(value, buffers.device) for name, value in {"lr": lr, **scalars}.items()}
    if buffers.device == "cpu":
        return lambda number: ops.sgd_(*buffers.pair(number), rounding=rounding, **given)
    slots = [given.pop("sq_norm")] if "sq_norm" in given else []
    vector = scalar_vector("sgd_", buffers.params[0].device, given)  # made once in a step, as by the optimizer

    def call(number: int) -> None:
        param, grad = buffers.pair(number)
        update = torch.ops.lomo_kernels.update_.default
        update([param], [grad], vector, slots, 0, rounding == "stochastic", 0, [0], [], [])

    return call


def plain(buffers: Buffers, lr: float, weight_decay: float | None = None) -> Call:
    def call(number: int) -> None:
        param, grad = buffers.pair(number)
        if weight_decay:
            param.mul_(1 - lr * weight_decay)
        param.add_(grad, alpha=-lr)

    return call


def stepped(buffers: Buffers, of_optimizer: list[nn.Parameter], step: Callable[[], object]) -> Call:
    """An optimizer's step on one parameter. One optimizer serves all buffers: its list has one of them at a time.
    `.grad` is set anew each time, since optimizers may take it away."""
    params = [nn.Parameter(param) for param in buffers.params]

    def call(number: int) -> None:
        number %= len(params)
        params[number].grad = buffers.grads[number]
        of_optimizer[0] = params[number]
        step()

    return call


def sgd(buffers: Buffers, lr: float, module: str = "torch.optim", **options: bool) -> Call:
    optimizer = importlib.import_module(module).SGD([nn.Parameter(buffers.params[0])], lr=lr, **options)
    return stepped(buffers, optimizer.param_groups[0]["params"], optimizer.step)


def lomo_optim(buffers: Buffers, lr: float) -> Call:
    """What its hook does with the first gradient that it finds."""
    from lomo_optim import Lomo

    params = [nn.Parameter(buffers.params[0])]
    model = SimpleNamespace(named_parameters=lambda: [("weight", params[0])], parameters=lambda: params)
    return stepped(buffers, params, partial(Lomo(model, lr=lr).grad_func, None))


#: The last ones may overwrite the gradients.
UPDATES: dict[str, Callable[[Buffers, float], Call]] = {
    "sgd_ nearest": ours,
    "sgd_ nearest, every scalar": partial(ours, **EVERY),
    "sgd_ nearest, with its norm": partial(ours, sq_norm=0.0),
    "sgd_ stochastic": partial(ours, rounding="stochastic"),
    "add_": plain,
    "mul_, add_": partial(plain, weight_decay=EVERY["weight_decay"]),
    "SGD foreach": partial(sgd, foreach=True),
    "SGD fused": partial(sgd, fused=True),
    "lomo_optim": lomo_optim,
    "optimi SGD, no Kahan": partial(sgd, module="optimi", kahan_sum=False),
    "optimi SGD": partial(sgd, module="optimi"),
}


def wrong(name: str, dtype: torch.dtype, device: str) -> str:
    """What is wrong with an update of 10,007 elements. Empty if nothing is."""
    buffers = Buffers(dtype, 10_007, device)
    before, grad = (tensor.clone() for tensor in buffers.pair(0))
    decay = {"weight_decay": EVERY["weight_decay"]}
    scalars = EVERY if "every scalar" in name else decay if name == "mul_, add_" else {}
    expected = reference.updated(before, grad, lr=0.5, stochastic="stochastic" in name, **scalars)
    UPDATES[name](buffers, 0.5)(0)
    after, expected = buffers.pair(0)[0].double(), expected.double()
    units = 0 if name.startswith("sgd_") else 4  # two roundings instead of one
    right = (after - expected).abs() <= units * torch.finfo(dtype).eps * (1 + expected.abs())
    return "" if right.all() else f"{int((~right).sum())} of 10007 elements are off by more than {units} units"


def test_update(paired, buffers, implementation, dtype, device):
    if lacking := missing_peer(implementation):
        pytest.skip(lacking)
    if dtype == "float32" and implementation in ("sgd_ stochastic", "optimi SGD"):
        pytest.skip(f"{implementation}, float32: float32 is not rounded")
    if reason := wrong(implementation, buffers.dtype, device):
        assert not implementation.startswith("sgd_"), reason
        pytest.skip(f"{implementation}, {dtype}, {device}: {reason}")
    # Optimizers may not allow a capture.
    capture = implementation.startswith("sgd_") or implementation in ("add_", "mul_, add_")
    paired(UPDATES[implementation](buffers, LR), buffers.probe(STREAMS), capture)


# --- norm: how fast, and how exact, is the sum of squares? -----------------------------------------------------------

#: Of rivals, which return the norm; ours adds its square to a slot.
NORMS = {
    "vector_norm": torch.linalg.vector_norm,
    "vector_norm, float32": lambda grad: torch.linalg.vector_norm(grad, dtype=torch.float32),
    "foreach_norm": lambda grad: torch._foreach_norm([grad])[0],  # clip_grad_norm_(foreach=True)
    "lomo_optim": lambda grad: torch.norm(grad.to(torch.float32), 2.0),  # its hook's very line
}


def test_norm(paired, buffers, implementation, device):
    slot = scalar(0.0, device)
    norm = NORMS.get(implementation, lambda grad: ops.sq_norm_(slot, grad))
    grad = buffers.grads[0]
    exact = sum(chunk.double().square().sum() for chunk in grad.split(2**24)).sqrt()
    result = norm(grad)
    error = abs((slot.sqrt() if implementation == "sq_norm_" else result.double()) / exact - 1).item()
    assert implementation != "sq_norm_" or error <= 1e-6
    paired(lambda number: norm(buffers.pair(number)[1]), buffers.probe(1), capture=True, error=error)


# --- lists: what does one call for many small tensors save against a call for each? ----------------------------------

TINY_LR = 1e-9  # weights stay as they are, more or less


def random(device: str, dtype: str, **shapes: tuple[int, ...]) -> SimpleNamespace:
    """Tensors by name, a learning rate and a slot."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape, device=device).to(getattr(torch, dtype)) for name, shape in shapes.items()}
    return SimpleNamespace(**tensors, lr=scalar(TINY_LR, device), slot=scalar(0.0, device))


ONE_BY_ONE = {
    "sgd_": lambda of, _: [ops.sgd_(*pair, lr=of.lr) for pair in zip(of.params, of.grads, strict=True)],
    "sq_norm_": lambda of, _: [ops.sq_norm_(*pair) for pair in zip(of.slots, of.grads, strict=True)],
}
#: Each with the call that it is compared with.
LISTS = {
    "sgd_list_": (lambda of, _: ops.sgd_list_(of.params, of.grads, lr=of.lr), "sgd_"),
    "_foreach_add_": (lambda of, _: torch._foreach_add_(of.params, of.grads, alpha=-TINY_LR), "sgd_"),
    "sq_norm_list_": (lambda of, _: ops.sq_norm_list_(of.slots, of.grads), "sq_norm_"),
    "_foreach_norm": (lambda of, _: torch._foreach_norm(of.grads), "sq_norm_"),
}


@pytest.fixture(scope="module")
def lists(dtype, tensors, elements, device):
    whole = random(device, dtype, params=(tensors, elements), grads=(tensors, elements), slots=(tensors, 1))
    lists = SimpleNamespace(params=[*whole.params], grads=[*whole.grads], slots=[*whole.slots.double()], lr=whole.lr)
    expected = [reference.updated(param, grad, lr=0.5) for param, grad in zip(lists.params, lists.grads, strict=True)]
    ops.sgd_list_(lists.params, lists.grads, lr=0.5)
    assert all(map(torch.equal, lists.params, expected))
    return lists


def test_lists(paired, lists, implementation):
    call, single = LISTS[implementation]
    paired(partial(call, lists), Baseline(f"{single}, one by one", partial(ONE_BY_ONE[single], lists)))


# --- linear: an update and a norm from a layer's factors, next to the product that makes its gradient ----------------

LINEAR_SHAPE = {"cpu": (1024, 1024), "cuda": (11008, 4096)}  # of the weight; the second is LLaMA-7B's
LINEAR = {
    "product, sgd_": lambda of, _: ops.sgd_(of.weight, of.gy.T @ of.x, lr=of.lr),
    "product, sq_norm_": lambda of, _: ops.sq_norm_(of.slot, of.gy.T @ of.x),
    "addmm_": lambda of, _: of.weight.addmm_(of.gy.T, of.x, alpha=-TINY_LR),
    "linear_sgd_ nearest": lambda of, _: ops.linear_sgd_(of.weight, of.x, of.gy, lr=of.lr),
    "linear_sgd_ stochastic": lambda of, _: ops.linear_sgd_(of.weight, of.x, of.gy, lr=of.lr, rounding="stochastic"),
    "linear_sgd_ nearest, with its norm": lambda of, _: ops.linear_sgd_(
        of.weight, of.x, of.gy, lr=of.lr, sq_norm=of.slot
    ),
    "linear_sq_norm_": lambda of, _: ops.linear_sq_norm_(of.slot, of.x, of.gy),
}


def tiles(of, _, mebibytes):
    """By tiles of so much memory."""
    with mock.patch.multiple(tiled, CROSSOVER=0, GPU_TILE_BYTES=mebibytes * 2**20):
        ops.linear_sgd_(of.weight, of.x, of.gy, lr=of.lr)


def in_registers(of, _):
    """By Triton's kernel, however many tokens there are."""
    with mock.patch.object(tiled, "CROSSOVER", 2**31):
        ops.linear_sgd_(of.weight, of.x, of.gy, lr=of.lr)


#: What `tiled.CROSSOVER` and `tiled.GPU_TILE_BYTES` choose between, on a GPU.
FORMS = {f"linear_sgd_, tiles of {size} MiB": partial(tiles, mebibytes=size) for size in (16, 64)}
FORMS["linear_sgd_, tiles in registers"] = in_registers


@pytest.fixture(scope="module")
def linear(tokens, dtype, device):
    rows, columns = LINEAR_SHAPE[device]
    layer = random(device, dtype, weight=(rows, columns), x=(tokens, columns), gy=(tokens, rows))
    expected = reference.linear_gradient([layer.x], [layer.gy])
    weight = torch.zeros_like(expected)
    ops.linear_sgd_(weight, layer.x, layer.gy, lr=1.0)
    assert (weight + expected).abs().max() <= 1e-4 * expected.abs().max()
    ops.linear_sq_norm_(layer.slot, layer.x, layer.gy)
    # An H100 loses up to 5e-5 of the sum: its matrix units cut off what lies below the largest product's last bits.
    rtol = 1e-5 if device == "cpu" or dtype == "float32" else 2e-4
    torch.testing.assert_close(layer.slot[0], expected.double().square().sum(), rtol=rtol, atol=0)
    return layer


def test_linear(paired, linear, implementation):
    product = Baseline("product", lambda _: linear.gy.T @ linear.x)  # no way to a new weight needs less
    paired(partial((LINEAR | FORMS)[implementation], linear), product, capture=True)


# --- embedding: the same from indices, next to the dense gradient ----------------------------------------------------

EMBEDDING_SHAPE = {"cpu": (32_000, 1024), "cuda": (128_256, 4096)}  # vocabularies of Llama 1 and 3
DECAY = 1e3  # 1 - TINY_LR * DECAY is not 1 in float32: every row is touched, as with any decay that counts


def dense(of, _):
    return torch.ops.aten.embedding_dense_backward(of.gy, of.index, len(of.weight), -1, False)


EMBEDDING = {
    "dense gradient, sgd_": lambda of, _: ops.sgd_(of.weight, dense(of, _), lr=of.lr),
    "dense gradient, sq_norm_": lambda of, _: ops.sq_norm_(of.slot, dense(of, _)),
    "index_add_": lambda of, _: of.weight.index_add_(0, of.index, of.gy, alpha=-TINY_LR),
    "embedding_sgd_": lambda of, _: ops.embedding_sgd_(of.weight, of.index, of.gy, lr=of.lr),
    "embedding_sgd_, decay": lambda of, _: ops.embedding_sgd_(of.weight, of.index, of.gy, lr=of.lr, weight_decay=DECAY),
    "embedding_sq_norm_": lambda of, _: ops.embedding_sq_norm_(of.slot, of.index, of.gy),
}


@pytest.fixture(scope="module")
def embedding(tokens, dtype, device):
    rows, width = EMBEDDING_SHAPE[device]
    layer = random(device, dtype, weight=(rows, width), gy=(tokens, width))
    layer.index = torch.randint(rows, (tokens,), device=device)
    updated, index = layer.weight[:100].clone(), layer.index % 100
    expected = reference.updated(updated, reference.embedding_gradient(100, [index], [layer.gy], [-1]), lr=0.5)
    ops.embedding_sgd_(updated, index, layer.gy, lr=0.5)
    torch.testing.assert_close(updated, expected)
    return layer


def test_embedding(paired, embedding, implementation):
    paired(partial(EMBEDDING[implementation], embedding), Baseline("dense gradient", partial(dense, embedding)))
