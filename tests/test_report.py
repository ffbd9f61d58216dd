"""The documents say what the committed results say, and the page says it right. Without matplotlib, but for plots."""

import dataclasses
import importlib
import itertools
import re
import shutil
import subprocess
import sys

import pytest

from bench import page, paper, report, results, rivals, tables
from bench.__main__ import QUESTIONS
from bench.peers import PEERS
from bench.results import ROOT, Measurement, Results

ABOUT = {"device": "Machine", "threads": 1, "torch": "2.13", "peers": {"lomo-optim": "0.1.1"}, "commit": "c" * 40}
SETTING = {"backend": "cpu", "detail": "avx2", "malloc": "stock"}


def timed(question, contestant, speed, *, beside="probe", spread=0.01, memory=None, error=None, **case):
    """As fast as what ran beside it, times `speed`."""
    seconds = [1e-3 / (speed * (1 + spread * k)) for k in (-2, -1, 0, 1, 2)]
    measured = {"bytes_moved": 3_000_000, "memory": memory or {}, "error": error}
    return Measurement(question, contestant, {**SETTING, **case}, seconds, beside, [1e-3] * 5, **measured)


def synthetic():
    """A little of every question."""
    measured = []
    for dtype, elements in ((dtype, elements) for dtype in tables.DTYPES for elements in (2**10, 2**24, 2**26)):
        case = {"dtype": dtype, "elements": elements}
        speeds = {"sgd_ nearest": 0.9, "sgd_ stochastic": 0.7, "add_": 0.95 if elements == 2**10 else 0.8}
        measured += [timed("update", who, speed, **case) for who, speed in speeds.items()]
        measured += [timed("update", "sgd_ nearest", 0.5, **case, detail="baseline")]
        measured += [timed("update", "lomo_optim", 0.1, **case, malloc="tuned")]
        measured += [
            timed("norm", "sq_norm_", 0.93, error=3e-9, **case),
            timed("norm", "vector_norm", 0.4, error=2e-3, **case),
        ]
    for question, who in (("lists", "_foreach_add_"), ("linear", "addmm_")):
        ours = {"lists": "sgd_list_", "linear": "linear_sgd_ nearest"}[question]
        for size in (16, 256):
            case = {"dtype": "bfloat16", "tensors" if question == "lists" else "tokens": size}
            measured += [timed(question, who, 0.8, **case), timed(question, ours, 0.9, **case)]
    for parameters in (10, 100):
        for who, speed in {"Lomo": 0.5, "hook, add_": 0.6, "lomo_optim": 0.01}.items():
            case = {"parameters": parameters, "shape": "256", "dtype": "float32"}
            measured.append(timed("hooks", who, speed, beside="bare backward", **case))
    for checkpointing in (False, True):
        for who, (speed, peak) in {
            rivals.BASE: (1.0, 200),
            "AdamW": (0.8, 600),
            rivals.FORWARD: (3.0, 100),
            "lomo_optim, clipping": (0.55, 120),
            "Lomo, clipping, two passes": (0.7, 110),
            "Lomo, clipping, one pass, fused": (0.97, 150),
            "Lomo": (1.0, 110),
        }.items():
            case = {"model": "30M", "tokens": 256, "checkpointing": checkpointing}
            memory = {"weights": 50 * 2**20, "states": 0, "peak": peak * 2**20}
            measured.append(timed("step", who, speed, beside=rivals.BASE, memory=memory, **case))
        for who, states in (("AdamW", 25), ("Lomo, clipping, two passes, fused", 0)):
            case = {
                "model": "llama-7b",
                "sequence": 512,
                "batch": 8,
                "checkpointing": checkpointing,
                "how": "simulated",
            }
            sizes = {"parameters": 12.5, "optimizer states": states, "activations": 1 if checkpointing else 44}
            memory = {category: int(size * 2**30) for category, size in sizes.items()}
            measured.append(Measurement("memory", who, {**SETTING, **case}, memory=memory))
    return Results(ABOUT, {"optimi": "not installed"}, measured)


