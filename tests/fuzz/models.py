"""Random models, options and ways to a step, next to the same steps in a textbook's code.

Without fused layers, `Textbook` has the arithmetic of `lomo_kernels.reference`: every bit is equal. Everything else is
compared with a statement in float64.
"""

from __future__ import annotations

import copy
import math
import warnings
from random import Random
from typing import Any

import torch
from support.adagc import AdaGC
from support.factored import FactoredTextbook
from support.textbook import Textbook, Textbook64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fuzz.specs import Finding, Kind, Outcome, Spec, check_words
from lomo_kernels import Lomo

WIDTHS = (1, 3, 8, 17, 40)
LAYERS = ("linear", "linear", "without bias", "twice", "shared", "norm", "embedding", "convolution", "scale", "unused")

#: Those whose gradients do not cancel to rounding errors, which a rule with factors makes as large as a gradient.
STABLE = tuple(kind for kind in LAYERS if kind not in ("norm", "scale"))


class Model(nn.Module):
    """A stack of layers on [batch, width]; made anew from a spec, always with the same weights."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        torch.manual_seed(spec["seed"])
        width = spec["width"]
        self.spec, self.kinds = spec, list(spec["layers"])
        self.layers = nn.ModuleList()
        shared = nn.Linear(width, width)
        for kind in self.kinds:
            made: nn.Module = nn.Linear(width, width, bias=kind != "without bias")
            if kind == "shared":
                made = nn.Linear(width, width)
                made.weight = shared.weight
            elif kind == "norm":
                made = nn.LayerNorm(width)
            elif kind == "embedding":
                made = nn.Embedding(7, width)
            elif kind == "convolution":
                made = nn.Conv1d(1, 1, 3, padding=1)
            elif kind == "scale":
                made = nn.ParameterList([nn.Parameter(torch.tensor(1.3))])
            self.layers.append(made)
        self.head = nn.Linear(width, 3)
        for i, param in enumerate(self.parameters()):
            param.requires_grad_(i % 5 not in spec["frozen"] or param is self.head.weight)

    def _layer(self, kind: str, layer: Any, x: Tensor, index: Tensor) -> Tensor:
        if kind == "unused":
            return x
        if kind == "twice":
            return layer(layer(x).tanh()).tanh()
        if kind == "embedding":
            return x + layer(index)
        if kind == "convolution":
            return layer(x[:, None])[:, 0].tanh()
        return x * layer[0] if kind == "scale" else layer(x).tanh()

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            if self.spec["checkpoint"] and kind in ("linear", "twice"):
                x = checkpoint(self._layer, kind, layer, x, index, use_reentrant=False)
            else:
                x = self._layer(kind, layer, x, index)
        return self.head(x)


def batch(seed: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, width, generator=generator).to(dtype)
    return x, torch.randint(7, (5,), generator=generator)


def loss_of(model: nn.Module, seed: int, factor: float = 1.0) -> Tensor:
    param = next(model.parameters())
    x, index = batch(seed, model.spec["width"], param.dtype)
    return (model(x, index).to(torch.promote_types(param.dtype, torch.float32)) ** 2).mean() * factor


def skips(options: Spec) -> bool:
    """Whether a gradient that is not finite skips the whole step."""
    return options["clip_grad_norm"] is not None or options["loss_scale"] == "dynamic"


def draw(r: Random) -> Spec:
    rule = r.choice(("sgd", "sgd", "sgd", "sign", "tensor", "rows", "adalomo", "clip_tensor"))
    plain = rule in ("sgd", "sign")
    dtype = r.choice(("float32", "bfloat16", "float16")) if plain else "float32"
    options: Spec = {
        "rounding": r.choice(("nearest", "stochastic", "split"))
        if dtype != "float16"
        else r.choice(("nearest", "stochastic")),
        "clip_grad_norm": r.choice((None, 0.01, 1.0, 1e3)),
        "clip_grad_value": r.choice((None, None, 1e-3)),
        "weight_decay": r.choice((0.0, 0.1)),
        "loss_scale": r.choice((None, 64.0, "dynamic")) if plain else None,
        "clip_memory": r.choice((0, 0, None, 300, 2000, "auto")),
        "seed": r.choice((0, 1, -(2**63), 2**40)),
    }
    if not plain:
        options["rounding"] = "nearest"
    if rule == "clip_tensor":
        options |= {"clip_tensor": 1.04, "loss_scale": None}
    else:
        options["rule"] = rule
    groups = r.random() < 0.25
    ways = ["backward", "backward", "accumulate"]
    ways += [] if options["loss_scale"] else ["step", "mixed"]  # plain backwards are not scaled
    ways += [] if groups else ["pair"]  # its second call sets the learning rate of all groups
    return {
        "seed": r.randrange(10**6),
        "width": r.choice(WIDTHS if plain else WIDTHS[1:]),  # a norm of one number has no gradient to divide by
        "layers": [r.choice(LAYERS if plain else STABLE) for _ in range(r.randrange(6))],
        "frozen": [i for i in range(1, 5) if r.random() < 0.15],
        "checkpoint": r.random() < 0.2,
        "dtype": dtype,
        "fused": r.random() < 0.35,
        "lr": r.choice((0.1, 0.01, 1.0) if plain else (0.1, 0.01)),
        "groups": groups,
        "options": options,
        "steps": [
            {
                "way": r.choice(ways),
                "batches": [r.randrange(10**6) for _ in range(r.choice((1, 1, 2, 3)))],
                "overflows": r.random() < 0.08 and skips(options),
            }
            for _ in range(r.choice((1, 2, 3)))
        ],
        "resumes": r.random() < 0.25,
    }


def make(spec: Spec) -> tuple[nn.Module, Lomo]:
    model = Model(spec).to(getattr(torch, spec["dtype"]))
    target: Any = model
    if spec["groups"]:
        named = list(model.named_parameters())
        target = [{"params": named[:1], "lr": spec["lr"] / 2, "weight_decay": 0.3}]
        target += [{"params": named[1:]}] if named[1:] else []
    options = dict(spec["options"])
    fused = model if spec["fused"] else False
    return model, Lomo(target, lr=spec["lr"], fused_layers=fused, **options)


def do(optimizer: Lomo, model: nn.Module, step: Spec, lr: float) -> None:
    """One step from one or more batches."""
    losses = [
        (lambda seed=seed: loss_of(model, seed, math.inf if step["overflows"] else 1.0)) for seed in step["batches"]
    ]
    way = step["way"]
    if way == "step":
        for loss in losses:
            loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    elif way == "accumulate":
        with optimizer.accumulate():
            for loss in losses[:-1]:
                optimizer.backward(loss())
        optimizer.backward(losses[-1]())
    elif way == "mixed":
        for loss in losses[:-1]:
            loss().backward()
        optimizer.backward(losses[-1]())
    elif way == "pair" and len(losses) == 1:
        value = losses[0]()
        optimizer.grad_norm(value)
        optimizer.fused_backward(value, lr)
    else:
        optimizer.backward(losses[0]())


def _used(step: Spec) -> list[int]:
    return (
        step["batches"][:1]
        if step["way"] in ("backward",) or (step["way"] == "pair" and len(step["batches"]) > 1)
        else step["batches"]
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().view(torch.uint8), b.detach().view(torch.uint8)) if a.dim() else bool(a == b)


def _books(spec: Spec, model: nn.Module) -> Any:
    """The textbook for these options, and whether it is equal in every bit."""
    options, lr = spec["options"], spec["lr"]
    common = {k: options[k] for k in ("weight_decay", "clip_grad_norm", "clip_grad_value")}
    rule = options.get("rule")
    exact = rule in ("sgd", "sign") and not spec["fused"]
    if exact:
        groups = None
        if spec["groups"]:
            names = [name for name, _ in model.named_parameters()]
            groups = [(names[:1], {"lr": lr / 2, "weight_decay": 0.3}), (names[1:], {})]
        more = {k: options[k] for k in ("rounding", "seed", "loss_scale", "rule")}
        return Textbook(model, lr=lr, groups=groups, **common, **more), True
    if spec["groups"] or any(step["overflows"] for step in spec["steps"]):
        return None, False
    if rule == "sgd":
        return (Textbook64(model, lr=lr, **common), False) if spec["dtype"] == "float32" else (None, False)
    if rule in ("tensor", "rows", "adalomo"):
        return FactoredTextbook(model, rule, lr=lr, **common), False
    if "clip_tensor" in options:
        return AdaGC(model, lr=lr, warm_up=100, **common), False
    return None, False


def _expect(book: Any, step: Spec, norm: Tensor) -> None:
    factor = math.inf if step["overflows"] else 1.0
    if isinstance(book, Textbook):
        for seed in _used(step):
            book.backward(loss_of(book.model, seed, factor))
        book.apply(norm)
        book.zero_grad()
        return
    total = sum((loss_of(book.model, seed, factor) for seed in _used(step)), start=torch.zeros((), dtype=torch.float64))
    book.step(total)


def run(spec: Spec) -> Outcome:
    """All steps of a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, optimizer = make(spec)
        except Exception as error:
            check_words(error, raw=False)
            return Outcome("refused")
        book, exact = _books(spec, model)
        with_norms = spec["options"]["clip_grad_norm"] is not None
        for number, step in enumerate(spec["steps"]):
            before = [param.detach().clone() for param in model.parameters()]
            try:
                do(optimizer, model, step, spec["lr"])
            except Exception as error:
                check_words(error, raw=False)
                changed = not all(map(_same, before, model.parameters()))
                if changed and optimizer.last_step_outcome != "partial":
                    raise Finding(f"step {number}: weights have changed, and then: {error}") from error
                return Outcome("refused")
            if any(param.grad is not None for param in model.parameters()):
                raise Finding(f"step {number}: a gradient is left")
            if book is not None:
                _expect(book, step, optimizer.last_grad_norm)
                if not math.isfinite(getattr(book, "norm", 0.0)) and not skips(spec["options"]):
                    break  # it has diverged, and only elements were skipped
                _compare(spec, number, model, book, exact, optimizer, with_norms)
            elif not all(param.isfinite().all() for param in model.parameters()):
                raise Finding(f"step {number}: a weight is not finite")
            if spec["resumes"]:
                weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
                optimizer.remove()
                model, optimizer = make(spec)
                model.load_state_dict(weights)
                optimizer.load_state_dict(state)
        optimizer.remove()
    return Outcome("equal")


