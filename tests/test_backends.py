"""How a backend is chosen, forced and refused, and that the reference serves as one."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import test_instruction_sets
import torch

import lomo_kernels
import lomo_kernels.__main__
from lomo_kernels import backends, ops
from lomo_kernels.composite import rule_factors, tiled

SHOW = "from lomo_kernels import backends; print([(c.key, c.backend, c.reason) for c in backends.choices()])"


def last_line(process):
    return process.stderr.strip().splitlines()[-1]


def test_cpu_tensors_are_served_by_the_cpu_backend_and_nothing_is_said(run_python):
    process = run_python(SHOW)
    assert process.returncode == 0 and "('CPU', 'cpu', 'the best" in process.stdout, process.stderr
    assert process.stdout.count("\n") == 1 and process.stderr == ""


def test_empty_variables_force_nothing(run_python):
    process = run_python(SHOW, LOMO_KERNELS_BACKEND="", LOMO_KERNELS_ISA="")
    assert process.returncode == 0 and "('CPU', 'cpu', 'the best" in process.stdout, process.stderr


def test_every_key_has_one_choice_and_one_kernel_per_operator():
    keys = [choice.key for choice in backends.choices()]
    assert sorted(keys) == sorted(set(keys)) == ["CPU", "CUDA"]
    for choice in backends.choices():
        assert choice.backend and choice.detail and choice.reason
        for name in ops.OPERATORS:
            there = torch._C._dispatch_has_kernel_for_dispatch_key(f"lomo_kernels::{name}", choice.key)
            assert there == (choice.of(name).backend != "none"), (name, choice)


def test_info_says_what_serves_each_operator(monkeypatch, capsys):
    overrides = dict.fromkeys(backends.COMPOSITE, backends.Choice("CUDA", "triton", "Triton 9.9", "beside the library"))
    monkeypatch.setitem(backends._chosen, "CUDA", backends.Choice("CUDA", "cuda", "sm_90", "has code", overrides))
    assert lomo_kernels.__main__.info() == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = {row[0]: row[2] for row in rows if row[1:2] == ["CUDA"]}
    assert shown == {name: "triton" if name in backends.COMPOSITE else "cuda" for name in ops.OPERATORS}


def test_an_unknown_backend_is_refused(run_python):
    process = run_python("import lomo_kernels", LOMO_KERNELS_BACKEND="nonesuch")
    assert process.returncode != 0
    line = last_line(process)
    assert line.startswith("ImportError: LOMO_KERNELS_BACKEND=nonesuch")
    assert all(name in line for name in ("cpu", "cuda", "triton", "reference"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU backends may be there")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_forced_backend_that_is_missing_is_refused(run_python, name):
    process = run_python("import lomo_kernels", LOMO_KERNELS_BACKEND=name)
    assert process.returncode != 0
    line = last_line(process)
    assert line.startswith(f"ImportError: LOMO_KERNELS_BACKEND={name}: ") and len(line) > 60, line


#: What there is: torch's CUDA and ROCm, a GPU, the compiled library, Triton. What is then chosen, forced or not; after
#: a plus what serves others: beside the library the operators of layers, beside Triton those of few numbers.
CUDA, ROCM, GPU, LIBRARY, TRITON = "CUDA", "ROCm", "GPU", "library", "Triton"
BROKEN = "broken library"
SITUATIONS = {
    (CUDA, GPU, LIBRARY, TRITON): {
        None: "cuda + triton",
        "cuda": "cuda + tiled",
        "triton": "triton + tiled",
        "cpu": "none",
    },
    (CUDA, GPU, LIBRARY): {None: "cuda + tiled", "cuda": "cuda + tiled", "triton": "no Triton"},
    (CUDA, GPU, TRITON): {None: "triton + tiled", "cuda": "no library", "triton": "triton + tiled"},
    (CUDA, GPU, BROKEN, TRITON): {
        None: "triton + tiled, with a warning",
        "cuda": "no code for this GPU",
        "triton": "triton + tiled",
    },
    (CUDA, GPU): {None: "none"},
    (CUDA, LIBRARY, TRITON): {None: "none", "cuda": "is_available() is False", "triton": "is_available() is False"},
    (ROCM, GPU, LIBRARY, TRITON): {None: "triton + tiled", "cuda": "built without CUDA", "triton": "triton + tiled"},
    (LIBRARY, TRITON): {None: "none", "cuda": "without CUDA and ROCm", "triton": "without CUDA and ROCm"},
}


@pytest.mark.parametrize("there", SITUATIONS, ids="+".join)
def test_the_choice_for_cuda_tensors(monkeypatch, tmp_path, there):
    registered = []  # (operator, key), of what registers itself and in what stands for it

    def load(what, missing, operators):
        def found(key="CUDA", names=None):
            if what not in there:
                raise ImportError(missing)
            registered.extend((name, key) for name in (operators if names is None else names))
            return f"the {what}"

        return found

    def load_cuda():
        if torch.version.cuda is None:
            raise ImportError("torch is built without CUDA")
        plain = set(ops.OPERATORS) - set(tiled.IMPLEMENTATIONS)
        return load(LIBRARY, "no code for this GPU" if BROKEN in there else "no library", plain)()

    class Library:
        def impl(self, name, function, key):
            registered.append((name, key))

    monkeypatch.setattr(torch.version, "cuda", "13.0" if CUDA in there else None)
    monkeypatch.setattr(torch.version, "hip", "7.0" if ROCM in there else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: GPU in there)
    monkeypatch.setattr(backends, "_load_cuda", load_cuda)
    small = rule_factors.IMPLEMENTATIONS.keys() - {"adalomo_factors"}
    monkeypatch.setattr(backends, "_load_triton", load(TRITON, "no Triton", set(ops.OPERATORS) - small))
    monkeypatch.setattr(backends, "library", Library())
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: (name.split("::")[1], key) in registered
    )
    file = tmp_path / "_cuda.so"
    monkeypatch.setattr(backends, "CUDA_LIBRARY", file)
    if LIBRARY in there or BROKEN in there:
        file.touch()
    for forced, outcome in SITUATIONS[there].items():
        monkeypatch.setattr(backends, "_forced", forced)
        monkeypatch.setattr(backends, "_chosen", {})
        registered.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                choice = backends.choice("CUDA")
            except ImportError as error:
                assert outcome in str(error) and forced is not None, (forced, error)
                continue
            assert backends.choice("CUDA") is choice
        beside = {choice.of(name).backend for name in backends.COMPOSITE} - {choice.backend}
        serving = " + ".join([choice.backend, *beside])
        assert f"{serving}{', with a warning' if caught else ''}" == outcome, choice
        expected = [] if choice.backend == "none" else [(name, "CUDA") for name in ops.OPERATORS]
        assert sorted(registered) == sorted(expected), "not one implementation for each operator"
        for name in ops.OPERATORS:
            assert choice.of(name).key == "CUDA" and choice.of(name).detail and choice.of(name).reason
        if caught:
            assert len(caught) == 1 and "no code for this GPU" in str(caught[0].message)


def test_the_choice_is_kept_where_its_warning_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "_cuda.so").touch()
    monkeypatch.setattr(backends, "CUDA_LIBRARY", tmp_path / "_cuda.so")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backends, "_forced", None)
    monkeypatch.setattr(backends, "_chosen", {})
    chosen = backends.Choice("CUDA", "triton", "Triton", "no code for this GPU")
    monkeypatch.setattr(backends, "_choose_for_cuda", lambda forced: chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="no code for this GPU"):
            backends.choice("CUDA")
    assert backends.choice("CUDA") is chosen


def test_cuda_tensors_without_a_backend_are_refused_with_reason_and_remedy(monkeypatch):
    none = backends.Choice("CUDA", "none", "install Triton", "lomo_kernels was built without CUDA")
    monkeypatch.setitem(backends._chosen, "CUDA", none)
    with pytest.raises(NotImplementedError, match="was built without CUDA; install Triton"):
        backends.check_device(torch.device("cuda", 1))


def test_a_missing_library_says_how_to_get_it(run_python, tmp_path):
    package = Path(lomo_kernels.__file__).parent
    shutil.copytree(package, tmp_path / "lomo_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import lomo_kernels; print(lomo_kernels.__file__)"
    process = run_python(code)
    assert process.returncode != 0
    line = last_line(process)
    assert line.startswith("ImportError: ") and "_cpu.so" in line and "pip install" in line
    without = run_python(code, LOMO_KERNELS_BACKEND="reference")  # which needs no library
    assert without.returncode == 0 and str(tmp_path) in without.stdout, without.stderr


REFERENCE = """
import json, torch
import test_instruction_sets
from lomo_kernels import backends, ops
from lomo_kernels.composite import tiled
assert {c.backend for c in backends.choices()} == {"reference"}
param = torch.ones(5, requires_grad=True)
loss = (param * param).sum()
ops.sgd_(param, torch.ones(5), lr=0.5)
try:
    loss.backward()
