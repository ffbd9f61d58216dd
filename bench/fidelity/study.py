"""Runs of the study: one run, the search for a learning rate, seeds, and what a step costs.

Each result is a line of a CSV file as soon as it is known. What a file has is not run again.
"""

from __future__ import annotations

import csv
import functools
import gc
import importlib.metadata
import itertools
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lomo_kernels import backends
from lomo_kernels.memory import LiveBytes

from .methods import BASE, METHODS, PRECISIONS, Method, missing
from .tasks import schedule

ROOT = Path(__file__).resolve().parents[2]
TUNING_SEED, SEEDS = 100, (0, 1, 2)
FACTOR = 2.0  # from one learning rate of a grid to the next
#: Of which learning rates as small as those of reinforcement learning are tried, too: the share of weights that change.
SPARSE, SMALLER = ("SGD + clip", "sign", "AdaLomo", "AdamW + clip"), (10, 100)
WATCHED = 8  # steps of a run in which changed weights are counted
ROUNDS = 12  # of timing

BEFORE = "before fine-tuning"
RUN = ("method", "precision", "lr", "seed", "part", "loss", "accuracy", "changed")
COST = ("method", "precision", "round", "seconds", "base_seconds", "peak")
ABOUT = ("settings", "machine", "commit", "date")


class Results:
    """A CSV file that grows.

    Raises:
        ValueError: it holds results of other settings.
    """

    def __init__(self, file: Path, columns: tuple[str, ...], key: int, about: dict[str, str]) -> None:
        """The first `key` columns say which result it is."""
        self.file, self.columns, self.key, self.about = file, columns, key, about
        self.rows: dict[tuple[str, ...], dict[str, str]] = {}
        if file.exists():
            with file.open(newline="") as lines:
                for row in csv.DictReader(lines):
                    if row["settings"] != about["settings"]:
                        raise ValueError(f"{file} holds results of other settings: move it away")
                    self.rows[tuple(row[column] for column in columns[:key])] = row

    def get(self, *key: Any) -> dict[str, str] | None:
        return self.rows.get(tuple(map(str, key)))

    def add(self, values: dict[str, Any]) -> dict[str, str]:
        row = {name: str(values.get(name, "")) for name in self.columns} | self.about
        new = not self.file.exists()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", newline="") as lines:
            writer = csv.DictWriter(lines, (*self.columns, *ABOUT), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows[tuple(row[column] for column in self.columns[: self.key])] = row
        return row


def about(task: Any) -> dict[str, str]:
    choice = backends.choice(task.device.upper().split(":")[0])
    if task.device == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        device = f"{(names or [platform.machine()])[0]}, {choice.detail}, threads: {torch.get_num_threads()}"
    else:
        device = torch.cuda.get_device_name(task.device)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for package in ("transformers", "lomo-optim"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    machine = ", ".join([device, *(f"{name} {version}" for name, version in versions.items())])
    return {"settings": task.settings, "machine": machine, "commit": commit(), "date": str(date.today())}


def commit() -> str:
    """The last that changed the library, with a plus sign if files of it differ from it; LOMO_COMMIT if that is given;
    otherwise empty outside a clone."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command, "--", "lomo_kernels", "csrc"], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    if given := os.environ.get("LOMO_COMMIT"):
        return given[:7]
    return git("log", "-1", "--format=%h") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))


# ---- One run --------------------------------------------------------------------------------------------------------


def train(task: Any, method: Method, precision: str, lr: float, seed: int, part: str) -> dict[str, Any]:
    """Fine-tunes from the pre-trained weights.

    Returns:
        What `task.evaluate` gives, a loss of infinity if the run diverged; "changed", the share of the weights that a
        step changes, the mean over `WATCHED` steps.
    """
    dtype, rounding = PRECISIONS[precision]
    model: nn.Module = task.model(seed).to(dtype)
    params = list(model.parameters())
    update = method.attach(model, rounding, seed)
    gap = max(1, task.steps // WATCHED)
    changed = []
    for step, batch in enumerate(task.batches(seed)):
        loss = task.loss(model, batch)
        if not loss.isfinite():
            return {"loss": math.inf}
        before = [param.detach().clone() for param in params] if step % gap == gap // 2 else None
        update(loss, lr * schedule(step, task.steps))
        if before is not None:
            count = sum(int((param != old).sum()) for param, old in zip(params, before, strict=True))
            changed.append(count / sum(param.numel() for param in params))
    measured = task.evaluate(model, part)
    if not math.isfinite(measured["loss"]):
        measured["loss"] = math.inf
    return {**measured, "changed": sum(changed) / len(changed)}


def best_lr(losses: dict[float, float]) -> float:
    return min(sorted(losses), key=lambda lr: losses[lr])


def search(loss_at: Callable[[float], float], start: float, span: int, most: int = 8) -> dict[float, float]:
    """Losses on a grid of learning rates: `span` values on both sides of `start`. The grid grows until the best value
    has a worse one on both sides, by at most `most` values."""
    losses = {start * FACTOR**power: math.nan for power in range(-span, span + 1)}
    losses = {lr: loss_at(lr) for lr in losses}
    for _ in range(most):
        best = best_lr(losses)
        if best == min(losses):
            new = best / FACTOR
        elif best == max(losses):
            new = best * FACTOR
        else:
            break
        losses[new] = loss_at(new)
    return losses


# ---- All runs -------------------------------------------------------------------------------------------------------


def configurations(task: Any, methods: tuple[str, ...]) -> list[tuple[str, str]]:
    """Method and precision, float32 first: its learning rates are where the others' grids begin."""
    rows = [(name, precision) for precision in PRECISIONS for name in methods]
    return [
        (name, precision)
        for name, precision in rows
        if precision in METHODS[name].precisions and METHODS[name].warm_up < task.steps
    ]


class Comparison:
    """Runs of a task, each of which is made once.

    Args:
        tune: search learning rates; otherwise each method runs at its first one.
    """

    def __init__(self, task: Any, results: Results, *, tune: bool = True) -> None:
        self.task, self.results, self.tune = task, results, tune
        self.rates: dict[tuple[str, str], float] = {}  # chosen, by method and precision

    def loss(self, lr: float, name: str, precision: str, seed: int, part: str) -> float:
        key = (name, precision, f"{lr:.6g}", seed, part)
        row = self.results.get(*key)
        if row is None:
            begin = time.perf_counter()
            held_out = "validation" if part == "validation" else "test"
            measured = train(self.task, METHODS[name], precision, lr, seed, held_out)
            gc.collect()  # models, optimizers and hooks refer to each other
            row = self.results.add({**dict(zip(RUN, key, strict=False)), **measured})
            said = f"{name}, {precision}, lr {lr:.3g}, seed {seed}, {part}: loss {float(row['loss']):.4f}"
            print(f"{said}, {time.perf_counter() - begin:.1f} s", flush=True)
        return float(row["loss"])

    def rate(self, name: str, precision: str) -> float:
        """Searched on the validation part in the precisions of `task.searched`. Others take the rate of float32, and
        lomo_optim that of our rule."""
        method = METHODS[name]
        source = (method.like, precision) if method.like else (name, "float32")
        start = METHODS[method.like or name].start[self.task.name]
        if source in self.rates and (method.like or precision not in self.task.searched):
            return self.rates[source]
        if not self.tune:
            return start
        center, span = (self.rates[source], 1) if source in self.rates else (start, self.task.span)
        of_method = {"name": name, "precision": precision, "seed": TUNING_SEED, "part": "validation"}
        return best_lr(search(functools.partial(self.loss, **of_method), center, span))

    def run(self, methods: tuple[str, ...], seeds: tuple[int, ...] = SEEDS) -> None:
        """Every method in every precision: its learning rate, then the seeds on the test part. Then the shares of
        weights that change at smaller rates, where the task asks for them."""
        before = (BEFORE, "float32", "0", 0, "test")
        if self.results.get(*before) is None:
            measured = self.task.evaluate(self.task.model(0), "test")
            self.results.add({**dict(zip(RUN, before, strict=False)), **measured})
        for name, precision in configurations(self.task, methods):
            if reason := missing(name):
                print(f"left out: {reason}")
                continue
            lr = self.rates[name, precision] = self.rate(name, precision)
            for seed in seeds:
                self.loss(lr, name, precision, seed, "test")
        for (name, precision), lr in self.rates.items():
            if self.task.sparse and name in SPARSE and precision != "float32":
                for divisor in SMALLER:
                    self.loss(lr / divisor, name, precision, 0, f"rate/{divisor}")


# ---- What a step costs ----------------------------------------------------------------------------------------------


def peak_bytes(task: Any, method: Method, precision: str) -> int:
    """Peak above the weights in a step after the first ones, optimizer state included."""
    dtype, rounding = PRECISIONS[precision]
    model = task.model(0).to(dtype)
    batches = list(itertools.islice(task.batches(0), method.warm_up + 2))
    gc.collect()
    on_gpu = task.device != "cpu"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    recorder = LiveBytes()

    def steps() -> None:
        update = method.attach(model, rounding, 0)
        for number, batch in enumerate(batches):
            if number == len(batches) - 1:
                torch.cuda.reset_peak_memory_stats() if on_gpu else recorder.reset_peak()
            update(task.loss(model, batch), 0.0)

    if on_gpu:
        steps()
        return torch.cuda.max_memory_allocated() - before
    with recorder:
        steps()
    return recorder.peak


def seconds(task: Any, work: Callable[[], object]) -> float:
    """On a CPU the processor's time of this process, which other processes change little; on a GPU the wall time."""
    if task.device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def cost(task: Any, results: Results, methods: tuple[str, ...], rounds: int = ROUNDS) -> None:
    """Peak memory, and times in rounds beside torch's SGD with clipping in the same dtype."""
    for name, precision in configurations(task, methods):
        if missing(name) or results.get(name, precision, rounds - 1):
            continue
        method = METHODS[name]
        peak = peak_bytes(task, method, precision)
        base = timed_step(task, BASE, precision, 1)
        mine = timed_step(task, method.attach, precision, method.warm_up + 1)
        for number in range(rounds):
            times = {"base_seconds": seconds(task, base), "seconds": seconds(task, mine)}
            results.add({"method": name, "precision": precision, "round": number, "peak": peak, **times})
        print(f"{name}, {precision}: peak {peak / 2**20:.1f} MiB", flush=True)
        gc.collect()


def timed_step(task: Any, attach: Callable[..., Any], precision: str, before: int) -> Callable[[], None]:
    """A step on always the same batch, after `before` steps, which make states. It leaves the weights as they are."""
    dtype, rounding = PRECISIONS[precision]
    model = task.model(0).to(dtype)
    update = attach(model, rounding, 0)
    batch = next(iter(task.batches(0)))

    def step() -> None:
        update(task.loss(model, batch), 0.0)

    for _ in range(before):
        step()
    return step