@pytest.fixture
def machine(tmp_path):
    return page.Device((tmp_path / "machine-avx2-2026-01-02.json",), synthetic())


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """Only what is committed of bench/results: who has measured their own machine has more there."""
    folder = results.RESULTS
    listed = subprocess.run(["git", "ls-files"], cwd=folder, capture_output=True, text=True)
    names = [file.name for file in folder.iterdir()] if listed.returncode else listed.stdout.split()
    for name in names:
        shutil.copy(folder / name, tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path)


def test_documents_say_what_the_committed_results_say(committed):
    for document, text in report.documents(report.newest()).items():
        assert document.read_text() == text, f"{document.name} is not up to date: run `python -m bench.report`"


def test_every_picture_that_a_document_shows_is_there_and_no_other(committed):
    shown = {
        path
        for text in report.documents(report.newest()).values()
        for path in re.findall(r"!\[.*?\]\((?:.*/)?(.*?)\)", text)
    }
    assert shown == {file.name for file in results.RESULTS.glob("*.svg")}


def test_every_command_of_the_readme_selects_tests_and_questions():
    text = (ROOT / "README.md").read_text()
    selected = [word for words in re.findall(r"""-k '?([\w ]+)""", text) for word in words.split(" or ")]
    assert len(selected) > 10
    for word in selected:
        assert any((ROOT / "tests").glob(f"{word}*.py")), word  # -k takes parts of names
    asked = re.findall(r"make bench ARGS=(\w+)|python -m bench (\w+)", text)
    assert asked and {one or other for one, other in asked} <= set(QUESTIONS)


def test_of_every_rival_the_page_says_how_it_is_set():
    compared = [question for question in QUESTIONS if question != "ceilings"]
    modules = [importlib.import_module(f"bench.bench_{question}") for question in compared]
    every = {contestant for module in modules for contestant in module.CONTESTANTS}
    rival = {one for one in every if not rivals.ours(one) and one != rivals.FORWARD}
    assert rival == PEERS.keys()


def test_every_question_has_a_section(machine):
    text = page.page([machine])
    assert set(QUESTIONS) == set(page.ASKS) == set(page.EXPLAINED) == set(tables.SECTIONS) == set(tables.AXES)
    measured = machine.results.questions()
    assert [question for question in page.ASKS if page.ASKS[question] in text] == [
        q for q in page.ASKS if q in measured
    ]
    assert "optimi: not installed" in text


def test_the_page_has_medians_spreads_and_gigabytes(machine):
    row = next(line for line in page.page([machine]).splitlines() if line.startswith("| **`sgd_` nearest** |"))
    # 3 MB in 1 ms / 0.9; nineteen of twenty of five equidistant samples lie within 1.9 of 2 steps
    assert row == "| **`sgd_` nearest** | 1.11 ms | 2.7 | 0.90 | 0.88-0.92 |"


def test_where_a_rival_is_faster_it_is_said_and_nowhere_else(machine):
    said = [line for line in tables.lost(machine.results, "update") if line.startswith("-")]
    assert said == [
        f"- {dtype}: add_ is faster than `sgd_` nearest: 1.06 times at 1 Ki elements." for dtype in tables.DTYPES
    ]
    said = " ".join(tables.lost(machine.results, "step"))
    assert "SGD, clip_grad_norm_ is faster than Lomo, clipping, two passes: 1.43 times at 256 tokens" in said
    assert "lomo_optim, clipping is smaller than Lomo, clipping, one pass, fused: 1.18 times" in said
    assert "AdamW" not in said
    assert "hook, add_ is faster than Lomo: 1.20 times at 10 parameters" in " ".join(
        tables.lost(machine.results, "hooks")
    )


def test_what_a_command_of_the_readme_selects_has_what_is_shown(machine):
    """The cases of the committed results' README that the short selection lacks: of these a command says --full."""
    from bench import bench_hooks, bench_memory, bench_step, bench_update

    assert tables.HEADLINE in bench_update.ELEMENTS["short"]
    for cases in (bench_hooks.COUNTS, bench_memory.MODES):
        assert len(cases["full"]) > len(cases["short"]) and all(case in cases["full"] for case in cases["short"])
    assert not {case.model for case in bench_step.CASES["cpu"]["short"]} & {bench_step.CASES["cpu"]["full"][0].model}


