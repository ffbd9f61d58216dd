"""Which implementation serves which device.

Exactly one implementation is registered per dispatch key. CPU tensors get theirs when the library is imported, CUDA
tensors (NVIDIA's and AMD's) when the first one shows up: to look at a GPU starts its driver, which an import should
not. ``LOMO_KERNELS_BACKEND`` forces one; ``python -m lomo_kernels info`` prints what is in force and why.
"""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .composite import rule_factors, tiled
from .ops._arguments import choose_kernels, library

VARIABLE = "LOMO_KERNELS_BACKEND"
NAMES = ("cpu", "cuda", "triton", "reference")

COMPOSITE = tiled.IMPLEMENTATIONS | rule_factors.IMPLEMENTATIONS

_HERE = Path(__file__).parent
CPU_LIBRARY, CUDA_LIBRARY = _HERE / "_cpu.so", _HERE / "_cuda.so"


@dataclass(frozen=True)
class Choice:
    """The implementation that serves one dispatch key."""

    key: str  # "CPU" or "CUDA"
    backend: str  # one of NAMES, "tiled" (made of torch's operators and our others), or "none"
    detail: str  # instruction set, targets, version; what to do where there is none
    reason: str
    overrides: Mapping[str, Choice] = field(default_factory=dict)  # operators that another one serves

    def of(self, operator: str) -> Choice:
        """The implementation of one operator."""
        return self.overrides.get(operator, self)


# ---- Each backend: loads and registers itself, returns what `info` shows, raises ImportError with the reason ---------


def _load_cpu() -> str:
    """Returns the instruction set in force."""
    if not CPU_LIBRARY.exists():
        raise ImportError(
            f"lomo_kernels has no compiled CPU library ({CPU_LIBRARY.name} is missing): run `pip install -e .` in the "
            f"source folder, or set {VARIABLE}=reference to do without (slow)"
        )
    try:
        torch.ops.load_library(CPU_LIBRARY)
    except OSError as reason:
        raise ImportError(
            f"{CPU_LIBRARY.name} of lomo_kernels cannot be loaded: {reason}. It needs torch 2.11 or newer (this is "
            f"{torch.__version__}) and the system that it was built for: `pip install 'torch>=2.11'`, or reinstall "
            "lomo_kernels here"
        ) from reason
    isa = ctypes.CDLL(str(CPU_LIBRARY)).lomo_kernels_isa
    isa.argtypes, isa.restype = [ctypes.POINTER(ctypes.c_char_p)], ctypes.c_char_p
    error = ctypes.c_char_p()
    name = isa(ctypes.byref(error))
    if name is None:
        raise ImportError((error.value or b"").decode())
    return str(name.decode())


def _unserved(key: str) -> list[str]:
    """Those operators of layers and of rules with factors that nothing serves yet."""
    served = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in COMPOSITE if not served(f"lomo_kernels::{name}", key)]


def _load_tiled(key: str, reason: str) -> dict[str, Choice]:
    """What nothing serves yet is made of torch's operators and our others."""
    choice = Choice(key, "tiled", "torch's operators, and update_ or sq_norm_ tile by tile", reason)
    names = _unserved(key)
    for name in names:
        library.impl(name, COMPOSITE[name], key)
    return dict.fromkeys(names, choice)


def _load_cuda() -> str:
    """Returns the GPUs that the library has code for."""
    if torch.version.cuda is None:
        raise ImportError(f"torch {torch.__version__} is built without CUDA")
    if not CUDA_LIBRARY.exists():
        raise ImportError(
            "lomo_kernels was built without CUDA: with nvcc on this machine, run `LOMO_CUDA=1 pip install .` in the "
            "source folder"
        )
    try:
        library = ctypes.CDLL(str(CUDA_LIBRARY), mode=os.RTLD_LOCAL | os.RTLD_NOW)
    except OSError as error:
        raise ImportError(f"{CUDA_LIBRARY.name} cannot be loaded: {error}") from error
    library.lomo_kernels_cuda_targets.restype = ctypes.c_char_p
    library.lomo_kernels_cuda_refusal.restype = ctypes.c_char_p
    if reason := library.lomo_kernels_cuda_refusal():  # then it has registered nothing
        raise ImportError(f"{CUDA_LIBRARY.name} cannot be used: {reason.decode()}")
    return str(library.lomo_kernels_cuda_targets().decode())


def _load_triton(key: str, names: Collection[str] | None = None) -> str:
    """Registers the operators of these names, or all. Returns Triton's version."""
    from . import triton  # only here: Triton takes a second to import

    return triton.register(key, names)


