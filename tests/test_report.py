"""The documents say what the committed results say, and the page says it right. Without matplotlib, but for plots."""

import dataclasses
import itertools
import re

import pytest

from bench import page, paper, report, results, rivals, tables
from bench.__main__ import QUESTIONS
from bench.measure import ROOT
from bench.peers import PEERS
from bench.results import Measurement, Results

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
    return page.Device(tmp_path / "machine-avx2-2026-01-02.json", synthetic())


def test_documents_say_what_the_committed_results_say():
    for document, text in report.documents(report.newest()).items():
        assert document.read_text() == text, f"{document.name} is not up to date: run `python -m bench.report`"


def test_every_picture_that_a_document_shows_is_there_and_no_other():
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
        assert (ROOT / "tests" / f"{word}.py").exists(), word
    asked = re.findall(r"make bench ARGS=(\w+)|python -m bench (\w+)", text)
    assert asked and {one or other for one, other in asked} <= set(QUESTIONS)


def test_of_every_rival_that_was_measured_the_page_says_how_it_is_set():
    measured = [one for device in report.newest() for one in device.results.measurements]
    rival = {one.contestant for one in measured if not rivals.ours(one.contestant)} - {rivals.FORWARD}
    assert rival <= PEERS.keys()


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
    # 3 MB in 1 ms / 0.9; four fifths of five equidistant samples lie within 1.6 of 2 steps
    assert row == "| **`sgd_` nearest** | 1.11 ms | 2.7 | 0.90 | 0.89-0.91 |"


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


def test_ranges_that_overlap_decide_nothing():
    case = {"dtype": "bfloat16", "elements": 2**20}
    pairs = [
        timed("update", "sgd_ nearest", 0.80, spread=0.05, **case),
        timed("update", "add_", 0.82, spread=0.05, **case),
    ]
    assert [pair.faster for pair in rivals.pairs(Results(ABOUT, {}, pairs), "update")] == [False]


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
    for question in report.SHORT:
        assert f"`python -m bench {question}`" in text
    assert text.count("![") == len(report.PICTURED)
    assert "| 59.40 | 14.58 |" in text


def test_a_gpus_checks_and_commands(machine):
    about = {**ABOUT, "capability": [9, 0], "commits": {"update": "a" * 40, "norm": "b" * 40 + "+"}}
    checks = {"test": {"cuda": {"status": 0}, "triton": {"status": 1}}}
    gpu = machine._replace(results=dataclasses.replace(machine.results, environment=about, checks=checks))
    text = page.page([gpu])
    assert "- test, cuda: passed\n- test, triton: FAILED with status 1\n" in text
    assert "`python -m bench update --device cuda`" in text
    assert "aaaaaaa (update); bbbbbbb+ (norm)" in text


def test_every_device_has_its_newest_file(tmp_path, monkeypatch):
    for name in ("cpu-avx2-2026-01-02", "cpu-avx2-2025-12-31", "nvidia-h200-2026-02-01", "nvidia-h200-2026-01-31"):
        results.write(tmp_path / f"{name}.json", Results(ABOUT))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert {one.name: one.date for one in report.newest()} == {"cpu-avx2": "2026-01-02", "nvidia-h200": "2026-02-01"}


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


def test_names_keep_apart():
    pytest.importorskip("matplotlib", reason="plots need matplotlib, of the extra 'bench'")
    from bench import plots

    assert plots.apart([0.0, 1.0], 0.1) == [0.0, 1.0]
    assert plots.apart([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    placed = plots.apart([0.0, 0.02, 0.1, 0.11, 0.5], 0.1)
    assert all(after - before >= 0.1 - 1e-9 for before, after in itertools.pairwise(placed))
