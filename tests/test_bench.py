"""The benches' own machinery: what is recorded, read again and compared. Nothing here looks at a time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as runner
from bench import bench_embedding, bench_norm, bench_update, compare, measure, methods, ranks, results
from bench.buffers import Buffers
from bench.results import Measurement, Results, Spread
from lomo_kernels import ops


def measurement(seconds, question="update", contestant="sgd_ nearest", **case):
    return Measurement(question, contestant, case, seconds, "probe", [1.0] * len(seconds))


def test_file_gives_back_what_was_written(tmp_path):
    one = Measurement("norm", "sq_norm_", {"elements": 4}, [1.5, 2.5], "read 1", [1.0, 2.0], error=0.0)
    other = Measurement("memory", "Lomo", {"model": "llama-7b", "checkpointing": False}, memory={"peak": 3})
    whole = Results({"device": "x", "commit": "c"}, {"optimi": "not installed"}, [one, other], {"test": {"status": 0}})
    results.write(tmp_path / "a.json", whole)
    assert results.read(tmp_path / "a.json") == whole


def test_adding_replaces_a_question_and_keeps_the_commits_of_the_others(tmp_path):
    file = tmp_path / "a.json"
    old = [measurement([1.0], "norm"), measurement([2.0], "update"), measurement([3.0], "update", "add_")]
    results.add(file, Results({"commit": "old"}, {"optimi": "why"}, old, {"build": {"status": 0}}))
    results.add(file, Results({"commit": "new"}, {}, [measurement([4.0], "update")], {"test": {"status": 1}}))
    content = results.read(file)
    assert [(one.question, one.seconds) for one in content.measurements] == [("norm", [1.0]), ("update", [4.0])]
    assert content.environment["commits"] == {"norm": "old", "build": "old", "update": "new", "test": "new"}
    assert content.checks == {"build": {"status": 0}, "test": {"status": 1}}
    assert content.missing == {"optimi": "why"}


def test_ratios_are_taken_round_by_round():
    one = Measurement("step", "Lomo", {}, [2.0, 30.0, 4.0], "SGD", [1.0, 10.0, 4.0])
    assert one.ratio.median == 2.0
    assert one.fraction.median == 0.5
    assert one.above.median == 1.0


def test_spread_holds_nineteen_of_twenty_samples():
    assert Spread.of([float(n) for n in range(41)]) == (20.0, 1.0, 39.0)
    assert Spread.of([7.0]) == (7.0, 7.0, 7.0)


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "same"), (1.02, "same"), (1.5, "slower"), (0.6, "faster")], ids=str
)
def test_compare_sees_a_slower_kernel(tmp_path, capsys, factor, verdict):
    samples = [1.0 + 0.01 * (n % 7) for n in range(21)]
    old = [measurement(samples, elements=4), measurement(samples, contestant="add_", elements=4)]
    new = [measurement([factor * s for s in samples], elements=4), measurement(samples, contestant="add_", elements=4)]
    for name, measurements in (("old", old), ("new", new)):
        results.write(tmp_path / name, Results({"commit": name}, {}, measurements))
    assert compare.main(tmp_path / "old", tmp_path / "new") == (verdict == "slower")
    said = capsys.readouterr().out
    assert (f"{verdict}: update, sgd_ nearest, 4" in said) == (verdict != "same")
    assert "add_" not in said


def test_what_ran_beside_nothing_is_not_compared():
    alone = Measurement("step", "Lomo", {}, [1.0, 2.0])
    beside = Measurement("step", "Lomo", {}, [1.0], "SGD", [1.0])
    for old, new in ((alone, beside), (beside, alone), (alone, alone)):
        assert not list(compare.changes(Results({}, {}, [old]), Results({}, {}, [new])))


def test_samples_of_several_processes_are_pooled():
    old = Results({}, {"a": "x"}, [measurement([1.0], elements=1), measurement([2.0], elements=2)])
    new = Results({}, {"b": "y"}, [measurement([3.0], elements=2), measurement([4.0], elements=3)])
    both = old.pooled(new)
    assert [(one.case["elements"], one.seconds) for one in both.measurements] == [
        (1, [1.0]),
        (2, [2.0, 3.0]),
        (3, [4.0]),
    ]
    assert all(len(one.seconds) == len(one.beside_seconds) for one in both.measurements)
    assert both.missing == {"a": "x", "b": "y"}


def test_processes_share_the_rounds():
    assert measure.rounds_for(10.0, 1) == 9
    assert measure.rounds_for(10.0, 3) == 3
    assert measure.rounds_for(1e-6, 3) * 3 >= measure.ROUNDS[1]


def test_compare_refuses_files_with_nothing_in_common(tmp_path):
    for name, size in (("old", 1), ("new", 2)):
        results.write(tmp_path / name, Results({"commit": name}, {}, [measurement([1.0], elements=size)]))
    with pytest.raises(ValueError, match="no measurement in common"):
        compare.main(tmp_path / "old", tmp_path / "new")


def test_short_calls_are_repeated_on_other_buffers_each_time(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    seen = []

    def call(number):
        seen.append(number)
        clock[0] += 1e-5

    (sample,) = measure.repeated("cpu", call)
    calibration = len(seen)
    assert sample() == pytest.approx(1e-5)
    assert (len(seen) - calibration) * 1e-5 >= measure.SAMPLE["cpu"]
    assert seen == list(range(len(seen)))


def test_calls_that_take_turns_never_share_a_buffer(monkeypatch):
    """What the probe has just read is in the cache, and would be found there by a call with the same number."""
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    seen = []

    def call(number):
        seen.append(number)
        clock[0] += 1e-4

    mine, probe = measure.repeated("cpu", call, call)
    for _ in range(3):
        probe()
        mine()
    assert seen == list(range(len(seen)))


def test_rounds_are_interleaved_in_rotated_order_and_the_first_is_left_out():
    order = []
    seconds = ranks.interleave({name: lambda _, name=name: order.append(name) or 1.0 for name in "abc"}, rounds=2)
    assert "".join(order) == "abc" + "bca" + "cab"
    assert {name: len(samples) for name, samples in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_buffers_exceed_the_cache_and_the_free_memory_is_respected(monkeypatch):
    buffers = Buffers(torch.bfloat16, 2**20, "cpu")
    assert sum(tensor.nbytes for tensor in buffers.params + buffers.grads) >= 2**28
    assert buffers.pair(len(buffers.params) + 1)[0] is buffers.params[1]
    monkeypatch.setattr("bench.buffers.free_memory", lambda device: 2**28)
    with pytest.raises(MemoryError, match="more than half of the free memory"):
        Buffers(torch.bfloat16, 2**20, "cpu")


@pytest.mark.parametrize(
    "content, said",
    [("", "JSONDecodeError"), ("{}", "KeyError"), ('{"measurements": [{"speed": 1}]}', "speed")],
    ids=str,
)
def test_a_file_of_something_else_is_refused(tmp_path, content, said):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=f"a.json: expected results .* got .*{said}.*; move it away"):
        results.read(tmp_path / "a.json")


def run(monkeypatch, *arguments, answer=None):
    """bench's main with these arguments, its processes measuring `answer`; what it ran."""
    ran = []
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    monkeypatch.setattr(runner, "measure", lambda run, options: ran.append(run) or (answer or Results({}), 5))
    return runner.main(), ran


