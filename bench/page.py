"""bench/results/README.md: what was measured on which device, with every table and plot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import tables
from .__main__ import TUNED
from .peers import PEERS
from .results import Results, device_and_date
from .rivals import BASE, clips, ours
from .tables import Lines, lost


class Device(NamedTuple):
    """The results of one device, and the files they come from, the newest last."""

    files: tuple[Path, ...]
    results: Results

    @property
    def name(self) -> str:
        return device_and_date(self.files[-1])[0]

    @property
    def date(self) -> str:
        return device_and_date(self.files[-1])[1]

    @property
    def title(self) -> str:
        detail = next((str(one.case["detail"]) for one in self.results.measurements if "detail" in one.case), "")
        device = str(self.results.environment["device"])
        return f"{device}, {detail}" if detail and self.is_cpu else device

    @property
    def is_cpu(self) -> bool:
        return "capability" not in self.results.environment

    def command(self, *arguments: str) -> str:
        return f"`python -m bench {' '.join(arguments)}{'' if self.is_cpu else ' --device cuda'}`"

    def pictures(self) -> dict[str, list[Picture]]:
        """By question, in the order in which the page shows them."""
        asked = self.results.questions()
        return {
            question: [one for one in made if one.wanted(self.results)]
            for question, made in PICTURES.items()
            if question in asked
        }

    def path(self, picture: Picture) -> str:
        return f"{self.name}-{picture.name}.svg"


class Picture(NamedTuple):
    """A plot of bench/plots.py, by the name of its function, and what it shows."""

    name: str
    shows: str
    wanted: Callable[[Results], bool] = lambda results: True


def several(question: str, key: str) -> Callable[[Results], bool]:
    return lambda results: len(tables.distinct(results.of(question), key)) > 1


def has_steps(results: Results) -> bool:
    return bool(tables.compared_cases(results))


def has_table_1(results: Results) -> bool:
    return any(map(tables.is_papers, tables.memory_cases(results)))


PICTURES = {
    "update": [
        Picture("update", "Speed of one update as a fraction of the memory's, by data type: ours and rivals"),
        Picture("update_sizes", "The same over the number of elements", several("update", "elements")),
        Picture("update_settings", "Ours with each instruction set or backend", several("update", "detail")),
    ],
    "norm": [Picture("norm", "Speed and error of the sum of squares: ours and rivals")],
    "hooks": [Picture("hooks", "Time per parameter over the number of parameters")],
    "step": [Picture("step", "Time of a training step against its peak memory, one point for each method", has_steps)],
    "memory": [Picture("memory", "What the peak is made of, the paper's Table 1 beside ours", has_table_1)],
}

ASKS = {
    "ceilings": "What does the device itself reach?",
    "update": "What fraction of memory bandwidth does the update reach?",
    "norm": "How fast, and how exact, is the sum of squares?",
    "lists": "What does one call for many small tensors save?",
    "linear": "What do a linear layer's update and norm cost when its weight gradient never exists?",
    "embedding": "And an embedding's?",
    "captured": "What does a step save that is captured in a CUDA graph?",
    "hooks": "What does an optimizer inside backward cost for each parameter?",
    "step": "How long does a whole training step take, and how much memory?",
    "data_parallel": "What does averaging inside the hooks cost, and save, next to DistributedDataParallel?",
    "sharded": "What does gathering less at a time cost under FSDP2, and save?",
    "memory": "What is the memory of LLaMA-7B's training made of?",
}

EXPLAINED = {
    "ceilings": "torch's own copy, maximum and product of large tensors. A copy counts bytes read and written.",
    "captured": "Times of a replay of the whole step are relative to the same step run eagerly.",
    "update": (
        "The probe reads two streams and writes one, in place, and does nothing else: no update of one parameter and "
        "one gradient moves fewer bytes. On a GPU it is a copy. “every scalar” is scale, clamp, coefficient and decay "
        "in the same pass; “with its norm” adds the sum of squares."
    ),
    "norm": "The probe reads one stream. The error is relative to float64.",
    "lists": "Times are relative to one call for each tensor.",
    "linear": (
        "Times are relative to the matrix product that makes the gradient as a tensor of its own. Who makes none can "
        "take less."
    ),
    "embedding": (
        "Times are relative to the making of the dense gradient, which touches every row; the others touch those that "
        "occur. `index_add_` rounds each occurrence, ours the sum of a row's."
    ),
    "hooks": (
        "Microseconds above a bare backward, which leaves gradients where they are, divided by the number of "
        "parameters. On a CPU with a malloc that keeps freed memory: new pages for the gradients that a bare backward "
        "leaves would weigh more than hooks do."
    ),
    "step": (
        "All methods ran interleaved, round by round; times are medians of the rounds' ratios. Peaks are of live "
        "bytes: activations, gradients, states, factors, copies."
    ),
    "data_parallel": (
        "Whole steps of a small Llama in float32, two processes over gloo on this machine, interleaved as above. "
        "DistributedDataParallel keeps its buckets, which the gradients are views of, between steps. So that "
        "gradients which end and come do not fault in new pages, malloc keeps freed memory, for everybody."
    ),
    "sharded": (
        "The same steps under `fully_shard`, which gathers, and reduces, a block at a time, or its attention and its "
        "MLP apart, or each linear layer (`lomo_kernels.plan.sharded.shard`). Weights are this rank's half."
    ),
    "memory": (
        "Live bytes of a step, simulated without a GPU (`lomo_kernels.plan`: the real model, optimizer and hooks on "
        "tensors without memory). As in the paper's Table 1, each category is its own maximum; the peak is of all at "
        "one time. "
        "The paper's rows are its own numbers; “not named” is what its totals have beyond its categories. “kernels of "
        "2023” has the attention that kept its softmax in float32, as the paper's models had; today's keeps one number "
        "per row."
    ),
}


def page(devices: list[Device]) -> str:
    lines = [
        "# Results",
        "",
        "Written by `python -m bench.report` from the files beside it. `make bench` measures a short selection, in",
        "minutes, `make bench-full` every size and case. The commands below, for single questions, take `make testing`",
        "first, and `.venv/bin/python` for `python`.",
        "",
        *HOW,
        "",
        *(f"- [{device.title}](#{anchor(device.title)}): {device.date}" for device in devices),
        "",
    ]
    for device in devices:
        lines += section(device)
    lines += rivals_set(devices)
    return "\n".join(lines).rstrip("\n") + "\n"


HOW = (
    "- Figures are medians, with the range in which nineteen samples of twenty lie (percentiles 2.5 to 97.5).",
    "- What is compared ran side by side: each sample of a call comes right after one of its probe, or all methods run",
    "  in every round, and ratios are taken round by round. So a busy machine moves both.",
    "  Compare the fractions and ratios of two rows, not their times or GB/s, which were taken at different moments.",
    "- Updates and norms use their buffers in turn, 256 MiB of them (512 on a GPU; 64 at 1 Ki elements of 16 bits), so",
    "  they come from memory. Lists and layers have one set, which may stay in the cache, and so has their yardstick.",
    "- Ours, and rivals' updates and steps, are checked against the reference before anything is timed.",
    "- A rival is listed as faster where its median is, by more than 2%, also where the ranges overlap.",
    "- **Bold** is ours.",
)


def anchor(title: str) -> str:
    """As GitHub makes it."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")


