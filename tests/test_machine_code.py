"""The GPU kernels' machine code keeps to budgets, so that a change that costs instructions fails. No GPU is needed, but
nvcc and Triton. bench/sass.py says what is read, and how; the tables below say what a kernel may cost."""

import re

import pytest

from bench import compiled, machine_code, sass
from bench.machine_code import H100, H200, blocks_per_multiprocessor, name_of, share_of_copy

pytestmark = pytest.mark.timeout(1800)

#: Instructions per element at most, without and with the sum of squares of the same pass: 3 percent above what nvcc
#: 13.0.88 and Triton 3.9.0 need. "16": bf16 or fp16. What needs fewer for good is to be lowered, in the same commit.
INSTRUCTIONS = """
kernel                    cuda-80     cuda-90     cuda-100    cuda-120    triton-90
sgd_ fp32 by fp32         19.9 27.3   21.7 29.2   18.7 26.2   18.3 26.5   13.7 20.7
sgd_ fp32 by 16           20.8 29.3   22.3 30.8   20.0 28.5   19.6 28.9   15.4 23.2
sgd_ bf16 by fp32         28.6 36.0   30.1 37.6   27.8 35.3   27.4 35.6   23.7 29.9
sgd_ bf16 by 16           29.9 38.3   31.4 39.9   28.6 37.1   28.2 37.5   25.8 32.2
sgd_ bf16 by fp32, st     43.2 50.6   44.5 52.0   45.4 52.8   44.8 53.0   30.2 41.7
sgd_ bf16 by 16, st       44.3 52.7   45.6 54.1   47.0 55.5   46.0 55.3   31.7 44.5
sgd_ fp16 by fp32         23.8 31.1   25.3 32.8   22.8 30.2   22.5 30.7   16.3 22.4
sgd_ fp16 by 16           24.8 33.3   26.7 35.2   23.5 32.0   23.3 32.6   17.6 24.3
sgd_ fp16 by fp32, st     54.6 61.9   55.9 63.3   57.2 64.6   56.3 64.6   59.1 66.5
sgd_ fp16 by 16, st       55.2 63.6   56.4 64.9   58.1 66.6   57.3 66.5   60.9 68.0
sq_norm_ fp32             - 11.5      - 12.0      - 13.3      - 14.0      - 10.9
sq_norm_ 16               - 12.5      - 12.9      - 14.3      - 15.0      - 11.6
"""

#: Blocks of 256 threads that fit on a multiprocessor at least, which bounds a thread's registers.
BLOCKS = {"cuda": 3, "triton": 2}
#: KiB that a multiprocessor has asked for at least before it waits. By Little's law an H200 at 4.3 TB/s moves 23 KiB
#: per multiprocessor in the 0.7 us that an access takes, which is assumed.
IN_FLIGHT = 24
#: The modelled share of a copy's speed that an update's instructions allow at least, and a norm's.
UPDATE_SHARE, NORM_SHARE = 0.95, 0.90
#: What is below that today, by the parameter's dtype: stochastic rounding.
BELOW = {("cuda", "bf16"): 0.75, ("cuda", "fp16"): 0.60, ("triton", "fp16"): 0.50}


def budgets():
    """(backend-arch, row) -> (limit without a norm, with one)."""
    head, *rows = [re.split(r" {2,}", line) for line in INSTRUCTIONS.strip().splitlines()]
    return {(column, row[0]): cell.split() for row in rows for column, cell in zip(head[1:], row[1:], strict=True)}


def row_of(kernel):
    short = {"fp32": "fp32", "bf16": "16", "fp16": "16"}
    if kernel.operator == "sq_norm_":
        return f"sq_norm_ {short[kernel.grad]}"
    return f"sgd_ {kernel.param} by {short[kernel.grad]}{', st' * kernel.stochastic}"


