"""The Triton backend without a GPU: interpreted, equal in bits; and compiled for GPUs, with what must be in the code
and what must not. The summary names their registers."""

import functools
import itertools
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels are not checked")

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels cannot be compiled in this process", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from bench.compiled import triton_source  # noqa: E402
from lomo_kernels.rules import RULES  # noqa: E402
from lomo_kernels.triton import launch, sgd, sq_norm  # noqa: E402
from lomo_kernels.triton.numerics import BLOCK  # noqa: E402

HERE = Path(__file__).parent
INTERPRETED = {"TRITON_INTERPRET": "1", "LOMO_KERNELS_BACKEND": "triton"}

# ---- Registration ----------------------------------------------------------------------------------------------------

ABSENT = "import sys; sys.modules['triton'] = None\n"
OLD = "import sys, types; sys.modules['triton'] = types.SimpleNamespace(__version__='3.1.0')\n"
SHOW = "from lomo_kernels import backends; print([(c.key, c.backend, c.detail) for c in backends.choices()])"


def test_triton_is_imported_only_when_chosen(run_python):
    process = run_python("import sys, lomo_kernels; print({'triton', 'lomo_kernels.triton'} & {*sys.modules})")
    assert process.returncode == 0 and process.stdout.strip() == "set()", process.stdout + process.stderr


def test_the_interpreter_serves_cpu_tensors(run_python):
    process = run_python(SHOW, **INTERPRETED)
    assert f"('CPU', 'triton', 'Triton {triton.__version__}, interpreted')" in process.stdout, process.stderr


@pytest.mark.parametrize(("code", "words"), [(ABSENT, "cannot be imported"), (OLD, "3.1.0 is too old")])
def test_a_triton_that_is_missing_or_old_is_refused(run_python, code, words):
    process = run_python(code + "import lomo_kernels", **INTERPRETED)
    line = process.stderr.strip().splitlines()[-1]
    assert line.startswith("ImportError: ") and words in line and "pip install 'triton>=3.6'" in line


def test_only_the_interpreter_serves_cpu_tensors(run_python):
    process = run_python("from lomo_kernels import triton; triton.register('CPU')")
    assert "cannot serve CPU tensors" in process.stderr and "TRITON_INTERPRET=1" in process.stderr
    process = run_python("from lomo_kernels import triton; triton.register('CUDA')", TRITON_INTERPRET="1")
    assert "cannot serve CUDA tensors" in process.stderr and "unset TRITON_INTERPRET" in process.stderr


# ---- Under the interpreter -------------------------------------------------------------------------------------------

# The interpreter computes with numpy, which warns of overflows that are meant.
PYTEST = """
import sys, pytest, support.interpreter
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::RuntimeWarning", *sys.argv[1:]]))
"""
TOO_LARGE = (
    "200003 or 3000001 or exactly_zero or threads or any_finite or 6553 or nothing_finite and 20 or "
    "shows_in_the_slot and (not bfloat16 or 70001 and not nan)"
)
#: Parts of the contract that an interpreter can do (six seconds per million elements): file, tests, at least how many.
CONTRACT = {
    "sizes": ("test_sgd.py", "every_size and (0] or -1] or -31] or 4095] or 4096] or 4097])", 80),
    "arguments": ("test_sgd.py", "every_argument and bfloat16 or every_key or numbers_and_tensors or step_may", 150),
    "oracle": ("test_sgd.py", "equal_the_oracle or 65536_parameters or near_overflow or not_given", 25),
    "not_finite": (
        "test_sgd.py",
        "(keeps or leaves) and bfloat16 and nearest or neighbours or hides or may_be_a or negative_zero",
        9,
    ),
    "subnormal": ("test_sgd.py", "subnormal_numbers or fused", 10),
    "norms": ("test_sgd.py", "same_pass and (-0] or -1] or -33] or 4097])", 70),
    "layouts": ("test_sgd.py", "test_layouts and small or in_a_dimension or expanded or negative_bit or overlap", 60),
    "shards": ("test_sgd.py", "shard or beyond_32", 80),
    "lists": ("test_sgd.py", "list_form and (all] or clip_value] or takes) or empty_list or iterable", 7),
    "split": (
        "test_split.py",
        "every_size and (0] or -1] or -31] or 4095] or 4097]) or every_argument and bfloat16 or strided or lists or "
        "keeps or found_inf or any_nan or bad_input or share_memory or layers or wrappers or factored or not_aligned",
        80,
    ),
    "autograd": ("test_sgd.py", "version or saved or inference or hook", 10),
    "refusals": ("test_sgd.py", "refuse", 150),
    "sq_norm": ("test_sq_norm.py", f"not ({TOO_LARGE})", 140),
}


