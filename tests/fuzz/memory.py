"""All tensors of a call lie in one block of memory, between bytes that nobody may write.

Two copies of the block are made. The operator gets tensors in one, `lomo_kernels.reference` those in the other. Then
the blocks have to be equal in every byte: results, arguments that are only read, and what lies between tensors.
"""

from __future__ import annotations

import functools
from random import Random
from typing import Any

import torch
from support import oracle
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fuzz.specs import Spec

GUARD = 64  # bytes around every tensor; a vector of AVX-512 that goes too far by one falls into it
DTYPES = ("float32", "bfloat16", "float16")
OTHER_DTYPES = ("float64", "int16", "int32", "int64", "uint8", "bool", "complex64", "float8_e4m3fn", "int8")
SIZES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 100, 129, 255, 257, 300)
LARGE = (511, 512, 513, 1023, 1025, 4095, 4096, 4097, 8193)
HUGE = (65535, 65536, 65537, 70000)
EXOTIC = (
    "requires grad", "parameter", "subclass", "negative bit", "conjugate bit", "sparse", "csr", "mkldnn", "meta",
    "fake", "nested", "jagged", "quantized", "None", "number", "freed",
)  # fmt: skip
#: Those that are a view of the block's memory.
SHARING = ("requires grad", "parameter", "subclass", "negative bit")


class Subclass(Tensor):
    """A subclass without behaviour of its own."""


def tensor(shape: list[int], dtype: str, values: str, seed: int, layout: str = "") -> Spec:
    return {"shape": shape, "dtype": dtype, "values": values, "seed": seed, "layout": layout, "exotic": "", "at": []}


def size(r: Random) -> int:
    return r.choice(SIZES if r.random() < 0.93 else LARGE if r.random() < 0.9 else HUGE)


LAYOUTS = ("strided", "permuted", "expanded", "gapped", "unaligned")


def layout(r: Random) -> str:
    return r.choice(LAYOUTS) if r.random() < 0.3 else ""


@functools.cache
def _pool(dtype: torch.dtype, values: str) -> Tensor:
    """Values to choose from. "integers": sums and products of a few hundred of them are exact in any order."""
    n = 1 << 18
    if values == "ids":
        return torch.randint(0, 1 << 30, (n,), generator=oracle.generator(5), dtype=torch.int64)
    if values == "integers":
        return torch.randint(-3, 4, (n,), generator=oracle.generator(6)).to(dtype)
    if values == "squares":
        return torch.rand(n, generator=oracle.generator(7), dtype=torch.float64).to(dtype)
    if dtype in oracle.FORMATS:
        return oracle.grad_of(n, dtype) if values == "mixed" else oracle.ordinary(n, dtype)
    return torch.randint(-100, 100, (n,), generator=oracle.generator(8)).to(dtype)


def strides_of(spec: Spec) -> list[int]:
    """Elements from one index to the next, in each dimension."""
    shape, r = spec["shape"], Random(spec["seed"])
    order = list(range(len(shape)))
    if spec["layout"] == "permuted":
        r.shuffle(order)
    strides, step = [0] * len(shape), 2 if spec["layout"] == "strided" else 1
    for d in reversed(order):
        strides[d] = step
        step *= max(1, shape[d]) + (r.choice((0, 1, 5)) if spec["layout"] == "gapped" else 0)
    if spec["layout"] == "expanded" and shape:
        strides[r.randrange(len(shape))] = 0
    return strides