except RuntimeError as error:
    assert "modified by an inplace operation" in str(error)
else:
    raise AssertionError("no version bump")
try:
    ops.sgd_(param, torch.ones(4), lr=0.5)
except ValueError as error:
    assert "grad has shape [4], param has shape [5]" in str(error)
torch.library.opcheck(torch.ops.lomo_kernels.sq_norm_.default, ([torch.zeros(1).double()], [torch.ones(3)], None))
print(json.dumps(test_instruction_sets.digests()))
"""


def test_the_reference_works_end_to_end(run_python):
    process = run_python(REFERENCE, LOMO_KERNELS_BACKEND="reference")
    assert process.returncode == 0, process.stderr
    made = json.loads(process.stdout)
    made.pop("norms")  # the reference sums in another order
    assert made == test_instruction_sets.expected_digests()


CONTRACT = """
import sys, pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_the_reference_passes_the_contract(run_python):
    """The operators' own tests once more, on a part of the grid."""
    here = Path(__file__).parent
    chosen = "list or found_inf or refused or layouts or version or inference or finite or shard or accumulates"
    files = [str(here / "test_sgd.py"), str(here / "test_sq_norm.py")]
    process = run_python(CONTRACT, *files, "-k", chosen, LOMO_KERNELS_BACKEND="reference")
    assert process.returncode == 0, process.stdout[-3000:]


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_a_device_without_a_backend_is_refused(kind):
    with pytest.raises(NotImplementedError, match=f"no backend for {kind} tensors"):
        backends.check_device(torch.device(kind))