#: The digests below see what these see in a tenth of the time, and the operators' own tests what is not of a kernel.
SLOW = ("sizes", "arguments", "oracle", "split", "subnormal", "layouts", "sq_norm", "autograd", "refusals")


@pytest.mark.parametrize("part", [pytest.param(part, marks=[pytest.mark.slow] * (part in SLOW)) for part in CONTRACT])
def test_the_interpreted_kernels_pass_the_contract(run_python, part):
    """The operators' own tests once more, on a part of the grid."""
    file, chosen, least = CONTRACT[part]
    process = run_python(PYTEST, str(HERE / file), "-k", chosen, **INTERPRETED)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr
    assert int(re.search(r"(\d+) passed", process.stdout)[1]) >= least, process.stdout[-300:]


MANY = "every_rule or long_list or last_block or rows_of_shards"


@pytest.mark.parametrize("part", [pytest.param(MANY, marks=pytest.mark.slow), f"not ({MANY})"])
def test_the_interpreted_kernels_pass_their_own_tests(run_python, part):
    process = run_python(PYTEST, str(HERE / "support" / "triton_interpreted.py"), "-k", part, **INTERPRETED)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr


DIGESTS = """
import json, warnings
import support.interpreter
import test_instruction_sets
from lomo_kernels import backends
warnings.simplefilter("ignore", RuntimeWarning)
assert backends.choice("CPU").backend == "triton", backends.choices()
test_instruction_sets.SIZES = (0, 1, 7, 17, 33, 513, 4097, 10007)
made = test_instruction_sets.digests()
made.pop("norms")  # each backend adds in its own order
assert made == test_instruction_sets.expected_digests(), made
"""


def test_the_interpreted_kernels_have_the_digests_of_the_reference(run_python):
    process = run_python(DIGESTS, **INTERPRETED)
    assert process.returncode == 0, process.stderr


# ---- Compiled --------------------------------------------------------------------------------------------------------

NVIDIA = (75, 80, 90, 100, 120)
#: The one whose code is checked in fast tests, too.
HOPPER = 90
AMD = "gfx942"
ELEMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
POINTERS = {"partials": "*fp64", "counters": "*i64", "table": "*i64"}
#: What is absent in each form of a kernel, and whether it reads a table.
FORMS = {
    "single": {"table": None, "COLUMNS": 0},
    "list": {"param": None, "grad": None, "low": None, "COLUMNS": launch.COLUMNS.value},
}


def source(kernel, pointers, constants, aligned=True):
    """`kernel` as a launch would specialise it."""
    return triton_source(kernel, pointers, constants, unaligned=() if aligned else ("param", "grad", "low"))


def update(
    p,
    g,
    stochastic,
    *,
    gpu=90,
    rows=False,
    pairs=True,
    norm=False,
    clamp=False,
    aligned=True,
    listed=False,
    rule=0,
    split=False,
):
    constants = {"P": TYPES[p], "G": TYPES[g], "RULE": rule, "STOCHASTIC": stochastic, "ROWS": rows, "PAIRS": pairs}
    constants |= {"NORM": norm, "CLAMP": clamp, "SPLIT": split, "BLOCK": BLOCK, "ALIGNED": aligned and listed}
    constants |= FORMS["list" if listed else "single"] | ({} if split and not listed else {"low": None})
    pointers = POINTERS | {"param": f"*{p}", "grad": f"*{g}", "low": "*i16"}
    if not norm:
        constants |= {"partials": None, "counters": None}
    if listed:
        options = sgd.list_constants(
            ELEMENTS[p], ELEMENTS[g], stochastic, split, aligned, gpu=gpu, rule=rule, clamp=clamp, norm=norm
        )
        assert {key: options.pop(key) for key in constants if key in options} == {
            key: value for key, value in constants.items() if value is not None
        }
    else:
        options = sgd.options(gpu, ELEMENTS[p], stochastic, rows, norm, clamp)
    return source(sgd.sgd_kernel, pointers, constants, aligned), options


def norm_of(g, *, gpu=90, aligned=True, listed=False):
    constants = {"G": TYPES[g], "BLOCK": BLOCK, "ALIGNED": aligned and listed}
    constants |= FORMS["list" if listed else "single"]
    return source(sq_norm.sq_norm_kernel, POINTERS | {"grad": f"*{g}"}, constants, aligned), sq_norm.options(gpu)


def size_of(name):
    return TYPES[name].primitive_bitwidth // 8


