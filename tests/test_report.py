"""The documents say what the committed results say, and the tables say it right."""

import copy
import json
import re
import shutil
import subprocess

import pytest

pytest.importorskip("pandas", reason="tables and plots need the extra 'bench'")
pytest.importorskip("matplotlib", reason="tables and plots need the extra 'bench'")

from bench import plots, report, results
from bench.bench_operators import DTYPES
from bench.results import BASE, FORWARD, QUESTIONS, ROOT

ABOUT = {"device": "Machine", "threads": 1, "torch": "2.13", "peers": {"lomo-optim": "0.1.1"}}
SETTING = {"backend": "cpu", "detail": "avx2", "malloc": "stock"}


def timed(implementation, speed, *, baseline="probe", spread=0.01, memory=None, error=None, setting=(), **case):
    """As fast as its baseline, times `speed`."""
    seconds = [1e-3 / (speed * (1 + spread * k)) for k in (-2, -1, 0, 1, 2)]
    extra = {**SETTING, **dict(setting), "baseline": baseline, "baseline_seconds": [1e-3] * 5}
    extra |= {name: value for name, value in {"memory": memory, "error": error}.items() if value is not None}
    return {"params": {"implementation": implementation, **case}, "extra_info": extra, "stats": {"data": seconds}}


def run_of(question, benchmarks, about=ABOUT, commit="c", missing=()):
    entries = [{"group": question, "fullname": f"{question}{n}", **one} for n, one in enumerate(benchmarks)]
    head = {
        "machine_info": about,
        "commit_info": {"id": commit * 40},
        "datetime": "2026-01-02T03:04",
        "missing": missing,
    }
    return {**head, "benchmarks": entries}


def synthetic():
    """A little of every question."""
    runs = {question: [] for question in ("update", "norm", "lists", "linear", "hooks", "step", "memory")}
    for dtype, elements in ((dtype, elements) for dtype in DTYPES for elements in (2**10, 2**24, 2**26)):
        case = {"dtype": dtype, "elements": elements}
        speeds = {"sgd_ nearest": 0.9, "sgd_ stochastic": 0.7, "add_": 0.95 if elements == 2**10 else 0.8}
        runs["update"] += [timed(who, speed, **case) for who, speed in speeds.items()]
        runs["update"] += [timed("sgd_ nearest", 0.5, **case, setting={"detail": "baseline"})]
        runs["update"] += [timed("lomo_optim", 0.1, **case, setting={"malloc": "tuned"})]
        runs["norm"] += [timed("sq_norm_", 0.93, error=3e-9, **case), timed("vector_norm", 0.4, error=2e-3, **case)]
    for question, who, ours in (("lists", "_foreach_add_", "sgd_list_"), ("linear", "addmm_", "linear_sgd_ nearest")):
        for size in (16, 256):
            case = {"dtype": "bfloat16", "tensors" if question == "lists" else "tokens": size}
            runs[question] += [timed(who, 0.8, **case), timed(ours, 0.9, **case)]
    for count in (10, 100):
        for who, speed in {"Lomo": 0.5, "hook, add_": 0.6, "lomo_optim": 0.01}.items():
            case = {"parameters": count, "shape": "256", "dtype": "float32"}
            runs["hooks"].append(timed(who, speed, baseline="bare backward", **case))
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
            case = {"model": "107M", "tokens": 256, "checkpointing": checkpointing}
            memory = {"weights": 50 * 2**20, "states": 0, "peak": peak * 2**20}
            runs["step"].append(timed(who, speed, baseline=BASE, memory=memory, **case))
        for who, states in (("AdamW", 25), ("Lomo, clipping, two passes, fused", 0)):
            case = {"model": "llama-7b", "sequence": 512, "batch": 8, "checkpointing": checkpointing}
            sizes = {"parameters": 12.5, "optimizer states": states, "activations": 1 if checkpointing else 44}
            memory = {category: int(size * 2**30) for category, size in sizes.items()}
            runs["memory"].append(simulated(who, memory, **case))
    return {question: run_of(question, benchmarks) for question, benchmarks in runs.items()}


def simulated(implementation, memory, measured=None, **case):
    extra = {**SETTING, "memory": memory, "most": memory} | ({"measured": measured} if measured else {})
    return {"params": {"implementation": implementation, **case}, "extra_info": extra, "stats": {"data": [1.0]}}


def device_of(folder, runs):
    for question, run in runs.items():
        results.write(folder / "machine-avx2" / f"{question}.json", results.pooled([copy.deepcopy(run)]))
    return report.Device.of(folder / "machine-avx2")


@pytest.fixture
def machine(tmp_path):
    return device_of(tmp_path, synthetic())