def _interpreted() -> bool:
    """Whether Triton interprets its kernels, on CPU tensors: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _load_reference(key: str) -> Choice:
    from . import reference  # only here: it is the oracle of the tests, and serves only if it is forced

    for name, function in reference.IMPLEMENTATIONS.items():
        library.impl(name, function, key)
    reason = f"{VARIABLE}=reference"
    return Choice(key, "reference", "plain torch", reason, _load_tiled(key, reason))


# ---- The choice -----------------------------------------------------------------------------------------------------


def _choose_for_cpu(forced: str | None) -> Choice:
    if forced == "reference":
        return _load_reference("CPU")
    if forced == "triton" and _interpreted():
        return _with_triton("CPU", f"{VARIABLE}=triton with TRITON_INTERPRET=1")
    isa = os.environ.get("LOMO_KERNELS_ISA")
    reason = f"LOMO_KERNELS_ISA={isa}" if isa else "the best this processor has"
    return Choice("CPU", "cpu", _load_cpu(), reason, _load_tiled("CPU", "the compiled library has no kernel for it"))


def _choose_for_cuda(forced: str | None) -> Choice:
    """Raises ImportError where `forced` cannot be had."""
    if forced == "reference":
        return _load_reference("CUDA")
    if forced == "cpu" or (forced == "triton" and _interpreted()):
        return Choice("CUDA", "none", f"unset {VARIABLE}", f"{VARIABLE}={forced} serves CPU tensors")
    if torch.version.cuda is None and torch.version.hip is None:
        return _no_gpu(forced, f"torch {torch.__version__} is built without CUDA and ROCm", "install a torch with one")
    if not torch.cuda.is_available():
        return _no_gpu(forced, "torch.cuda.is_available() is False", "check the GPU's driver")
    if forced == "cuda":
        reason = f"{VARIABLE}=cuda"
        return Choice("CUDA", "cuda", _load_cuda(), reason, _load_tiled("CUDA", reason))
    if forced == "triton":
        return _with_triton("CUDA", f"{VARIABLE}=triton")
    try:
        detail = _load_cuda()
    except ImportError as error:
        why_not_cuda = str(error)
    else:
        return Choice("CUDA", "cuda", detail, "the compiled library has code for this GPU", _choose_layers())
    try:
        return _with_triton("CUDA", why_not_cuda)
    except ImportError as error:
        return Choice("CUDA", "none", str(error), why_not_cuda)


def _choose_layers() -> dict[str, Choice]:
    """What serves the operators of layers beside the CUDA library, which has none of them."""
    names = _unserved("CUDA")
    try:
        choice = Choice("CUDA", "triton", _load_triton("CUDA", names), "the compiled library has no kernel for it")
    except ImportError as error:
        return _load_tiled("CUDA", str(error))
    return dict.fromkeys(names, choice)


def _with_triton(key: str, reason: str) -> Choice:
    """Triton for all operators that it has. Raises ImportError if it cannot be had."""
    detail = _load_triton(key)
    return Choice(key, "triton", detail, reason, _load_tiled(key, "Triton has no kernel for it"))


def _no_gpu(forced: str | None, reason: str, remedy: str) -> Choice:
    if forced is not None:
        raise ImportError(f"{reason}; {remedy}, or unset {VARIABLE}")
    return Choice("CUDA", "none", remedy, reason)


_forced = os.environ.get(VARIABLE) or None
_chosen: dict[str, Choice] = {}
_lock = threading.Lock()  # hooks of several devices run in several threads


def choice(key: str) -> Choice:
    """The implementation in force for the dispatch key "CPU" or "CUDA", chosen now where it was not yet."""
    with _lock:
        new = key not in _chosen
        if new:
            _chosen[key] = (_choose_for_cpu if key == "CPU" else _choose_for_cuda)(_forced)
        chosen = _chosen[key]
    unusable = torch.version.cuda is not None and CUDA_LIBRARY.exists()  # there, and not chosen
    if new and key == "CUDA" and chosen.backend == "triton" and not _forced and unusable:
        warnings.warn(f"lomo_kernels: {chosen.reason}. Triton's kernels take over", stacklevel=2)
    return chosen


def check_device(device: torch.device) -> None:
    """Chooses an implementation for tensors on `device` where that was not done yet.

    Raises:
        NotImplementedError: there is none; the message says why and what to do.
    """
    if device.type == "meta":
        return
    if device.type not in ("cpu", "cuda"):
        raise NotImplementedError(
            f"lomo_kernels has no backend for {device.type} tensors (it has: cpu, cuda); move the model to one of these"
        )
    chosen = choice(device.type.upper())
    if chosen.backend == "none":
        raise NotImplementedError(
            f"lomo_kernels has no backend in force for {device.type} tensors: {chosen.reason}; {chosen.detail}. "
            f"{VARIABLE}=reference serves them all the same (plain torch, slow)"
        )


def choices() -> list[Choice]:
    """The implementations in force, for `info`."""
    return [choice("CPU"), choice("CUDA")]


def _start() -> None:
    if _forced not in (None, *NAMES):
        raise ImportError(f"{VARIABLE}={_forced}: expected one of {', '.join(NAMES)}")
    cpu = choice("CPU")
    if _forced in ("cuda", "triton") and cpu.backend != _forced:  # what was asked for is refused now, or never
        try:
            choice("CUDA")
        except ImportError as error:
            raise ImportError(f"{VARIABLE}={_forced}: {error}") from error


choose_kernels.append(check_device)
_start()
