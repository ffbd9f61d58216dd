"""Parameters and gradients for kernels, more of them than a cache holds, and the probes of memory bandwidth."""

from __future__ import annotations

from functools import cached_property, partial
from itertools import count
from statistics import median

import torch

from .measure import Baseline, Call, calibrated, timed

CACHE = {"cpu": 2**28, "cuda": 2**29}  # bytes that the calls go through: several times the largest last-level caches
VIEWS = 2**14  # at most so many buffers: below 4 Ki elements of 16 bits they stay in the last-level cache
PROBE_ROUNDS = 15  # of which the fastest probe is chosen


class Buffers:
    """Pairs of a parameter and its gradient, each of `elements` numbers, to be used in turn."""

    def __init__(self, dtype: torch.dtype, elements: int, device: str) -> None:
        count = min(max(-(-CACHE[device] // (2 * elements * dtype.itemsize)), 1), VIEWS)
        generator = torch.Generator(device).manual_seed(0)
        random = torch.randn(2, min(2**22, count * elements), device=device, generator=generator).to(dtype)
        memory = [torch.empty(count * elements, dtype=dtype, device=device) for _ in random]
        for whole, numbers in zip(memory, random, strict=True):
            for chunk in whole.split(len(numbers)):
                chunk.copy_(numbers[: len(chunk)])
        self.params, self.grads = (whole.split(elements) for whole in memory)
        self.device, self.dtype, self.nbytes = device, dtype, elements * dtype.itemsize

    def pair(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        number %= len(self.params)
        return self.params[number], self.grads[number]

    def probe(self, streams: int) -> Baseline:
        """What moves as many bytes as an update (3 streams) or a norm (1), and does nothing else."""
        if self.device == "cuda":
            # By a kernel. In a CUDA graph `copy_` is a copy of CUDA's own: 2.75 TB/s on an H200, and 4.2 in eager mode.
            return Baseline(
                "copy", lambda number: torch.neg(self.pair(number)[1], out=self.pair(number)[0]), streams / 2
            )
        import lomo_kernels_testing as native  # built by `make testing`

        def read_1(number: int) -> None:
            native.read_1(self.pair(number)[1].data_ptr(), self.nbytes)

        return Baseline("read 1", read_1) if streams == 1 else self._read_2_write_1

    @cached_property
    def _read_2_write_1(self) -> Baseline:
        """The fastest of the ways to do it: which that is depends on the processor and on the buffers' size."""
        import lomo_kernels_testing as native

        def call(number: int, way: int) -> None:
            param, grad = self.pair(number)
            native.read_2_write_1(param.data_ptr(), grad.data_ptr(), self.nbytes, way)

        numbers = count()
        ways: list[Call] = [partial(call, way=way) for way in range(native.READ_2_WRITE_1)]
        probes = [lambda way=way: way(next(numbers)) for way in ways]
        times = calibrated(probes[0], self.device)[0]
        rounds = [[timed(probe, times, self.device) for probe in probes] for _ in range(PROBE_ROUNDS)]
        medians = [median(seconds) for seconds in zip(*rounds, strict=True)]
        return Baseline("read 2, write 1", ways[medians.index(min(medians))])
