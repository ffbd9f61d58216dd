"""The operators with row and column factors in Triton without a GPU: interpreted, and compiled for GPUs. See
test_triton.py."""

import functools
import re
from collections import Counter

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels are not checked")

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels cannot be compiled in this process", allow_module_level=True)

import torch  # noqa: E402
from test_triton import (  # noqa: E402
    AMD,
    FUSED,
    HERE,
    INTERPRETED,
    PYTEST,
    TWINS,
    TYPES,
    assembled,
    compiled,
    every_target,
    resources,
    size_of,
)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from bench.compiled import triton_source  # noqa: E402
from lomo_kernels.triton import adalomo, factor_sums, factored, launch, matrices  # noqa: E402

# ---- Under the interpreter -------------------------------------------------------------------------------------------


def test_the_interpreted_kernels_pass_their_own_tests(run_python):
    file = HERE / "support" / "triton_factored_interpreted.py"
    process = run_python(PYTEST, str(file), **INTERPRETED)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("part", ["test_sums", "test_sum_of or test_update", "not (test_sum or test_update)"])
def test_the_interpreted_kernels_pass_the_contract(run_python, part):
    chosen = f"({part}) and not threads and not 5000 and not 700 and not 260 and not 8000"
    process = run_python(PYTEST, str(HERE / "test_factored.py"), "-k", chosen, **INTERPRETED)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr
    assert int(re.search(r"(\d+) passed", process.stdout)[1]) >= 15, process.stdout[-300:]


@pytest.mark.slow
def test_fused_layers_call_the_interpreted_kernels(run_python):
    """Every rule, formed gradients and rows that were looked up, both roundings, a step that overflows."""
    chosen = "(bits_of_the_float32 and bfloat16) or overflows or looked_up"
    process = run_python(PYTEST, str(HERE / "test_lomo_fused_factored.py"), "-k", chosen, **INTERPRETED)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr
    assert int(re.search(r"(\d+) passed", process.stdout)[1]) >= 15, process.stdout[-300:]


# ---- Compiled --------------------------------------------------------------------------------------------------------

POINTERS = {"partials": "*fp64", "counter": "*i64", "row_factors": "*fp32", "column_factors": "*fp32"}
POINTERS |= {"row_sums": "*fp64", "column_sums": "*fp64", "of_rows": "*fp64", "of_columns": "*fp64", "low": "*i16"}
POINTERS |= dict.fromkeys(("row", "column", "beta", "new_row", "new_column"), "*fp32")
LARGE, CONVOLUTION = matrices.tile_of(1, 4096, 4096), matrices.tile_of(4096, 3, 3)


def update(p, g, stochastic=False, *, split=False, clamp=False, rows=False, pairs=True, tile=LARGE):
    aligned = tile is LARGE
    constants = {"P": TYPES[p], "G": TYPES[g], "RULE": 0, "ALIGNED": aligned, "CLAMP": clamp, "STOCHASTIC": stochastic}
    constants |= {"ROWS": rows, "PAIRS": pairs, **tile._asdict()} | ({} if split else {"low": None})
    pointers = POINTERS | {"param": f"*{p}", "grad": f"*{g}"}
    return triton_source(factored.factored_update_kernel, pointers, constants), launch.options()


def norm_of(g, clamp=False):
    constants = {"G": TYPES[g], "ALIGNED": True, "CLAMP": clamp, **LARGE._asdict()}
    return triton_source(factored.factored_sq_norm_kernel, POINTERS | {"grad": f"*{g}"}, constants), launch.options()


def strips_of(g, clamp=False):
    constants = {"G": TYPES[g], "ALIGNED": True, "CLAMP": clamp, "R": LARGE.R, "C": LARGE.C}
    return triton_source(factor_sums.sums_of_strips_kernel, POINTERS | {"grad": f"*{g}"}, constants), launch.options()


def sums_of_matrices(g):
    constants = {"G": TYPES[g], "CLAMP": True, **CONVOLUTION._asdict()}
    return triton_source(factor_sums.sums_of_matrices_kernel, POINTERS | {"grad": f"*{g}"}, constants), launch.options()


