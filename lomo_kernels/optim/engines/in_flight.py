"""Gradients on their way between processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..managed_parameter import ManagedParameter
from ..streams import current, here

# Small gradients that travel together: as much as their list call takes (passes.BUFFER_BYTES).
BUCKET_BYTES = 1024 * 1024
# Reductions under way beside the newest and oldest one. They overlap with backward; each is a gradient in memory.
IN_FLIGHT_BYTES = 32 * 1024 * 1024


class _Sent(NamedTuple):
    managed_params: Sequence[ManagedParameter]
    result: Tensor
    source: Tensor
    work: dist.Work
    stream: torch.cuda.Stream | None  # whose memory both are


class InFlight:
    """Reductions under way."""

    def __init__(self) -> None:
        self._sent: deque[_Sent] = deque()
        self._bytes = 0

    def put(self, managed_params: Sequence[ManagedParameter], result: Tensor, source: Tensor, work: dist.Work) -> None:
        """One more, which `work` stands for. `source` and `result`, perhaps one tensor, are the current stream's."""
        self._sent.append(_Sent(managed_params, result, source, work, current(result)))
        self._bytes += source.nbytes

    def take(self, limit: int) -> Iterator[tuple[Sequence[ManagedParameter], Tensor]]:
        """Records and results of the oldest, for use on the current stream, until the sources of those left, but for
        the newest, take no more than `limit` bytes."""
        while self._sent and self._bytes - self._sent[-1].source.nbytes > limit:
            managed_params, result, source, work, stream = self._sent.popleft()
            self._bytes -= source.nbytes
            work.wait()  # on a GPU the current stream does
            here(result, stream)
            if source is not result:
                here(source, stream)
            del source
            yield managed_params, result
