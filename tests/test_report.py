"""The documents say what the committed results say, and the tables say it right."""

import dataclasses
import re
import shutil
import subprocess
import sys

import pytest

pd = pytest.importorskip("pandas", reason="tables and plots need the extra 'bench'")
pytest.importorskip("matplotlib", reason="tables and plots need the extra 'bench'")

from bench import paper, plots, report, results  # noqa: E402
from bench.__main__ import QUESTIONS  # noqa: E402
from bench.results import BASE, FORWARD, ROOT, Measurement, Results  # noqa: E402

ABOUT = {"device": "Machine", "threads": 1, "torch": "2.13", "peers": {"lomo-optim": "0.1.1"}, "commit": "c" * 40}
SETTING = {"backend": "cpu", "detail": "avx2", "malloc": "stock"}


def timed(question, contestant, speed, *, beside="probe", spread=0.01, memory=None, error=None, **case):
    """As fast as what ran beside it, times `speed`."""
    seconds = [1e-3 / (speed * (1 + spread * k)) for k in (-2, -1, 0, 1, 2)]
    measured = {"memory": memory or {}, "error": error}
    return Measurement(question, contestant, {**SETTING, **case}, seconds, beside, [1e-3] * 5, **measured)


def synthetic():
    """A little of every question."""
    measured = []
    for dtype, elements in ((dtype, elements) for dtype in results.DTYPES for elements in (2**10, 2**24, 2**26)):
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
            BASE: (1.0, 200),
            "AdamW": (0.8, 600),
            FORWARD: (3.0, 100),
            "lomo_optim, clipping": (0.55, 120),
            "Lomo, clipping, two passes": (0.7, 110),
            "Lomo, clipping, one pass, fused": (0.97, 150),
            "Lomo": (1.0, 110),
        }.items():
            case = {"model": "30M", "tokens": 256, "checkpointing": checkpointing}
            memory = {"weights": 50 * 2**20, "states": 0, "peak": peak * 2**20}
            measured.append(timed("step", who, speed, beside=BASE, memory=memory, **case))
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
    return device_of(tmp_path, synthetic())


def device_of(folder, measured):
    return report.Device.of((folder / "machine-avx2-2026-01-02.json",), measured)


def table(device, name):
    return "\n".join(report.tables(name, device))


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
    measured = report.devices()
    marks = 0
    for document in report.documents():
        text = document.read_text()
        marks += len(report.MARK.findall(text))
        assert text.count("<!-- bench: ") == text.count("<!-- end bench -->") == len(report.MARK.findall(text))
        assert report.filled(text, measured) == text, f"{document.name} is not up to date: run `python -m bench.report`"
    assert marks > 20


def test_every_picture_that_a_document_shows_is_there_and_no_other(committed):
    texts = [document.read_text() for document in report.documents()]
    shown = {path for text in texts for path in re.findall(r"!\[.*?\]\([^)]*?([^/)]*-[^/)]*\.svg)\)", text)}
    assert shown == {file.name for file in results.RESULTS.glob("*.svg")}


def test_the_page_has_every_question_and_says_how_every_rival_is_set():
    text = (ROOT / "bench" / "results" / "README.md").read_text()
    for question in QUESTIONS:
        assert f"<!-- bench: {question} -->" in text
        assert f"python -m bench {question}" in " ".join(text.split())
    said = set(re.findall(r"^- ([^:]+?):", text, re.M))
    for device in report.devices():
        rivals = {one.contestant for one in device.results.measurements if not results.ours(one.contestant)}
        assert rivals - said <= {FORWARD} | {one.contestant for one in device.results.of("ceilings")}


def test_an_unknown_table_is_an_error(machine):
    with pytest.raises(KeyError, match="nonesuch"):
        report.filled("<!-- bench: nonesuch -->\n<!-- end bench -->", [machine])


def test_what_was_not_measured_is_said_to_be(machine):
    text = report.filled("a\n<!-- bench: sharded -->\nold\n<!-- end bench -->\nb", [machine])
    assert text == "a\n<!-- bench: sharded -->\n\nNot measured yet.\n\n<!-- end bench -->\nb"


def test_tables_have_medians_and_spreads_in_the_order_of_sizes(machine):
    # nineteen of twenty of five equidistant samples lie within 1.9 of 2 steps
    text = table(machine, "update")
    assert "| **sgd_ nearest** | 0.90 (0.88-0.92) | 0.90 (0.88-0.92) | 0.90 (0.88-0.92) |" in text
    assert "| fraction of the probe, bfloat16 | 1 Ki elements | 16 Mi elements | 64 Mi elements |" in text
    assert "| add_ | 0.95 | 0.80 | 0.80 |" in text and "| lomo_optim, tuned malloc | 0.10 | 0.10 | 0.10 |" in text
    assert "| **sgd_ nearest, baseline** | 0.50" in text
    assert "| **sq_norm_** | 3e-09 | 3e-09 | 3e-09 |" in table(machine, "norm")


def test_hooks_cost_what_is_above_a_bare_backward(machine):
    assert "| **Lomo** | 100.0 (" in table(machine, "hooks")  # 1 ms at half the speed, 10 parameters


