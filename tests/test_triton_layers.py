"""The layers' operators in Triton without a GPU: interpreted, and compiled for GPUs. See test_triton.py."""

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
    HOPPER,
    INEXACT,
    INTERPRETED,
    NVIDIA,
    PYTEST,
    TWINS,
    TYPES,
    Assembled,
    assembled,
    compiled,
    programs_together,
    resources,
)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from bench.compiled import assembler_remarks, triton_source  # noqa: E402
from lomo_kernels.triton import embedding, launch, linear  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# ---- Under the interpreter -------------------------------------------------------------------------------------------


MANY = "of_every_shape or every_tile or alike or extreme or estimate"


@pytest.mark.parametrize("part", [pytest.param(MANY, marks=pytest.mark.slow), f"not ({MANY})"])
def test_the_interpreted_kernels_pass_their_own_tests(run_python, part):
    process = run_python(PYTEST, str(HERE / "support" / "triton_layers_interpreted.py"), "-k", part, **INTERPRETED)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr


# ---- Compiled --------------------------------------------------------------------------------------------------------

POINTERS = {"partials": "*fp64", "counter": "*i64", "keys": "*i64", "order": "*i64", "done": "*i64"}
POINTERS |= {"touched": "*u8", "lengths": "*fp32"}


def source(kernel, pointers, constants, aligned=True):
    """`kernel` as a launch would specialise it."""
    return triton_source(kernel, pointers, constants, unaligned=() if aligned else ("weight", "gy", "x"))


def product_constants(g, tile, gpu, aligned):
    constants = {"G": TYPES[g], "ALIGNED": aligned, "BM": tile.rows, "BN": tile.columns, "BK": tile.tokens}
    return constants | {"WIDEN": linear.widened(DTYPES[g], gpu), "TOKENS": None}


def update(gpu, p, g, stochastic, *, norm=False, clamp=False, pairs=True, aligned=True, rule=0):
    tile = linear.tile_of(DTYPES[g], gpu, aligned)
    constants = {"P": TYPES[p], "RULE": rule, "CLAMP": clamp, "STOCHASTIC": stochastic, "PAIRS": pairs, "NORM": norm}
    constants |= {"PARTS": tile.parts} | product_constants(g, tile, gpu, aligned)
    if not norm:
        constants |= {"partials": None, "counter": None}
    pointers = POINTERS | {"weight": f"*{p}", "gy": f"*{g}", "x": f"*{g}"}
    return source(linear.linear_sgd_kernel, pointers, constants, aligned), tile.options(), tile


def norm_of(gpu, g, *, gram=False, aligned=True):
    tile = linear.tile_of(DTYPES[g], gpu, aligned)
    constants = product_constants(g, tile, gpu, aligned) | {"GRAM": gram} | ({} if gram else {"done": None})
    pointers = POINTERS | {"gy": f"*{g}", "x": f"*{g}"}
    return source(linear.linear_sq_norm_kernel, pointers, constants, aligned), tile.options(), tile


def gram_of(gpu, g, *, aligned=True):
    tile = linear.gram_tile_of(DTYPES[g], gpu)
    constants = {"G": TYPES[g], "ALIGNED": aligned, "BT": tile.rows, "BK": tile.tokens, "ROWS": None, "COLUMNS": None}
    constants["WIDEN"] = linear.widened(DTYPES[g], gpu)
    pointers = POINTERS | {"gy": f"*{g}", "x": f"*{g}"}
    return source(linear.gram_kernel, pointers, constants, aligned), tile.options(), tile


def lengths_of(gpu, g):
    constants = {"G": TYPES[g], "BLOCK": 1024, "SIZE": None}
    return source(linear.lengths_kernel, POINTERS | {"x": f"*{g}"}, constants), launch.options(4), None


def embedded(gpu, p, g, stochastic, *, rule=0, norm=False, clamp=False, pairs=True, aligned=True, decay=False):
    constants = {"P": TYPES[p], "G": TYPES[g], "RULE": rule, "ROWS": False, "CLAMP": clamp, "STOCHASTIC": stochastic}
    constants |= {"PAIRS": pairs, "NORM": norm}
    constants |= {
        "ALIGNED": aligned,
        "DECAY": decay,
        "BLOCK": embedding.BLOCK,
        "U": embedding.TOGETHER,
    }
    if not norm:
        constants |= {"partials": None, "counter": None}
    pointers = POINTERS | {"weight": f"*{p}", "gy": f"*{g}"}
    return source(embedding.embedding_sgd_kernel, pointers, constants, aligned), launch.options(4), None