def table(device, name):
    return "\n".join(report.tables(name, device))


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """Only what is committed of bench/results: who has measured their own machine has more there."""
    folder = results.RESULTS
    listed = subprocess.run(["git", "ls-files"], cwd=folder, capture_output=True, text=True)
    files = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    for name in files if listed.returncode else listed.stdout.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / name, tmp_path / name)
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


def test_the_page_has_every_question_and_says_how_every_rival_is_set(committed):
    text = (ROOT / "bench" / "results" / "README.md").read_text()
    for question in QUESTIONS:
        assert f"<!-- bench: {question} -->" in text
        assert f"python -m bench {question}" in " ".join(text.split())
    said = set(re.findall(r"^- ([^:]+?):", text, re.M))
    for device in report.devices():
        rows = device.rows[device.rows["question"] != "ceilings"]
        rivals = {name for name in rows["implementation"] if not results.ours(name)}
        assert rivals and rivals - said <= {FORWARD}


def test_an_unknown_table_is_an_error(machine):
    with pytest.raises(KeyError, match="nonesuch"):
        report.filled("<!-- bench: nonesuch -->\n<!-- end bench -->", [machine])


def test_what_was_not_measured_is_said_to_be(machine):
    text = report.filled("a\n<!-- bench: sharded -->\nold\n<!-- end bench -->\nb", [machine])
    assert text == "a\n<!-- bench: sharded -->\n\nNot measured yet.\n\n<!-- end bench -->\nb"


def test_tables_of_several_devices_name_them(machine):
    mark = "<!-- bench: hooks -->\n<!-- end bench -->"
    assert "machine-avx2:\n\n| shape 256" in report.filled(mark, [machine, machine])
    assert "machine-avx2:" not in report.filled(mark, [machine])


def test_tables_have_medians_and_spreads_in_the_order_of_sizes(machine):
    # nineteen of twenty of five equidistant samples lie within 1.9 of 2 steps
    text = table(machine, "update")
    head = "| bfloat16, relative to “probe” | speed, 1 Ki elements | speed, 16 Mi elements | speed, 64 Mi elements |"
    assert head in text
    assert "| **sgd_ nearest** | 0.90 (0.88-0.92) | 0.90 (0.88-0.92) | 0.90 (0.88-0.92) |" in text
    assert "| add_ | 0.95 (0.93-0.97) | 0.80 (0.78-0.82) | 0.80 (0.78-0.82) |" in text
    assert "| lomo_optim, tuned malloc | 0.10 (0.10-0.10) |" in text
    assert set(machine.rows["detail"]) == {"avx2"}  # no forced instruction set
    assert "| 16 Mi elements | error, bfloat16 | error, float16 | error, float32 |" in table(machine, "norm")
    assert "| **sq_norm_** | 3e-09 | 3e-09 | 3e-09 |" in table(machine, "norm")
    assert "| **linear_sgd_ nearest** | 1.111 (" in table(machine, "linear")


def test_a_short_table_has_some_rows_of_one_case(machine):
    text = table(machine, "update short")
    assert "| **sgd_ stochastic** | 0.70 (" in text and "float32" not in text


def test_hooks_cost_what_is_above_a_bare_backward(machine):
    assert "| **Lomo** | 100.0 (" in table(machine, "hooks")  # 1 ms at half the speed, 10 parameters


def test_steps_name_their_baseline_and_have_a_column_for_each_malloc(tmp_path, machine):
    text = table(machine, "step")
    case = f"Llama 107M, 256 tokens, no checkpointing, relative to “{BASE}”"
    assert f"| {case} | step, s, stock malloc | time, stock malloc | GiB above the weights, stock malloc |" in text
    assert "| AdamW | 0.00125 | 1.25 (1.23-1.27) | 0.586 |" in text
    runs = synthetic()
    for benchmark in [one for one in runs["step"]["benchmarks"] if one["params"]["implementation"] == "Lomo"]:
        other = copy.deepcopy(benchmark)
        other["extra_info"]["malloc"], other["fullname"] = "tuned", other["fullname"] + " tuned"
        other["stats"]["data"] = [2 * seconds for seconds in other["stats"]["data"]]
        runs["step"]["benchmarks"].append(other)
    text = table(device_of(tmp_path, runs), "step short")
    assert "| time, stock malloc | time, tuned malloc | GiB above the weights, stock malloc |" in text
    assert "| **Lomo** | 1.00 (0.98-1.02) | 2.00 (1.96-2.04) | 0.107 | 0.107 |" in text
    assert "| lomo_optim, clipping | 1.82 (1.78-1.85) | - | 0.117 | - |" in text and "AdamW" not in text


