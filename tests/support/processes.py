"""Real processes, over gloo unless told otherwise, for the tests of several ranks: started once per file and world
size, then given work."""

from __future__ import annotations

import datetime
import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from lomo_kernels.memory import LiveBytes

# A forked server imports torch once for all of them: seconds less per process.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed.tensor.parallel", "torch.distributed.fsdp", "support.engines"])

#: Seconds: of a collective operation, until a rank gives up waiting for another; of a call, until the test fails.
GROUP_TIMEOUT, CALL_TIMEOUT = 30.0, 90.0
#: Seconds for the others to end once one has raised.
GRACE = 2.0
#: Threads of a process, at which new processes take its place: that costs 0.1 s. Every group that a test makes leaves
#: three threads, which look for work a hundred times a second. Idle processes with 320 took 5% of a core each.
CROWDED = 64


class Processes:
    """`world` processes with a default group. With another backend than gloo each takes the GPU of its rank.

    Args:
        timeout, call_timeout: seconds, of a collective operation and of a call.
    """

    def __init__(
        self, world: int, timeout: float = GROUP_TIMEOUT, backend: str = "gloo", call_timeout: float = CALL_TIMEOUT
    ) -> None:
        self.world = world
        self._call_timeout = call_timeout
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            ours, theirs = _context.Pipe()
            store = os.path.join(self._folder.name, "store")
            process = _context.Process(target=_serve, args=(rank, world, timeout, backend, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()

    @property
    def usable(self) -> bool:
        return all(process.is_alive() and _threads(process.pid) < CROWDED for process in self._processes)

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(rank, *args)``, a function of a module's top level, on every rank; the results by rank.

        The first rank that raises, dies or takes too long fails the test, and ends all of them.
        """
        results = self.outcomes(function, *args)
        failed = [(rank, result) for rank, result in enumerate(results) if isinstance(result, Failed)]
        if failed:
            self.close()
            # What the others say is mostly that they lost one of them.
            raise AssertionError("".join(f"\nrank {rank}: {result.text}" for rank, result in failed))
        return results

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """As `call`, with a `Failed` for each rank that raised, died or was still at it when time was up."""
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__qualname__, args))
        results: list[Any] = [Failed("still at it")] * self.world
        open_ = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        deadline = time.monotonic() + self._call_timeout
        while open_ and (ready := wait(list(open_), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = open_.pop(pipe)
                try:
                    results[rank] = pipe.recv()
                except EOFError:
                    results[rank] = Failed("died")
                if isinstance(results[rank], Failed) and results[rank].text != "died":
                    deadline = min(deadline, time.monotonic() + GRACE)
        return results


def by_world() -> Iterator[Callable[[int], Processes]]:
    """What a fixture yields: `Processes` by world size that stay as long as it does, while they are usable."""
    running: dict[int, Processes] = {}

    def get(world: int) -> Processes:
        if world in running and not running[world].usable:
            running.pop(world).close()
        if world not in running:
            running[world] = Processes(world)
        return running[world]

    yield get
    for some in running.values():
        some.close()


def _threads(pid: int | None) -> int:
    """How many a process has; 0 if the system does not say."""
    tasks = f"/proc/{pid}/task"
    return len(os.listdir(tasks)) if os.path.isdir(tasks) else 0


class Collectives(TorchDispatchMode):
    """Elements that each kind of collective is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensor = args[1] if "reduce_scatter" in func.__name__ else args[0]
            while isinstance(tensor, (list, tuple)):
                (tensor,) = tensor
            self.sent.setdefault(func.__name__.split(".")[0], []).append(tensor.numel())
        return func(*args, **(kwargs or {}))


def lowest_peak(step: Callable[[], None]) -> int:
    """Bytes above what lived before, of the leanest of eight calls.

    Gloo's thread lets go of a tensor it has sent when it gets to that, so one in four calls holds one longer.
    """
    peaks = []
    for _ in range(8):
        with LiveBytes() as live:
            step()
        peaks.append(live.peak)
    return min(peaks)


class Failed:
    def __init__(self, text: str) -> None:
        self.text = text


def _serve(rank: int, world: int, timeout: float, backend: str, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    if backend != "gloo":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout),
    )
    while True:
        module, name, args = pipe.recv()
        torch.manual_seed(0)
        try:
            result = getattr(importlib.import_module(module), name)(rank, *args)
        except BaseException:
            result = Failed(traceback.format_exc())
        pipe.send(result)
