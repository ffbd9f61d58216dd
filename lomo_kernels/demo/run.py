"""The `demo` command: pre-trains a small model, fine-tunes it once per method, and prints what was measured."""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR

from lomo_kernels import AdaLomo, Lomo, backends
from lomo_kernels.demo import text
from lomo_kernels.demo.model import ByteLlama, Config
from lomo_kernels.memory import LiveBytes

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

_HELD_OUT = 0.1  # the last tenth of the fine-tuning text
_MIB = 2**20
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to the parser that `python -m lomo_kernels` makes for it."""

    def option(name: str, kind: type, default: object, meaning: str) -> None:
        parser.add_argument(name, type=kind, default=default, help=f"{meaning} (default: {default})")

    option("--layers", int, 6, "transformer blocks")
    option("--d-model", int, 320, "width of the residual stream")
    option("--heads", int, 5, "attention heads")
    parser.add_argument("--kv-heads", type=int, help="heads of keys and values (default: as many as --heads)")
    option("--ffn", int, 864, "width of the feed-forward layers")
    option("--seq", int, 128, "bytes per window")
    option("--batch", int, 2, "windows per fine-tuning step")
    option("--steps", int, 80, "fine-tuning steps per method")
    option("--pretrain-batch", int, 4, "windows per pre-training step")
    option("--pretrain-steps", int, 130, "pre-training steps")
    option("--eval-windows", int, 128, "windows of the held-out text")
    parser.add_argument("--text", metavar="FILE", help="text to fine-tune on (default: Python's documentation topics)")
    # float32 is the default because 16-bit products are slow on many CPUs: 512 x 384 by 384 x 1024 takes 2 ms in
    # float32 and 4 ms in bfloat16 on a Sapphire Rapids without its matrix unit, 5 ms and 25 to 250 ms with AVX2 only.
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the weights (default: %(default)s)")
    rounding = "of Lomo's 16-bit weights (default: %(default)s)"
    parser.add_argument("--rounding", choices=("nearest", "stochastic"), default="stochastic", help=rounding)
    # Chosen by the mean held-out loss of seeds 0 and 1, with 120 steps after 200 of pre-training. SGD, and Lomo, whose
    # arithmetic is the same: 2.091 at 0.3, 2.070 at 0.5, 2.104 at 0.7. AdamW: 2.033 at 3e-4, 2.033 at 5e-4, 2.031 at
    # 7e-4. Worse after pre-training at 1e-3. AdaLomo: 2.045 at 0.01, 1.978 at 0.02, 1.980 at 0.04.
    option("--lr-lomo", float, 0.5, "learning rate of Lomo")
    option("--lr-adalomo", float, 0.02, "learning rate of AdaLomo")
    option("--lr-sgd", float, 0.5, "learning rate of SGD")
    option("--lr-adamw", float, 5e-4, "learning rate of AdamW")
    option("--lr-pretrain", float, 5e-4, "learning rate of pre-training (AdamW)")
    option("--warmup", float, 0.1, "share of the steps in which the learning rate rises; then it falls to zero")
    option("--clip", float, 1.0, "largest norm of the gradient")
    again = "compute activations again in backward instead of keeping them (default: yes)"
    parser.add_argument("--checkpoint", action=argparse.BooleanOptionalAction, default=True, help=again)
    option("--seed", int, 0, "of weights, batches and stochastic rounding")
    option("--device", str, "cpu", "cpu or cuda[:index]")
    parser.add_argument("--threads", type=int, help="threads on the CPU (default: torch's choice)")


class Stepper(NamedTuple):
    """An optimizer on a model, and what a training loop does with each loss."""

    optimizer: torch.optim.Optimizer
    update: Callable[[torch.Tensor], object]


@dataclass(frozen=True)
class Method:
    name: str
    attach: Callable[[ByteLlama], Stepper]


@dataclass(frozen=True)
class Result:
    """What was measured of one method.

    `peak_bytes` is above the weights: gradients, optimizer state and activations.  `step_seconds` is the median.
    Losses are of the held-out text in nats per byte, before and after fine-tuning.
    """

    method: str
    peak_bytes: int
    step_seconds: float
    loss_before: float
    loss_after: float


def methods(args: argparse.Namespace) -> list[Method]:
    """The methods in the order of the table, Lomo first; all except AdaLomo clip by the global norm."""

    def lomo(model: ByteLlama, **options: Any) -> Stepper:
        optimizer = Lomo(
            model, lr=args.lr_lomo, clip_grad_norm=args.clip, rounding=args.rounding, seed=args.seed, **options
        )
        return Stepper(optimizer, optimizer.backward)

    def adalomo(model: ByteLlama) -> Stepper:
        optimizer = AdaLomo(model, lr=args.lr_adalomo, rounding=args.rounding, seed=args.seed)
        return Stepper(optimizer, optimizer.backward)

    def sgd(model: ByteLlama) -> Stepper:
        return _standard(model, torch.optim.SGD(model.parameters(), lr=args.lr_sgd, fused=_fused(model)), args.clip)

    def adamw(model: ByteLlama) -> Stepper:
        return _adamw(model, args.lr_adamw, args.clip)

    return [
        Method("Lomo", lomo),
        Method("Lomo, clip_memory=0", partial(lomo, clip_memory=0)),
        Method("AdaLomo", adalomo),
        Method("SGD + clip", sgd),
        Method("AdamW + clip", adamw),
    ]


def _fused(model: ByteLlama) -> bool:
    # torch's fastest implementation, so that times compare with the best.  On CPUs it is left out for 16-bit weights:
    # torch 2.13's fused SGD leaves whole vectors of them unchanged.
    weight = model.head.weight
    return weight.is_cuda or weight.dtype is torch.float32


def _adamw(model: ByteLlama, lr: float, clip: float) -> Stepper:
    return _standard(model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=_fused(model)), clip)


def _standard(model: ByteLlama, optimizer: torch.optim.Optimizer, clip: float) -> Stepper:
    def update(loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    return Stepper(optimizer, update)


def train(
    model: ByteLlama, method: Method, batches: Iterable[torch.Tensor], steps: int, warmup: float, progress: Progress
) -> float:
    """Trains a model in place over `steps` batches (int64 [batch, seq + 1], on any device).

    Returns:
        The median of the seconds that a step took, from the batch to the updated weights.
    """
    device = model.head.weight.device
    stepper = method.attach(model)
    rising = max(1, round(warmup * steps))
    schedule = LambdaLR(
        stepper.optimizer, lambda step: min((step + 1) / rising, (steps - step) / max(1, steps - rising))
    )
    task = progress.add_task(method.name, total=steps, measured="")
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        loss = model.loss(batch.to(device))
        stepper.update(loss)
        value = float(loss.detach())  # also waits for a GPU's forward
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        schedule.step()
        rate = batch[:, 1:].numel() / statistics.median(seconds[-20:])
        progress.update(task, advance=1, measured=f"loss {value:.3f} {rate:>6.0f} tokens/s")
    return statistics.median(seconds)


@torch.no_grad()
def evaluate(model: ByteLlama, windows: torch.Tensor) -> float:
    """Mean loss in nats per byte over windows (int64 [n, seq + 1], on any device)."""
    device = model.head.weight.device
    losses = [model.loss(part.to(device)) * len(part) for part in windows.split(16)]
    return float(torch.stack(losses).sum()) / len(windows)


def peak_bytes(model: ByteLlama, method: Method | None, batches: Iterable[torch.Tensor]) -> int:
    """Peak of the bytes alive above the weights over a few steps, which change the model.

    On the CPU this counts tensors, on a GPU what the allocator handed out.  A `method` of None runs the forward only.
    """
    device = model.head.weight.device
    on_gpu = device.type == "cuda"
    gc.collect()  # what an earlier method left in reference cycles must not die during the measurement
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    recorder = LiveBytes()
    with nullcontext() if on_gpu else recorder:
        stepper = method.attach(model) if method else None
        for batch in batches:
            loss = model.loss(batch.to(device))
            if stepper:
                stepper.update(loss)
            del loss
    return torch.cuda.max_memory_allocated(device) - before if on_gpu else recorder.peak


def summary(results: list[Result]) -> str:
    """What the table shows, in words. Lomo's results are beside those of the others."""
    ours = [result for result in results if result.method.startswith(("Lomo", "AdaLomo"))]
    others = [result for result in results if result not in ours]

    def times(lomo: Result, value: Callable[[Result], float]) -> str:
        return " and ".join(f"{value(lomo) / value(other):.2f} times that of {other.method}" for other in others)

    comparison = " ".join(
        f"{lomo.method}: the peak above the weights is {times(lomo, lambda result: result.peak_bytes)}; the time of a "
        f"step is {times(lomo, lambda result: result.step_seconds)}."
        for lomo in ours
    )

    best = min(results, key=lambda result: result.loss_after if math.isfinite(result.loss_after) else math.inf)
    distances = " and ".join(
        f"{result.method} {result.loss_after - best.loss_after:.3f} above it"
        for result in results
        if result is not best
    )
    worse = " and ".join(result.method for result in results if not result.loss_after < result.loss_before)
    return (
        f"{comparison} The lowest held-out loss after fine-tuning is that of "
        f"{best.method}, {best.loss_after:.3f} nats per byte, with {distances}."
        + (f" Fine-tuning did not lower the loss with {worse}." if worse else "")
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is not a device: cpu or cuda[:index]") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: the demo runs on cpu or cuda[:index]")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    choice = backends.choice(device.type.upper())
    if choice.backend == "none":
        raise ValueError(f"--device {name}: {choice.reason}; {choice.detail}")
    return device


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError on numbers out of range; sizes that do not fit together are `Config`'s."""
    sizes = ("layers", "d_model", "heads", "kv_heads", "ffn", "seq", "batch", "pretrain_batch", "eval_windows")
    at_least_one = (*sizes, "steps", "pretrain_steps", "threads")
    positive = ("lr_lomo", "lr_adalomo", "lr_sgd", "lr_adamw", "lr_pretrain", "clip")
    for name in (*at_least_one, *positive):
        value = getattr(args, name)
        if value is not None and not (value >= 1 if name in at_least_one else 0 < value < float("inf")):
            wanted = "at least 1" if name in at_least_one else "a positive number"
            raise ValueError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to 2**32 - 1, not {args.seed}")
    if not 0 <= args.warmup <= 1:
        raise ValueError(f"--warmup must be from 0 to 1, not {args.warmup}")
    if importlib.util.find_spec("rich") is None:
        raise ValueError("the demo needs rich: pip install 'rich>=13,<16'")