class Case(NamedTuple):
    make: Callable  # source and options
    read: int  # bytes of an element that come by 128-bit loads
    halves: int  # that come by 64-bit loads: a thread has four elements of a float32 parameter, so of its gradient
    written: int
    plain: bool  # only the update


def cases():
    for p, g in itertools.product(TYPES, TYPES):
        mixed = p == "fp32" and g != "fp32"
        sizes = (4, 2, 4) if mixed else (size_of(p) + size_of(g), 0, size_of(p))
        for rounding in ("nearest", "stochastic") if p != "fp32" else ("nearest",):
            stochastic = rounding == "stochastic"
            yield f"{p} by {g} {rounding}", Case(functools.partial(update, p, g, stochastic), *sizes, True)
        if p == "bf16":
            split = functools.partial(update, p, g, False, split=True)
            yield f"{p} by {g} split", Case(split, 2 + 2 + size_of(g), 0, 2 + 2, False)
        full = {"norm": True, "clamp": True, "rows": p != "fp32", "pairs": False}
        yield f"{p} by {g} everything", Case(functools.partial(update, p, g, p != "fp32", **full), *sizes, False)
    for g in TYPES:
        # Twice: a program's first block, and in the loop the next one.
        yield f"{g} norm", Case(functools.partial(norm_of, g), 2 * size_of(g), 0, 0, False)
        listed = functools.partial(update, g, g, g != "fp32", norm=True, listed=True)
        yield f"{g} list", Case(listed, 2 * size_of(g), 0, size_of(g), False)
        yield f"{g} list norm", Case(functools.partial(norm_of, g, listed=True), 2 * size_of(g), 0, 0, False)


CASES = dict(cases())


def compiled(target, made, **changed):
    code, options = made
    gpu = GPUTarget("hip", target, 64) if isinstance(target, str) else GPUTarget("cuda", target, 32)
    return triton.compile(code, target=gpu, options=options | changed)


class Assembled(NamedTuple):
    """What the tests read of a compiled kernel."""

    asm: dict
    metadata: NamedTuple


#: Kernels that form no product have one PTX on these, but for the line that names the target. Only the assembler, a
#: fifth of the time, is run for each.
TWINS = {120: 100}


def assembled(target, made, twin):
    """`compiled`; `twin`: the kernel for the target of `TWINS`, whose PTX is taken if it is the same source."""
    (code, options), (other, others) = made, twin
    if code.hash() != other.hash() or options != others:
        return compiled(target, made)
    kernel = compiled(TWINS[target], twin)
    ptx, replaced = re.subn(rf"(?m)^(\.target sm_){TWINS[target]}", rf"\g<1>{target}", kernel.asm["ptx"])
    assert replaced == 1
    backend = triton.compiler.make_backend(GPUTarget("cuda", target, 32))
    return Assembled({"ptx": ptx, "cubin": backend.make_cubin(ptx, {}, kernel.metadata, target)}, kernel.metadata)


