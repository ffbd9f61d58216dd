"""Memory that runs out inside a kernel. torch raises `torch.OutOfMemoryError` for it, except across its stable ABI."""

from __future__ import annotations

import re

import torch

#: The calls of torch by which native code allocates, as the stable ABI names them. It gives no reason for a failure.
_ALLOCATION = re.compile(r'"aten::(empty|new_empty|contiguous|sum)".* API call failed at torch/csrc/stable', re.DOTALL)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether it is torch.OutOfMemoryError, or a call inside our kernels that allocates.

    An allocation of torch's own on a CPU is a RuntimeError of another form, and is not recognised.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_ALLOCATION.search(str(error))) and _gpu_works()


def as_out_of_memory(error: BaseException) -> BaseException:
    """`torch.OutOfMemoryError` in place of an error that came through the stable ABI; other errors as they are."""
    if isinstance(error, torch.OutOfMemoryError) or not ran_out_of_memory(error):
        return error
    return torch.OutOfMemoryError(f"lomo_kernels: memory ran out: a kernel asked torch for a tensor. {error}")


def _gpu_works() -> bool:
    """After an illegal access, say, every call of CUDA fails, and not because memory ran out."""
    if not torch.cuda.is_initialized() or torch.cuda.is_current_stream_capturing():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
