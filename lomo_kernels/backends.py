"""Which implementation serves which device, chosen once when the library is imported.

Exactly one implementation is registered per dispatch key. ``LOMO_KERNELS_BACKEND`` forces one;
``python -m lomo_kernels info`` prints what is in force and why.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import reference
from .ops._arguments import library

CPU_LIBRARY = Path(__file__).parent / "_cpu.so"
VARIABLE = "LOMO_KERNELS_BACKEND"


@dataclass(frozen=True)
class Choice:
    """The implementation that serves one dispatch key."""

    key: str  # "CPU" or "CUDA"
    backend: str  # "cpu", "reference", or "none"
    detail: str  # instruction set, or what to do
    reason: str


def _use_cpu() -> list[Choice]:
    if not CPU_LIBRARY.exists():
        raise ImportError(
            f"lomo_kernels has no compiled CPU library ({CPU_LIBRARY.name} is missing): run `pip install -e .` in the "
            f"source folder, or set {VARIABLE}=reference to do without (slow)"
        )
    torch.ops.load_library(CPU_LIBRARY)
    isa = ctypes.CDLL(str(CPU_LIBRARY)).lomo_kernels_isa
    isa.argtypes, isa.restype = [ctypes.POINTER(ctypes.c_char_p)], ctypes.c_char_p
    error = ctypes.c_char_p()
    name = isa(ctypes.byref(error))
    if name is None:
        raise ImportError((error.value or b"").decode())
    forced = os.environ.get("LOMO_KERNELS_ISA")
    reason = f"LOMO_KERNELS_ISA={forced}" if forced else "the best this processor has"
    gpu = Choice("CUDA", "none", "not built in this version", f"only {VARIABLE}=reference serves CUDA tensors yet")
    return [Choice("CPU", "cpu", name.decode(), reason), gpu]


def _use_reference() -> list[Choice]:
    for name, function in reference.IMPLEMENTATIONS.items():
        for key in ("CPU", "CUDA"):
            library.impl(name, function, key)
    return [Choice(key, "reference", "plain torch", f"{VARIABLE}=reference") for key in ("CPU", "CUDA")]


def _use_triton() -> list[Choice]:
    from . import triton

    key, other = ("CPU", "CUDA") if os.environ.get("TRITON_INTERPRET") == "1" else ("CUDA", "CPU")
    if key == "CUDA" and not torch.cuda.is_available():
        raise ImportError(f"{VARIABLE}=triton: torch finds no GPU; TRITON_INTERPRET=1 interprets the kernels (slow)")
    try:
        detail = triton.register(key)
    except ImportError as error:
        raise ImportError(f"{VARIABLE}=triton: {error}") from error
    return [
        Choice(key, "triton", detail, f"{VARIABLE}=triton"),
        Choice(other, "none", "not served", f"{VARIABLE}=triton"),
    ]


def _missing(name: str) -> Callable[[], list[Choice]]:
    def refuse() -> list[Choice]:
        raise ImportError(
            f"{VARIABLE}={name}: the {name} backend is not built in this version of lomo_kernels; unset the variable, "
            "or use cpu or reference"
        )

    return refuse


BACKENDS: dict[str, Callable[[], list[Choice]]] = {
    "cpu": _use_cpu,
    "reference": _use_reference,
    "cuda": _missing("cuda"),
    "triton": _use_triton,
}


def _choose() -> list[Choice]:
    name = os.environ.get(VARIABLE) or "cpu"
    if name not in BACKENDS:
        raise ImportError(f"{VARIABLE}={name}: expected one of {', '.join(BACKENDS)}")
    return BACKENDS[name]()


#: What is in force, for `info`.
choices: list[Choice] = _choose()


def check_device(device: torch.device) -> None:
    """Raises NotImplementedError where no backend serves tensors on `device`."""
    served = {choice.key.lower() for choice in choices if choice.backend != "none"}
    if device.type in served or device.type == "meta":
        return
    raise NotImplementedError(
        f"lomo_kernels has no backend in force for {device.type} tensors (it has: {', '.join(sorted(served))}); move "
        f"the model to the CPU, or set {VARIABLE}=reference before importing lomo_kernels (plain torch, slow; CPU and "
        "CUDA)"
    )
