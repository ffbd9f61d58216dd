"""What all tests share: seeds, threads, GPU skips, and a helper that runs a snippet in a fresh process."""

import gc
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

TESTS = Path(__file__).parent

# Workers of pytest-xdist stand side by side; tests of several threads ask for them with the `threads` fixture.
torch.set_num_threads(1)

# The same examples on every run, so that no failure comes and goes; HYPOTHESIS_PROFILE=explore looks for new ones.
hypothesis.settings.register_profile("default", derandomize=True, database=None, deadline=None, max_examples=200)
hypothesis.settings.register_profile("explore", database=None, deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser):
    parser.addoption(
        "--slow",
        action="store_true",
        default=bool(os.environ.get("CI")),
        help="run the tests marked slow, too, as continuous integration does",
    )


def served_devices():
    """Devices that the tests of the operators run on: those with a backend in force, and with hardware."""
    from lomo_kernels import backends

    present = {"CPU": True, "CUDA": torch.cuda.is_available()}
    return [c.key.lower() for c in backends.choices() if c.backend != "none" and present[c.key]]


def pytest_report_header():
    from lomo_kernels import backends

    return [f"lomo_kernels on {c.key}: {c.backend} ({c.detail}; {c.reason})" for c in backends.choices()]


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        marks = {"cpu": (), "cuda": pytest.mark.gpu}
        metafunc.parametrize("device", [pytest.param(name, marks=marks[name]) for name in served_devices()])


def pytest_collection_finish():
    """What the tests' imports have made lives on. Without looking at it a `gc.collect()`, of which tests of memory call
    several and a simulation some, takes 1 ms in place of 150 to 300."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # as Python ends, it destroys what modules have made


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.is_available() is False")
    if item.get_closest_marker("slow") and not (item.config.option.slow or selects(item.config)):
        pytest.skip("slow, left out: make test ARGS=--slow runs all tests")


def selects(config):
    """Whether tests were named, by -k, by -m or by path::name: then all that are named run."""
    return bool(config.option.keyword or config.option.markexpr or any("::" in name for name in config.args))


def pytest_terminal_summary(terminalreporter):
    """What was compiled for GPUs, with no spilled register and no stack: those who pass say how many registers."""
    registers = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "registers":
                registers.setdefault(value[0], []).append(value[1])
    if registers:
        terminalreporter.section("compiled for GPUs: no spills, no stack")
    for kernels, counts in sorted(registers.items()):
        terminalreporter.write_line(f"{kernels}: {len(counts)} kernels, {min(counts)} to {max(counts)} registers")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ranks():
    """ranks(world): `Processes` that stay for a file's tests. For the session they would take time while other tests
    run: see `support.processes.CROWDED`."""
    from support.processes import by_world

    yield from by_world()


@pytest.fixture(scope="module")
def ranks_with_deepspeed():
    """As `ranks`, with processes of their own: DeepSpeed exchanges functions of torch."""
    from support.processes import by_world

    yield from by_world()


@pytest.fixture(scope="session")
def run_python():
    """Runs Python code in a fresh process, where this folder can be imported and no LOMO_KERNELS_* is set but `env`.
    The package is the one that is tested, `make sanitize`'s too: the current folder comes last.

    Returns the finished process: `returncode`, `stdout`, `stderr`. torch is imported already, unless `env` has what
    counts before that: LD_PRELOAD.
    """
    from support.fresh import Server

    server = Server()
    package = str(Path(importlib.util.find_spec("lomo_kernels").origin).parents[1])

    def run(code, *arguments, **env):
        clean = {k: v for k, v in os.environ.items() if not k.startswith("LOMO_KERNELS_")}
        paths = [str(TESTS), package, *filter(None, [clean.get("PYTHONPATH")])]
        env = {**clean, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **env}
        if "LD_PRELOAD" not in env:
            return server.run(code, *arguments, env=env)
        whole = [sys.executable, "-c", f"import sys; sys.path.append(sys.path.pop(0))\n{code}", *arguments]
        return subprocess.run(whole, env=env, capture_output=True, text=True, timeout=580)

    yield run
    server.close()