def test_steps_name_what_they_are_held_to_and_the_malloc(machine):
    text = table(machine, "step")
    assert f"| Llama 30M, 256 tokens, no checkpointing, stock malloc | step | tokens/s | time, {BASE} = 1 |" in text
    tuned = [dataclasses.replace(one, case=one.case | {"malloc": "tuned"}) for one in machine.results.of("step")]
    both = report.Device.of(machine.files, Results(ABOUT, {}, machine.results.of("step") + tuned))
    head = "| Llama 30M, 256 tokens, no checkpointing | time, stock malloc | time, tuned malloc |"
    assert head in table(both, "step short")


def test_the_papers_totals_are_its_own(machine):
    for one in paper.measurements():
        totals = paper.TOTALS[one.case["checkpointing"]]
        assert one.peak / 2**30 == pytest.approx(totals[one.contestant])
        assert one.memory["not named"] == (0 if one.case["checkpointing"] else 2**30)
    text = table(machine, "memory")
    labels = [line.split(" | ")[0] for line in text.splitlines()]
    assert labels[2:5] == ["| AdamW, the paper", "| SGD, the paper", "| LOMO, the paper"]
    assert "| **Lomo, clipping, two passes, fused, simulated** | 12.50 | - | 0.00 | 44.00 | - | 56.50 |" in text
    assert "| LOMO, the paper | 59.40 | 14.58 |" in table(machine, "memory short")
    assert "| **Lomo, clipping, two passes, fused, simulated** | 56.50 | 13.50 |" in table(machine, "memory short")


def test_commits_and_checks_of_a_gpu(machine):
    about = {**ABOUT, "capability": [9, 0], "commits": {"update": "a" * 40, "norm": "b" * 40 + "+"}}
    checks = {"ncu": {"said": "passed", "seconds": 3.0}, "more": {"said": "exit status 1", "seconds": 4.2}}
    gpu = report.Device.of(machine.files, dataclasses.replace(machine.results, environment=about, checks=checks))
    text = table(gpu, "environment")
    assert "- ncu: passed, 3 s\n- more: exit status 1, 4 s\n" in text
    assert "aaaaaaa (update); bbbbbbb+ (norm)" in text and "optimi: not installed" in text


def test_every_device_has_all_of_its_files_but_short_ones_only_without_others(tmp_path, monkeypatch):
    full = ("cpu-avx2-2025-12-31", "cpu-avx2-2026-01-02", "nvidia-h200-2026-02-01-0930", "nvidia-h200-2026-02-01-1002")
    short = ("cpu-avx2-2026-03-01-short", "laptop-2026-01-05-short", "laptop-2026-01-06-short")
    for name in (*full, *short):
        results.write(tmp_path / f"{name}.json", Results(ABOUT))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    newest = {device.name: tuple(file.stem for file in device.files) for device in report.devices()}
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
    (device,) = report.devices()
    shown = [(one.question, one.case["backend"], round(one.fraction.median, 2)) for one in device.results.measurements]
    assert shown == [("update", "cuda", 0.8), ("norm", "cuda", 0.9), ("norm", "triton", 0.7)]
    assert [check["said"] for check in device.results.checks.values()] == ["at 2", "at 1"]
    asked = {"update": old, "norm": new, "a": new, "b": new}
    assert device.results.environment["commits"] == {name: about["commit"] for name, about in asked.items()}
    text = table(device, "environment")
    assert "aaaaaaa (update)" in text and all(file.name in text for file in device.files)


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
    assert report.seconds(seconds) == text


@pytest.mark.parametrize(
    "number, text", [(291, "291"), (1024, "1 Ki"), (2**24, "16 Mi"), (2**30, "1 Gi"), (1500, "1500")]
)
def test_count(number, text):
    assert report.count(number) == text


def test_plots_are_the_same_whenever_the_results_are(machine, tmp_path):
    drawn = [list(plots.draw(machine, tmp_path / turn)) for turn in ("a", "b") if (tmp_path / turn).mkdir() is None]
    assert [file.name for file in drawn[0]] == [f"machine-avx2-{name}.svg" for name in (*plots.PLOTS, "memory")]
    for first, second in zip(*drawn, strict=True):
        assert first.read_text() == second.read_text()
        assert "<dc:date>" not in first.read_text()


def test_what_cannot_be_drawn_is_not(tmp_path):
    """Other cases of memory than the paper's, and steps whose yardstick did not fit."""
    memory = {"weights": 1, "states": 0, "peak": 2}
    step = Measurement(
        "step", "Lomo", {**SETTING, "model": "1B", "tokens": 1, "checkpointing": False}, [1.0], memory=memory
    )
    run = {"model": "other", "sequence": 1, "batch": 1, "checkpointing": True}
    real = Measurement("memory", "Lomo", {**SETTING, **run, "how": "measured"}, memory={"all": 1})
    device = device_of(tmp_path, Results(ABOUT, {}, [step, real]))
    assert list(plots.draw(device, tmp_path)) == []
    assert "1B" in table(device, "step")