def added():
    made = triton_source(factor_sums.add_strips_kernel, POINTERS, {"N": factor_sums.SUMS})
    return made, launch.options(launch.WARPS // 2)


def of_adalomo(rows):
    constants = {"ROWS": rows, "BLOCK": adalomo.BLOCK}
    return triton_source(adalomo.adalomo_kernel, POINTERS, constants), launch.options()


def cases():
    """Name, and how it is made with how many bytes of an element are read by vectors, and written; None: by none."""
    for p, g in (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "bf16"), ("bf16", "fp32")):
        stochastic = p != "fp32"
        mixed = p == "fp32" and g == "bf16"
        sizes = 4 if mixed else size_of(p) + size_of(g), size_of(p)
        yield f"{p} by {g}", functools.partial(update, p, g, stochastic), sizes
        full = functools.partial(update, p, g, stochastic, clamp=True, rows=stochastic, pairs=False)
        yield f"{p} by {g} everything", full, sizes
    yield "bf16 nearest", functools.partial(update, "bf16", "bf16"), (4, 2)
    yield "bf16 split", functools.partial(update, "bf16", "bf16", split=True, clamp=True), (6, 4)
    small = functools.partial(update, "bf16", "bf16", True, clamp=True, pairs=False, tile=CONVOLUTION)
    yield "bf16 convolution", small, None
    for g in ("fp32", "bf16"):
        yield f"{g} norm", functools.partial(norm_of, g, clamp=True), (size_of(g), 0)
        yield f"{g} strips", functools.partial(strips_of, g), (2 * size_of(g), 0)  # the next rows in the loop
        yield f"{g} matrices", functools.partial(sums_of_matrices, g), None
    yield "added", added, None
    yield "adalomo", functools.partial(of_adalomo, True), None
    yield "adalomo of a vector", functools.partial(of_adalomo, False), None


CASES = {name: case for name, *case in cases()}


@pytest.mark.parametrize("name", CASES)
@every_target
def test_compiled_for_nvidia(target, name, tmp_path, record_property):
    make, sizes = CASES[name]
    kernel = assembled(target, make(), make()) if target in TWINS else compiled(target, make())
    ptx = kernel.asm["ptx"]
    registers, stack, local = resources(kernel, tmp_path)
    assert stack == local == 0, "registers are spilled"
    record_property("registers", (f"Triton, factors, sm_{target}", registers))
    assert not FUSED.search(ptx), "a multiplication and an addition are fused"
    assert ".ftz" not in ptx and ".approx" not in ptx
    if sizes is None:
        return
    there = Counter(re.findall(r"\b(?:ld|st)\.global\.v4\.b32", ptx))
    of_factors = 0 if "strips" in name else 4  # bytes of an element's column factor
    per_thread = 4096 // (32 * make()[1]["num_warps"])
    assert there["ld.global.v4.b32"] == per_thread * (sizes[0] + of_factors) // 16
    assert there["st.global.v4.b32"] == per_thread * sizes[1] // 16
    if "strips" not in name and "norm" not in name:
        assert "ld.shared" not in ptx or "everything" in name, "elements wander between threads"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16 by bf16", "bf16 split", "bf16 strips", "bf16 norm", "bf16 matrices"])
def test_compiled_for_amd(name, record_property):
    code, options = CASES[name][0]()
    kernel = compiled(AMD, (code, options | {"num_warps": options["num_warps"] // 2}))
    code = kernel.asm["amdgcn"]
    (registers,) = re.findall(r"^\s+\.vgpr_count:\s+(\d+)", code, re.M)
    record_property("registers", (f"Triton, factors, {AMD}", int(registers)))
    for key in (".vgpr_spill_count", ".private_segment_fixed_size"):
        assert re.findall(rf"{re.escape(key)}:\s+(\d+)", code) == ["0"], f"{key}: registers are spilled"
    assert not FUSED.search(code), "a multiplication and an addition are fused"


KERNELS = [factored.factored_update_kernel, factored.factored_sq_norm_kernel, factor_sums.sums_of_matrices_kernel]
KERNELS += [factor_sums.sums_of_strips_kernel, factor_sums.add_strips_kernel, adalomo.adalomo_kernel]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_no_number_makes_another_variant(kernel):
    """Sizes, addresses and the bits of scalars: a compilation for one would come in the midst of training."""
    numbers = [p.name for p in kernel.params if not p.is_constexpr and p.annotation_type]
    given = {p.name: 3 if p.is_constexpr or p.annotation_type else torch.zeros(64) for p in kernel.params}
    backend = triton.compiler.make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    usual = binder(**given)[1]
    assert len(numbers) >= 4
    for name in numbers:
        for value in (0, 1, 16, 2**20, -1):
            assert binder(**given | {name: value})[1] == usual, (name, value)