def _finetuning_text(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out bytes, uint8."""
    whole = text.to_tensor(text.file_text(args.text) if args.text else text.documentation_topics())
    held_out = int(len(whole) * _HELD_OUT)
    if held_out < args.seq + 1:
        raise ValueError(
            f"{args.text or 'the text'} is too short: its last tenth, held out, is {held_out} bytes, "
            f"and a window of --seq {args.seq} needs {args.seq + 1}"
        )
    return whole[:-held_out], whole[-held_out:]


def main(args: argparse.Namespace) -> int:
    """Runs the command.  Returns 0, or 2 after one sentence on stderr about an option that cannot be."""
    try:
        _check(args)
        device = _device(args.device)
        config = Config(args.layers, args.d_model, args.heads, args.kv_heads or args.heads, args.ffn)
        training, held_out = _finetuning_text(args)
        sources = text.to_tensor(text.stdlib_sources())
    except ValueError as error:
        print(f"python -m lomo_kernels demo: {error}", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    compare(args, ByteLlama(config, seed=args.seed).to(device), sources, training, held_out)
    return 0


def compare(
    args: argparse.Namespace,
    model: ByteLlama,
    sources: torch.Tensor,
    training: torch.Tensor,
    held_out: torch.Tensor,
) -> list[Result]:
    """Pre-trains `model` in place on `sources`, fine-tunes a copy by each method on `training`, prints the table.

    Args:
        model: float32.
        sources, training, held_out: uint8 [n], n > args.seq.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    def drawn(steps: int) -> Iterable[torch.Tensor]:
        return text.batches(training, count=steps, batch=args.batch, seq=args.seq, seed=args.seed + 1)

    console = Console()
    count = sum(parameter.numel() for parameter in model.parameters())
    source = args.text or "documentation topics"
    console.print(
        f"A model of {count / 1e6:.1f}M parameters over bytes: pre-trained on {len(sources) / 1e6:.1f} MB of the "
        f"standard library's sources, fine-tuned on {len(training) / 1e6:.2f} MB of {source}, "
        f"evaluated on {len(held_out) / 1e3:.0f} KB of it held out.",
        markup=False,  # a file's name may contain brackets
    )
    windows = text.windows(held_out, limit=args.eval_windows, seq=args.seq)
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[measured]}"),
        TimeRemainingColumn(),
    )
    results = []
    with Progress(*columns, console=console) as progress:
        pretraining = Method("pre-training", lambda model: _adamw(model, args.lr_pretrain, args.clip))
        batches = text.batches(
            sources, count=args.pretrain_steps, batch=args.pretrain_batch, seq=args.seq, seed=args.seed
        )
        train(model, pretraining, batches, args.pretrain_steps, args.warmup, progress)
        model.to(_DTYPES[args.dtype]).checkpoint_blocks = args.checkpoint
        before = evaluate(model, windows)
        forward = peak_bytes(copy.deepcopy(model), None, drawn(1))
        for method in methods(args):
            # Two steps: the first makes the optimizer's state, the second runs beside it.
            peak = peak_bytes(copy.deepcopy(model), method, drawn(2))
            tuned = copy.deepcopy(model)
            seconds = train(tuned, method, drawn(args.steps), args.steps, args.warmup, progress)
            results.append(Result(method.name, peak, seconds, before, evaluate(tuned, windows)))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    console.print(_table(results, weights, forward))
    console.print(summary(results))
    return results


def _table(results: list[Result], weights: int, forward: int) -> Table:
    from rich.table import Table

    table = Table(
        title="Full-parameter fine-tuning from one checkpoint, with the same batches",
        caption=f"Weights {weights / _MIB:.1f} MiB; a forward pass alone peaks {forward / _MIB:.1f} MiB above them.",
    )
    table.add_column("method")
    for heading in ("peak above\nthe weights", "seconds\nper step", "held-out loss\nbefore", "held-out loss\nafter"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.method,
            f"{result.peak_bytes / _MIB:.1f} MiB",
            f"{result.step_seconds:.3f}",
            f"{result.loss_before:.3f}",
            f"{result.loss_after:.3f}",
        )
    return table