@pytest.fixture(
    scope="module",
    params=[(b, arch) for b, arches in machine_code.ARCHES.items() for arch in arches],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def measured(request):
    """Backend, architecture, and (kernel, facts) of all of its kernels."""
    backend, arch = request.param
    try:
        if backend == "cuda":
            compiled.build_cuda()
        else:
            pytest.importorskip("triton")
        return backend, arch, machine_code.measure(backend, arch)
    except compiled.NoCompiler as error:
        pytest.skip(f"THE MACHINE CODE WAS NOT READ: {error}")


def test_every_kernel_is_read(measured):
    """5 ways to round and 3 dtypes of gradients, with and without a norm, and 3 norms alone."""
    assert len({name_of(kernel) for kernel, _ in measured[2]}) == len(measured[2]) == 5 * 3 * 2 + 3


def test_instructions_per_element(measured):
    backend, arch, kernels = measured
    limits = budgets()
    over = []
    for kernel, facts in kernels:
        limit = float(limits[f"{backend}-{arch}", row_of(kernel)][kernel.norm])
        if facts.instructions > limit:
            over.append(f"{name_of(kernel)}: {facts.instructions:.1f}, budget {limit}")
    assert not over, "\n".join(over)


def test_all_loads_of_a_tile_are_issued_before_the_first_is_waited_for(measured):
    for kernel, facts in measured[2]:
        # The CUDA kernels of bfloat16 parameters load a group of elements when the one before it has arrived.
        serial = measured[0] == "cuda" and kernel.param == "bf16" and kernel.operator == "sgd_"
        assert facts.loads_together >= facts.loads // (2 if serial else 1), name_of(kernel)


def test_accesses_are_as_wide_as_they_can_be(measured):
    """128 bits, but 64 for 16-bit elements beside those of 32 bits. Narrower ones are refused by `facts_of`."""
    for kernel, facts in measured[2]:
        assert facts.loads <= kernel.most_loads, name_of(kernel)


def test_registers_leave_room_for_blocks(measured):
    backend, arch, kernels = measured
    for kernel, facts in kernels:
        assert facts.stack == 0, f"{name_of(kernel)}: registers are spilled"
        assert facts.blocks * kernel.threads >= BLOCKS[backend] * 256, (name_of(kernel), facts.registers)
        if arch == 90:
            assert facts.in_flight >= IN_FLIGHT, name_of(kernel)


@pytest.mark.parametrize("measured", [("cuda", 90), ("triton", 90)], indirect=True, ids=["cuda", "triton"])
def test_instructions_allow_the_speed_of_a_copy(measured):
    """Modelled, for Hopper."""
    backend, _, kernels = measured
    for kernel, facts in kernels:
        for card in (H100, H200):
            share, limit = share_of_copy(facts, kernel.bytes_moved, card)
            least = NORM_SHARE if kernel.norm else UPDATE_SHARE
            least = BELOW.get((backend, kernel.param), least) if kernel.stochastic else least
            assert share >= least, f"{name_of(kernel)} on {card.name}: {share:.0%}, by {limit}"


def test_the_committed_table_is_of_these_sources(measured):
    backend, arch, kernels = measured
    committed = machine_code.FILE.read_text()
    version = machine_code.versions()[backend]
    if version not in committed:
        pytest.skip(f"THE TABLE IS NOT COMPARED: it is not of {version}; `make machine-code` writes it anew")
    assert machine_code.section(backend, arch, kernels) in committed, "`make machine-code` writes it anew"


# ---- Products --------------------------------------------------------------------------------------------------------

#: Blocks on a multiprocessor at least, of kernels of 256 threads, of 128 for fp32.
PRODUCTS = {
    "`linear_sgd_` bf16 by bf16": 1,
    "`linear_sgd_` bf16 by bf16, norm": 2,
    "`linear_sgd_` bf16 by bf16, stochastic, norm, clamp": 2,
    "`linear_sgd_` fp16 by fp16, norm": 2,
    "`linear_sgd_` fp16 by fp16, stochastic, norm, clamp": 1,
    "`linear_sgd_` fp32 by bf16, norm": 2,
    "`linear_sgd_` fp32 by fp32, norm": 7,
    "`linear_sq_norm_` bf16": 1,
    "`linear_sq_norm_` fp16": 1,
    "`linear_sq_norm_` fp32": 6,
}


def test_products():
    pytest.importorskip("triton")
    for product in compiled.triton_products(90):
        assert not product.serialized, f"{product.name}: each product is waited for before the next"
        assert product.stack == 0, f"{product.name}: registers are spilled"
        blocks = blocks_per_multiprocessor(90, product.threads, product.registers, product.shared)
        assert blocks >= PRODUCTS[product.name], (product.name, product.registers, product.shared)


# ---- The reader ------------------------------------------------------------------------------------------------------


def code(text):
    """Instructions of a made-up function, "[sets|waits] text" each, 16 bytes apart; jumps name a line, "@3"."""
    made = []
    for number, line in enumerate(text.strip().splitlines()):
        bars, predicate, rest = re.match(r"\s*(?:\[(.*?)\] )?(@!?P\d )?(.*)", line).groups()
        sets, waits = (bars or "7|").split("|")
        rest = re.sub(r"@(\d+)", lambda m: hex(16 * int(m[1])), rest)
        made.append(sass.Instruction(16 * number, rest, (predicate or "").strip(), int(sets), int(waits or 0)))
    return made


# A whole tile takes lines 1 to 4, the end of a tensor the loop of lines 6 to 8; both go on at line 9.
TILE = """
@P0 BRA @6
[0|] LDG.E.128 R4, desc[UR4][R2.64]
{between}
[1|] LDG.E.128 R8, desc[UR4][R2.64+0x10]
BRA @9
NOP
[0|] LDG.E.U16 R4, desc[UR4][R2.64]
IADD3 R2, R2, 0x2, RZ
@P1 BRA @6
[7|3] FADD R4, R4, R8
CALL.REL.NOINC @13
STG.E.128 desc[UR4][R2.64], R4
EXIT
FMUL R4, R4, R4
RET.REL.NODEC R20 0x0
"""


def test_the_hot_path_makes_the_wide_accesses_and_follows_calls():
    path = sass.hot_path(code(TILE.format(between="MOV R1, R2")), reads=32, writes=16)
    assert [i.address // 16 for i in path] == [0, 1, 2, 3, 4, 9, 10, 13, 14, 11, 12]
    assert sass.units(path) == {"control": 5, "lsu": 3, "alu": 1, "fma": 2}


@pytest.mark.parametrize(("between", "together"), [("MOV R1, R2", 2), ("[7|1] MOV R1, R4", 1), ("[7|2] MOV R1, R4", 2)])
def test_a_wait_between_loads_is_seen(between, together):
    path = sass.hot_path(code(TILE.format(between=between)), reads=32, writes=16)
    (loads,) = sass.loads_of_tiles(path, 32, 1)
    assert sass.loads_together(path, loads) == together


def test_narrow_accesses_are_not_counted():
    narrow = code(TILE.format(between="MOV R1, R2").replace("LDG.E.128 R8", "LDG.E.64 R8"))
    assert sass.hot_path(narrow, reads=32, writes=16) is None
    assert sass.hot_path(narrow, reads=24, writes=16, narrowest=8)
    assert sass.hot_path(narrow, reads=24, writes=16, FADD=2) is None


def test_a_loop_without_a_tile_is_no_short_cut():
    """The way over lines 4 to 8, a group, is longer than once through the loop of one element, lines 1 to 2."""
    text = "@P0 BRA @4\nIADD3 R2, R2, 0x1, RZ\n@P1 BRA @1\nBRA @9\n" + "FADD R1, R1, R1\n" * 5
    text += "LDG.E.128 R4, desc[UR4][R2.64]\nEXIT"
    path = sass.hot_path(code(text), reads=16, writes=0)
    assert [i.address // 16 for i in path] == [0, 4, 5, 6, 7, 8, 9, 10]


def test_blocks_per_multiprocessor():
    """As NVIDIA's occupancy calculator says."""
    assert blocks_per_multiprocessor(90, 256, 64, 0) == 4
    assert blocks_per_multiprocessor(90, 256, 65, 0) == 3
    assert blocks_per_multiprocessor(90, 256, 32, 0) == 8
    assert blocks_per_multiprocessor(120, 256, 32, 0) == 6
    assert blocks_per_multiprocessor(90, 256, 128, 98304) == 2
    assert blocks_per_multiprocessor(90, 128, 16, 0) == 16
    assert blocks_per_multiprocessor(90, 32, 16, 0) == 32


def test_the_model():
    """A kernel whose instructions need twice the time that memory needs is half as fast as a copy."""
    card = machine_code.Card("ideal", copy=6.0 * 10 * 132 * 1e9, clock=1e9)  # 10 elements of 6 bytes per clock
    facts = machine_code.Facts(12.8, {"alu": 6.0}, 4, 4, 64, 0, 4, 64.0)
    assert share_of_copy(facts, 6, card) == (1.0, "issue")
    assert share_of_copy(facts._replace(units={"alu": 12.8}), 6, card) == (0.5, "ALU")