def test_cases_stand_in_order_whatever_was_measured_first():
    sizes = [("float32", 64), ("bfloat16", 1024), ("bfloat16", 16), ("float32", 16)]
    ours = [timed("linear", "linear_sgd_ nearest", 0.8, dtype=dtype, tokens=size) for dtype, size in sizes]
    theirs = [timed("linear", "addmm_", 1.6, dtype=dtype, tokens=size) for dtype, size in sizes]
    both = Results(ABOUT, {}, [*ours, *theirs])
    head = next(tables.relative(both, "linear"))
    assert re.findall(r"\w+, [\w ]+ tokens", head) == [
        "bfloat16, 16 tokens",
        "bfloat16, 1 Ki tokens",
        "float32, 16 tokens",
        "float32, 64 tokens",
    ]
    said = " ".join(tables.lost(both, "linear"))
    assert "2.00 times at 16 tokens, 2.00 times at 1 Ki tokens" in said


def test_losses_of_memory_are_listed_with_chunks_and_with_other_kernels():
    case = {"model": "llama-7b", "sequence": 512, "batch": 8, "how": "simulated", "checkpointing": True}
    measured = [
        Measurement("memory", who, {**SETTING, **case, **mode}, memory={"parameters": peak})
        for who, peak in (("Lomo", 2000), ("lomo_optim", 1000))
        for mode in ({"kernels": "of 2023"}, {"chunk": 256})
    ]
    said = [line for line in tables.lost(Results(ABOUT, {}, measured), "memory") if line.startswith("-")]
    assert len(said) == 2 and all("smaller than Lomo: 2.00 times" in line for line in said)


@pytest.mark.parametrize(("speed", "count"), [(0.81, 0), (0.82, 1)])
def test_a_rival_is_faster_by_its_median_though_the_ranges_overlap(speed, count):
    case = {"dtype": "bfloat16", "elements": 2**20}
    pairs = [
        timed("update", "sgd_ nearest", 0.80, spread=0.05, **case),
        timed("update", "add_", speed, spread=0.05, **case),
    ]
    said = "\n".join(tables.lost(Results(ABOUT, {}, pairs), "update"))
    assert f"{count} of 1 comparisons" in said
    assert ("- bfloat16: add_ is faster than `sgd_` nearest: 1.02 times at 1 Mi elements." in said) == bool(count)


def test_the_headline_has_a_rival_with_the_malloc_that_it_is_faster_with(machine):
    stock = [timed("update", "lomo_optim", speed, dtype="bfloat16", elements=2**24) for speed in (0.05, 0.3)]
    for one, times in zip(stock, ("9.00 times lomo_optim, tuned malloc", "3.00 times lomo_optim."), strict=True):
        measured = [*machine.results.measurements, one]  # tuned it has 0.1 of the probe, ours 0.9
        device = machine._replace(results=Results(ABOUT, {}, measured))
        said = next(line for line in page.headlines(device.results) if "update in bfloat16" in line)
        assert times in said
        assert "| lomo_optim, tuned malloc | 0.10 | 0.10 | 0.10 |" in report.readme([device])


def test_the_headline_of_memory_has_the_rivals_of_the_same_simulation(machine):
    said = [line for line in page.headlines(machine.results) if line.startswith("- LLaMA-7B without")]
    assert len(said) == 1
    assert (
        "Lomo, clipping, two passes, fused, simulated: 56.50; AdamW, simulated: 81.50; LOMO, the paper: 59.40"
        in said[0]
    )


def test_a_table_names_what_its_times_are_held_to():
    case = {"model": "27M", "tokens": 256, "ranks": 2}
    one = timed("data_parallel", "Lomo", 1.1, beside="DDP, SGD", memory={"weights": 1, "states": 0, "peak": 2}, **case)
    assert "| time, DDP, SGD = 1 |" in next(tables.data_parallel(Results(ABOUT, {}, [one])))