def test_devices_with_a_backend_are_not_refused():
    for kind in ("cpu", "meta"):
        backends.check_device(torch.device(kind))


def test_a_tied_weight_on_the_reference(run_python):
    """A sum of several kinds of factors is formed tile by tile, with kernels that the compiled library alone has."""
    program = """
import torch
from torch import nn
from lomo_kernels import Lomo
for dtype in (torch.float32, torch.bfloat16):
    table, head = nn.Embedding(300, 64, dtype=dtype), nn.Linear(64, 300, bias=False, dtype=dtype)
    head.weight = table.weight
    model = nn.ModuleList([table, head])
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=0.1, clip_passes="one", fused_layers=True)
    before = table.weight.detach().clone()
    optimizer.backward(head(table(torch.arange(9))).float().square().mean())
    print(torch.equal(before, table.weight), optimizer.last_grad_norm.item() > 0)
"""
    process = run_python(program, LOMO_KERNELS_BACKEND="reference")
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["False", "True"] * 2


def test_a_library_that_cannot_be_loaded_is_explained(run_python, tmp_path):
    """As beside an older torch, or on an older system."""
    (tmp_path / "_cpu.so").write_bytes(b"no library")
    code = """
import pathlib, sys
from lomo_kernels import backends
backends.CPU_LIBRARY = pathlib.Path(sys.argv[1])
backends._load_cpu()
"""
    process = run_python(code, str(tmp_path / "_cpu.so"))
    assert process.returncode == 1
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: _cpu.so of lomo_kernels cannot be loaded: ") and "torch 2.11 or newer" in last
