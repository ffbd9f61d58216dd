"""The CUDA library is compiled and linked for `bench.compiled.TARGETS`, and its code is what it should be. Needs nvcc,
no GPU.

nvcc is that of PATH, CUDACXX, CUDA_HOME or /usr/local/cuda, else the one of `pip install nvidia-cuda-nvcc
nvidia-cuda-runtime`.
"""

import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch

from bench.compiled import BUILD, OBJECTS, TARGETS, NoCompiler, build_cuda, output_of, tool
from bench.results import ROOT
from lomo_kernels import ops
from lomo_kernels.rules import RULES

ARCHES = [f"sm_{arch}" for arch in TARGETS.split(";")]
#: Source: number of kernels in it. update: every rule, times 6 ways to round, as float32 parameters are not rounded,
#: times 3 dtypes of gradients; it and sq_norm: one kernel for one tensor, one for short lists and one for long ones.
#: factored: as update, and the norm. factor_sums: strips and small matrices, and the addition of the strips' sums.
#: rule_factors: one for each operator.
KERNELS = {
    "update_kernel.cu": len(RULES) * 6 * 3 * 3,
    "sq_norm_kernel.cu": 3 * 3,
    "factored_kernel.cu": len(RULES) * 6 * 3 + 3,
    "factor_sums_kernel.cu": 3 + 3 + 1,
    "rule_factors_kernel.cu": 5,
}
#: Registers of a thread at most: three blocks of 256 threads fit on a multiprocessor, or two.
REGISTERS = dict.fromkeys(KERNELS, 80) | {"factored_kernel.cu": 128}

#: Of parameters and gradients, mangled.
TYPES = "7Float32|13SplitBFloat16|8BFloat16|7Float16"

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def nvcc():
    """Builds _cuda.so in the build folder, if something has changed, and returns nvcc's path."""
    try:
        return build_cuda()
    except NoCompiler as error:
        pytest.skip(f"THE CUDA KERNELS WERE NOT COMPILED AND THEIR CODE NOT CHECKED: {error}")


@pytest.fixture(scope="module", params=KERNELS)
def ptx(request, nvcc, tmp_path_factory):
    """The source's name, and its kernels' PTX by name."""
    to = tmp_path_factory.mktemp("ptx") / "code.ptx"
    source = ROOT / "csrc" / "cuda" / request.param
    options = ["-std=c++17", "-O3", *flags(request.param), "-arch=compute_90", "-ptx"]
    failed, output = output_of(nvcc, *options, str(source), "-o", str(to))
    assert not failed, output
    parts = re.split(r"^\.entry |^\.visible \.entry |^\.weak \.entry ", to.read_text(), flags=re.MULTILINE)[1:]
    return request.param, {part.split("(")[0]: part for part in parts}


def flags(source):
    """Those that decide on arithmetic, as the library was compiled with them."""
    commands = (BUILD / "build.ninja").read_text()
    edge = re.search(rf"build [^\n]*{source}\.o: .*?\n\n", commands, re.DOTALL)[0]
    return re.findall(r"--?(?:fmad|ftz|prec-div|prec-sqrt|use_fast_math)\S*", edge)


# ---- Resources ------------------------------------------------------------------------------------------------------