def _compare(
    spec: Spec, number: int, model: nn.Module, book: Any, exact: bool, optimizer: Lomo, with_norms: bool
) -> None:
    for (name, param), expected in zip(model.named_parameters(), book.model.parameters(), strict=True):
        if exact:
            if not _same(param, expected):
                off = (param.double() - expected.double()).abs().max().item()
                raise Finding(f"step {number}: {name} differs from the textbook's by {off}")
        else:
            scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
            off = (param.double() - expected).abs().max().item() if expected.numel() else 0.0
            # a rule with factors divides by gradients, whose errors grow if they are small
            loose = 0.0 if isinstance(book, Textbook64) else 0.05 * spec["lr"]
            if not off <= (3e-5 * scale + loose) * (1 + number):
                raise Finding(f"step {number}: {name} is off by {off}, of {scale}")
    if isinstance(book, Textbook) and math.isfinite(book.norm):
        if not math.isclose(optimizer.last_grad_norm.item(), book.norm, rel_tol=1e-5, abs_tol=1e-12):
            raise Finding(f"step {number}: the norm is {optimizer.last_grad_norm.item()}, expected {book.norm}")
        if optimizer.loss_scale.item() != book.loss_scale:
            raise Finding(f"step {number}: the loss scale is {optimizer.loss_scale.item()}, expected {book.loss_scale}")


MODELS = Kind(draw, run)