def embedded_norm(gpu, g, *, aligned=True):
    constants = {"G": TYPES[g], "ALIGNED": aligned, "BLOCK": embedding.BLOCK}
    constants["U"] = embedding.TOGETHER
    kernel = embedding.embedding_sq_norm_kernel
    return source(kernel, POINTERS | {"gy": f"*{g}"}, constants, aligned), launch.options(4), None


#: Weight by factors.
PAIRS = [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "bf16"), ("bf16", "fp32")]


def cases():
    everything = {"norm": True, "clamp": True}
    odd = everything | {"pairs": False, "aligned": False}
    for p, g in PAIRS:
        for name, make in (("linear", update), ("embedding", embedded)):
            one = functools.partial(make, p=p, g=g, stochastic=p != "fp32")
            yield f"{name} {p} by {g}", one
            yield f"{name} {p} by {g} everything", functools.partial(one, **everything)
            yield f"{name} {p} by {g} odd", functools.partial(one, **odd)
    yield "linear bf16 by bf16 nearest", functools.partial(update, p="bf16", g="bf16", stochastic=False)
    for g in ("fp32", "bf16"):
        yield f"linear norm {g}", functools.partial(norm_of, g=g, gram=True)
        yield f"linear norm {g} odd", functools.partial(norm_of, g=g, aligned=False)
        yield f"gram {g}", functools.partial(gram_of, g=g)
        yield f"gram {g} odd", functools.partial(gram_of, g=g, aligned=False)
        yield f"lengths {g}", functools.partial(lengths_of, g=g)
        yield f"embedding {g} decay", functools.partial(embedded, p=g, g=g, stochastic=g != "fp32", decay=True)
        yield f"embedding norm {g}", functools.partial(embedded_norm, g=g)
        yield f"embedding norm {g} odd", functools.partial(embedded_norm, g=g, aligned=False)


CASES = dict(cases())
#: Updates and norms in whole tiles, of 16-bit factors: one program multiplies while another updates.
TOGETHER = [
    name for name in CASES if re.match(r"linear.* (?:bf16|fp16)\b", name) and not re.search("odd|by fp32", name)
]
#: Updates without a norm and a clamp. On one GPU they are compiled too; on the others "everything" stands for them: it
#: is the same code in the same tile, and holds more in registers.
PARTS = [name for name in CASES if " by " in name and not re.search("everything|odd", name)]
WHOLE = [name for name in CASES if name not in PARTS and "odd" not in name]
#: Shared memory that a program may have, in KiB.
SHARED = {75: 64, 80: 163, 90: 227, 100: 227, 120: 99, AMD: 64}


@pytest.mark.parametrize(
    ("target", "name"),
    [
        pytest.param(target, name, marks=() if target == HOPPER and name in WHOLE else pytest.mark.slow)
        for target in NVIDIA
        for name in CASES
        if target == HOPPER or name not in PARTS
    ],
)
def test_compiled_for_nvidia(target, name, tmp_path, record_property):
    code, options, tile = CASES[name](target)
    if tile is None and target in TWINS:
        kernel = assembled(target, (code, options), CASES[name](TWINS[target])[:2])
    else:
        kernel = compiled(target, (code, options))
    ptx = kernel.asm["ptx"]
    registers, stack, local = resources(kernel, tmp_path)
    assert stack == local == 0, f"registers are spilled: {stack} bytes"
    record_property("registers", (f"Triton, layers, sm_{target}", registers))
    assert kernel.metadata.shared <= SHARED[target] * 1024
    if tile is not None and target == 90:
        remarks = assembler_remarks(ptx, target, kernel.metadata)
        assert "serialized" not in remarks, "products wait for each other, which takes a third longer"
    if name in TOGETHER and target in (90, 100):
        assert options["maxnreg"] == 128
        together = programs_together(kernel, registers), SHARED[target] * 1024 // (kernel.metadata.shared + 1024)
        assert min(together) == 2, f"{together} programs share a multiprocessor, by registers and by shared memory"
    assert not INEXACT.search(ptx)
    fused = len(FUSED.findall(ptx))
    if tile is not None and not re.search(r"\b(?:mma\.sync|wgmma|tcgen05\.mma)", ptx):
        # Only what forms the product itself, of float32.
        step = tile.rows * tile.columns * tile.tokens // (32 * options["num_warps"])
        assert 0 < fused <= 2 * step if name.startswith("gram") else fused == step
        assert target < 80 or "fp32" in name.replace("linear fp32 by", "")
    else:
        assert fused == 0, "a multiplication and an addition are fused"
    there = Counter(re.findall(r"\b(?:ld|st)\.global\.v4\.b32|cp\.async\.cg", ptx))
    if name.startswith("linear") and "odd" not in name:
        if target >= 80:
            assert there["cp.async.cg"] >= 2, "factors are not read ahead, 16 bytes at a time"
        if "norm" not in name:
            size = DTYPES[name.split()[1]].itemsize * tile.rows * tile.columns // (32 * options["num_warps"] * 16)
            assert there["st.global.v4.b32"] == size, "the weight is not written 16 bytes at a time"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["embedding fp16 by fp16 everything", "embedding norm fp32 odd", "lengths bf16"])
