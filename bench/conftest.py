"""What the benches share: options, cases, and rounds that alternate with a baseline's."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from lomo_kernels import backends

from . import measure, results


def pytest_addoption(parser):
    group = parser.getgroup("measurements of lomo_kernels")
    group.addoption("--full", action="store_true", help="every size and case, not the short selection")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="whose kernels are measured")
    group.addoption("--processes", type=int, default=1, help="this many share the rounds (set by python -m bench)")


def pytest_configure(config):
    config.missing = set()
    torch.set_num_threads(1)  # the probe of memory bandwidth has one, and a thread of two is not measured well


def pytest_generate_tests(metafunc):
    """`cases(device, full)` of the module: by question values by the names of arguments. Implementations share what a
    case sets up, so cases have the scope of the module."""
    cases = metafunc.module.cases(*map(metafunc.config.getoption, ("device", "full")))
    for names, values in cases[metafunc.definition.originalname.removeprefix("test_")].items():
        scope = "function" if "implementation" in names else "module"
        metafunc.parametrize(names, values, scope=scope)


def pytest_make_parametrize_id(val, argname):
    return ("checkpointing" if val else "kept") if argname == "checkpointing" else str(val)


def pytest_collection_modifyitems(config, items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=measure.CLOCKS[config.getoption("device")]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """What is skipped is named in the results."""
    report = yield
    if report.skipped:
        item.config.missing.add(report.longrepr[2].removeprefix("Skipped: "))
    return report


def pytest_benchmark_generate_machine_info(config):
    return results.machine_info(config.getoption("device"))


def pytest_benchmark_update_json(config, output_json):
    """Adds the question of each benchmark, the setting of the process, what was skipped, and the commit."""
    device = config.getoption("device")
    choice = backends.choice(device.upper())
    setting = {"backend": choice.backend, "detail": choice.detail}
    if device == "cpu":
        setting["malloc"] = "tuned" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else "stock"
    for benchmark in output_json["benchmarks"]:
        benchmark["group"] = benchmark["name"].split("[")[0].removeprefix("test_")
        benchmark["fullname"] += f" {' '.join(setting.values())}"
        benchmark["extra_info"] |= setting
    output_json |= {"missing": sorted(config.missing), "commit_info": {"id": results.commit()}}


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("device")


@pytest.fixture
def paired(benchmark, device, request):
    """paired(call, baseline, …): times `call` in rounds, each followed by a round of the baseline; `extra_info` takes
    the rest. Calls get a running number, to use buffers in turn. It runs on over both: with numbers of their own, the
    call would find in the cache what the baseline has just used. `capture`: on a GPU, in CUDA graphs."""

    def run(call, baseline=None, capture=False, **extra_info):
        numbers, samples = itertools.count(), []
        capture = capture and device == "cuda" and not benchmark.disabled

        def numbered(call):
            return measure.captured(call) if capture else lambda: call(next(numbers))

        target, compared = numbered(call), numbered(baseline.call) if baseline else None
        if benchmark.disabled:
            benchmark.pedantic(target)
            return compared() if baseline else None
        iterations, seconds = measure.calibrated(target, device)
        compared_iterations, compared_seconds = measure.calibrated(compared, device) if baseline else (0, 0.0)
        if capture:
            whole = measure.CAPTURED
            iterations, compared_iterations = (
                -(-times // whole) * whole for times in (iterations, compared_iterations)
            )

        def compare():
            samples.append(measure.timed(compared, compared_iterations, device) * baseline.scale)

        rounds = measure.rounds_for(seconds + compared_seconds, request.config.getoption("processes"))
        rounds_of = {"iterations": iterations, "rounds": rounds, "warmup_rounds": 1}
        benchmark.extra_info |= extra_info | ({"baseline": baseline.name} if baseline else {})
        benchmark.pedantic(target, teardown=compare if baseline else None, **rounds_of)
        benchmark.extra_info["baseline_seconds"] = samples[1 : rounds + 1]  # without the warm-up's

    return run
