"""What memory does each method need, and which part saved what?

``python -m bench.bench_memory`` prints the paper's Table 1 beside ours: LLaMA-7B in full, simulated in minutes without
its memory (`lomo_kernels.plan`), every category with and without activation checkpointing; what each component saves;
and, as a check, a small model that really runs here, on a GPU where there is one (``--gpu`` names a larger one).
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lomo_kernels import tiled
from lomo_kernels.demo.model import Config
from lomo_kernels.plan import CATEGORIES, METHODS, SHAPES, llama, loss_of, simulate
from lomo_kernels.plan.methods import missing

from .measure import allocations, peak_of

GIB = 2**30
PAPER = {"model": "llama-7b", "sequence": 512, "batch": 8}
CHUNK = 256  # tokens whose logits exist at a time, where the loss is in chunks
SMALL = Config(layers=8, d_model=512, heads=8, kv_heads=8, ffn=1408, vocab=4096)
SMALL_CASE = {"model": "8 layers, width 512", "sequence": 256, "batch": 1}

#: arXiv 2306.09782v2, Table 1, GiB: gradients, optimizer states. The columns add up to 1.00 less than the totals where
#: activations are kept.
PUBLISHED = {"AdamW": (12.55, 75.31), "SGD": (12.55, 25.10), "LOMO": (0.24, 0.00)}
PUBLISHED_PARAMETERS = 12.55
PUBLISHED_ACTIVATIONS = {False: 45.61, True: 1.79}
PUBLISHED_TOTALS = {"AdamW": (147.02, 102.20), "SGD": (96.81, 51.99), "LOMO": (59.40, 14.58)}

#: What the paper's three rows are here, and with the attention and RMSNorm that transformers had then.
OF_2023 = ("AdamW, fp32 master", "SGD, fp32 master", "lomo_optim")

#: Each row leaves out one more thing than the row before.
COMPONENTS = {
    "AdamW, fp32 master": "",
    "AdamW": "float32 master weights; moments in bfloat16",
    "SGD": "optimizer states",
    "lomo_optim": "the set of gradients: each is used in backward",
    "Lomo": "float32 copies of weight and gradient",
    "Lomo, fused": "gradients of linear layers and embeddings",
}
#: What exact clipping by the global norm costs on top, by the way it is done.
CLIPPING = ("lomo_optim, two", "Lomo, two", "Lomo, two, fused", "Lomo, one backward", "Lomo, one backward, fused")
#: (checkpointing, loss in chunks)
SETTINGS = {"all kept": (False, False), "checkpoints": (True, False), "checkpoints, loss in chunks": (True, True)}

Progress = Callable[[str], None]


def contestants() -> list[str]:
    """lomo_optim is left out where it is not installed; `missing` says so."""
    return [name for name in METHODS if not (name.startswith("lomo_optim") and missing())]


def result(contestant: str, case: dict[str, Any], how: str, bytes_: dict[str, int], **more: Any) -> dict[str, Any]:
    return {"question": "memory", "contestant": contestant, "case": case, "how": how, "bytes": bytes_, **more}


def simulated(
    name: str,
    base: dict[str, Any],
    config: Config,
    *,
    checkpointing: bool,
    chunked: bool = False,
    kernels: str = "gpu",
) -> dict[str, Any]:
    chunk = CHUNK if chunked else None
    build, loss = llama(config, checkpointing=checkpointing), loss_of(base["batch"], base["sequence"], chunk)
    peak = simulate(build, loss, METHODS[name], kernels=kernels)
    case = {**base, "checkpointing": checkpointing, "chunk": chunk, "kernels": kernels}
    return result(name, case, "simulated", {**peak.at_peak, "peak": peak.peak}, most=peak.most)


def published() -> Iterator[dict[str, Any]]:
    for name, (gradients, states) in PUBLISHED.items():
        for checkpointing, total in zip((False, True), PUBLISHED_TOTALS[name], strict=True):
            gib = {
                "parameters": PUBLISHED_PARAMETERS,
                "gradients": gradients,
                "optimizer states": states,
                "activations": PUBLISHED_ACTIVATIONS[checkpointing],
                "peak": total,
            }
            case = {**PAPER, "checkpointing": checkpointing}
            yield result(f"{name} (paper)", case, "published", {key: round(value * GIB) for key, value in gib.items()})


def measured(name: str, base: dict[str, Any], config: Config, *, checkpointing: bool, device: str) -> dict[str, Any]:
    """A step that is really taken, after a first one: on the CPU torch's profiler sees every allocation, also inside
    operators; on a GPU it is `torch.cuda.max_memory_allocated`."""
    build, loss = llama(config, checkpointing=checkpointing), loss_of(base["batch"], base["sequence"])
    gc.collect()
    with torch.device(device):
        model = build()
        attached = METHODS[name].attach(model)
        attached.update(loss(model))
        gc.collect()
        if device == "cpu":
            tiled.buffer.memory = torch.empty(0)  # a tile that stayed counts too
            there = sum(tensor.nbytes for tensor in (*model.parameters(), *attached.states()))
            peak = there + peak_of(allocations(lambda: attached.update(loss(model))))
        else:
            torch.cuda.reset_peak_memory_stats()
            attached.update(loss(model))
            peak = torch.cuda.max_memory_allocated()
    return result(name, {**base, "checkpointing": checkpointing, "device": device}, "measured", {"peak": peak})


def of_the_paper(progress: Progress) -> Iterator[dict[str, Any]]:
    """LLaMA-7B as in the paper, simulated: some two minutes."""
    yield from published()
    config = SHAPES[PAPER["model"]]
    for name in contestants():
        for setting, (checkpointing, chunked) in SETTINGS.items():
            progress(f"{name}, {setting}")
            yield simulated(name, PAPER, config, checkpointing=checkpointing, chunked=chunked)
    for name in (name for name in OF_2023 if name in contestants()):
        for checkpointing in (False, True):
            progress(f"{name}, kernels of 2023")
            yield simulated(name, PAPER, config, checkpointing=checkpointing, kernels="unfused")


def checks(progress: Progress, gpu: str | None) -> Iterator[dict[str, Any]]:
    """Real runs beside their simulations: of a small model here, or of `gpu`, a key of `SHAPES`, on the GPU."""
    device, config, case = "cpu", SMALL, SMALL_CASE
    if gpu is not None:
        device, config, case = "cuda", SHAPES[gpu], {"model": gpu, "sequence": 512, "batch": 1}
    for name in contestants():
        for checkpointing in (False, True):
            progress(f"{name}, {case['model']}, on {device}, checkpointing={checkpointing}")
            kernels = "cpu" if device == "cpu" else "gpu"
            yield simulated(name, case, config, checkpointing=checkpointing, kernels=kernels)
            yield measured(name, case, config, checkpointing=checkpointing, device=device)


def measurements(full: bool, progress: Progress = lambda what: None, gpu: str | None = None) -> list[dict[str, Any]]:
    """Everything that the tables show. Unless `full` only the checks."""
    return [*(of_the_paper(progress) if full else ()), *checks(progress, gpu)]


# ---- Tables ---------------------------------------------------------------------------------------------------------


def _find(results: list[dict[str, Any]], contestant: str, how: str = "simulated", **case: Any) -> dict[str, Any] | None:
    for one in results:
        if one["contestant"] == contestant and one["how"] == how and case.items() <= one["case"].items():
            return one
    return None


def _print(title: str, head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    print(f"\n{title}")
    for row in (head, *rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())


def _gib(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / GIB:.2f}"


def print_table_1(results: list[dict[str, Any]]) -> None:
    """The paper's Table 1: each category's own maximum, and the peak of the total."""
    for checkpointing in (False, True):
        rows = []
        for one in results:
            shown = one["how"] == "published" or (one["case"].get("kernels") != "cpu" and not one["case"].get("chunk"))
            if not shown or one["case"]["model"] != PAPER["model"] or one["case"]["checkpointing"] != checkpointing:
                continue
            name = one["contestant"] + (", kernels of 2023" if one["case"].get("kernels") == "unfused" else "")
            most = one.get("most", one["bytes"])
            rows.append([name, *(_gib(most.get(category)) for category in CATEGORIES), _gib(one["bytes"]["peak"])])
        title = f"LLaMA-7B, sequence 512, batch 8, {'with' if checkpointing else 'no'} activation checkpointing, GiB"
        _print(f"{title}: each category's maximum, and the largest total", ["", *CATEGORIES, "peak"], rows)


def print_ablation(results: list[dict[str, Any]]) -> None:
    rows, before = [], dict.fromkeys(SETTINGS, 0)
    for name, less in (*COMPONENTS.items(), *((name, "(adds exact clipping)") for name in CLIPPING)):
        cells = []
        for setting, (checkpointing, chunked) in SETTINGS.items():
            case = {**PAPER, "checkpointing": checkpointing, "chunk": CHUNK if chunked else None, "kernels": "gpu"}
            one = _find(results, name, **case)
            if one is None:
                cells.append("not installed")
                continue
            peak = one["bytes"]["peak"]
            saved = before[setting] - peak
            cells.append(_gib(peak) + (f" ({-saved / GIB:+.2f})" if name in COMPONENTS and less else ""))
            before[setting] = peak
        rows.append([name, less, *cells])
    _print("What each component saves, LLaMA-7B, sequence 512, batch 8: peak, GiB", ["", "without", *SETTINGS], rows)


def print_check(results: list[dict[str, Any]]) -> None:
    rows = []
    for real in (one for one in results if one["how"] == "measured"):
        case = {key: value for key, value in real["case"].items() if key != "device"}
        one = _find(results, real["contestant"], **case)
        assert one is not None
        peak, simulation = real["bytes"]["peak"], one["bytes"]["peak"]
        checkpoints = "checkpoints" if case["checkpointing"] else "all kept"
        cells = [f"{peak / 2**20:.1f}", f"{simulation / 2**20:.1f}", f"{simulation / peak:.3f}"]
        rows.append([f"{real['contestant']}, {checkpoints}", *cells])
    where = next(one["case"] for one in results if one["how"] == "measured")
    title = f"{where['model']}, sequence {where['sequence']}, batch {where['batch']}, really run on {where['device']}"
    _print(f"{title}: peak, MiB", ["", "measured", "simulated", "ratio"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="only the small model")
    parser.add_argument("--gpu", choices=SHAPES, help="measure this model on the GPU, beside its simulation")
    arguments = parser.parse_args()
    for name in missing():
        print(f"{name} is not installed: lomo_optim is missing from the tables (pip install 'lomo_kernels[bench]')")
    results = measurements(not arguments.short, lambda what: print(f"... {what}", flush=True), arguments.gpu)
    if not arguments.short:
        print_table_1(results)
        print_ablation(results)
    print_check(results)


def test_the_simulation_is_what_a_real_run_takes() -> None:
    results = measurements(full=False)
    for real in (one for one in results if one["how"] == "measured"):
        case = {key: value for key, value in real["case"].items() if key != "device"}
        one = _find(results, real["contestant"], **case)
        assert one is not None
        most, least = one["bytes"]["peak"], one["bytes"]["peak"] - one["bytes"]["workspace"]
        assert 0.97 * least <= real["bytes"]["peak"] <= 1.03 * most, one


if __name__ == "__main__":
    main()