def section(device: Device) -> Lines:
    measured = device.results
    yield f"## {device.title}"
    yield ""
    yield from tables.environment(measured, device.files)
    if points := list(headlines(measured)):
        yield "### At a glance"
        yield ""
        yield from points
        yield ""
    for question, tabled in tables.SECTIONS.items():
        if question not in measured.questions():
            continue
        yield f"### {ASKS[question]}"
        yield ""
        yield f"{EXPLAINED[question]} {device.command(question)} measures it, with `--full` every case."
        yield ""
        for picture in device.pictures().get(question, []):
            yield f"![{picture.shows}]({device.path(picture)})"
            yield ""
        yield from tabled(measured, question)
        yield from lost(measured, question)
    if measured.checks:
        yield "### Build, tests and sanitizers"
        yield ""
        yield from (f"- {stage}: {check['said']}, {check['seconds']:.0f} s" for stage, check in measured.checks.items())
        yield ""
    if measured.missing:
        yield "### What is missing, and why"
        yield ""
        yield from (f"- {what}: {reason}" for what, reason in measured.missing.items())
        yield ""


def rivals_set(devices: list[Device]) -> Lines:
    """How each of those measured is set."""
    measured = {one.contestant for device in devices for one in device.results.measurements}
    yield "## How rivals are set"
    yield ""
    for peer, how in PEERS.items():
        if peer in measured:
            yield f"- {peer}: {how}."
    yield ""
    yield "In updates, norms and steps who allocates also ran with a malloc that keeps freed memory (“tuned malloc”):"
    yield f"`{' '.join(f'{key}={value}' for key, value in TUNED.items())}`."


