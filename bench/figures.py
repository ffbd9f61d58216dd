"""``python -m bench.figures``: writes the documents' tables anew from the newest results of each device.

Results are committed under ``bench/results/``; tests/test_figures.py checks that the documents say what they say.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROOT = RESULTS.parent.parent
BEGIN, END = "<!-- figures, from `python -m bench.figures` -->\n", "<!-- end of figures -->\n"
DTYPES = ("bfloat16", "float16", "float32")


def newest(*kinds: str) -> dict[str, Path]:
    """The newest file of each device with a section of these: names are ``<device>-<year>-<month>-<day>.json``."""
    files = sorted(RESULTS.glob("*.json"), key=lambda file: file.stem[-10:])
    return {file.stem[:-11]: file for file in files if set(kinds) & json.loads(file.read_text()).keys()}


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def commit(about: dict[str, str]) -> str:
    """Short, with "+" where the files measured differed from it."""
    return about["commit"][:7] + "+" * about["commit"].endswith("+")


def source(file: Path, up: str = "") -> str:
    return f"[{file.name}]({up}bench/results/{file.name})"


def cpu_figures(file: Path) -> Iterator[str]:
    results = json.loads(file.read_text())
    about = results["environment"]
    update, norm = results["update"], results["norm"]
    yield (
        f"One thread of {about['device']} ({about['instruction_set']}), torch {about['torch']}, commit "
        f"{commit(about)}: {source(file)}. Medians of ratios taken round by round in one process. The probe reads"
        " two streams and writes one, in place: no update of one parameter and one gradient moves fewer bytes."
    )
    yield ""
    names = ("sgd_ nearest", "sgd_ nearest, every scalar", "sgd_ stochastic", "add_", "SGD foreach")
    shown = {
        "add_": "`param.add_(grad, alpha=-lr)`",
        "SGD foreach": "`torch.optim.SGD(foreach=True)`",
    }
    rows = [
        [shown.get(name, f"`sgd_`{name.removeprefix('sgd_').replace(' ', ', ', 1)}")]
        + [f"{update[dtype][name]['fraction_of_probe']['median']:.2f}" for dtype in DTYPES]
        for name in names
    ]
    yield from table(["4096 x 4096, fraction of the probe's speed", *DTYPES], rows)
    yield ""
    rows = []
    for name, what in (("sq_norm_", "`sq_norm_`"), ("vector_norm", "`torch.linalg.vector_norm`")):
        rows.append([f"{what}, 4096 x 4096, ms"] + [f"{norm[dtype][name]['seconds'] * 1e3:.2f}" for dtype in DTYPES])
    for name, what in (("sq_norm_", "`sq_norm_`"), ("vector_norm", "`torch.linalg.vector_norm`")):
        errors = [f"{results['norm_errors'][dtype][name]:.0e}" for dtype in DTYPES]
        rows.append([f"{what}, error at 33M elements, relative to float64", *errors])
    yield from table(["norm", *DTYPES], rows)
    yield ""
    hooks = results["hooks"]
    cells = [(count, who) for count in (291, 723) for who in ("Lomo", "torch hook")]
    rows = [
        [shape] + [f"{hooks[f'{count} x {shape}, float32, {who}']['median_us']:.1f}" for count, who in cells]
        for shape in ("256 elements", "64 x 64")
    ]
    head = [f"{count} parameters: {'`Lomo`' if who == 'Lomo' else 'a hook with `add_`'}" for count, who in cells]
    yield from table(["microseconds per parameter above bare autograd, float32", *head], rows)


def gpu_figures(file: Path) -> Iterator[str]:
    results = json.loads(file.read_text())
    about = results["environment"]
    yield (
        f"{about['device']}, driver {about['driver']}, nvcc {about['nvcc']}, torch {about['torch']}, Triton "
        f"{about['triton']}, commit {commit(about)}: {source(file)}. Fractions of the speed of a copy on the "
        "device (bytes moved over time), medians of ratios taken round by round."
    )
    yield ""
    measured = {backend: one for backend, one in results["bench"].items() if "kernels" in one}
    columns = [(backend, dtype) for backend in measured for dtype in DTYPES]
    rows = []
    for name in ("sgd_ nearest", "sgd_ nearest, every scalar", "sgd_ stochastic", "sq_norm_", "add_", "vector_norm"):
        cells = [measured[backend]["kernels"]["256M"][dtype][name] for backend, dtype in columns]
        rows.append([f"`{name}`", *(f"{cell['fraction_of_copy']['median']:.2f}" for cell in cells)])
    yield from table(["256M elements", *(f"{backend}, {dtype}" for backend, dtype in columns)], rows)
    yield ""
    clocks = [(backend, clock) for backend in measured for clock in ("wall", "gpu")]
    rows = []
    for name in ("sgd_, one by one", "sgd_list_", "sq_norm_, one by one", "sq_norm_list_"):
        cells = [measured[backend]["lists"][name][f"{clock}_seconds"] for backend, clock in clocks]
        rows.append([f"`{name}`", *(f"{seconds * 1e6:.0f}" for seconds in cells)])
    yield from table(["500 tensors of 4096, microseconds", *(f"{backend}, {clock}" for backend, clock in clocks)], rows)


def _llama(model: dict[str, Any]) -> str:
    return (
        f"Llama shape, bfloat16: {model['layers']} layers, width {model['d_model']}, MLP {model['ffn']}, vocabulary "
        f"{model['vocab']}: {model['weight_bytes'] / 2**20:.0f} MiB of weights."
    )


def short_step_figures(file: Path) -> Iterator[str]:
    """The first case of `step_figures`."""
    results = json.loads(file.read_text())
    case, steps = next(iter(results["steps"].items()))
    yield (
        f"Whole training steps. {_llama(results['model'])} Commit {commit(results['environment'])}: {source(file)}; "
        "more of it in [docs/one_backward.md](docs/one_backward.md)."
    )
    yield ""
    rows = [[name, _time(one), _peak(one)] for name, one in steps.items()]
    yield from table([case, "time, SGD with `clip_grad_norm_` = 1", "peak above the weights, MiB"], rows)


def step_figures(file: Path) -> Iterator[str]:
    results = json.loads(file.read_text())
    about = results["environment"]
    yield (
        f"{_llama(results['model'])} Whole steps, one thread of "
        f"{about['device']} ({about['instruction_set']}), torch {about['torch']}, commit {commit(about)}: "
        f"{source(file, '../')}. Times are medians of ratios to SGD with `clip_grad_norm_`, taken round by round; peaks"
        " are live bytes above the weights: activations, gradients, factors, copies."
    )
    for quantity, cell in (("time", _time), ("peak, MiB", _peak)):
        yield ""
        cases = list(results["steps"])
        names = list(results["steps"][cases[0]])
        yield from table(
            [quantity, *cases], [[name, *(cell(results["steps"][case][name]) for case in cases)] for name in names]
        )
    yield ""
    base = [statistics.median(one["SGD, clip_grad_norm_"]["seconds"]) for one in results["steps"].values()]
    yield "SGD with `clip_grad_norm_` takes " + ", ".join(f"{seconds:.2f} s" for seconds in base) + " in these cases."
    for name in results["missing"]:
        yield f"{name} was not installed."


def _time(result: dict[str, Any]) -> str:
    return f"{result['ratio_to_sgd_and_clip']['median']:.2f}"


def _peak(result: dict[str, Any]) -> str:
    return f"{result['peak_bytes'] / 2**20:.0f}"


def readme() -> str:
    """The README's section."""
    lines: list[str] = []
    files = newest("bench", "update")
    for device, file in files.items():
        lines += ["", *(cpu_figures(file) if device.startswith("cpu") else gpu_figures(file))]
    for file in newest("steps").values():
        lines += ["", *short_step_figures(file)]
    if all(device.startswith("cpu") for device in files):
        lines += ["", "No GPU was measured."]
    return "\n".join(lines) + "\n\n"


def one_backward() -> str:
    """The section of docs/one_backward.md."""
    lines = [line for file in newest("steps").values() for line in ("", *step_figures(file))]
    return "\n".join(lines) + "\n\n"


DOCUMENTS: dict[Path, Callable[[], str]] = {ROOT / "README.md": readme, ROOT / "docs" / "one_backward.md": one_backward}


def replaced(document: Path) -> str:
    """The document with its figures made anew."""
    before, rest = document.read_text().split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{DOCUMENTS[document]()}{END}{after}"


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(replaced(document))
