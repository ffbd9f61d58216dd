"""torch's default device and default dtype change nothing: every tensor that the package makes names its own."""

import ast
import contextlib
import copy
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import lomo_kernels
from lomo_kernels import Lomo, ops
from lomo_kernels.composite import tiled

FACTORIES = {
    *("arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn"),
    *("randperm", "scalar_tensor", "tensor", "zeros"),
}

DEFAULTS = {
    "meta": ("meta", torch.float32),
    "cpu": ("cpu", torch.float32),
    "float64": (None, torch.float64),
    "bfloat16": (None, torch.bfloat16),
    "meta, float64": ("meta", torch.float64),
}


@contextlib.contextmanager
def defaults(device, dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device) if device else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


def made(function, *arguments, default=(None, torch.float32)):
    """The tensors that `function` returns with these defaults, in a thread that has made no buffer yet."""
    results = []

    def run():
        torch.set_num_threads(1)
        try:
            with defaults(*default):
                results.append(function(*arguments))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def assert_same(tensors, expected):
    assert len(tensors) == len(expected)
    for tensor, wanted in zip(tensors, expected, strict=True):
        assert (tensor.device, tensor.dtype) == (wanted.device, wanted.dtype)
        assert torch.equal(tensor, wanted)


def test_every_tensor_names_its_device_and_dtype():
    nameless = []
    for path in sorted(Path(lomo_kernels.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name("torch"), attr=name)) if name in FACTORIES:
                    if not {"device", "dtype"} <= {keyword.arg for keyword in node.keywords}:
                        nameless.append(f"{path.name}:{node.lineno} torch.{name}")
    assert not nameless, nameless


def operators(dtype, arguments):
    """What all operators make of tensors of `dtype`, which were made before."""
    weight, grad, x, gy, index, rows = (tensor.clone() for tensor in arguments)
    slots, keys = list(torch.zeros(6, 1, dtype=torch.float64, device="cpu")), {"seed": 3, "step": 5}
    numbers = {"lr": 0.1, "weight_decay": 0.01, "inv_scale": 0.5, "clip_value": 3.0, "clip_coef": 0.7, "found_inf": 0.0}
    rounding = "nearest" if dtype is torch.float32 else "stochastic"
    ops.sq_norm_(slots[0], grad, inv_scale=0.5)
    ops.sq_norm_list_(slots[:2], [grad, grad[:2]])
    ops.linear_sq_norm_(slots[2], x, gy, inv_scale=0.5)
    ops.linear_sq_norm_(slots[2], [x, x], [gy, gy])
    ops.embedding_sq_norm_(slots[3], index, rows, padding_idx=1, inv_scale=0.5)
    tiled.embedding_sq_norm_(slots[4], [index], [rows], [-1], None)  # what serves where no kernel does
    ops.sgd_(weight, grad, **numbers, **keys, rounding=rounding, sq_norm=slots[5])
    ops.sgd_list_([weight], [grad], **numbers, **keys, rounding=rounding)
    ops.linear_sgd_(weight, x, gy, **numbers, **keys, rounding=rounding)
    ops.embedding_sgd_(weight, index, rows, **numbers, **keys, rounding=rounding)
    return [weight, *slots]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("default", DEFAULTS.values(), ids=DEFAULTS)
def test_operators(default, dtype):
    shapes = ((300, 70), (300, 70), (9, 70), (9, 300), (9, 70))
    weight, grad, x, gy, rows = (torch.randn(shape).to(dtype) for shape in shapes)
    arguments = weight, grad, x, gy, torch.randint(300, (9,)), rows
    expected = made(operators, dtype, arguments)
    assert not torch.equal(expected[0], weight) and all(slot > 0 for slot in expected[1:])
    assert_same(made(operators, dtype, arguments, default=default), expected)


MODES = {
    "hook": {},
    "two passes": {"clip_grad_norm": 0.05, "clip_passes": "two"},
    "one pass": {"clip_grad_norm": 0.05, "clip_passes": "one"},
    "fused": {"fused_layers": True},
    "fused, two passes": {"fused_layers": True, "clip_grad_norm": 0.05, "clip_passes": "two"},
    "fused, one pass": {"fused_layers": True, "clip_grad_norm": 0.05, "clip_passes": "one"},
    "scale": {"loss_scale": 1024.0, "clip_grad_value": 1.0, "weight_decay": 0.1},
    "dynamic": {"loss_scale": "dynamic", "clip_grad_norm": 0.05, "dtype": torch.float16, "clip_passes": "two"},
    "stochastic": {"rounding": "stochastic", "fused_layers": True, "dtype": torch.bfloat16},
}


class Tied(nn.Module):
    """An embedding, its table as the head too, a layer above 64 KiB and a bias in between."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner, self.head = (
            nn.Embedding(50, 136),
            nn.Linear(136, 136),
            nn.Linear(136, 50, bias=False),
        )
        self.head.weight = self.embedding.weight

    def forward(self, index, target):
        logits = self.head(torch.tanh(self.inner(self.embedding(index))))
        return nn.functional.cross_entropy(logits.float(), target)


def steps(model, index, target, options):
    model = copy.deepcopy(model)
    with Lomo(model, lr=0.1, **options) as optimizer:
        for _ in range(3):
            optimizer.backward(model(index, target))
        norm = optimizer.last_grad_norm
        state = optimizer.state_dict()
        optimizer.load_state_dict(state)
        optimizer.backward(model(index, target))
    return [*(param.detach() for param in model.parameters()), *([] if norm is None else [norm])]


@pytest.mark.parametrize("mode", MODES)
def test_steps(mode):
    options = dict(MODES[mode])
    model = Tied().to(options.pop("dtype", torch.float32))
    index, target = torch.randint(50, (2, 12))
    expected = made(steps, model, index, target, options)
    assert not torch.equal(expected[0], model.embedding.weight)
    for default in DEFAULTS.values():
        assert_same(made(steps, model, index, target, options, default=default), expected)