def resources(kernel, tmp_path):
    """Registers, and bytes of stack and local memory, as the compiler of NVIDIA's machine code reports them."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return [int(number) for number in re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups()]


def expected(kernel, made, case):
    """How many 128-bit loads, 64-bit loads and 128-bit stores a thread needs for a full block."""
    elements = BLOCK // (made[1]["num_warps"] * kernel.metadata.target.warp_size)
    return elements * case.read // 16, elements * case.halves // 8, elements * case.written // 16


def programs_together(kernel, registers):
    """How many programs fit on a multiprocessor, by registers, which are given out to a warp by 256."""
    return 65536 // (-(-32 * registers // 256) * 256 * kernel.metadata.num_warps)


# In float arithmetic only: mad.lo and mad.wide are of integers, and what multiplies by 2**32 on AMD's GPUs is a part of
# 64-bit division. There, too, a float16 is widened by a multiplication that adds -0: it rounds once, as it should.
FUSED = re.compile(
    r"\bfma\.|\bmad\.(?:rn|rz|rm|rp)\.|\bv_(?:pk_)?(?:fma|fmac|mac|mad)\w*_f\d+(?!.*(?:0x[4c]f800000|, neg\(0\)))"
)
#: What is not rounded to nearest. `/` becomes div.full, which the interpreter does not show.
INEXACT = re.compile(r"\.ftz|\.approx|\bdiv\.full")


every_target = pytest.mark.parametrize(
    "target", [pytest.param(target, marks=() if target == HOPPER else pytest.mark.slow) for target in NVIDIA]
)


@pytest.mark.parametrize("name", CASES)
@every_target
def test_compiled_for_nvidia(target, name, tmp_path, record_property):
    case = CASES[name]
    made = case.make(gpu=target)
    kernel = assembled(target, made, case.make(gpu=TWINS[target])) if target in TWINS else compiled(target, made)
    ptx = kernel.asm["ptx"]
    registers, stack, local = resources(kernel, tmp_path)
    assert stack == local == 0, "registers are spilled"
    record_property("registers", (f"Triton, sm_{target}", registers))
    assert not FUSED.search(ptx), "a multiplication and an addition are fused"
    assert not INEXACT.search(ptx)
    accesses = Counter(re.findall(r"\b(?:ld|st)\.global\.v\d\.b\d+", ptx))
    counts = [accesses[key] for key in ("ld.global.v4.b32", "ld.global.v2.b32", "st.global.v4.b32")]
    assert tuple(counts) == expected(kernel, made, case)
    if case.plain:
        # One number of each warp, for the decision how to round: more would be elements that wander between threads.
        assert ptx.count("ld.shared") <= ("stochastic" in name), "elements wander between threads"
        assert programs_together(kernel, registers) >= 2, "no two programs fit on a multiprocessor"


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "sgd"])
@pytest.mark.parametrize("name", TYPES)
def test_every_rule_is_compiled_to_exact_operations(name, rule, tmp_path):
    """`CASES` have SGD's kernels only. The interpreter's bits are right even if the compiled code's are not."""
    kernel = compiled(90, update(name, name, name != "fp32", clamp=True, rule=RULES[rule]))
    advice = "use + - * and tl.div_rn in direction() of lomo_kernels/triton/numerics.py"
    for pattern in (FUSED, INEXACT):
        assert not (inexact := pattern.search(kernel.asm["ptx"])), f"rule {rule!r} has {inexact[0]}: {advice}"
    _, stack, local = resources(kernel, tmp_path)
    assert stack == local == 0, "registers are spilled"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp32 by fp16 nearest", "fp16 by bf16 everything", "bf16 list", "bf16 list norm"])
