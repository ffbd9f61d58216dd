"""Which CUDA streams the hooks of one backward run on, and what they must wait for. Nothing of it concerns the CPU.

Autograd runs each hook on the stream its parameter was used on, in one thread per device. When backward ends, the
streams it ran on are waited for by the caller's (`torch.autograd.backward` does that), but where it begins only the
loss's stream is tied to the caller's: the caller set hyperparameters and slots on its own stream of every device, so
each other stream waits for that one before its first kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
from torch import Tensor


class Streams:
    """The streams of one pass.

    Args:
        devices: those of the parameters. The streams current on them now are the caller's.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._caller = {device: torch.cuda.current_stream(device) for device in devices if device.type == "cuda"}
        self._joined = set(self._caller.values())
        self._lock = threading.Lock()

    def join(self, device: torch.device) -> torch.cuda.Stream | None:
        """The stream current on `device`, after it waited, the first time, for the caller's. None for the CPU."""
        if device.type != "cuda":
            return None
        stream = torch.cuda.current_stream(device)
        with self._lock:
            if stream not in self._joined:
                self._joined.add(stream)
                stream.wait_stream(self._caller[device])
        return stream

    @staticmethod
    def lend(tensors: Iterable[Tensor], device: torch.device, owner: torch.cuda.Stream | None) -> None:
        """Keeps memory that belongs to stream `owner` from being given away before the current stream has used it."""
        if owner is None:
            return
        current = torch.cuda.current_stream(device)
        if current != owner:
            for tensor in tensors:
                tensor.record_stream(current)
