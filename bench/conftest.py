"""What the benches share: the device, the extent, and a record of what was measured."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from lomo_kernels import backends

from . import ranks, results
from .buffers import Buffers
from .measure import Clock, environment, repeated, rounds_for


def pytest_addoption(parser):
    group = parser.getgroup("measurements of lomo_kernels")
    group.addoption("--full", action="store_true", help="every size and case, not the short selection")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="whose kernels are measured")
    group.addoption("--processes", type=int, default=1, help="this many share the rounds (set by python -m bench)")
    group.addoption("--record", metavar="FILE", type=Path, help="write the measurements there")


def pytest_configure(config):
    config.measurements, config.missing = [], {}
    torch.set_num_threads(1)  # the probe of memory bandwidth has one, and a thread of two is not measured well


def pytest_generate_tests(metafunc):
    """Arguments named as a constant of the module (`tokens`: TOKENS, `contestant`: CONTESTANTS), which may differ by
    extent: {"short": …, "full": …}, under the device where they differ; without a constant, `dtype` is each of them."""
    extent = "full" if metafunc.config.getoption("full") else "short"
    for name in metafunc.fixturenames:
        every = results.DTYPES if name == "dtype" else None
        if values := getattr(metafunc.module, f"{name.upper().rstrip('S')}S", every):
            if isinstance(values, dict):
                values = values.get(metafunc.config.getoption("device"), values)
            scope = "function" if name == "contestant" else "module"  # contestants share what a case sets up
            metafunc.parametrize(name, values[extent] if isinstance(values, dict) else values, ids=str, scope=scope)


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=Clock.read))


def pytest_sessionfinish(session):
    write(session.config)


def write(config):
    """After every measurement: the process may be killed."""
    if file := config.getoption("record"):
        config.about = getattr(config, "about", None) or environment(config.getoption("device"))
        results.write(file, results.Results(config.about, config.missing, config.measurements))


@pytest.fixture(scope="session")
def device(request):
    name = request.config.getoption("device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.fail("--device cuda needs a GPU: torch.cuda.is_available() is False")
    return name


@pytest.fixture(scope="session")
def setting(device):
    """What the process is set to, part of every case."""
    serving = backends.choice(device.upper())
    tuned = os.environ.get("MALLOC_MMAP_MAX_") == "0"
    allocator = {"malloc": "tuned" if tuned else "stock"} if device == "cpu" else {}
    return {"backend": serving.backend, "detail": serving.detail, **allocator}


@pytest.fixture(scope="session")
def missing(request):
    """missing(name, reason): names a contestant that cannot run here, and skips the test."""

    def skip(name, reason):
        request.config.missing[name] = reason
        pytest.skip(f"{name}: {reason}")

    return skip


@pytest.fixture(scope="module")
def buffers(elements, dtype, device, missing):
    try:
        return Buffers(getattr(torch, dtype), elements, device)
    except MemoryError as error:
        missing(f"{elements} elements, {dtype}", str(error))


@pytest.fixture
def record(request, setting):
    """record(contestant, case, …): keeps a `results.Measurement` of this file's question."""
    question = request.module.__name__.split("bench_")[-1]

    def keep(contestant, case, **measured):
        one = results.Measurement(question, contestant, {**setting, **case}, **measured)
        request.config.measurements.append(one)
        write(request.config)
        return one

    return keep


@pytest.fixture(scope="module")
def samples(case, device, request):
    """Seconds and memory of steps over two processes, by contestant."""
    if device != "cpu":
        pytest.skip("one GPU has no two ranks")
    timed = request.config.getoption("benchmark_enable")
    rounds = rounds_for(math.inf, request.config.getoption("processes")) if timed else 0
    return ranks.measured(request.module.made, case, rounds)


@pytest.fixture
def ranked(record, samples):
    """ranked(contestant, case, name): records the samples of this name beside the first name's."""
    seconds, memory = samples
    first = next(iter(seconds))

    def run(contestant, case, name):
        beside = {"beside": first, "beside_seconds": seconds[first]}
        record(contestant, case, seconds=seconds[name], memory=memory[name], **beside)

    return run


@pytest.fixture
def paired(benchmark, record, device, request):
    """paired(contestant, case, call, beside, …): times `call`, in every round right after the probe `beside`."""

    def run(contestant, case, call, beside=None, **more):
        calls = [call, beside.call] if beside else [call]
        if benchmark.disabled:
            benchmark.pedantic(lambda: [each(0) for each in calls])
            return
        mine, *other = repeated(device, *calls)
        seconds, beside_seconds = [], []

        def before():
            beside_seconds.extend(probe() * beside.scale for probe in other)

        def sample():
            seconds.append(mine())
            Clock.seconds += seconds[-1]

        rounds = rounds_for(mine() + sum(probe() for probe in other), request.config.getoption("processes"))
        benchmark.pedantic(sample, setup=before, rounds=rounds)
        measured = {"seconds": seconds, "beside": beside.name if beside else "", "beside_seconds": beside_seconds}
        record(contestant, case, **measured, **more)

    return run