def test_twins_have_one_ptx(name):
    """And one machine code, whoever made the PTX."""
    for target, twin in TWINS.items():
        made = CASES[name].make(gpu=target)
        whole, parts = compiled(target, made), assembled(target, made, CASES[name].make(gpu=twin))
        assert isinstance(parts, Assembled) and whole.asm["ptx"] == parts.asm["ptx"]
        assert whole.asm["cubin"] == parts.asm["cubin"] and whole.metadata.shared == parts.metadata.shared


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("listed", [False, True], ids=["single", "list"])
@pytest.mark.parametrize("p", TYPES)
def test_two_programs_share_a_multiprocessor(p, listed, norm, tmp_path):
    """With all that takes registers: a clamp, a norm and rounding, and in a list rows that are not plain."""
    stochastic = p != "fp32"
    rows = listed and stochastic
    made = update(p, p, stochastic, rows=rows, pairs=not rows, norm=norm, clamp=True, aligned=not listed, listed=listed)
    kernel = compiled(90, made)
    registers, stack, local = resources(kernel, tmp_path)
    assert stack == local == 0, "registers are spilled"
    assert not rows or kernel.metadata.num_warps == 16  # one program of twice as many threads
    assert programs_together(kernel, registers) >= (1 if rows else 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compiled_for_amd(name, record_property):
    case = CASES[name]
    code, options = case.make(gpu=0)
    made = code, options | {"num_warps": options["num_warps"] // 2}  # as `launch.WARPS` is where torch is built for AMD
    kernel = compiled(AMD, made)
    code = kernel.asm["amdgcn"]
    (registers,) = re.findall(r"^\s+\.vgpr_count:\s+(\d+)", code, re.M)
    record_property("registers", (f"Triton, {AMD}", int(registers)))
    for key in (".vgpr_spill_count", ".sgpr_spill_count", ".private_segment_fixed_size"):
        assert re.findall(rf"{re.escape(key)}:\s+(\d+)", code) == ["0"], f"{key}: registers are spilled"
    assert not FUSED.search(code), "a multiplication and an addition are fused"
    assert code.count(".amdhsa_float_denorm_mode_32 3") == code.count(".amdhsa_float_denorm_mode_16_64 3") == 1
    there = Counter(re.findall(r"\b(?:global|buffer)_((?:load|store)_dwordx4)", code))
    loads, _, stores = expected(kernel, made, case)
    assert (there["load_dwordx4"], there["store_dwordx4"]) == (loads, stores)


@pytest.mark.parametrize("target", [90, AMD])
def test_a_fused_multiply_add_would_be_seen(target):
    kernel = compiled(target, update("fp32", "fp32", False), enable_fp_fusion=True)
    assert FUSED.search(kernel.asm["amdgcn" if target == AMD else "ptx"])


@pytest.mark.parametrize("name", ["update", "norm"])
def test_unaligned_tensors_are_not_read_in_vectors(name):
    made = update("bf16", "bf16", True, aligned=False) if name == "update" else norm_of("bf16", aligned=False)
    listed = update("bf16", "bf16", True, rows=True, pairs=False, aligned=False, listed=True)
    for one in (made, listed) if name == "update" else (made, norm_of("bf16", aligned=False, listed=True)):
        ptx = compiled(80, one).asm["ptx"]
        assert "ld.global.b16" in ptx and not re.search(r"(?:ld|st)\.global\.v\d", ptx)


@pytest.mark.parametrize("made", [update("bf16", "fp32", True, norm=True), norm_of("bf16")], ids=["update", "norm"])
def test_the_block_number_is_widened_before_it_is_multiplied(made):
    """Block 2**20 begins at element 2**32: the interpreter cannot come so far."""
    ptx = compiled(80, made).asm["ptx"]
    (register,) = re.findall(r"mov\.u32\s+(%r\d+), %ctaid\.x;", ptx)
    users = [
        line.strip() for line in ptx.splitlines() if re.search(rf"[, ]{register}[,;]", line) and "ctaid" not in line
    ]
    assert users
    for line in users:
        assert re.match(r"(?:cvt\.[su]64\.[su]32|mul\.wide\.[su]32|mad\.wide\.[su]32)\s", line), line


def test_the_sum_of_a_block_is_stored_before_the_block_is_counted():
    """The thread that stores the sum is the one that counts, with release and acquire: then no barrier is needed."""
    ptx = compiled(90, norm_of("bf16")).asm["ptx"]
    store, count = re.findall(
        r"@(%p\d+) (st\.global\.b64|atom\.global\.gpu\.acq_rel\.add\.u64)", ptx[: ptx.index("ld.global.cg")]
    )[:2]
    assert store[1] == "st.global.b64" and count[1].startswith("atom") and store[0] == count[0]


@pytest.mark.parametrize("made", [update("bf16", "fp32", True, norm=True), norm_of("bf16")], ids=["update", "norm"])
def test_no_sum_depends_on_the_layout(made):
    """Two numbers have one sum. Of more, the compiler would choose the order, for each GPU and each kernel another."""
    code = compiled(90, made).asm["ttir"]
    sums = re.findall(r'"tt\.reduce"\(.*?axis = (\d).*?\}\).*?: \(tensor<([\dx]+)xf\d\d>\)', code, re.S)
    assert len(sums) >= 20
    for axis, shape in sums:
        assert int(shape.split("x")[int(axis)]) <= 2, shape


def specialized(kernel, **changed):
    """What a launch for these arguments is compiled for: a type, and what is known of the value, for each."""
    numbers = {parameter.name: 3 for parameter in kernel.params}
    tensors = {"param": torch.zeros(64), "grad": torch.zeros(64), "table": torch.zeros(64, dtype=torch.int64)}
    given = numbers | tensors | {"partials": None, "counters": None} | changed
    binder = create_function_from_signature(
        kernel.signature, kernel.params, triton.compiler.make_backend(GPUTarget("cuda", 90, 32))
    )
    return binder(**{parameter.name: given[parameter.name] for parameter in kernel.params})[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", [sgd.sgd_kernel, sq_norm.sq_norm_kernel])
def test_no_number_makes_another_variant(kernel, form):
    """Sizes, addresses, keys and the bits of scalars: a compilation for one would come in the midst of training."""
    usual = specialized(kernel, **FORMS[form])
    names = [p.name for p in kernel.params if not p.is_constexpr and p.annotation_type]
    assert len(names) >= 4
    for name in names:
        large = [] if name in ("on_device", "kind") else [2**31, 2**40, -(2**63)]
        for value in (0, 1, 16, 2**20, -1, *large):
            assert specialized(kernel, **FORMS[form], **{name: value}) == usual, (name, value)


def test_alignment_makes_another_variant():
    usual = specialized(sgd.sgd_kernel, **FORMS["single"])
    assert specialized(sgd.sgd_kernel, **FORMS["single"], grad=torch.zeros(64)[4:]) == usual
    assert specialized(sgd.sgd_kernel, **FORMS["single"], grad=torch.zeros(64)[1:]) != usual
