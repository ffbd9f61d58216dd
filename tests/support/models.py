"""A transformer small enough for tests, with everything that is hard for an optimizer inside backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

VOCAB = 19
SEQ = 6


@dataclass(frozen=True)
class Options:
    """`checkpoint`: "none", "reentrant" or "non-reentrant". `frozen`: beginnings of parameter names."""

    tied: bool = False
    checkpoint: str = "none"
    frozen: tuple[str, ...] = ()
    unused: bool = False
    dtype: torch.dtype = torch.float32
    width: int = 16
    layers: int = 2
    dropout: float = 0.0

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch.")] if self.dtype is not torch.float32 else []
        parts += ["tied"] if self.tied else []
        parts += [self.checkpoint] if self.checkpoint != "none" else []
        parts += ["frozen"] if self.frozen else []
        parts += ["unused"] if self.unused else []
        return "-".join(parts) or "untied"


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        weights = (q @ k.transpose(-1, -2) / x.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + self.dropout(self.out(weights @ v))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TinyTransformer(nn.Module):
    """Embedding, positions, blocks, norm, head, and a scalar parameter; returns the cross entropy."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        width = options.width
        self.embedding = nn.Embedding(VOCAB, width)
        nn.init.normal_(self.embedding.weight, std=0.2)
        self.positions = nn.Parameter(torch.randn(SEQ, width) * 0.1)
        self.blocks = nn.ModuleList(Block(width, options.dropout) for _ in range(options.layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.gain = nn.Parameter(torch.tensor(1.5))
        if options.unused:
            self.spare = nn.Linear(width, 3)
        if options.tied:
            self.head.weight = self.embedding.weight
        self.checkpoint = options.checkpoint

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions
        for block in self.blocks:
            if self.checkpoint == "none":
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpoint == "reentrant")
        logits = self.head(self.norm(x)) * self.gain
        if logits.dtype.itemsize < 4:
            logits = logits.float()
        return F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1))


def transformer(options: Options = Options(), seed: int = 0) -> TinyTransformer:
    torch.manual_seed(seed)
    model = TinyTransformer(options).to(options.dtype)
    for name, param in model.named_parameters():
        param.requires_grad_(not name.startswith(options.frozen) if options.frozen else True)
    return model


def transformer_of_vectors(options: Options = Options()) -> TinyTransformer:
    """FSDP2 and DeepSpeed take no scalar parameters. One of a single element leaves all ranks but one an empty shard,
    or one of padding only."""
    model = transformer(options)
    model.gain = nn.Parameter(model.gain.detach().reshape(1), requires_grad=model.gain.requires_grad)
    return model


class Planted(nn.Module):
    """Gradients known beforehand and the same on every rank, so that averaging is exact and bits can be compared.

    Every parameter has a module of its own: DeepSpeed gathers by modules.
    """

    SHAPES = ((19, 6), (7,), (5, 4, 3), (1,), (600, 121))  # the last one too large to wait for others

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(PlantedLayer(torch.randn(shape).to(dtype)) for shape in self.SHAPES)

    def forward(self, step: int) -> Tensor:
        return sum(layer(100 * step + index) for index, layer in enumerate(self.layers))


class PlantedLayer(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, seed: int) -> Tensor:
        param = self.weight
        grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)).to(param.dtype)
        if isinstance(param, DTensor):
            grad = distribute_tensor(grad, param.device_mesh, param.placements)
        product = (param.float() * grad.float()).sum()
        return product.full_tensor() if isinstance(product, DTensor) else product


def batch(seed: int, size: int = 3) -> tuple[Tensor, Tensor]:
    """Tokens and targets, both [size, SEQ]."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return tuple(torch.randint(VOCAB, (size, SEQ), generator=generator) for _ in range(2))


def loss_of(model: nn.Module, seed: int) -> Tensor:
    device = next(model.parameters()).device
    return model(*(tokens.to(device) for tokens in batch(seed)))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def whole(param: Tensor) -> Tensor:
    return param.full_tensor() if isinstance(param, DTensor) else param.detach()


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, gathered where they are DTensors."""
    return {name: whole(param).detach().clone() for name, param in model.named_parameters()}


def assert_close(actual: dict[str, Tensor], expected: nn.Module, atol: float = 1e-6) -> None:
    for name, weight in actual.items():
        assert (weight - expected.get_parameter(name)).abs().max().item() <= atol, name


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equality of every bit, with the names of the parameters that differ."""
    assert actual.keys() == expected.keys()
    different = [name for name in actual if not same_bits(actual[name], expected[name])]
    assert not different, f"{len(different)} of {len(actual)} parameters differ: {different[:5]}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    a, b = (tensor.detach().contiguous() for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*(t.view(kinds[t.element_size()]) for t in (a, b)))


def vector(*values: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def gives(param: Tensor, grad: Tensor) -> Tensor:
    """A float32 loss whose gradient with respect to `param` is `grad`."""
    return (param.float() * grad.float()).sum()


def on_gradient_pass(param: nn.Parameter, change: Callable[[int, Tensor], Tensor | None]) -> None:
    """Calls ``change(number of the backward pass, gradient)`` for each gradient of `param`, before the optimizer."""
    passes = iter(range(1_000_000))
    param.register_hook(lambda grad: change(next(passes), grad))
