"""A run of 20,000 steps with a dynamic loss scale: memory stays flat, and two runs have the same bits."""

from __future__ import annotations

import gc
import hashlib
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from support.models import same_bits
from support.processes import Processes
from torch import Tensor, nn

from lomo_kernels import Lomo

STEPS = 20_000
REPORTS = 10
#: One step in so many has a gradient that is not finite, so that the scale falls between its growths.
OVERFLOW_EVERY = 4700


@dataclass
class Report:
    """What was seen at some steps."""

    hashes: list[str] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)  # KiB
    objects: list[int] = field(default_factory=list)  # that Python's garbage collector knows
    tensors: list[int] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    skipped: int = 0


def model_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Embedding(50, 32), nn.Linear(32, 160), nn.LayerNorm(160), nn.Tanh(), nn.Linear(160, 50)]
    return nn.Sequential(*layers).to(dtype)


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(2 * step + rank)
    tokens = torch.randint(50, (8,), generator=generator)
    loss = nn.functional.cross_entropy(model(tokens).float(), (tokens * 7 + 1) % 50)
    return loss * 1e38 * 1e38 if step % OVERFLOW_EVERY == OVERFLOW_EVERY - 1 else loss


def digest(model: nn.Module, optimizer: Lomo) -> str:
    """Of all weights and all of the optimizer's state."""
    sha = hashlib.sha256()
    states = (value for state in optimizer.state_dict()["state"].values() for value in state.values())
    for value in [*model.parameters(), *states]:
        tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
        sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else str(tensor).encode())
    return sha.hexdigest()[:16]


def rss() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def run(rank: int = 0, steps: int = STEPS, process_group: Any = False, **options: Any) -> Report:
    """One run, or one rank's part of it."""
    model, report = model_of(torch.float16), Report()
    optimizer = Lomo(model, lr=0.02, rounding="stochastic", seed=5, process_group=process_group, **options)
    assert optimizer._training.state.scale.kind == "dynamic"
    for step in range(steps):
        optimizer.backward(loss_of(model, step, rank))
        if (step + 1) % max(steps // REPORTS, 1) == 0:
            gc.collect()
            report.hashes.append(digest(model, optimizer))
            report.scales.append(optimizer.loss_scale.item())
            objects = gc.get_objects()
            report.objects.append(len(objects))
            report.tensors.append(sum(issubclass(type(thing), Tensor) for thing in objects))
            del objects
            report.rss.append(rss())
    assert optimizer.step_count.item() == steps
    report.skipped = int(optimizer.skipped_steps)
    optimizer.remove()
    return report


def on_rank(rank: int, steps: int, options: dict[str, Any]) -> Report:
    """`run` as one of several ranks."""
    return run(rank, steps, torch.distributed.group.WORLD, **options)


def on_two_ranks(steps: int, **options: Any) -> list[Report]:
    """Data parallel, over gloo."""
    processes = Processes(2, timeout=600.0, call_timeout=float(max(steps, 100)))
    try:
        return processes.call(on_rank, steps, options)
    finally:
        processes.close()


def wrong_with(one: Report, other: Report) -> str:
    """What is wrong with two reports of the same run. Memory is compared from the second report on."""
    if one.hashes != other.hashes:
        return f"other bits: {one.hashes} and {other.hashes}"
    for report in (one, other):
        if max(report.tensors[1:]) > report.tensors[1]:
            return f"more tensors: {report.tensors}"
        if max(report.objects[1:]) > report.objects[1] + 100:
            return f"more objects: {report.objects}"
        if max(report.rss[1:]) > report.rss[1] + 4096:
            return f"more memory: {report.rss} KiB"
    return ""


#: Steps at which a counter of so many bits would overflow, or a float32 or float64 would not count on.
BOUNDS = (2**24, 2**31, 2**32, 2**53, 2**62)


def counters() -> str:
    """What is wrong with runs whose step count passes `BOUNDS`."""
    for bound in BOUNDS:
        for options in (
            {"rule": "adalomo"},
            {"clip_tensor": 1.04, "loss_scale": "dynamic"},
            {"rounding": "stochastic"},
        ):
            results = []
            for split in (False, True):
                model = model_of(torch.bfloat16)
                with Lomo(model, lr=0.02, **options) as short:  # AdaLomo's means exist, as after so many steps
                    short.backward(loss_of(model, 100, 0))
                    optimizer = _at(bound - 3, model, options, short)
                for step in range(6):
                    if split:  # saved and loaded at each step
                        optimizer = _at(int(optimizer.step_count), model, options, optimizer)
                    before = [param.detach().clone() for param in model.parameters()]
                    optimizer.backward(loss_of(model, step, 0))
                    moved = any(not same_bits(a, b) for a, b in zip(before, model.parameters(), strict=True))
                    if int(optimizer.step_count) != bound - 2 + step or not moved:
                        return f"step {bound - 2 + step}: counted {int(optimizer.step_count)}, moved {moved}"
                results.append(digest(model, optimizer))
                optimizer.remove()
            if results[0] != results[1]:
                return f"a resumed run differs at {bound}, {options}"
    return ""


def _at(step: int, model: nn.Module, options: dict[str, Any], before: Lomo) -> Lomo:
    """An optimizer that goes on from `before`, as if that had made so many steps."""
    state = before.state_dict()
    optimizer = Lomo(model, lr=0.02, **options)
    state["lomo"]["step"].fill_(step)
    for numbers in state["state"].values():
        numbers["step"].fill_(step)
    optimizer.load_state_dict(state)
    return optimizer
