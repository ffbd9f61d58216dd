"""Every instruction set gives the same bits, and those of the reference. Each is tried in a process of its own."""

import functools
import hashlib
import itertools
import json
import math
import platform
import signal
import sys
from pathlib import Path

import pytest
import torch
from support import oracle
from support.oracle import ARGUMENTS, DTYPES, ROUNDINGS, reference_arguments
from test_embedding import gradient as embedding_gradient

from lomo_kernels import ops, reference
from lomo_kernels.ops.scalars import vector
from lomo_kernels.rules import RULES

ISAS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
SIZES = (0, 1, 7, 17, 33, 513, 4097, 10007, 70001)
MESSAGE = "this processor and build offer"

CODE = """
import json
import test_instruction_sets
from lomo_kernels import backends
assert backends.choice("CPU").backend == "cpu", backends.choices()
made = test_instruction_sets.digests() | {"embeddings": test_instruction_sets.embedding_digests()}
made |= {"factored": test_instruction_sets.factored_digests()}
print(json.dumps([backends.choice("CPU").detail, made]))
"""


def digest(tensors):
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(oracle.bits(tensor).numpy().tobytes())
    return sha.hexdigest()


def cases(param_dtype, rounding):
    """A fixed grid of parameters, gradients and arguments."""
    for grad_dtype in DTYPES:
        for size in SIZES:
            for arguments in (ARGUMENTS["lr"], ARGUMENTS["all"]):
                keys = {
                    "rounding": rounding,
                    "seed": size,
                    "parameter_id": 2**40,
                    "step": 7,
                    "shard": (2**33 - 99, 7, 9),
                }
                yield oracle.param_of(size, param_dtype), oracle.grad_of(size, grad_dtype), arguments | keys
    yield (
        oracle.ordinary(10007, param_dtype),
        oracle.ordinary(10007, torch.float16, 1),
        {"lr": 0.03, "rounding": rounding},
    )
    n = 100_000
    param, grad = oracle.ordinary(2 * n, param_dtype)[::2], oracle.ordinary(n, torch.float32).view(1000, 100).t()
    yield param.view(100, 1000), grad, ARGUMENTS["all"] | {"rounding": rounding}


def rule_cases():
    """Parameters, gradients and arguments for each rule: any numbers, and ordinary ones, for which kernels are fast."""
    for (p, g), rounding in itertools.product(itertools.product(DTYPES, DTYPES), ROUNDINGS):
        given = {"rounding": rounding, "seed": 4, "step": 7}
        for size in (7, 33, 513, 4097):
            yield oracle.param_of(size, p), oracle.grad_of(size, g), ARGUMENTS["all"] | given
        yield oracle.ordinary(10007, p), oracle.ordinary(10007, g, 1), {"lr": 0.03} | given


def split_cases():
    """Parameters of `cases` with low parts."""
    for param, grad, arguments in cases(torch.bfloat16, "nearest"):
        low = torch.randint(-(2**15), 2**15, param.shape, generator=oracle.generator(6), dtype=torch.int16)
        yield param, low, grad, {k: v for k, v in arguments.items() if k in ("lr", *ARGUMENTS["all"])}


@functools.cache
def expected_digests():
    """The updates' digests, by the reference."""
    pairs = (reference.updated_split(p, low, g, **reference_arguments(given)) for p, low, g, given in split_cases())
    rules = {
        f"rule {rule}": digest(reference.updated(p, g, **reference_arguments(a), rule=rule) for p, g, a in rule_cases())
        for rule in RULES
    }
    return {"split": digest(itertools.chain.from_iterable(pairs)), **rules} | {
        f"{oracle.name_of(dtype)} {rounding}": digest(
            reference.updated(p, g, **reference_arguments(arguments)) for p, g, arguments in cases(dtype, rounding)
        )
        for dtype in DTYPES
        for rounding in ROUNDINGS
    }