@pytest.mark.parametrize("there", [True, False], ids=["file", "no file"])
def test_a_selection_of_nothing_is_an_error_and_changes_no_file(tmp_path, monkeypatch, capsys, there):
    file = tmp_path / "a.json"
    if there:
        results.write(file, Results({"commit": "old"}, {}, [measurement([1.0], "lists")]))
    before = file.read_text() if there else None
    status, ran = run(monkeypatch, "lists", "-k", "nobody", "--output", file)
    assert (status, len(ran)) == (1, runner.PROCESSES)
    assert "-k 'nobody' selects no test of lists" in capsys.readouterr().out
    assert file.exists() == there and (not there or file.read_text() == before)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nothing"], "unknown: nothing"),
        (["lists", "--output", "corrupt"], "cannot add to corrupt: corrupt: expected results"),
        (["lists", "--output", "folder"], "cannot add to folder: .*Is a directory"),
        (["lists", "--output", "corrupt/a.json"], "cannot add to corrupt/a.json: "),
        (["lists", "--device", "cuda"], "--device cuda needs a GPU"),
        (["update"], "run `make testing` first"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("corrupt").write_text("no results")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runner, "TESTING", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code == 2
    assert re.search(said, capsys.readouterr().err)


def test_what_is_measured_goes_into_a_folder_that_is_made_for_it(tmp_path, monkeypatch):
    answer = Results({"commit": "c"}, {}, [measurement([1.0], "lists")])
    assert run(monkeypatch, "lists", "--output", tmp_path / "new" / "a.json", answer=answer)[0] == 0
    assert results.read(tmp_path / "new" / "a.json").measurements[0].seconds == [1.0] * runner.PROCESSES


def test_who_allocates_is_measured_with_the_tuned_malloc_too():
    """Of those of 16 bits: memory of its size that a call takes and gives back."""
    size = 2**16
    buffers = Buffers(torch.bfloat16, size, "cpu")
    calls = {name: make(buffers, 1e-3) for name, make in bench_update.MAKERS.items()}
    calls |= {name: lambda _, norm=norm: norm(buffers.grads[0]) for name, norm in bench_norm.NORMS.items()}
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
    assert ranks.same_step(before - change, before - change, before)
    assert not ranks.same_step(before - 3 * change, before - change, before)
    assert not ranks.same_step(before, before - change, before)


def test_the_embedding_that_decays_does():
    """A decay of 1 is no work: only the rows that occur are touched."""
    lr, weight_decay = bench_embedding.LR, bench_embedding.WEIGHT_DECAY
    weight = torch.ones(3, 2)
    ops.embedding_sgd_(weight, torch.tensor([0]), torch.ones(1, 2), lr=lr, weight_decay=weight_decay)
    assert (weight[1:] < 1).all()


@pytest.mark.parametrize("contestant", bench_update.CONTESTANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_contestants_compute_the_update(contestant, dtype):
    """SGD fused is known to be wrong for 16 bits on CPUs (torch 2.13): that is what this check is for."""
    if lacking := methods.missing_peer(contestant):
        pytest.skip(lacking[1])
    wrong = bench_update.wrong(contestant, dtype, "cpu")
    assert not wrong or contestant == "SGD fused"


def test_wrong_results_are_noticed(monkeypatch):
    monkeypatch.setitem(bench_update.MAKERS, "add_", lambda buffers, lr: lambda number: None)
    assert "10007 elements are not within" in bench_update.wrong("add_", torch.bfloat16, "cpu")


def test_a_missing_peer_is_named_in_the_results(tmp_path):
    """And the runner's whole way, from a process of its own to the file."""
    code = (
        "import sys, importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'lomo_optim' else real(name, *rest)\n"
        "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    file = tmp_path / "measured.json"
    selected = ["-k", "65536 and bfloat16 and not sgd_"]
    options = ["-q", "-p", "no:cacheprovider", "--benchmark-enable", *selected, f"--record={file}"]
    command = [sys.executable, "-c", code, "bench/bench_norm.py", "bench/bench_update.py", *options]
    # Not as a worker of pytest-xdist, in which pytest-benchmark measures nothing.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=results.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    content = results.read(file)
    assert "lomo_optim not installed" in content.missing["lomo_optim"]
    rivals = content.of("update", dtype="bfloat16", elements=65536)
    assert {one.contestant for one in rivals} >= {"add_", "SGD foreach"}
    assert all(len(one.seconds) == len(one.beside_seconds) >= measure.ROUNDS[0] for one in rivals)
    assert content.environment["threads"] == 1
