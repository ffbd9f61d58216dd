"""Tables of measured results, in Markdown, question by question.

Every function takes the results of one device. What was not measured is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from . import paper
from .peers import PEERS
from .results import DTYPES, Measurement, Results, Spread, device_and_date
from .rivals import BASE, FORWARD, Pair, ours, pairs

SETTING = ("backend", "detail", "malloc")  # of a case: what its process was set to
HEADLINE = 2**24  # elements: neither a parameter nor its gradient fits in a cache

Lines = Iterator[str]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Lines:
    """Numbers stand to the right."""
    head = list(head)
    yield "| " + " | ".join(head) + " |"
    yield "|---|" + "---:|" * (len(head) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def folded(summary: str, lines: Iterable[str]) -> Lines:
    yield f"<details><summary>{summary}</summary>"
    yield ""
    yield from lines
    yield "</details>"
    yield ""


def spread(of: Spread, digits: int = 2) -> str:
    """Median, and the range of nineteen samples of twenty. Small ones have two digits more."""
    digits += 2 * (of.median < 0.1)
    return f"{of.median:.{digits}f} ({of.low:.{digits}f}-{of.high:.{digits}f})"


def seconds(value: float) -> str:
    """With three digits, in the unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def count(number: int) -> str:
    """1024 is 1 Ki."""
    for unit, size in (("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)):
        if number >= size and number % size == 0:
            return f"{number // size} {unit}"
    return str(number)


def gib(number: float) -> str:
    return f"{number / 2**30:.{2 if number >= 2**30 else 3}f}"


def distinct(measurements: Iterable[Measurement], name: str) -> list[Any]:
    """The values that a case has there, in order of appearance; sizes in order of size."""
    values = list(dict.fromkeys(one.case.get(name) for one in measurements))
    return sorted(values) if all(isinstance(value, (int, bool)) for value in values) else values


def setting(one: Measurement) -> tuple[Any, ...]:
    return tuple(one.case.get(name) for name in SETTING)


def default(measurements: list[Measurement]) -> tuple[Any, ...]:
    """What a process has that forces nothing: it is measured first."""
    return setting(measurements[0])


def name(one: Measurement, usual: tuple[Any, ...]) -> str:
    """The contestant, with what its process was set to where that is not the usual; ours is set as code."""
    first, *rest = one.contestant.split(" ", 1)
    bare = first.rstrip(",")
    shown = (
        " ".join([f"`{bare}`{first[len(bare) :]}", *rest])
        if bare.endswith("_") and ours(one.contestant)
        else one.contestant
    )
    other = [value for value, normal in zip(setting(one), usual, strict=True) if value != normal]
    words = ["tuned malloc" if value == "tuned" else str(value) for value in other]
    return ", ".join([shown, *words])


def by_name(measurements: list[Measurement], usual: tuple[Any, ...]) -> dict[str, list[Measurement]]:
    groups: dict[str, list[Measurement]] = {}
    for one in measurements:
        groups.setdefault(name(one, usual), []).append(one)
    return groups


def serving(which: tuple[Any, ...]) -> str:
    """A setting's backend, or the detail that tells it from others: a CPU's instruction set."""
    backend, detail, _ = which
    return str(detail if backend == "cpu" else backend)


def ordered(measured: list[Measurement]) -> list[Measurement]:
    """Ours as they come, then rivals as `PEERS` has them, each beside itself in another setting."""
    appeared = list(dict.fromkeys(one.contestant for one in measured))
    places = {peer: place for place, peer in enumerate(PEERS)}
    return sorted(
        measured,
        key=lambda one: (
            not ours(one.contestant),
            places.get(one.contestant, -1),
            appeared.index(one.contestant),
        ),
    )


def strong(label: str) -> str:
    """Ours stands out."""
    return f"**{label}**" if ours(label.removeprefix("`")) else label


def headline_size(measurements: list[Measurement]) -> int:
    """The largest size up to `HEADLINE`, or the smallest there is."""
    sizes = distinct(measurements, "elements")
    return max((size for size in sizes if size <= HEADLINE), default=sizes[0])


def at_headline(measured: list[Measurement], dtype: str) -> dict[str, Measurement]:
    """By contestant, at the headline's size and in the usual setting."""
    size, usual = headline_size(measured), default(measured)
    return {
        one.contestant: one
        for one in measured
        if (one.case["dtype"], one.case["elements"], setting(one)) == (dtype, size, usual)
    }


def at_best(measured: list[Measurement], dtype: str, contestant: str) -> Measurement | None:
    """A rival at the headline's size, with the malloc that it is faster with."""
    size, usual = headline_size(measured), default(measured)
    found = [
        one
        for one in measured
        if (one.contestant, one.case["dtype"], one.case["elements"]) == (contestant, dtype, size)
        and setting(one)[:2] == usual[:2]
    ]
    return max(found, key=lambda one: one.fraction.median, default=None)


def fraction(one: Measurement | None) -> str:
    """Of the speed of what ran beside it."""
    return f"{one.fraction.median:.2f}" if one else "-"


def error(one: Measurement | None) -> str:
    return "-" if one is None or one.error is None else f"{one.error:.0e}"


# --- ceilings --------------------------------------------------------------------------------------------------------


def ceilings(results: Results, question: str = "ceilings") -> Lines:
    rows = [[one.contestant, seconds(one.time.median), one.reached] for one in results.of(question)]
    yield from table(["", "time", "reached"], rows)


# --- updates and norms -----------------------------------------------------------------------------------------------


def bandwidth(results: Results, question: str) -> Lines:
    """ "update" and "norm": each contestant at one size, by dtype; instruction sets; every size."""
    measured = results.of(question)
    usual = default(measured)
    size = headline_size(measured)
    for dtype in DTYPES:
        rows = []
        for one in ordered(results.of(question, dtype=dtype, elements=size)):
            if setting(one)[:2] != usual[:2]:
                continue  # in the table of instruction sets
            row = [strong(name(one, usual)), seconds(one.time.median), f"{one.gigabytes_per_second:.1f}"]
            row += [fraction(one), f"{one.fraction.low:.2f}-{one.fraction.high:.2f}"]
            rows.append(row if one.error is None else [*row, error(one)])
        if rows:
            probe = measured[0].beside
            head = [
                f"{dtype}, {count(size)} elements",
                "time",
                "GB/s",
                f"of the probe “{probe}”",
                "19 of 20 samples",
            ]
            yield from table(head + ["error"] * (len(rows[0]) > len(head)), rows)
    yield from settings(results, question, size)
    for dtype in DTYPES:
        if sized := results.of(question, dtype=dtype):
            yield from folded(f"Every size, {dtype}: fraction of the probe", sizes(sized, usual))


def settings(results: Results, question: str, size: int) -> Lines:
    """Ours in every setting of the process: instruction sets on a CPU, backends on a GPU."""
    measured = [one for one in results.of(question, elements=size) if ours(one.contestant)]
    served = list(dict.fromkeys(setting(one)[:2] for one in measured))
    if len(served) < 2:
        return
    found = {
        (one.contestant, one.case["dtype"], *setting(one)[:2]): spread(one.fraction)
        for one in measured
        if one.contestant in ("sgd_ nearest", "sgd_ stochastic", "sq_norm_")
    }
    columns = list(dict.fromkeys((contestant, dtype) for contestant, dtype, *_ in found))
    columns.sort(key=lambda column: (column[0], DTYPES.index(column[1])))
    rows = [
        [", ".join(str(part) for part in which if part), *(found.get((*column, *which), "-") for column in columns)]
        for which in served
    ]
    yield from table(["fraction of the probe", *(", ".join(column) for column in columns)], rows)


def sizes(measured: list[Measurement], usual: tuple[Any, ...]) -> Lines:
    columns = distinct(measured, "elements")
    rows = []
    for label, of_one in by_name(ordered(measured), usual).items():
        found = {one.case["elements"]: spread(one.fraction) for one in of_one}
        rows.append([strong(label), *(found.get(size, "-") for size in columns)])
    yield from table(["elements", *(count(size) for size in columns)], rows)


# --- calls held to another call --------------------------------------------------------------------------------------


def relative(results: Results, question: str) -> Lines:
    """ "lists", "linear" and "embedding": time over that of what ran beside it, by case."""
    measured = results.of(question)
    usual = default(measured)
    cases = list(dict.fromkeys(_own(one) for one in sorted(measured, key=_place)))
    for beside in dict.fromkeys(one.beside for one in measured):
        group = [one for one in measured if one.beside == beside]
        columns = [case for case in cases if any(_own(one) == case for one in group)]
        rows = []
        for label, of_one in by_name(group, usual).items():
            found = {_own(one): spread(one.ratio) for one in of_one}
            rows.append([strong(label), *(found.get(case, "-") for case in columns)])
        base = {
            case: Spread.of([s for one in group if _own(one) == case for s in one.beside_seconds]) for case in columns
        }
        rows.append([f"{beside}, itself", *(seconds(base[case].median) for case in columns)])
        yield from table([f"time over that of “{beside}”", *(", ".join(case) for case in columns)], rows)


def _own(one: Measurement) -> tuple[str, ...]:
    """The case in words, without the process's setting."""
    return tuple(_word(key, value) for key, value in one.case.items() if key not in SETTING)


def _place(one: Measurement) -> tuple[Any, ...]:
    """Where its case stands among those of its question: numbers by size, the rest by name."""
    return tuple((isinstance(value, str), value) for key, value in one.case.items() if key not in SETTING)


def _word(key: str, value: Any) -> str:
    if key == "checkpointing":
        return "checkpointing" if value else "no checkpointing"
    if key in ("elements", "tokens", "tensors", "parameters", "ranks"):
        return f"{count(value)} {key}"
    return f"{key} {value}" if isinstance(value, int) else str(value)


# --- hooks -----------------------------------------------------------------------------------------------------------


def per_parameter(one: Measurement) -> Spread:
    """Seconds above a bare backward, of each parameter."""
    return Spread(*(value / one.case["parameters"] for value in one.above))


def hook_cases(results: Results) -> list[tuple[str, str]]:
    """Shape and dtype of every table of hooks."""
    return list(dict.fromkeys((one.case["shape"], one.case["dtype"]) for one in results.of("hooks")))


def of_hooks(results: Results, shape: str, dtype: str) -> Lines:
    measured = results.of("hooks", shape=shape, dtype=dtype)
    columns = distinct(measured, "parameters")
    rows = []
    for label, of_one in by_name(measured, default(results.of("hooks"))).items():
        found = {one.case["parameters"]: _microseconds(per_parameter(one)) for one in of_one}
        rows.append([strong(label), *(found.get(number, "-") for number in columns)])
    head = f"µs per parameter of {shape}, {dtype}"
    yield from table([head, *(f"{number} parameters" for number in columns)], rows)


def hooks(results: Results, question: str = "hooks") -> Lines:
    for case in hook_cases(results):
        yield from of_hooks(results, *case)


def _microseconds(of: Spread) -> str:
    return spread(Spread(*(value * 1e6 for value in of)), 1)


# --- training steps --------------------------------------------------------------------------------------------------


def step_cases(results: Results) -> list[dict[str, Any]]:
    """Model, tokens, checkpointing and setting of every table of steps, the usual setting first."""
    measured = results.of("step")
    return [dict(case) for case in dict.fromkeys(tuple(one.case.items()) for one in measured)]


def compared_cases(results: Results) -> list[dict[str, Any]]:
    """Those of `step_cases` whose times were compared: on a small GPU what they are held to may not fit."""
    found = [(case, results.of("step", **case)) for case in step_cases(results)]
    return [case for case, measured in found if any(one.beside and one.contestant != FORWARD for one in measured)]


def step_words(case: dict[str, Any]) -> str:
    words = [f"Llama {case['model']}", f"{case['tokens']} tokens", _word("checkpointing", case["checkpointing"])]
    return ", ".join(words + ["tuned malloc"] * (case.get("malloc") == "tuned"))


def step(results: Results, case: dict[str, Any]) -> Lines:
    """One case: seconds, tokens per second, ratio, and the peak above the weights."""
    rows = []
    measured = results.of("step", **case)
    for one in measured:
        median = one.time.median
        ratio = spread(one.ratio) if one.beside_seconds else "-"
        row = [strong(one.contestant), seconds(median), f"{case['tokens'] / median:.0f}", ratio]
        rows.append([*row, gib(one.memory["peak"]), gib(one.peak)])
    head = [step_words(case), "step", "tokens/s", f"time, {BASE} = 1"]
    yield from table([*head, "peak above the weights, GiB", "with the weights, GiB"], rows)


def steps(results: Results, question: str = "step") -> Lines:
    first, *others = step_cases(results)
    yield from step(results, first)
    for case in others:
        yield from folded(step_words(case), step(results, case))


def data_parallel(results: Results, question: str = "data_parallel") -> Lines:
    """Seconds, ratio, and the peak above the weights with what is kept between steps."""
    for case in dict.fromkeys(_own(one) for one in results.of(question)):
        rows = []
        measured = [one for one in results.of(question) if _own(one) == case]
        for one in measured:
            row = [strong(one.contestant), seconds(one.time.median), spread(one.ratio)]
            rows.append(row + [f"{one.memory[part] / 2**20:.0f}" for part in ("peak", "states")])
        head = ["step", f"time, {measured[0].beside} = 1", "peak above the weights, MiB", "of it kept between steps"]
        yield from table([", ".join(case), *head], rows)


def sharded(results: Results, question: str = "sharded") -> Lines:
    """Ratios and peaks by what is gathered together."""
    measured = results.of(question)
    groups = distinct(measured, "group")
    for case in dict.fromkeys(_own_but(one, "group") for one in measured):
        found = {(one.contestant, one.case["group"]): one for one in measured if _own_but(one, "group") == case}
        rows = []
        for contestant in dict.fromkeys(contestant for contestant, _ in found):
            of_one = [found[contestant, group] for group in groups]
            row = [strong(contestant), *(spread(one.ratio) for one in of_one)]
            rows.append(row + [f"{one.memory['peak'] / 2**20:.0f}" for one in of_one])
        first = f"time by {groups[0]}, {measured[0].beside} = 1"
        head = [first, *(f"time by {group}" for group in groups[1:])]
        head += [f"peak above the weights by {group}, MiB" for group in groups]
        yield from table([", ".join(case), *head], rows)


# --- memory ----------------------------------------------------------------------------------------------------------


def memory_cases(results: Results) -> list[tuple[str, int, int]]:
    return list(
        dict.fromkeys((one.case["model"], one.case["sequence"], one.case["batch"]) for one in results.of("memory"))
    )


def is_papers(case: tuple[str, int, int]) -> bool:
    return (case[0].lower(), *case[1:]) == (paper.MODEL, paper.SEQUENCE, paper.BATCH)


def memory_rows(
    results: Results, case: tuple[str, int, int], checkpointing: bool, most: bool = False
) -> dict[str, dict[str, float]]:
    """GiB by category of each method, at the peak or the `most` of each; the paper's own first where it has this case.
    Without those whose loss is in chunks, which the paper's is not."""
    model, sequence, batch = case
    found = results.of("memory", model=model, sequence=sequence, batch=batch, checkpointing=checkpointing)
    rows = {f"{one}, the paper": row for one, row in paper.rows(checkpointing).items()} if is_papers(case) else {}
    for one in found:
        if "chunk" not in one.case:
            label = f"{one.contestant}, {one.case['how']}" + ", kernels of 2023" * ("kernels" in one.case)
            bytes_ = one.most if most and one.most else one.memory
            rows[label] = {key: value / 2**30 for key, value in bytes_.items()}
    return rows


def categories(rows: Iterable[dict[str, float]]) -> list[str]:
    """Those in which any method has something."""
    found = dict.fromkeys(key for row in rows for key, value in row.items() if value >= 0.005)
    return sorted(found, key=lambda category: category == "not named")


def memory(results: Results, question: str = "memory") -> Lines:
    for case, checkpointing in itertools.product(filter(is_papers, memory_cases(results)), (False, True)):
        if not results.of("memory", model=case[0], sequence=case[1], batch=case[2], checkpointing=checkpointing):
            continue
        rows = memory_rows(results, case, checkpointing, most=True)
        totals = memory_rows(results, case, checkpointing)
        columns = categories(rows.values())
        head = f"{case[0]}, sequence {case[1]}, batch {case[2]}, {_word('checkpointing', checkpointing)}; GiB"
        yield from table(
            [head, *columns, "peak"],
            (
                [strong(label)]
                + [f"{row.get(column, 0):.2f}" for column in columns]
                + [f"{sum(totals[label].values()):.2f}"]
                for label, row in rows.items()
            ),
        )
    yield from ablation(results)
    yield from simulation_errors(results)


#: Each leaves out one more thing than the one before.
COMPONENTS = {
    "AdamW, fp32 master": "",
    "AdamW": "float32 master weights; moments in bfloat16",
    "SGD": "optimizer states",
    "lomo_optim": "the set of gradients: each is used in backward",
    "Lomo": "float32 copies of weight and gradient",
    "Lomo, fused": "gradients of linear layers and embeddings",
}
#: What exact clipping by the global norm costs on top, by the way it is done.
CLIPPING = (
    "lomo_optim, clipping",
    "Lomo, clipping, two passes",
    "Lomo, clipping, two passes, fused",
    "Lomo, clipping, one pass",
    "Lomo, clipping, one pass, fused",
)


def ablation(results: Results) -> Lines:
    """Which part saved what: the peak of the paper's case as one thing after the other is left out."""
    cases = [one for one in results.of("memory", model=paper.MODEL) if "kernels" not in one.case]
    settings = list(dict.fromkeys((one.case["checkpointing"], one.case.get("chunk")) for one in cases))
    if not settings:
        return
    peaks = {(one.contestant, one.case["checkpointing"], one.case.get("chunk")): one.peak for one in cases}
    rows, before = [], dict.fromkeys(settings, 0)
    for contestant, less in (*COMPONENTS.items(), *((name, "(clips exactly)") for name in CLIPPING)):
        row = [strong(contestant), less or "-"]
        for setting in settings:
            peak = peaks.get((contestant, *setting))
            change = (
                f" ({(peak - before[setting]) / 2**30:+.2f})"
                if peak and before[setting] and not less.startswith("(")
                else ""
            )
            row.append(f"{peak / 2**30:.2f}{change}" if peak else "-")
            before[setting] = peak or 0
        rows.append(row)
    words = [_word("checkpointing", saved) + f", loss in chunks of {chunk}" * bool(chunk) for saved, chunk in settings]
    yield from table(["Which part saves what: peak, GiB", "without", *words], rows)


def simulation_errors(results: Results) -> Lines:
    """What was simulated and then really run."""
    rows = []
    for real in results.of("memory", how="measured"):
        same = {key: real.case[key] for key in ("model", "sequence", "batch", "checkpointing")}
        one = next(one for one in results.of("memory", how="simulated", **same) if one.contestant == real.contestant)
        peaks = [f"{peak / 2**20:.1f}" for peak in (real.peak, one.peak)]
        name_ = f"{real.contestant}, {_word('checkpointing', real.case['checkpointing'])}"
        rows.append([strong(name_), *peaks, f"{one.peak / real.peak:.3f}"])
    if rows:
        head = f"{real.case['model']}, {real.case['sequence']} tokens, really run: peak, MiB"
        yield from folded("Is the simulation right?", table([head, "measured", "simulated", "ratio"], rows))


# --- where a rival is faster -----------------------------------------------------------------------------------------

#: What a group of such cases has in a row.
AXES = {
    "ceilings": "",
    "captured": "tokens",
    "update": "elements",
    "norm": "elements",
    "lists": "tensors",
    "linear": "tokens",
    "embedding": "tokens",
    "hooks": "parameters",
    "step": "tokens",
    "data_parallel": "tokens",
    "sharded": "tokens",
    "memory": "",
}


def lost(results: Results, question: str) -> Lines:
    """Every case in which a rival is faster or takes less memory."""
    compared = list(pairs(results, question))
    if timed := [pair for pair in compared if pair.rival.beside_seconds and pair.ours.beside_seconds]:
        found = [pair for pair in timed if pair.faster]
        share = f"{len(found)} of {len(timed)} comparisons"
        yield f"**Where a rival is faster** (by more than 2% in the median, whatever the spreads): {share}."
        yield ""
        yield from _grouped(results, question, found, "faster", lambda pair: pair.times)
    if sized := [pair for pair in compared if pair.rival.memory and pair.ours.memory]:
        found = [pair for pair in sized if pair.smaller]
        yield f"**Where a rival takes less memory** (by more than 1%): {len(found)} of {len(sized)} comparisons."
        yield ""
        yield from _grouped(results, question, found, "smaller", lambda pair: pair.bytes)


def _grouped(results: Results, question: str, found: list[Pair], what: str, times: Callable[[Pair], float]) -> Lines:
    """By case and rival, along the question's axis."""
    usual, axis = default(results.of(question)), AXES[question]
    groups: dict[str, dict[str, list[str]]] = {}
    for pair in sorted(found, key=lambda pair: _place(pair.rival)):
        rival = f"{', '.join(_own_but(pair.rival, axis))}: {name(pair.rival, usual)} is {what} than"
        mine = groups.setdefault(rival, {}).setdefault(name(pair.ours, usual), [])
        where = f" at {_word(axis, pair.rival.case[axis])}" if axis else ""
        mine.append(f"{times(pair):.2f} times{where}")
    for rival, mine in groups.items():
        yield f"- {rival} " + "; ".join(f"{label}: {', '.join(many)}" for label, many in mine.items()) + "."
    if groups:
        yield ""


def _own_but(one: Measurement, axis: str) -> tuple[str, ...]:
    case = {key: value for key, value in one.case.items() if key != axis}
    return _own(Measurement(one.question, one.contestant, case))


# --- what it ran on --------------------------------------------------------------------------------------------------


def environment(results: Results, files: tuple[Path, ...]) -> Lines:
    about = results.environment
    known = {key: value for key, value in about.items() if key not in ("peers", "commits", "commit", "capability")}
    rows = [[key.replace("_", " "), str(value)] for key, value in known.items() if value != "none"]
    rows += [["peers", ", ".join(f"{key} {value}" for key, value in about["peers"].items())]]
    rows += [["commit", commits(about)], ["date", device_and_date(files[-1])[1]]]
    rows += [["file", f"[{file.name}]({file.name})"] for file in files]
    yield "| | |"
    yield "|---|---|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def commits(about: dict[str, Any]) -> str:
    """Short, with "+" where files measured differ from it; with the questions where they were asked of several."""
    asked: dict[str, list[str]] = {}
    for question, commit in about.get("commits", {}).items():
        asked.setdefault(commit, []).append(question)
    short = {commit: commit[:7] + "+" * commit.endswith("+") for commit in asked or [about["commit"]]}
    if len(short) == 1:
        return next(iter(short.values()))
    return "; ".join(f"{short[commit]} ({', '.join(questions)})" for commit, questions in asked.items())


SECTIONS: dict[str, Callable[[Results, str], Lines]] = {
    "ceilings": ceilings,
    "captured": relative,
    "update": bandwidth,
    "norm": bandwidth,
    "lists": relative,
    "linear": relative,
    "embedding": relative,
    "hooks": hooks,
    "step": steps,
    "data_parallel": data_parallel,
    "sharded": sharded,
    "memory": memory,
}