def test_steps_whose_baseline_did_not_fit_have_times(tmp_path):
    step = timed("Lomo", 1.0, model="1B", tokens=1, checkpointing=False, memory={"weights": 1, "states": 0, "peak": 2})
    step["extra_info"] = {**step["extra_info"], "baseline_seconds": []}
    del step["extra_info"]["baseline"]
    device = device_of(tmp_path, {"step": run_of("step", [step])})
    heading = "| Llama 1B, 1 tokens, no checkpointing | step, s, stock malloc | GiB above the weights, stock malloc |"
    assert heading in table(device, "step")
    assert list(plots.draw(device, tmp_path)) == []


def test_the_papers_totals_are_its_own(machine):
    labels = [line.split(" | ")[0] for line in table(machine, "memory").splitlines()]
    assert labels[2:5] == ["| AdamW, the paper", "| SGD, the paper", "| LOMO, the paper"]
    text = table(machine, "memory")
    assert "| SGD, the paper | 12.55 | 12.55 | 25.10 | 45.61 | 1.00 | 96.81 |" in text
    ours = "| **Lomo, clipping, two passes, fused** |"
    assert f"{ours} 12.50 | - | 0.00 | 44.00 | - | 56.50 |" in text
    assert "| LOMO, the paper | 59.40 | 14.58 |" in table(machine, "memory short")
    assert f"{ours} 56.50 | 13.50 |" in table(machine, "memory short")


def test_cases_that_differ_in_a_loss_or_in_kernels_have_tables_of_their_own(tmp_path):
    case = {"model": "llama-7b", "sequence": 512, "batch": 8, "checkpointing": True}
    kinds = ({}, {"chunk": 256}, {"kernels": "of 2023"})
    runs = [simulated("AdamW", {"parameters": n * 2**30}, **case, **kind) for n, kind in enumerate(kinds, 1)]
    device = device_of(tmp_path, {"memory": run_of("memory", runs)})
    text = table(device, "memory")
    for place, n in (("", 1), (", loss in chunks of 256", 2), (", kernels of 2023", 3)):
        (part,) = [part for part in text.split("\n\n") if part.startswith(f"| Llama 7b, checkpointing{place} |")]
        assert f"| AdamW | {n}.00 |" in part
    assert "| AdamW | - | 1.00 |" in table(device, "memory short") and "2.00" not in table(device, "memory short")


def test_a_model_that_ran_stands_next_to_its_simulation(tmp_path):
    run = {"model": "small", "sequence": 1, "batch": 1, "checkpointing": True}
    device = device_of(tmp_path, {"memory": run_of("memory", [simulated("Lomo", {"all": 2**29}, 2**30, **run)])})
    assert "| Llama small, checkpointing | simulated / measured | GiB at the peak |" in table(device, "memory")
    assert "| **Lomo** | 0.500 | 0.500 |" in table(device, "memory")


def test_each_file_has_its_date_and_commit_and_a_gpu_its_stages(tmp_path, monkeypatch):
    """Files add up, and what serves is named where it differs."""
    gpu, norms = {**ABOUT, "capability": [9, 0]}, []
    for backend, speed in (("cuda", 0.9), ("triton", 0.7)):
        setting = {"backend": backend, "detail": backend}
        norms.append(timed("sq_norm_", speed, error=0.0, dtype="bfloat16", elements=2**24, setting=setting))
    runs = {
        "a": run_of("norm", norms[:1], gpu, "a"),
        "b": run_of("norm", norms[1:], gpu, "b", ["optimi: not installed"]),
    }
    device = device_of(tmp_path, runs)
    checks = {"ncu": {"said": "passed", "seconds": 3.0}, "more": {"said": "exit status 1", "seconds": 4.2}}
    (tmp_path / "machine-avx2" / "stages.json").write_text(json.dumps(checks))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    text = table(device, "environment")
    assert "- ncu: passed, 3 s\n- more: exit status 1, 4 s\n" in text and "- optimi: not installed" in text
    assert "| [a.json](machine-avx2/a.json) | 2026-01-02 | aaaaaaa | Machine |" in text
    assert "| **sq_norm_** | 0.90 (" in table(device, "norm")
    assert "| **sq_norm_, triton** | 0.70 (" in table(device, "norm")


@pytest.mark.parametrize(
    "number, text", [(291, "291"), (1024, "1 Ki"), (2**24, "16 Mi"), (2**30, "1 Gi"), (1500, "1500")]
)
def test_count(number, text):
    assert report.count(number) == text


def test_plots_are_the_same_whenever_the_results_are(machine, tmp_path):
    drawn = [list(plots.draw(machine, tmp_path / turn)) for turn in ("a", "b") if (tmp_path / turn).mkdir() is None]
    assert [file.name for file in drawn[0]] == [f"machine-avx2-{name}.svg" for name in plots.PLOTS]
    for first, second in zip(*drawn, strict=True):
        assert first.read_text() == second.read_text()
        assert "<dc:date>" not in first.read_text()