def test_without_matplotlib_nothing_is_written_and_what_to_install_is_said(monkeypatch):
    monkeypatch.delitem(sys.modules, "bench.plots", raising=False)
    monkeypatch.delattr("bench.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(report, "documents", lambda devices: pytest.fail("begun"))
    with pytest.raises(SystemExit, match=r"the plots need matplotlib: pip install"):
        report.main()


def test_a_rival_that_nothing_is_held_against_is_an_error():
    with pytest.raises(KeyError):
        list(
            rivals.pairs(
                Results(ABOUT, {}, [timed("linear", who, 1.0) for who in ("linear_sgd_ nearest", "new")]), "linear"
            )
        )


def test_cost_per_parameter_is_what_is_above_a_bare_backward(machine):
    one = machine.results.of("hooks", parameters=10)[0]
    assert tables.per_parameter(one).median == pytest.approx((1e-3 / 0.5 - 1e-3) / 10)


def test_the_papers_totals_are_its_own(machine):
    rows = tables.memory_rows(machine.results, ("llama-7b", 512, 8), checkpointing=False)
    assert list(rows) == [
        "AdamW, the paper",
        "SGD, the paper",
        "LOMO, the paper",
        "AdamW, simulated",
        "Lomo, clipping, two passes, fused, simulated",
    ]
    for checkpointing, totals in paper.TOTALS.items():
        for method, row in paper.rows(checkpointing).items():
            assert sum(row.values()) == pytest.approx(totals[method])
            assert row["not named"] == (0 if checkpointing else 1)
    assert rows["Lomo, clipping, two passes, fused, simulated"]["activations"] == 44


def test_readme_has_the_headlines_with_their_commands(machine):
    text = report.readme([machine])
    for question in report.SHORT:  # those whose short selection has other cases than are shown measure all
        full = " --full" * (question in ("hooks", "step", "memory"))
        assert f"`python -m bench {question}{full}`" in text
    assert text.count("![") == len(report.PICTURED)
    assert "| 59.40 | 14.58 |" in text


def test_a_gpus_checks_and_commands(machine):
    about = {**ABOUT, "capability": [9, 0], "commits": {"update": "a" * 40, "norm": "b" * 40 + "+"}}
    checks = {"ncu": {"said": "passed", "seconds": 3.0}, "more": {"said": "exit status 1", "seconds": 4.2}}
    gpu = machine._replace(results=dataclasses.replace(machine.results, environment=about, checks=checks))
    text = page.page([gpu])
    assert "- ncu: passed, 3 s\n- more: exit status 1, 4 s\n" in text
    assert "`python -m bench update --device cuda`" in text
    assert "aaaaaaa (update); bbbbbbb+ (norm)" in text


def test_every_device_has_all_of_its_files_but_short_ones_only_without_others(tmp_path, monkeypatch):
    full = ("cpu-avx2-2025-12-31", "cpu-avx2-2026-01-02", "nvidia-h200-2026-02-01-0930", "nvidia-h200-2026-02-01-1002")
    short = ("cpu-avx2-2026-03-01-short", "laptop-2026-01-05-short", "laptop-2026-01-06-short")
    for name in (*full, *short):
        results.write(tmp_path / f"{name}.json", Results(ABOUT))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    newest = {device.name: tuple(file.stem for file in device.files) for device in report.newest()}
    assert newest == {"cpu-avx2": full[:2], "nvidia-h200": full[2:], "laptop": short[1:]}


def test_the_files_of_a_device_are_one(tmp_path, monkeypatch):
    """Of one commit they add up. A newer commit's answer to a question takes the place of the older one."""
    old, new = ({**ABOUT, "commit": letter * 40, "capability": [9, 0]} for letter in "an")
    cuda, triton = ({"dtype": "bfloat16", "elements": 2**24, "backend": name} for name in ("cuda", "triton"))
    first = [timed("update", "sgd_ nearest", 0.8, **cuda), timed("norm", "sq_norm_", 0.5, error=0.0, **cuda)]
    second = [timed("norm", "sq_norm_", 0.9, error=0.0, **cuda)]
    third = [timed("norm", "sq_norm_", 0.7, error=0.0, **triton)]
    contents = (old, first, "a"), (new, second, "b"), (new, third, "a")
    for hour, (about, measured, stage) in enumerate(contents):
        check = {stage: {"status": hour == 1, "said": f"at {hour}", "seconds": 1.0}}
        results.add(tmp_path / f"gpu-2026-01-02-0{hour}00.json", Results(about, {}, measured, check))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    (device,) = report.newest()
    shown = [(one.question, one.case["backend"], round(one.fraction.median, 2)) for one in device.results.measurements]
    assert shown == [("update", "cuda", 0.8), ("norm", "cuda", 0.9), ("norm", "triton", 0.7)]
    assert [check["said"] for check in device.results.checks.values()] == ["at 2", "at 1"]
    asked = {"update": old, "norm": new, "a": new, "b": new}
    assert device.results.environment["commits"] == {name: about["commit"] for name, about in asked.items()}
    assert "aaaaaaa (update)" in page.page([device])
    assert all(file.name in report.source(device) for file in device.files)


def test_a_file_of_another_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a name like <device>"):
        results.device_and_date(tmp_path / "mine.json")


@pytest.mark.parametrize("arguments, is_short", [([], True), (["--full"], False), (["--full", "-k", "bfloat16"], True)])
def test_less_than_every_case_has_a_file_of_its_own(arguments, is_short, monkeypatch):
    from bench import __main__ as command

    files = []
    monkeypatch.setattr(command.results, "writable", files.append)
    monkeypatch.setattr(command, "measure", lambda *_: (None, 5))
    monkeypatch.setattr(sys, "argv", ["bench", "lists", *arguments])
    command.main()
    assert [results.is_short(file) for file in files] == [is_short]


@pytest.mark.parametrize(
    "seconds, text", [(2.0, "2 s"), (0.00314159, "3.14 ms"), (4.2e-6, "4.2 µs"), (5e-10, "0.5 ns"), (1e-6, "1 µs")]
)
def test_seconds(seconds, text):
    assert tables.seconds(seconds) == text


@pytest.mark.parametrize(
    "number, text", [(291, "291"), (1024, "1 Ki"), (2**24, "16 Mi"), (2**30, "1 Gi"), (1500, "1500")]
)
def test_count(number, text):
    assert tables.count(number) == text


def test_plots_are_the_same_whenever_the_results_are(machine, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib, of the extra 'bench'")
    from bench import plots

    drawn = [picture.name for made in machine.pictures().values() for picture in made]
    assert drawn == ["update", "update_sizes", "update_settings", "norm", "hooks", "step", "memory"]
    for name in drawn:
        files = [tmp_path / f"{name}-{turn}.svg" for turn in range(2)]
        for file in files:
            plots.save(name, machine.results, file)
        first, second = (file.read_text() for file in files)
        assert first == second
        assert "<dc:date>" not in first


def test_what_cannot_be_drawn_is_not():
    """A step whose yardstick did not fit, a part of every step, and a real run without the paper's case."""
    step = {"model": "1B", "tokens": 1, "checkpointing": False}
    run = {"model": "other", "sequence": 1, "batch": 1, "checkpointing": True}
    memory = {"weights": 1, "states": 0, "peak": 2}
    for one in (
        Measurement("step", "Lomo", {**SETTING, **step}, [1.0], memory=memory),
        timed("step", "forward alone", 1.0, memory=memory, **step),
        Measurement("memory", "Lomo", {**SETTING, **run, "how": "measured"}, memory={"all": 1}),
    ):
        simulated = Measurement("memory", "Lomo", {**SETTING, **run, "how": "simulated"}, memory={"parameters": 1})
        both = Results(ABOUT, {}, [one, simulated])
        device = page.Device((results.RESULTS / "x-2026-01-02.json",), both)
        assert device.pictures()[one.question] == []
        assert page.ASKS[one.question] in page.page([device])


def test_names_keep_apart():
    pytest.importorskip("matplotlib", reason="plots need matplotlib, of the extra 'bench'")
    from bench import plots

    assert plots.apart([0.0, 1.0], 0.1) == [0.0, 1.0]
    assert plots.apart([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    placed = plots.apart([0.0, 0.02, 0.1, 0.11, 0.5], 0.1)
    assert all(after - before >= 0.1 - 1e-9 for before, after in itertools.pairwise(placed))