def digests():
    """The updates' and the norms' digests, by the operators."""
    result, norms, parts = {}, [], []
    for param, low, grad, arguments in split_cases():
        param = param.clone(memory_format=torch.preserve_format)
        ops.sgd_(param, grad, **arguments, low=low, rounding="split")
        parts += [param, low]
    result["split"] = digest(parts)
    for rule in RULES:
        updated = []
        for param, grad, arguments in rule_cases():
            ops.sgd_(param, grad, **arguments, rule=rule)
            updated.append(param)
        result[f"rule {rule}"] = digest(updated)
    for dtype in DTYPES:
        for rounding in ROUNDINGS:
            updated = []
            for param, grad, arguments in cases(dtype, rounding):
                slot = torch.zeros(1, dtype=torch.float64)
                param = param.clone(memory_format=torch.preserve_format)
                ops.sgd_(param, grad, **arguments, sq_norm=slot)
                updated.append(param)
                norms.append(torch.where(slot.isfinite(), slot, math.inf))  # infinity and NaN say the same
            result[f"{oracle.name_of(dtype)} {rounding}"] = digest(updated)
    for dtype in DTYPES:
        for size in (*SIZES, 100_003):
            for scale in (1.0, 1e4, 1e20, 1e-25):
                slot = torch.zeros(1, dtype=torch.float64)
                grad = (oracle.ordinary(size, torch.float32) * scale).to(dtype)
                ops.sq_norm_(slot, grad, inv_scale=0.3)
                norms.append(torch.where(slot.isfinite(), slot, math.inf))
    return result | {"norms": digest(norms)}


def factored(operators):
    """Parameters updated with factors, and the sums, by operators of these names."""
    updated, sums = [], []
    for i, (p, g) in enumerate(itertools.product(DTYPES, DTYPES)):
        for rows, columns in ((1, 1), (9, 65), (40, 4097), (300, 63)):
            param = oracle.param_of(rows * columns, p, i).view(rows, columns).clone()
            grad = oracle.ordinary(rows * columns, g, i).view(rows, columns)
            factors = oracle.ordinary(rows, torch.float32).abs(), oracle.ordinary(columns, torch.float32).abs()[None]
            scalars = vector("test", param.device, {"lr": 0.1, "clip_value": 0.9, "step": 3})
            slot = torch.zeros(1, dtype=torch.float64)
            lines = torch.zeros(rows, dtype=torch.float64), torch.zeros(1, columns, dtype=torch.float64)
            operators["factored_update_"](param, grad, *factors, scalars, 0, bool(i % 2), 1, 2, [])
            operators["factored_sq_norm_"](slot, grad, *factors, scalars)
            operators["factor_sums_"](*lines, grad, scalars)
            updated.append(param)
            sums += [slot, *lines]
    return digest(updated), digest(sums)


def expected_factored_digest():
    return factored(reference.IMPLEMENTATIONS)[0]


def factored_digests():
    names = ("factored_update_", "factored_sq_norm_", "factor_sums_")
    updates, sums = factored({name: getattr(torch.ops.lomo_kernels, name) for name in names})
    return {"updates": updates, "sums": sums}


def embeddings():
    """Weight, indices, grad_output and arguments, with few and with many tokens for a row."""
    for i, (p, g) in enumerate(itertools.product(DTYPES, DTYPES)):
        for dim, make in itertools.product((1, 63, 65, 4097), (oracle.grad_of, oracle.ordinary)):
            index = torch.randint(9, (30,), generator=oracle.generator(i))
            weight, grad = oracle.param_of(12 * dim, p, i).view(12, dim), make(30 * dim, g, i).view(30, dim)
            yield weight, index, grad, ARGUMENTS["all"] | {"rounding": ROUNDINGS[i % 2], "step": 7}


def expected_embedding_digest():
    return digest(
        reference.updated(w, embedding_gradient(len(w), [i], [g], [-1])[0], **reference_arguments(arguments))
        for w, i, g, arguments in embeddings()
    )


def embedding_digests():
    """The updates' and the norms' digests, by the operators."""
    updated, norms = [], []
    for weight, index, grad, arguments in embeddings():
        slot, apart = torch.zeros(2, 1, dtype=torch.float64)
        ops.embedding_sq_norm_(apart, index, grad, inv_scale=0.3)
        ops.embedding_sgd_(weight, index, grad, **arguments, sq_norm=slot)
        updated.append(weight)
        norms += [torch.where(s.isfinite(), s, math.inf) for s in (slot, apart)]
    return {"updates": digest(updated), "norms": digest(norms)}


#: Instructions per element that an update of ordinary numbers may take: what g++ 12 makes for AVX2, and a quarter more.
#: One hash serves two bfloat16 elements or one float16 element, which the processor converts in one instruction. The
#: limits hold for AVX-512 too, whose machine code has some 0.6 times as many: it was never counted while it ran.
LIMITS = {
    "bfloat16 nearest": 2.3,
    "bfloat16 stochastic": 3.6,
    "bfloat16 split": 3.3,
    "float16 nearest": 1.2,
    "float16 stochastic": 3.6,
}