def headlines(measured: Results) -> Lines:
    """What a reader takes away, in figures."""
    asked = measured.questions()
    if "update" in asked:
        yield from update_headlines(measured)
    if "norm" in asked:
        found = tables.at_headline(measured.of("norm"), "bfloat16")
        said = [
            f"{label} {tables.fraction(one)}, error {tables.error(one)}"
            for label in ("sq_norm_", "vector_norm")
            if (one := found.get(label))
        ]
        yield f"- Fraction of the memory's speed, sum of squares of a bfloat16 gradient: {'; '.join(said)}."
    if "step" in asked:
        yield from step_headlines(measured)
    if "memory" in asked:
        yield from memory_headlines(measured)


def update_headlines(measured: Results) -> Lines:
    asked = measured.of("update")
    for dtype in tables.DTYPES:
        found = tables.at_headline(asked, dtype)
        if mine := found.get("sgd_ nearest"):
            speed = mine.fraction.median
            times = [
                f"{speed / best.fraction.median:.2f} times {tables.name(best, tables.default(asked))}"
                for peer in ("add_", "SGD foreach", "optimi SGD, no Kahan", "lomo_optim")
                if (best := tables.at_best(asked, dtype, peer))
            ]
            yield f"- An update in {dtype} runs at {speed:.2f} of the memory's speed: {'; '.join(times)}."


def step_headlines(measured: Results) -> Lines:
    """Of the first case: the fastest with exact clipping, ours and that of others who free gradients in backward."""
    case = tables.step_cases(measured)[0]
    clipping = [one for one in measured.of("step", **case) if clips(one.contestant) and one.beside_seconds]
    for freeing in (("Lomo",), ("lomo_optim", "optimi")):
        if found := [one for one in clipping if one.contestant.startswith(freeing)]:
            best = min(found, key=lambda one: one.ratio.median)
            peak = tables.gib(best.memory["peak"])
            yield (
                f"- {tables.step_words(case)}: {best.contestant} takes {best.ratio.median:.2f} of the time of "
                f"{BASE} and {peak} GiB above the weights."
            )
    for base in (one for one in clipping if one.contestant == BASE):
        peak = tables.gib(base.memory["peak"])
        yield f"- {tables.step_words(case)}: {BASE} itself takes {peak} GiB above the weights."


def memory_headlines(measured: Results) -> Lines:
    """Of the paper's case: the least that ours take, and others in the same simulation; beside them what the paper
    says of its own, whose attention kept more."""
    for case in filter(tables.is_papers, tables.memory_cases(measured)):
        for checkpointing in (False, True):
            rows = tables.memory_rows(measured, case, checkpointing)
            totals = {label: sum(row.values()) for label, row in rows.items()}
            if mine := [label for label in totals if ours(label)]:
                least = min(mine, key=totals.__getitem__)
                others = ("lomo_optim, simulated", "SGD, simulated", "AdamW, simulated")
                labels = (least, *others, "LOMO, the paper", "AdamW, the paper")
                words = "; ".join(f"{label}: {totals[label]:.2f}" for label in labels if label in totals)
                how = "with" if checkpointing else "without"
                yield f"- LLaMA-7B {how} checkpointing, GiB: {words}."
