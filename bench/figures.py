"""``python -m bench.figures``: writes the README's tables anew from the newest results of each device.

Results are committed under ``bench/results/``; tests/test_figures.py checks that the README says what they say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = RESULTS.parent.parent / "README.md"
DTYPES = ("bfloat16", "float16", "float32")


def newest() -> dict[str, Path]:
    """The newest file of each device with measurements: names are ``<device>-<year>-<month>-<day>.json``."""
    files = sorted(RESULTS.glob("*.json"), key=lambda file: file.stem[-10:])
    return {file.stem[:-11]: file for file in files if {"bench", "update"} & json.loads(file.read_text()).keys()}


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def source(file: Path) -> str:
    return f"[{file.name}](bench/results/{file.name})"


def cpu_figures(file: Path) -> Iterator[str]:
    results = json.loads(file.read_text())
    about = results["environment"]
    update, norm = results["update"], results["norm"]
    yield (
        f"One thread of {about['device']} ({about['instruction_set']}), torch {about['torch']}, commit "
        f"{about['commit'][:7]}: {source(file)}. Medians of ratios taken round by round in one process. The probe reads"
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
        f"{about['triton']}, commit {about['commit'][:7]}: {source(file)}. Fractions of the speed of a copy on the "
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


def figures() -> str:
    """The README's section."""
    lines: list[str] = []
    files = newest()
    for device, file in files.items():
        lines += ["", *(cpu_figures(file) if device.startswith("cpu") else gpu_figures(file))]
    if all(device.startswith("cpu") for device in files):
        lines += ["", "No GPU was measured."]
    return "\n".join(lines) + "\n\n"


def replaced(readme: str) -> str:
    """The README with its figures made anew."""
    before, rest = readme.split("<!-- figures, from `python -m bench.figures` -->\n")
    _, after = rest.split("<!-- end of figures -->\n")
    return f"{before}<!-- figures, from `python -m bench.figures` -->\n{figures()}<!-- end of figures -->\n{after}"


if __name__ == "__main__":
    README.write_text(replaced(README.read_text()))
