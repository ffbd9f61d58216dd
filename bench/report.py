"""``python -m bench.report``: writes bench/results/README.md, its plots, and the other documents' tables of results.

From the newest file of each device in bench/results. Nothing is measured here; what was not measured is left out.
tests/test_report.py checks that the documents say what the committed results say.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from . import paper, results, tables
from .page import EXPLAINED, Device, page
from .peers import EXTRA
from .results import ROOT
from .tables import Lines, lost, strong, table

BEGIN, END = "<!-- results, from `python -m bench.report` -->\n", "<!-- end of results -->\n"


def readme(devices: list[Device]) -> str:
    lines = [
        "",
        "Medians. [bench/results](bench/results/README.md) has every size, every rival, how each is set, the spreads,",
        "and where a rival is faster. Commands take `make testing` first, and `.venv/bin/python` for `python`.",
    ]
    for device in devices:
        lines += ["", source(device), ""]
        for question, short in SHORT.items():
            if question in device.results.questions():
                for picture in device.pictures().get(question, [])[:1] if question in PICTURED else []:
                    lines += [f"![{picture.shows}](bench/results/{device.path(picture)})", ""]
                lines += short(device)
    if all(device.is_cpu for device in devices):
        lines += ["No GPU was measured.", ""]
    return "\n".join(lines) + "\n"


PICTURED = ("update", "step")  # in the README; the page has all


def source(device: Device, up: str = "") -> str:
    """What gave the figures."""
    about = device.results.environment
    threads = f"{about['threads']} thread, " if device.is_cpu else ""
    words = f"{device.title}, {threads}torch {about['torch']}, commit {tables.commits(about)}, {device.date}"
    return f"{words}: {', '.join(f'[{file.name}]({up}bench/results/{file.name})' for file in device.files)}."


#: Of the update, in the README.
SHOWN = (
    "sgd_ nearest",
    "sgd_ nearest, every scalar",
    "sgd_ stochastic",
    "add_",
    "SGD foreach",
    "optimi SGD, no Kahan",
    "lomo_optim",
)


def short_update(device: Device) -> Lines:
    measured = device.results.of("update")
    size, usual = tables.headline_size(measured), tables.default(measured)
    rows = []
    for contestant in SHOWN:
        of_it = [one for one in measured if one.contestant == contestant and one.case["elements"] == size]
        of_it = [one for one in of_it if tables.setting(one)[:2] == usual[:2]]  # with either malloc
        for label, ones in tables.by_name(of_it, usual).items():
            found = {one.case["dtype"]: one for one in ones}
            rows.append([strong(label), *(tables.fraction(found.get(dtype)) for dtype in tables.DTYPES)])
    head = f"update of {tables.count(size)} elements, fraction of the probe “{measured[0].beside}”"
    yield from table([head, *tables.DTYPES], rows)
    yield device.command("update")
    yield ""


def short_norm(device: Device) -> Lines:
    measured = device.results.of("norm")
    found = {dtype: tables.at_headline(measured, dtype) for dtype in tables.DTYPES}
    rows = []
    for contestant, shown in (("sq_norm_", "**`sq_norm_`**"), ("vector_norm", "`torch.linalg.vector_norm`")):
        speeds = [tables.fraction(of.get(contestant)) for of in found.values()]
        errors = [tables.error(of.get(contestant)) for of in found.values()]
        rows += [[f"{shown}, fraction of the probe “{measured[0].beside}”", *speeds]]
        rows += [[f"{shown}, error relative to float64", *errors]]
    yield from table([f"norm of {tables.count(tables.headline_size(measured))} elements", *found], rows)
    yield device.command("norm")
    yield ""


def short_hooks(device: Device) -> Lines:
    """The first case."""
    yield from tables.of_hooks(device.results, *tables.hook_cases(device.results)[0])
    yield device.command("hooks", "--full")
    yield ""


def short_step(device: Device) -> Lines:
    """The first case."""
    yield from tables.step(device.results, tables.step_cases(device.results)[0])
    yield f"{device.command('step', '--full')}; more of it in [docs/one_backward.md](docs/one_backward.md)."
    yield ""


def short_memory(device: Device) -> Lines:
    """Totals of the paper's case."""
    case = next((one for one in tables.memory_cases(device.results) if tables.is_papers(one)), None)
    if case is None:
        return
    plain, saved = (tables.memory_rows(device.results, case, checkpointing) for checkpointing in (False, True))
    rows = [
        [
            strong(label),
            *(f"{sum(of[label].values()):.2f}" if label in of else "-" for of in (plain, saved)),
        ]
        for label in dict.fromkeys([*plain, *saved])
    ]
    head = f"LLaMA-7B, sequence {paper.SEQUENCE}, batch {paper.BATCH}: peak, GiB"
    yield from table([head, "no checkpointing", "checkpointing"], rows)
    yield device.command("memory", "--full")
    yield ""


SHORT = {"update": short_update, "norm": short_norm, "hooks": short_hooks, "step": short_step, "memory": short_memory}


def one_backward(devices: list[Device]) -> str:
    lines = [""]
    if not any("step" in device.results.questions() for device in devices):
        lines += ["`python -m bench step --full` measures it; no results of it are committed yet.", ""]
    for device in devices:
        if "step" not in device.results.questions():
            continue
        lines += [f"{source(device, '../')} {EXPLAINED['step']} Command: {device.command('step', '--full')}.", ""]
        lines += tables.steps(device.results)
        lines += lost(device.results, "step")
    return "\n".join(lines) + "\n"


# --- writing ---------------------------------------------------------------------------------------------------------


def newest() -> list[Device]:
    """Every device, with all of its files that count."""
    return [Device(files, functools.reduce(results.merged, map(results.read, files))) for files in results.newest()]


def replaced(document: Path, text: str) -> str:
    """The document with its section of results made anew."""
    before, rest = document.read_text().split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{text}{END}{after}"


def documents(devices: list[Device]) -> dict[Path, str]:
    """What each of them has to say."""
    readme_file, one_backward_file = ROOT / "README.md", ROOT / "docs" / "one_backward.md"
    return {
        results.RESULTS / "README.md": page(devices),
        readme_file: replaced(readme_file, readme(devices)),
        one_backward_file: replaced(one_backward_file, one_backward(devices)),
    }


def main() -> None:
    try:
        from . import plots  # needs matplotlib, the tables do not
    except ModuleNotFoundError as error:
        sys.exit(f"the plots need {error.name}: {EXTRA}; nothing was written")

    devices = newest()
    for document, text in documents(devices).items():
        document.write_text(text)
        print(f"wrote {document.relative_to(ROOT)}")
    for old in results.RESULTS.glob("*.svg"):
        old.unlink()
    for device in devices:
        for picture in (one for made in device.pictures().values() for one in made):
            plots.save(picture.name, device.results, results.RESULTS / device.path(picture))
            print(f"drew {device.path(picture)}")


if __name__ == "__main__":
    main()
