"""Which CUDA streams the hooks of one backward run on, and what they must wait for. Nothing of it concerns the CPU.

Autograd runs each hook on the stream its parameter was used on, in one thread per device; FSDP2 calls hooks on streams
of its own. Where backward begins only the loss's stream is tied to the caller's: the caller set hyperparameters and
slots on its own stream of every device, so each other stream waits for that one before its first kernel. When backward
ends, autograd makes the caller's streams wait for those it ran on itself, FSDP2 for its own only in the last backward
(`set_is_last_backward`): so the caller's wait for all that joined.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
from torch import Tensor

from ..ops._arguments import stream_handle as handle


class Streams:
    """The streams of one pass.

    Args:
        devices: those of the parameters. The streams current on them now are the caller's.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._caller = {device: torch.cuda.current_stream(device) for device in devices if device.type == "cuda"}
        self._joined = {(device.index, stream.cuda_stream): stream for device, stream in self._caller.items()}
        self._lock = threading.Lock()

    def join(self, device: torch.device) -> torch.cuda.Stream | None:
        """The stream current on `device`, after it waited, the first time, for the caller's. None for the CPU."""
        if device.type != "cuda":
            return None
        key = device.index, handle(device)
        stream = self._joined.get(key)
        if stream is not None:
            return stream
        with self._lock:
            stream = torch.cuda.current_stream(device)
            stream.wait_stream(self._caller[device])
            self._joined[key] = stream
        return stream

    def leave(self) -> None:
        """The caller's streams wait for all that joined: what their kernels wrote is read from here on."""
        callers = {device.index: stream for device, stream in self._caller.items()}
        for (index, _), stream in self._joined.items():
            if stream != callers[index]:
                callers[index].wait_stream(stream)

    @staticmethod
    def lend(tensors: Iterable[Tensor], device: torch.device, owner: torch.cuda.Stream | None) -> None:
        """Keeps memory that belongs to stream `owner` from being given away before the current stream has used it."""
        if owner is None or handle(device) == owner.cuda_stream:
            return
        current = torch.cuda.current_stream(device)
        for tensor in tensors:
            tensor.record_stream(current)


def current(tensor: Tensor) -> torch.cuda.Stream | None:
    """The stream current on the tensor's device. None for the CPU."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


def here(tensor: Tensor, made_on: torch.cuda.Stream | None) -> Tensor:
    """`tensor`, for use on the current stream: see `use_here`."""
    use_here([tensor], tensor.device, made_on)
    return tensor


def use_here(tensors: Iterable[Tensor], device: torch.device, made_on: torch.cuda.Stream | None) -> None:
    """Makes the current stream wait for all that `made_on` has queued by now, and keeps the tensors' memory until the
    current stream has used it. To record an event where they are made would be exact, but takes some 10 us at each use,
    and there is hardly ever another stream."""
    if made_on is not None and handle(device) != made_on.cuda_stream:
        torch.cuda.current_stream(device).wait_stream(made_on)
        Streams.lend(tensors, device, made_on)
