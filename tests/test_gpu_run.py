"""`make gpu` without a GPU: its stages end in time whatever they do, and the whole of it runs on a pretended device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import budget, gpu, results
from bench.bench_operators import DTYPES
from bench.budget import Stage

TESTS = Path(__file__).parent
slow = pytest.mark.slow  # the pretended run takes 35 s
FOREVER = """import signal, time
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
time.sleep(600)
"""


def python(name: str, code: str, limit: float = 30, **options: str) -> Stage:
    return Stage(name, limit, [sys.executable, "-c", code], **options)


def run(stages: list[Stage], folder: Path, seconds: float = 60) -> dict[str, budget.Outcome]:
    outcomes = budget.run(stages, time.monotonic() + seconds, folder)
    return {outcome.stage.name: outcome for outcome in outcomes}


def alive(pid: int) -> bool:
    """A killed process that nobody has waited for is a zombie."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"


def test_whatever_a_stage_does_the_next_one_runs(tmp_path: Path) -> None:
    child = f"import subprocess, sys\nprint(subprocess.Popen([sys.executable, '-c', {FOREVER!r}]).pid, flush=True)\n"
    stages = [
        python("fails", "print('why'); raise SystemExit(3)"),
        python("crashes", "import os; os.abort()"),
        python("hangs", child + FOREVER, 3),
        python("leaves a child", child),
        python("spews", "while True: print('x' * 2**20)"),
        Stage("is missing", 30, ["no-such-program"]),
        python("last", "print('here')"),
    ]
    outcomes = run(stages, tmp_path)
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "fails": "exit status 3",
        "crashes": "killed by signal 6",
        "hangs": "stopped at its limit of 3 s",
        "leaves a child": "passed",
        "spews": "stopped after 64 MiB of output",
        "is missing": "cannot be started: [Errno 2] No such file or directory: 'no-such-program'",
        "last": "passed",
    }
    for name in ("hangs", "leaves a child"):
        assert not alive(int(outcomes[name].output.read_text())), f"{name}: its child lives on"
    assert outcomes["fails"].output.read_text() == "why\n"
    assert len(gpu.ends(outcomes["spews"].output)) < 1.1 * gpu.PRINTED


def test_what_a_stage_has_before_its_limit_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is interrupted, as by Ctrl-C, and pytest writes what it has measured. The clock stands until pytest is in the
    second test; then 594 s have passed, and it goes on."""
    reached: list[float] = []

    def monotonic() -> float:
        if not reached and (tmp_path / "reached").exists():
            reached.append(time.monotonic())
        return 594 + time.monotonic() - reached[0] if reached else 0.0

    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))
    (tmp_path / "test_slow.py").write_text("""
import pathlib
import time
def test_one(benchmark):
    benchmark.pedantic(int, rounds=2)
def test_two(benchmark):
    pathlib.Path(__file__).with_name("reached").touch()
    time.sleep(600)
""")
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "--rootdir", str(tmp_path), str(tmp_path)]
    command += ["--benchmark-enable", f"--benchmark-json={tmp_path}/measured.json"]
    environment = {"PYTEST_XDIST_WORKER": "", "PYTEST_ADDOPTS": ""}
    outcome = run([Stage("slow", 600, command, environment)], tmp_path, 900)["slow"]
    assert outcome.status == "stopped at its limit of 600 s", outcome.output.read_text()
    (benchmark,) = json.loads((tmp_path / "measured.json").read_text())["benchmarks"]
    assert benchmark["name"] == "test_one" and len(benchmark["stats"]["data"]) == 2


def test_the_budget_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage's limit is cut to what is left, and what is left for the last one is too little."""
    hangs = [python(name, FOREVER, 600, together="group") for name in ("one", "two")]
    monkeypatch.setattr(budget, "LEAST", 1.0)
    outcomes = run([*hangs, python("last", "")], tmp_path, 3)
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "one": "stopped at its limit of 3 s",
        "two": "stopped at its limit of 3 s",
        "last": "not started: 0 s were left",
    }
    assert not outcomes["last"].started


def test_neighbours_run_side_by_side_and_others_in_turn(tmp_path: Path) -> None:
    wait = "import pathlib, time\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)\n"
    make = "import pathlib\npathlib.Path({!r}).touch()\n"
    file = str(tmp_path / "file")
    stages = [
        python("waits", wait.format(file), together="group"),
        python("makes", make.format(file), together="group"),
    ]
    assert all(outcome.passed for outcome in run([*stages, python("alone", "")], tmp_path).values())
    assert [[stage.name for stage in group] for group in budget.groups([*stages[1:], python("alone", "")])] == [
        ["makes"],
        ["alone"],
    ]


def test_a_run_that_is_stopped_says_what_it_has(machine: Path, tmp_path: Path) -> None:
    """By SIGTERM, as `timeout` does. No stage is left running."""
    hang = f"import os\nprint(os.getpid(), flush=True)\n{FOREVER}"
    code = f"""
from bench import gpu
from bench.budget import Stage
hang = Stage("hang", 60, [{sys.executable!r}, "-c", {hang!r}])
stages = [Stage("build", 9, ["true"]), hang, Stage("ncu", 9, ["true"])]
gpu.main(["--results", {str(tmp_path)!r}], lambda capability, cores: stages)
"""
    env = {**os.environ, "PATH": f"{machine / 'bin'}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    run = subprocess.Popen([sys.executable, "-c", code], env=env, cwd=results.ROOT, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (pid := "".join(file.read_text() for file in tmp_path.glob("lomo-gpu-*/hang.txt"))):
        assert time.monotonic() < end
        time.sleep(0.1)
    run.terminate()
    said, _ = run.communicate(timeout=30)
    assert not alive(int(pid))
    assert said.splitlines()[-1] == 'left: make gpu ARGS="hang ncu"'
    assert (tmp_path / "summary.txt").read_text().splitlines()[1].startswith("passed: build ")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose bin has what a GPU machine has."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "bin").mkdir()
    for name in ("nvidia-smi", "compute-sanitizer", "ncu"):
        program = folder / "bin" / name
        program.write_text("#!/bin/sh\necho 'Pretended GPU, 9.0'\n")
        program.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def walked(machine: Path) -> subprocess.CompletedProcess[str]:
    """The pretended run, ended: its budget is a hard limit."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "LOMO_"))}
    env |= {"LOMO_COMMIT": "c" * 40, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{results.ROOT}{os.pathsep}{TESTS}"}
    command = [sys.executable, TESTS / "support" / "pretended_run.py", machine, "--budget", "300"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=310)


@pytest.fixture(scope="module")
def folder(machine: Path, walked: object) -> Path:
    """The results of the pretended device."""
    return machine / "results" / "pretended-gpu"


@pytest.fixture(scope="module")
def measured(folder: Path) -> list[dict[str, Any]]:
    return [results.read(file) for file in sorted(folder.glob("*.json")) if file.name != "stages.json"]


def lines(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@slow
def test_every_stage_but_those_that_cannot_passes_on_a_pretended_gpu(
    walked: subprocess.CompletedProcess[str], folder: Path, machine: Path
) -> None:
    """One hangs and one fails."""
    said = {name: check["said"] for name, check in json.loads((folder / "stages.json").read_text()).items()}
    expected = {stage.name: "passed" for stage in gpu.stages("9.0", 16)}
    expected |= {"hang": "stopped at its limit of 2 s", "fail": "exit status 3"}
    assert said == expected, walked.stdout[-3000:] + (machine / "results" / "log.txt").read_text()[-3000:]
    assert walked.returncode == 1
    tests = lines(machine / "results" / "tests.jsonl")
    assert {test["stage"] for test in tests} == expected.keys() - {"build", "hang", "fail", "more"}
    assert not [test for test in tests if test["outcome"] == "failed"]


@slow
def test_all_that_was_measured_is_in_the_results(measured: list[dict[str, Any]]) -> None:
    assert {content["machine_info"]["device"] for content in measured} == {"Pretended GPU"}
    assert {content["commit_info"]["id"] for content in measured} == {"c" * 40}
    benchmarks = [benchmark for content in measured for benchmark in content["benchmarks"]]
    cases: dict[str, list[dict[str, Any]]] = {}
    for benchmark in benchmarks:
        case = benchmark["params"] | benchmark["extra_info"]
        cases.setdefault(benchmark["group"], []).append(case)
        assert benchmark["stats"]["data"] and len(case["baseline_seconds"]) in (0, len(benchmark["stats"]["data"]))
    questions = {"ceilings", "update", "norm", "lists", "linear", "captured", "hooks", "step", "memory", "embedding"}
    questions |= {"clipping", "head"}
    assert cases.keys() == questions
    for question in ("update", "norm"):
        found = {(case["backend"], case["dtype"], case["elements"]) for case in cases[question]}
        assert found == {(b, d, n) for b in ("cuda", "triton") for d in DTYPES for n in (2**24, 2**28)}
    assert {case["model"] for case in cases["step"]} == {"1.1B", "6.7B"}
    assert {case["tokens"] for case in cases["linear"]} == {256, 1024, 4096, 16384}
    missing = " ".join(reason for content in measured for reason in content["missing"])
    assert "lomo_optim: lomo_optim" in missing and "optimi: optimi" in missing, "missing peers are no failures"


@slow
def test_the_report_shows_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = pytest.importorskip("bench.report", reason="tables need the extra 'bench'")
    monkeypatch.setattr(results, "RESULTS", folder.parent)
    (device,) = report.devices()
    names = ["environment", *report.TABLES]
    text = "\n".join(part for name in names for part in report.tables(name, device))
    for words in ("| Pretended GPU |", "| copy |", "- hang: stopped at its limit of 2 s", "| addmm_ |"):
        assert words in text


@slow
def test_the_summary_is_short_and_says_what_is_left(walked: subprocess.CompletedProcess[str], machine: Path) -> None:
    summary = (machine / "results" / "summary.txt").read_text().splitlines()
    assert walked.stdout.splitlines()[-len(summary) :] == summary
    assert len(summary) < 40
    for words in ("NOT PASSED hang: stopped", "NOT PASSED fail: exit", "copy ", "cuda, bfloat16, 2^28", "step, 6.7B"):
        assert any(words in line for line in summary), words
    assert summary[-1] == 'left: make gpu ARGS="hang fail"'
    assert len(list((machine / "results").iterdir())) <= 8
    assert "planted" in (machine / "results" / "log.txt").read_text()


@slow
def test_every_stage_selects_tests_and_all_are_in_some_stage(walked: object, machine: Path) -> None:
    selected = {line["stage"]: set(line["tests"]) for line in lines(machine / "selected.jsonl")}
    assert all(selected.values())
    bits, others = selected["bits-triton"], selected["others-triton"]
    assert not bits & others and bits | others == selected["bits-cuda"]
    assert len(bits) < 0.3 * len(bits | others)
    for param in ("bfloat16", "float16", "float32"):
        for grad in ("bfloat16", "float16", "float32"):
            for rounding in ("nearest", "stochastic"):
                for test in ("test_every_size_and_alignment", "test_sq_norm_in_the_same_pass"):
                    assert f"tests/test_sgd.py::{test}[cuda-{param}-{grad}-{rounding}-65537]" in bits
    names = {test.split("[")[0].split("::")[1] for test in bits}
    assert names >= {"test_the_list_form_equals_single_calls", "test_a_shard_equals_its_part_of_the_whole"}
    assert {test.split("::")[1].split("[")[0] for test in selected["memcheck"]} >= {
        "test_the_list_form_equals_single_calls",
        "test_sq_norm_in_the_same_pass",
        "test_the_slot_accumulates",
    }
    assert selected["memcheck"] == selected["racecheck"] and len(selected["memcheck"]) < 20
    names = {test.split("::")[1].split("[")[0] for test in selected["features"]}
    assert names >= {
        "test_streams_side_by_side",
        "test_a_captured_step_replays_with_another_learning_rate",
        "test_a_step_never_synchronises",
    }
    assert selected["features"].isdisjoint(selected["beyond-2-31"]) and len(selected["beyond-2-31"]) == 2
    assert {test.split("::")[0] for test in selected["more"]} == {
        "tests/test_distributed_backends.py",
        "tests/test_plan.py",
    }


@slow
def test_a_second_call_goes_on(machine: Path, walked: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without names it runs what has not passed; the build always runs."""
    monkeypatch.setenv("PATH", f"{machine / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(TESTS)
    before = dict(os.environ)
    started: list[str] = []

    def known(capability: str, cores: int) -> list[Stage]:
        return [*gpu.stages(capability, cores), python("fail", "")]

    def start(stage: Stage, output: Path) -> budget.Process:
        started.append(stage.name)
        return budget.spawn(stage._replace(command=["true"]), output)

    folder = ["--results", str(machine / "results")]
    try:
        assert gpu.main(folder, known, start) == 0
        assert gpu.main(["ncu", "bits-triton", *folder], known, start) == 0
        with pytest.raises(SystemExit):
            gpu.main(["nothing", *folder], start=start)
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert started == ["build", "fail", "build", "bits-triton", "ncu"]
