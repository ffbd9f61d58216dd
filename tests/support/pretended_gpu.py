"""A plugin of pytest that pretends that there is a GPU: its tensors are on the CPU, and so are the kernels.

For the benches and tests that only a GPU runs: no typo shall meet the first one. Sizes are tiny, peers are missing, and
of every stage's tests only the first few run; how many were selected goes into the file LOMO_SELECTED.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

FORCED = os.environ.pop("LOMO_KERNELS_BACKEND", "") or "cuda"
FEW = 3
GIB = 2**30
PEERS = ("lomo_optim", "optimi", "deepspeed")


def on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


class OnCpu(DeviceContext):
    """Whoever asks for a tensor on the GPU gets one on the CPU. Fused layers step back for any mode but this kind."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(on_cpu, args), **kwargs)


class Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return super().__new__(cls, device="cpu")


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.time: float | None = None

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        assert self.time is not None and other.time is not None, "an event was not recorded"
        return (other.time - self.time) * 1e3

    def synchronize(self) -> None: ...
    def wait(self, stream: Any = None) -> None: ...


class Stream:
    def __init__(self, device: Any = None) -> None: ...
    def wait_stream(self, stream: Stream) -> None: ...
    def synchronize(self) -> None: ...


class CUDAGraph:
    """What is captured runs once; a replay takes some time."""

    captured = False

    def replay(self) -> None:
        assert self.captured, "replay of a graph that was not captured"
        time.sleep(1e-5)


@contextlib.contextmanager
def graph(captured: CUDAGraph, stream: Any = None):
    yield
    captured.captured = True


def nothing() -> Any:
    """A function of its own each time: torch's compiler has a rule for each by identity."""
    return lambda *arguments: None


#: No allocation is seen: a step takes 8 KiB, always.
STATISTICS = {"requested_bytes.all.current": 2**12, "requested_bytes.all.peak": 2**13 + 2**12}
STATISTICS["allocation.all.allocated"] = 1
PRETENDED = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "get_device_name": lambda device=None: "Pretended GPU",
    "get_device_capability": lambda device=None: (9, 0),
    "mem_get_info": lambda device=None: (8 * GIB, 80 * GIB),
    "memory_stats": lambda device=None: dict(STATISTICS),
    "current_stream": lambda device=None: Stream(),
    "stream": lambda stream: contextlib.nullcontext(),
    **{name: nothing() for name in ("synchronize", "reset_peak_memory_stats", "empty_cache", "set_sync_debug_mode")},
    **{name: nothing() for name in ("_sleep", "manual_seed_all")},
    **{kind.__name__: kind for kind in (Event, Stream, CUDAGraph)},
    "graph": graph,
}


def pretend() -> None:
    """For this process, until it ends."""
    for name, pretended in PRETENDED.items():
        setattr(torch.cuda, name, pretended)
    torch.version.cuda = "13.0"
    torch.Generator = Generator  # type: ignore[misc]
    real = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name in PEERS else real(name, *rest)
    from lomo_kernels import backends

    backends._chosen["CUDA"] = backends.Choice("CUDA", FORCED, "pretended", "for tests")
    TorchFunctionMode.__enter__(OnCpu("cpu"))


def make_tiny() -> None:
    """The benches' sizes. Their names, by which stages select, stay."""
    from bench import bench_head, bench_memory, bench_operators, bench_training, buffers, measure
    from bench.methods import TINY

    buffers.CACHE["cuda"] = 2**16
    whole = buffers.Buffers.__init__
    buffers.Buffers.__init__ = lambda self, dtype, elements, device: whole(self, dtype, min(elements, 2000), device)
    measure.ROUND["cuda"], measure.ROUNDS = 1e-5, (2, 3)
    bench_operators.BYTES["cuda"], bench_operators.SIDE["cuda"] = 2**16, 32
    bench_operators.LINEAR_SHAPE["cuda"] = (40, 32)
    bench_operators.EMBEDDING_SHAPE["cuda"] = (300, 16)
    bench_training.CAPTURED = bench_head.CONFIG = TINY
    bench_training.MODELS.update({"1.1B": TINY, "6.7B": dataclasses.replace(TINY, layers=1)})
    attach = bench_training.Trained.__init__
    bench_training.Trained.__init__ = lambda self, name, whole, tokens, *rest: attach(self, name, whole, 16, *rest)
    bench_memory.RUN["cuda"] = ("llama-1b", TINY, 16)


def pytest_configure(config: Any) -> None:
    pretend()
    if config.pluginmanager.has_plugin("benchmark") and any("bench_" in argument for argument in config.args):
        make_tiny()


def pytest_collection_finish(session: Any) -> None:
    selected = {"stage": os.environ["LOMO_STAGE"], "tests": [item.nodeid for item in session.items]}
    with Path(os.environ["LOMO_SELECTED"]).open("a") as file:
        file.write(json.dumps(selected) + "\n")
    if not any("bench_" in item.nodeid for item in session.items):
        session.items[:] = session.items[:FEW]