def resources(source):
    """(target, kernel) -> (bytes of stack, bytes spilled, registers), from what ptxas said."""
    found = {}
    pattern = (
        r"Compiling entry function '(\S+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    log = (OBJECTS / f"{source}.o.log").read_text()
    for kernel, target, stack, stores, loads, registers in re.findall(pattern, log, re.DOTALL):
        found[target, kernel] = int(stack), int(stores) + int(loads), int(registers)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("target", ARCHES)
@pytest.mark.parametrize("source", KERNELS)
def test_no_kernel_spills_or_has_a_stack(nvcc, source, target, record_property):
    _, version = output_of(nvcc, "--list-gpu-code")
    if target not in version.split():
        pytest.skip(f"{target} IS NOT CHECKED: {nvcc} does not know it")
    figures = {kernel: figures for (of, kernel), figures in resources(source).items() if of == target}
    assert len(figures) == KERNELS[source]
    bad = {kernel: figures for kernel, figures in figures.items() if figures[0] or figures[1]}
    assert not bad, f"(stack, spills, registers): {bad}"
    for _, _, registers in figures.values():
        record_property("registers", (f"CUDA, {target}, {source}", registers))
        assert registers <= REGISTERS[source], "too few blocks fit on a multiprocessor"


# ---- Code -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_is_fused_and_nothing_flushed(ptx):
    source, kernels = ptx
    assert len(kernels) == KERNELS[source]
    for kernel, code in kernels.items():
        operations = Counter(re.findall(r"^\s*(?:@\S+\s+)?([a-z0-9]+\.[a-z0-9.]*f(?:16|32|64)\S*)", code, re.MULTILINE))
        arithmetic = [op for op in operations if re.match(r"(mul|add|sub)\.", op)]
        # Without .rn the assembler may fuse a product and a sum.
        assert arithmetic or "replace_states" in kernel, kernel  # it copies
        assert all(".rn." in op for op in arithmetic), (kernel, operations)
        # A conversion rounds to nearest; but a stochastic result was rounded before, and is cut.
        conversions = {op for op in operations if re.match(r"cvt\.r[a-z]\.b?f16", op)}
        types = re.findall(TYPES, kernel)
        cut = {"cvt.rz.f16x2.f32"} if types[:1] == ["7Float16"] and "Lb1E" in kernel else set()
        assert {op for op in conversions if ".rn." not in op} == cut, (kernel, conversions)
        # A rule may divide, if the quotient is rounded to nearest. The squares of factor_sums are exact in float64.
        forbidden = r"(fma|mad|ex2|lg2|sin|cos|tanh)\.|(div|rcp|sqrt)\.(?!rn\.)|.*\.(ftz|approx|sat)"
        exact = {"fma.rn.f64"} if source == "factor_sums_kernel.cu" else set()
        assert not [op for op in operations if re.match(forbidden, op) and op not in exact], (kernel, operations)


@pytest.mark.slow
def test_doubles_are_for_sums_and_scalars_only(ptx):
    """At most a conversion and three operations per element of a group, in the rescue of sums; none in the update."""
    for kernel, code in ptx[1].items():
        doubles = len(re.findall(r"(?:add|sub|mul)\.rn\.f64", code))
        assert doubles <= 2 * 16 + 32, (kernel, doubles)


@pytest.mark.slow
def test_accesses_are_as_wide_as_can_be(ptx):
    """A thread's 16 elements take 2 accesses of 8 neighbours; with 32 bits an element in either tensor 4 of 4. A
    gradient is loaded with the streaming policy, except by an update, whose parameters would then stay in the cache."""
    source, kernels = ptx
    for kernel, code in kernels.items():
        names = re.findall(TYPES, kernel)
        if not names or "sums_of_matrices" in kernel:
            continue  # single numbers
        # The mangled name of a gradient of the parameter's dtype refers back to it.
        param, grad = (names[0], names[-1]) if "update_kernel" in kernel else (None, names[0])
        accesses = 4 if "7Float32" in (param, grad) else 2
        written = 2 if param == "13SplitBFloat16" else 1  # the low part too

        def width(name, accesses=accesses):
            return "v4" if name == "7Float32" or accesses == 2 else "v2"

        tiles = 1 if param else 2  # sums load the next tile too
        loads = Counter(re.findall(r"ld\.global(\.cs)?\.(v[24])\.[ubf]32", code))
        expected = Counter({("" if param else ".cs", width(grad)): tiles * accesses})
        expected += Counter({("", width(param)): written * accesses}) if param else Counter()
        expected += Counter({("", "v4"): 4}) if source == "factored_kernel.cu" else Counter()  # 16 columns' factors
        assert loads == expected, kernel
        stores = Counter(re.findall(r"st\.global\S*\.(v[24])\.[ubf]32", code))
        assert stores == (Counter({width(param): written * accesses}) if param else Counter()), kernel
        assert not re.search(r"\b(ld|st)\.local", code), kernel


# ---- The library ----------------------------------------------------------------------------------------------------

STUB = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n'
LOAD = """
import ctypes, sys, torch
from lomo_kernels import ops
path, = sys.argv[1:]
torch.ops.load_library(path)
library = ctypes.CDLL(path)
library.lomo_kernels_cuda_targets.restype = ctypes.c_char_p
print(library.lomo_kernels_cuda_targets().decode())
library.lomo_kernels_cuda_refusal.restype = ctypes.c_char_p
print(library.lomo_kernels_cuda_refusal().decode())
for name in ops.OPERATORS:
    print(torch._C._dispatch_has_kernel_for_dispatch_key(f"lomo_kernels::{name}", "CUDA"))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA: the library is loaded as it is")
def test_the_library_links_and_registers_nothing_without_a_gpu(nvcc, run_python, tmp_path):
    """A torch without CUDA lacks one symbol of it, which is lent here; every other one must be found."""
    (tmp_path / "stub.cpp").write_text(STUB)
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    subprocess.run([compiler, "-shared", "-fPIC", tmp_path / "stub.cpp", "-o", tmp_path / "stub.so"], check=True)
    process = run_python(LOAD, str(BUILD / "_cuda.so"), LD_PRELOAD=str(tmp_path / "stub.so"))
    assert process.returncode == 0, process.stderr
    targets, refusal, *registered = process.stdout.splitlines()
    _, known = output_of(nvcc, "--list-gpu-code")
    expected = [target for target in ARCHES if target in known.split()]
    assert targets.split() == [*expected, expected[-1].replace("sm_", "compute_")]
    assert refusal.startswith("CUDA says: ") and len(refusal) > 30
    assert registered == ["False"] * len(ops.OPERATORS)


def test_what_is_wrong_is_refused(tmp_path):
    """LOMO_CUDA and LOMO_CUDA_ARCHS that mean nothing, in one sentence."""
    common = [tool("cmake"), "-S", str(ROOT), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    common += [f"-DPYTHON={sys.executable}"]
    failed, output = output_of(*common, "-B", str(tmp_path / "a"), "-DLOMO_CUDA=yes")
    assert failed and "LOMO_CUDA is 'yes', expected auto, 0 or 1" in output
    if torch.version.cuda is None:
        failed, output = output_of(*common, "-B", str(tmp_path / "b"))
        assert not failed and "CUDA kernels are left out: " in output