COUNT = """
import json
import test_instruction_sets
print(json.dumps(test_instruction_sets.instructions()))
"""


def instructions():
    """Instructions per element, by dtype and rounding: in what calls of two sizes differ. None if they are not counted
    here. The operator is called without its wrapper, which takes twice its instructions. A count takes a second, so
    only those that are too high are made again: what else the process does may have come between."""
    import lomo_kernels_testing as native

    if native.count_instructions(lambda: None) < 10:  # it takes some hundred
        return None

    def instructions_of(elements, dtype, rounding):
        """How many instructions one call takes."""
        param, grad = torch.ones(elements, dtype=dtype), torch.full((elements,), 0.01, dtype=dtype)
        low = [torch.zeros(elements, dtype=torch.int16)] if rounding == "split" else []
        arguments = [param], [grad], scalars, [], RULES["sgd"], rounding == "stochastic", 0, [0], [], low
        update = functools.partial(torch.ops.lomo_kernels.update_.default, *arguments)
        for _ in range(50):  # until Python has specialised its bytecode
            update()
        return native.count_instructions(update)

    def per_element(*of):
        return (instructions_of(3 * 1024, *of) - instructions_of(1024, *of)) / (2 * 1024)

    counts = {}
    scalars = vector("update_", torch.device("cpu"), {"lr": 0.1})
    for dtype in (torch.bfloat16, torch.float16):
        for rounding in (*ROUNDINGS, "split") if dtype is torch.bfloat16 else ROUNDINGS:
            name, count = f"{oracle.name_of(dtype)} {rounding}", per_element(dtype, rounding)
            counts[name] = count if 0.3 < count <= LIMITS[name] else per_element(dtype, rounding)
    return counts


@pytest.mark.parametrize("isa", ["avx2", pytest.param("avx512", marks=pytest.mark.slow)])
def test_updates_take_few_instructions(run_python, isa):
    pytest.importorskip("lomo_kernels_testing", reason="run `make testing`: the module that counts is not built")
    if platform.machine() != "x86_64" or sys.platform != "linux":
        pytest.skip("instructions are counted on Linux on x86-64 only")
    testing = str(Path(__file__).parents[1] / "build" / "testing")
    process = run_python(f"import sys; sys.path.append({testing!r})" + COUNT, LOMO_KERNELS_ISA=isa)
    if process.returncode and MESSAGE in process.stderr:
        pytest.skip(process.stderr.strip().splitlines()[-1])
    if process.returncode == -signal.SIGTRAP:
        pytest.skip("this system ends a process that sets the processor's trap flag (an emulator?)")
    assert process.returncode == 0, process.stderr
    counts = json.loads(process.stdout)
    if counts is None:
        pytest.skip("this system ignores the processor's trap flag (an emulator?)")
    assert {name: count for name, count in counts.items() if count > LIMITS[name]} == {}, counts
    assert min(counts.values()) > 0.3, counts  # each element is looked at


@pytest.fixture(scope="module")
def digests_of(run_python):
    """The digests of one instruction set, made once; skips where the processor lacks it."""
    made = {}

    def get(isa):
        if isa not in made:
            made[isa] = run_python(CODE, LOMO_KERNELS_ISA=isa)
        process = made[isa]
        if process.returncode and MESSAGE in process.stderr:
            pytest.skip(process.stderr.strip().splitlines()[-1])
        assert process.returncode == 0, process.stderr
        name, digests = json.loads(process.stdout)
        assert name == isa
        return digests

    return get


@pytest.mark.parametrize("isa", ISAS)
def test_updates_equal_the_reference(digests_of, isa):
    made = digests_of(isa)
    norms, embeddings, factored = (made.pop(name) for name in ("norms", "embeddings", "factored"))
    assert made == expected_digests()
    assert embeddings["updates"] == expected_embedding_digest()
    assert factored["updates"] == expected_factored_digest()
    baseline = digests_of("baseline")
    wanted = baseline["norms"], baseline["embeddings"]["norms"], baseline["factored"]["sums"]
    found = norms, embeddings["norms"], factored["sums"]
    assert found == wanted, "the norms' bits depend on the instruction set"


def test_the_baseline_is_never_missing(run_python):
    process = run_python("import lomo_kernels", LOMO_KERNELS_ISA="nonesuch")
    assert process.returncode != 0
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: LOMO_KERNELS_ISA=nonesuch") and MESSAGE in last and "baseline" in last