def test_twins_have_one_ptx(name):
    for target, twin in TWINS.items():
        made = CASES[name](target)[:2]
        whole, parts = compiled(target, made), assembled(target, made, CASES[name](twin)[:2])
        assert isinstance(parts, Assembled) and whole.asm["ptx"] == parts.asm["ptx"]
        assert whole.asm["cubin"] == parts.asm["cubin"] and whole.metadata.shared == parts.metadata.shared


@pytest.mark.slow
def test_without_the_limit_a_program_would_be_alone(tmp_path):
    code, options, _ = CASES["linear fp16 by fp16 everything"](90)
    assert options.pop("maxnreg") == 128
    kernel = compiled(90, (code, options))
    assert programs_together(kernel, resources(kernel, tmp_path)[0]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compiled_for_amd(name, record_property):
    code, options, _ = CASES[name](0)
    kernel = compiled(AMD, (code, options))
    code = kernel.asm["amdgcn"]
    (registers,) = re.findall(r"^\s+\.vgpr_count:\s+(\d+)", code, re.M)
    record_property("registers", (f"Triton, layers, {AMD}", int(registers)))
    for key in (".vgpr_spill_count", ".sgpr_spill_count", ".private_segment_fixed_size"):
        assert re.findall(rf"{re.escape(key)}:\s+(\d+)", code) == ["0"], f"{key}: registers are spilled"
    assert kernel.metadata.shared <= SHARED[AMD] * 1024
    if not name.startswith(("gram", "lengths")):  # a square root is made of them; no bit depends on it
        assert not FUSED.search(code), "a multiplication and an addition are fused"


KERNELS = [linear.linear_sgd_kernel, linear.linear_sq_norm_kernel, linear.gram_kernel, linear.lengths_kernel]
KERNELS += [embedding.embedding_sgd_kernel, embedding.embedding_sq_norm_kernel]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_no_number_makes_another_variant(kernel):
    """Sizes, strides, addresses and the bits of scalars: a compilation for one would come in the midst of training."""
    numbers = [p.name for p in kernel.params if not p.is_constexpr and p.annotation_type]
    given = {p.name: 3 if p.is_constexpr or p.annotation_type else torch.zeros(64) for p in kernel.params}
    backend = triton.compiler.make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    usual = binder(**given)[1]
    assert len(numbers) >= 2
    for name in numbers:
        for value in (0, 1, 16, 2**20, -1):
            assert binder(**given | {name: value})[1] == usual, (name, value)


@pytest.mark.parametrize(
    "name", ["gram bf16", "linear norm bf16", "embedding norm bf16", "linear bf16 by bf16 everything"]
)
def test_sums_are_stored_before_the_program_is_counted(name):
    """The thread that stores them is the one that counts, with release and acquire: then no barrier is needed."""
    code, options, _ = CASES[name](90)
    ptx = compiled(90, (code, options)).asm["ptx"]
    count = re.search(r"@(%p\d+) atom\.global\.gpu\.acq_rel\.add\.u64", ptx)
    stores = re.findall(r"@(%p\d+) st\.global\.b64", ptx[: count.start()])
    sums = 2 if name.startswith("gram") else 1
    assert stores[-sums:] == [count[1]] * sums