class Block:
    """Memory for the tensors of a call. Their places follow from the specs alone."""

    def __init__(self, specs: dict[str, Spec], *, inference: bool = False) -> None:
        self.places: dict[str, tuple[int, list[int]]] = {}  # first byte, strides
        end = 256
        for name, spec in specs.items():
            size, strides = getattr(torch, spec["dtype"]).itemsize, strides_of(spec)
            extent = 1 + sum((n - 1) * s for n, s in zip(spec["shape"], strides, strict=True))
            extent = extent * size if all(spec["shape"]) else 0
            if spec["at"] and spec["at"][0] in self.places:  # bytes after the beginning of another tensor
                begin = max(0, self.places[spec["at"][0]][0] + spec["at"][1]) // size * size
            else:
                begin = -(-(end + GUARD) // 64) * 64 + (size if spec["layout"] == "unaligned" else 0)
            self.places[name] = begin, strides
            end = max(end, begin + extent)
        with torch.inference_mode(inference):
            self.bytes = torch.full((-(-(end + 256) // 64) * 64,), 0xA5, dtype=torch.uint8)
        for name, spec in specs.items():
            if not spec["at"]:
                self._fill(name, spec)

    def copy(self) -> Block:
        other = object.__new__(Block)
        other.places, other.bytes = self.places, self.bytes.clone()
        return other

    def view(self, name: str, spec: Spec) -> Tensor:
        begin, strides = self.places[name]
        dtype = getattr(torch, spec["dtype"])
        return self.bytes.view(dtype).as_strided(spec["shape"], strides, begin // dtype.itemsize)

    def separate(self, specs: dict[str, Spec]) -> Block:
        """The same values in tensors that share no memory."""
        other = Block({name: spec | {"at": []} for name, spec in specs.items()}, inference=self.bytes.is_inference())
        for name, spec in specs.items():
            other.write(name, spec, self.view(name, spec))
        return other

    def write(self, name: str, spec: Spec, values: Tensor) -> None:
        """Writes a tensor. If some of its elements share memory, which copy_ refuses, one of them is written."""
        view = self.view(name, spec)
        with torch.inference_mode(self.bytes.is_inference()):
            view.as_strided(*_narrowed(view, view)).copy_(values.as_strided(*_narrowed(values, view)))

    def _fill(self, name: str, spec: Spec) -> None:
        view = self.view(name, spec)
        if not view.numel():
            return
        pool, need = _pool(torch.int64 if spec["values"] == "ids" else view.dtype, spec["values"]), view.numel()
        first = spec["seed"] % (len(pool) - need)
        chosen = pool[first : first + need]
        if spec["values"] == "ids":
            chosen = (chosen % spec["rows"]).to(view.dtype)
        with torch.inference_mode(self.bytes.is_inference()):
            self.write(name, spec, view.new_empty(need).copy_(chosen).view(spec["shape"]))


def _narrowed(tensor: Tensor, like: Tensor) -> tuple[list[int], list[int], int]:
    """Sizes and strides with the dimensions of stride zero of `like` cut to one."""
    sizes = [1 if s == 0 else n for n, s in zip(like.shape, like.stride(), strict=True)]
    return sizes, list(tensor.stride()), tensor.storage_offset()


_fake_mode = FakeTensorMode(allow_non_fake_inputs=False)


def exotic(view: Tensor, kind: str) -> Any:
    """The tensor as one of a rare kind. Kinds that cannot share its memory get a copy."""
    if kind == "requires grad":
        return view.detach().requires_grad_() if view.is_floating_point() else view
    if kind == "parameter":
        return torch.nn.Parameter(view, requires_grad=view.is_floating_point())
    if kind == "subclass":
        return view.as_subclass(Subclass)
    if kind == "negative bit":
        return torch._neg_view(view) if view.dtype not in (torch.bool, torch.uint8) else view
    copies = {
        "conjugate bit": lambda: torch.view_as_complex(torch.zeros(*view.shape, 2)).conj(),
        "sparse": lambda: view.detach().to_sparse(),
        "csr": lambda: view.detach().to_sparse_csr(),
        "mkldnn": lambda: view.detach().to_mkldnn(),
        "meta": lambda: torch.empty_like(view, device="meta"),
        "fake": lambda: _fake_mode.from_tensor(view.detach().clone()),
        "nested": lambda: torch.nested.nested_tensor([view.detach()]),
        "jagged": lambda: torch.nested.nested_tensor([view.detach()], layout=torch.jagged),
        "quantized": lambda: torch.quantize_per_tensor(view.detach().float(), 0.1, 0, torch.qint8),
        "None": lambda: None,
        "number": lambda: 3,
        "freed": lambda: freed(view.detach().clone()),
    }
    return copies[kind]()


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor
