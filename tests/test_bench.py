"""The benches' own machinery: rounds, buffers, results, and that implementations are right. Nothing here looks at a
time."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as runner
from bench import bench_operators, bench_ranks, measure, methods, results
from bench.buffers import Buffers
from lomo_kernels import ops


def run_of(*samples, missing=(), name="update", commit="c"):
    """A run with a benchmark for each list of samples."""
    benchmarks = [
        {
            "group": name,
            "name": f"{name}{number}",
            "fullname": f"{name}{number}",
            "params": {"implementation": "add_"},
            "extra_info": {"baseline": "probe", "baseline_seconds": [2 * sample for sample in seconds]},
            "stats": {"data": list(seconds), "iterations": 1},
        }
        for number, seconds in enumerate(samples)
    ]
    head = {"machine_info": {"device": "x"}, "commit_info": {"id": commit}, "datetime": "2026-01-02"}
    return {**head, "missing": list(missing), "benchmarks": benchmarks}


def test_file_gives_back_what_was_written_and_pytest_benchmark_compares_it(tmp_path):
    run = results.pooled([run_of([1.0, 2.0, 3.0], [5.0], missing=["optimi: not installed"])])
    results.write(tmp_path / "new" / "a.json", run)
    assert results.read(tmp_path / "new" / "a.json") == run
    results.write(tmp_path / "b.json", results.pooled([run_of([2.0], [9.0])]))
    compare = [Path(sys.executable).parent / "pytest-benchmark", "compare", "--columns=median"]
    done = subprocess.run([*compare, tmp_path / "new" / "a.json", tmp_path / "b.json"], capture_output=True, text=True)
    assert done.returncode == 0 and "2.0000" in done.stdout and "9.0000" in done.stdout, done.stdout + done.stderr


def test_samples_of_several_processes_are_pooled():
    first, second = run_of([1.0], [2.0], missing=["b"]), run_of([3.00001, 4.0], missing=["a"], commit="d")
    whole = results.pooled([first, second])
    assert [benchmark["stats"]["data"] for benchmark in whole["benchmarks"]] == [[1.0, 3.0, 4.0], [2.0]]
    assert whole["benchmarks"][0]["stats"]["median"] == 3.0 and whole["benchmarks"][0]["stats"]["rounds"] == 3
    assert results.ratios(whole["benchmarks"][0]) == [0.5] * 3
    assert whole["missing"] == ["a", "b"] and whole["commit_info"] == {"id": "d"}


def test_ratios_need_a_baseline_of_the_same_rounds():
    (benchmark,) = run_of([1.0, 2.0])["benchmarks"]
    benchmark["extra_info"]["baseline_seconds"] = []
    assert results.ratios(benchmark) == []
    benchmark["extra_info"]["baseline_seconds"] = [1.0]
    with pytest.raises(ValueError, match="zip"):
        results.ratios(benchmark)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a.json: expected results .* without .*benchmarks"):
        results.read(tmp_path / "a.json")


def test_processes_share_the_rounds():
    assert measure.rounds_for(10.0, 1) == 9
    assert measure.rounds_for(10.0, 3) == 3
    assert measure.rounds_for(1e-6, 3) * 3 >= measure.ROUNDS[1]


def test_short_calls_are_repeated_until_they_fill_a_round(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setitem(measure.CLOCKS, "cpu", lambda: clock[0])

    def call():
        calls.append(None)
        clock[0] += 1e-5

    times, seconds = measure.calibrated(call, "cpu")
    assert times * 1e-5 == pytest.approx(seconds) and seconds >= measure.ROUND["cpu"]
    calls.clear()
    assert measure.timed(call, times, "cpu") == pytest.approx(1e-5) and len(calls) == times


BENCH = """
from bench import measure
from bench.measure import Baseline
calls, seconds = [], [0.0]
measure.CLOCKS["cpu"] = lambda: seconds[0]  # stands, but for a call, which takes its number in milliseconds
def cases(device, full):
    return {"x": {"implementation": ["ours", "absent"], "elements": [4] if full else [2]}}
def test_x(paired, implementation, elements):
    import pytest
    if implementation == "absent":
        pytest.skip("absent: not installed")
    def call(number):
        calls.append(number)
        seconds[0] += 1e-3 * number
    paired(call, Baseline("probe", call, 2.0), error=0.5)
    assert calls == list(range(len(calls)))  # what one has just used is in the cache, and would serve the other
"""


#: In a worker of pytest-xdist, which these variables tell of, pytest-benchmark measures nothing.
PYTEST = """
import os, sys, pytest
for name in [name for name in os.environ if name.startswith("PYTEST_")]:
    del os.environ[name]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[1:]]))
"""


def test_rounds_alternate_with_the_baselines_and_go_to_the_file(run_python, tmp_path):
    (tmp_path / "bench_x.py").write_text(BENCH)
    (tmp_path / "conftest.py").write_text("from bench.conftest import *")
    options = ["--full", str(tmp_path), "--rootdir", str(tmp_path), "-o", "python_files=bench_*.py"]
    options += ["--benchmark-enable", f"--benchmark-json={tmp_path}/x.json"]
    done = run_python(PYTEST, *options, LOMO_COMMIT="abc")
    assert done.returncode == 0, done.stdout + done.stderr
    run = results.read(tmp_path / "x.json")
    (benchmark,) = run["benchmarks"]
    extra = benchmark["extra_info"]
    assert benchmark["group"] == "x" and benchmark["params"] == {"implementation": "ours", "elements": 4}
    assert (extra["backend"], extra["malloc"], extra["baseline"], extra["error"]) == ("cpu", "stock", "probe", 0.5)
    data, baseline = benchmark["stats"]["data"], extra["baseline_seconds"]
    assert len(data) >= measure.ROUNDS[0]
    # Each round of the baseline follows one of the call: its number is the next one.
    assert baseline == pytest.approx([2 * (seconds + 1e-3) for seconds in data])
    assert run["missing"] == ["absent: not installed"] and run["commit_info"] == {"id": "abc"}
    assert run["machine_info"]["threads"] == 1


def test_buffers_exceed_the_cache():
    buffers = Buffers(torch.bfloat16, 2**20, "cpu")
    assert sum(tensor.nbytes for tensor in buffers.params + buffers.grads) >= 2**28
    assert buffers.pair(len(buffers.params) + 1)[0] is buffers.params[1]


def call_runner(monkeypatch, *arguments, answer=None):
    """bench's main with these arguments, its processes measuring `answer`; and what they were asked."""
    asked = []

    def measured(question, environment, options):
        asked.append((question, environment, options))
        return answer and answer(), 0 if answer else 5

    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    monkeypatch.setattr(runner, "measure", measured)
    return runner.main(), asked


def test_nothing_measured_is_an_error_and_changes_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    status, asked = call_runner(monkeypatch, "lists")
    assert (status, len(asked)) == (1, 1) and not list(tmp_path.rglob("*.json"))
    assert "nothing was measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nothing"], "unknown: nothing"),
        (["lists", "--device", "cuda"], "--device cuda needs a GPU"),
        (["update"], "run `make testing` first"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runner, "TESTING", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        call_runner(monkeypatch, *arguments)
    assert stopped.value.code == 2
    assert re.search(said, capsys.readouterr().err)


def test_in_full_three_processes_are_pooled_in_the_folder_of_the_device(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pandas", reason="tables need the extra 'bench'")

    def answer():
        run = run_of([1.0], name="lists")
        run["benchmarks"][0]["extra_info"] |= {"backend": "cpu", "detail": "avx2", "malloc": "stock"}
        run["benchmarks"][0]["params"]["dtype"] = "bfloat16"
        return run

    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    status, asked = call_runner(monkeypatch, "lists", "--full", answer=answer)
    assert status == 0 and [options[-2:] for *_, options in asked] == [["--processes=3", "--full"]] * 3
    (file,) = tmp_path.rglob("*.json")
    assert file == tmp_path / runner.folder_of("cpu") / "lists.json"
    assert results.read(file)["benchmarks"][0]["stats"]["data"] == [1.0] * 3
    assert "| add_ | 0.500 (0.500-0.500) |" in capsys.readouterr().out


def test_who_allocates_is_measured_with_the_tuned_malloc_too():
    """Of those of 16 bits: memory of its size that a call takes and gives back."""
    size = 2**16
    buffers = Buffers(torch.bfloat16, size, "cpu")
    calls = {name: make(buffers, 1e-3) for name, make in bench_operators.UPDATES.items()}
    calls |= {name: lambda _, norm=norm: norm(buffers.grads[0]) for name, norm in bench_operators.NORMS.items()}
    allocating = set()
    for name, call in calls.items():
        for number in range(len(buffers.params)):  # makes what an optimizer keeps
            call(number)
        if measure.peak_of(measure.allocations(lambda call=call: call(0))) >= 2 * size:
            allocating.add(name)
    assert allocating == {"lomo_optim", "vector_norm, float32"}
    assert runner.ALLOCATING == "lomo_optim or (vector_norm and float32)"  # pytest's -k knows no comma


def test_a_step_of_another_length_is_noticed_where_clipping_makes_steps_of_1e_7():
    before = 0.02 * torch.randn(1000)
    change = 1e-7 * torch.randn(1000)
    assert bench_ranks.same_step(before - change, before - change, before)
    assert not bench_ranks.same_step(before - 3 * change, before - change, before)
    assert not bench_ranks.same_step(before, before - change, before)


def test_the_embedding_that_decays_does():
    """A decay of 1 is no work: only the rows that occur are touched."""
    weight = torch.ones(3, 2)
    lr, weight_decay = bench_operators.TINY_LR, bench_operators.DECAY
    ops.embedding_sgd_(weight, torch.tensor([0]), torch.ones(1, 2), lr=lr, weight_decay=weight_decay)
    assert (weight[1:] < 1).all()


@pytest.mark.parametrize("implementation", bench_operators.UPDATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_implementations_compute_the_update(implementation, dtype):
    """SGD fused is known to be wrong for 16 bits on CPUs (torch 2.13): that is what this check is for."""
    if lacking := methods.missing_peer(implementation):
        pytest.skip(lacking)
    wrong = bench_operators.wrong(implementation, dtype, "cpu")
    assert not wrong or implementation == "SGD fused"


def test_wrong_results_are_noticed(monkeypatch):
    monkeypatch.setitem(bench_operators.UPDATES, "add_", lambda buffers, lr: lambda number: None)
    assert "10007 elements are off by more than 4 units" in bench_operators.wrong("add_", torch.bfloat16, "cpu")


BREAK = """
from lomo_kernels import ops
for name in ("sgd_", "sgd_list_", "sq_norm_", "linear_sgd_", "embedding_sgd_"):
    setattr(ops, name, lambda *arguments, **options: None)
"""

#: Of each question the smallest sizes.
SELECTED = {
    "update": "sgd_ and bfloat16-65536",
    "norm": "sq_norm_ and 65536",
    "lists": "",
    "linear": "",
    "embedding": "",
}


def test_nothing_of_ours_that_is_wrong_is_timed(run_python):
    """In a process of its own whose operators do nothing."""
    pytest.importorskip("lomo_kernels_testing", reason="the probes are built by `make testing`")
    chosen = " or ".join(f"test_{question}" + f" and {words}" * bool(words) for question, words in SELECTED.items())
    asked = [str(results.ROOT / results.QUESTIONS[question]) for question in SELECTED]
    done = run_python(BREAK + PYTEST, *asked, "-k", chosen, "-rfE")
    assert done.returncode == 1 and "passed" not in done.stdout, done.stdout + done.stderr
    failed = re.findall(r"^(?:FAILED|ERROR) \S+::test_(\w+)", done.stdout, re.M)
    assert set(failed) == SELECTED.keys()


def test_a_rival_that_is_wrong_is_named_and_not_timed(monkeypatch):
    monkeypatch.setitem(bench_operators.UPDATES, "add_", lambda buffers, lr: lambda number: None)
    with pytest.raises(pytest.skip.Exception, match=r"add_, bfloat16, cpu: .* of 10007 elements"):
        bench_operators.test_update(pytest.fail, Buffers(torch.bfloat16, 4, "cpu"), "add_", "bfloat16", "cpu")
