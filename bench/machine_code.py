"""``make machine-code``: what the compiled GPU kernels cost in instructions, and what speed that allows.

Writes bench/results/machine-code.md. No GPU is needed and nothing is timed: the instructions are counted in the machine
code (bench/sass.py), and the share is a model's (`share_of_copy`). tests/test_machine_code.py holds them to budgets.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

from . import compiled, sass
from .compiled import Kernel
from .results import RESULTS

FILE = RESULTS / "machine-code.md"
ARCHES = {"cuda": tuple(int(arch) for arch in compiled.TARGETS.split(";") if arch != "75"), "triton": (90,)}


class Facts(NamedTuple):
    """What the machine code of a kernel says. Counts are per element, of a whole and aligned tile."""

    instructions: float
    units: dict[str, float]
    loads: int  # of a thread's part of a tile
    loads_together: int  # how many of them are issued before the first of them is waited for
    registers: int
    stack: int  # bytes
    blocks: int  # that fit on a multiprocessor
    in_flight: float  # KiB that a multiprocessor has asked for before it waits


# ---- Multiprocessors -------------------------------------------------------------------------------------------------


class Multiprocessor(NamedTuple):
    """Limits of one multiprocessor, from the CUDA C++ Programming Guide. All have 65536 registers."""

    threads: int
    blocks: int
    shared: int  # KiB


MULTIPROCESSORS = {
    75: Multiprocessor(1024, 16, 64),
    80: Multiprocessor(2048, 32, 164),
    86: Multiprocessor(1536, 16, 100),
    89: Multiprocessor(1536, 24, 100),
    90: Multiprocessor(2048, 32, 228),
    100: Multiprocessor(2048, 32, 228),
    120: Multiprocessor(1536, 24, 100),
}


def blocks_per_multiprocessor(arch: int, threads: int, registers: int, shared: int) -> int:
    """How many blocks run at the same time. Registers are given to a warp in units of 256, and to warps in fours; of
    shared memory the system keeps 1 KiB per block."""
    limits = MULTIPROCESSORS[arch]
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // of_warp // 4 * 4 // warps
    by_shared = limits.shared * 1024 // (shared + 1024)
    return min(limits.threads // (32 * warps), limits.blocks, by_registers, by_shared)


# ---- The model -------------------------------------------------------------------------------------------------------


class Card(NamedTuple):
    """A GPU of the Hopper generation, as the model takes it."""

    name: str
    copy: float  # bytes per second that a copy between two places of the GPU's memory reads and writes, assumed
    multiprocessors: int = 132
    clock: float = 1.755e9  # cycles per second


H100, H200 = Card("H100", 3.0e12), Card("H200", 4.3e12)

#: Lanes of a Hopper multiprocessor, per clock, and what is executed on them.
LANES: dict[str, tuple[int, Callable[[Facts], float]]] = {
    "issue": (128, lambda facts: facts.instructions),
    "ALU": (64, lambda facts: facts.units.get("alu", 0)),
    "products and sums": (128, lambda facts: facts.units.get("fma", 0) + facts.units.get("imad", 0)),
    "integer products": (64, lambda facts: facts.units.get("imad", 0)),
    "conversions": (16, lambda facts: facts.units.get("conversion", 0)),
    "float64": (64, lambda facts: facts.units.get("fp64", 0)),
}


def share_of_copy(facts: Facts, bytes_moved: int, card: Card) -> tuple[float, str]:
    """Modelled: the share of a copy's speed that the instructions of a kernel allow, and what limits them.

    At the speed of a copy a multiprocessor gets so many elements per clock; the kernel is slower by as much as the
    busiest of `LANES` needs more time than a clock for them. Assumed is that the lanes can always be kept busy, by as
    many warps as fit, and that the clock is not lowered. Waiting for memory, the start and the end of a launch, and
    caches are not modelled.
    """
    elements = card.copy / bytes_moved / card.multiprocessors / card.clock
    busy = {name: count(facts) * elements / lanes for name, (lanes, count) in LANES.items()}
    limit = max(busy, key=lambda name: busy[name])
    return min(1.0, 1 / busy[limit]), limit


# ---- Kernels ---------------------------------------------------------------------------------------------------------


def facts_of(kernel: Kernel, arch: int) -> Facts:
    """
    Raises:
        ValueError: no way through the code makes a tile's accesses as wide as they should be.
    """
    count = kernel.elements * kernel.tiles
    read = count * sum(compiled.SIZES[dtype] for dtype in kernel.dtypes)
    written = count * sum(compiled.SIZES[dtype] for dtype in kernel.written)
    narrowest = min(kernel.widths.values())
    path = sass.hot_path(kernel.code, read, written, narrowest, **dict(kernel.markers))
    if path is None:
        raise ValueError(f"{name_of(kernel)}, sm_{arch}: accesses of a whole tile have less than {8 * narrowest} bits")
    loads = sass.loads_of_tiles(path, read // kernel.tiles, kernel.tiles, narrowest, kernel.ahead)
    together = min(sass.loads_together(path, of_tile) for of_tile in loads)
    blocks = blocks_per_multiprocessor(arch, kernel.threads, kernel.registers, kernel.shared)
    return Facts(
        instructions=len(path) / count,
        units={unit: number / count for unit, number in sass.units(path).items()},
        loads=len(loads[0]),
        loads_together=together,
        registers=kernel.registers,
        stack=kernel.stack,
        blocks=blocks,
        in_flight=sum(path[place].wide for place in loads[0][:together]) * kernel.threads * blocks / 1024,
    )


def name_of(kernel: Kernel) -> str:
    if not kernel.written:
        return f"`{kernel.operator}` {kernel.grad}"
    rounding = "" if kernel.param == "fp32" else f", {kernel.rounding}"
    return f"`{kernel.operator}` {kernel.param} by {kernel.grad}{rounding}{', norm' if kernel.norm else ''}"


# ---- The page --------------------------------------------------------------------------------------------------------


def version_of(backend: str) -> str:
    """The compiler of a backend's kernels."""
    if backend == "triton":
        import triton

        return f"Triton {triton.__version__}"
    _, said = compiled.output_of(compiled.build_cuda(), "--version")
    release = re.search(r"V(\d+\.\d+\.\d+)", said)
    assert release is not None, said
    return f"nvcc {release[1]}"


def title(backend: str, arch: int) -> str:
    return f"## {'CUDA' if backend == 'cuda' else 'Triton'}, sm_{arch}"


def both(values: Iterable[object]) -> str:
    """Without a norm and with it; one of them, if they are the same."""
    return " / ".join(dict.fromkeys(map(str, values)))


def section(backend: str, arch: int, measured: list[tuple[Kernel, Facts]]) -> str:
    """A table of a backend's kernels."""
    cards = [H100, H200] if arch == 90 else []
    heads = ["kernel", "instructions", "ALU", "loads together", "KiB asked for", "registers", "blocks"]
    heads += [f"{card.name}, modelled" for card in cards]
    lines = [title(backend, arch), "", " | ".join(heads), " | ".join(["---"] + ["--:"] * (len(heads) - 1))]
    rows: dict[str, list[tuple[Kernel, Facts]]] = {}
    for kernel, facts in measured:
        rows.setdefault(name_of(kernel).removesuffix(", norm"), []).append((kernel, facts))
    for name, row in rows.items():
        each = [facts for _, facts in row]
        cells = [
            both(f"{facts.instructions:.1f}" for facts in each),
            both(f"{facts.units['alu']:.1f}" for facts in each),
            both(f"{facts.loads_together} of {facts.loads}" for facts in each),
            both(f"{facts.in_flight:.0f}" for facts in each),
            both(facts.registers for facts in each),
            both(facts.blocks for facts in each),
        ]
        for card in cards:
            cells.append(both(f"{share_of_copy(facts, k.bytes_moved, card)[0]:.0%}" for k, facts in row))
        lines.append(" | ".join([name, *cells]))
    return "\n".join(lines) + "\n"


def products_section(arch: int, products: Iterable[compiled.Product]) -> str:
    lines = [f"## Products in Triton, sm_{arch}", "", "kernel | registers | bound | shared KiB | blocks | serialized"]
    lines.append("--- | --: | --: | --: | --: | ---")
    for product in products:
        blocks = blocks_per_multiprocessor(arch, product.threads, product.registers, product.shared)
        cells = [product.name, product.registers, product.maxnreg or "", f"{product.shared / 1024:.0f}", blocks]
        lines.append(" | ".join(map(str, [*cells, "yes" if product.serialized else "no"])))
    return "\n".join(lines) + "\n"


HEAD = """# The GPU kernels' machine code

Written by `make machine-code` from what {cuda} and {triton} compile. **No GPU took part and nothing was timed**; see
[docs/backends.md](../../docs/backends.md).

Per element, on the way of a whole and aligned tile of a 4096 x 4096 parameter, start and end of the block included:
instructions, and those of them that the ALU executes. Loads together: how many of a thread's loads of a tile are issued
before the first of them is waited for. KiB asked for: by all blocks of a multiprocessor, before they wait. Registers
of a thread; blocks that fit on a multiprocessor. Two figures: without and with the sum of squares of the same pass. No
kernel spills a register. Modelled: the share of a copy's speed that the instructions allow (`bench/machine_code.py`).
"""


def measure(backend: str, arch: int) -> list[tuple[Kernel, Facts]]:
    kernels = compiled.cuda_kernels if backend == "cuda" else compiled.triton_kernels
    return [(kernel, facts_of(kernel, arch)) for kernel in kernels(arch)]


def main() -> None:
    try:
        parts = [HEAD.format(**{backend: version_of(backend) for backend in ARCHES})]
        for backend, arches in ARCHES.items():
            parts += [section(backend, arch, measure(backend, arch)) for arch in arches]
        parts.append(products_section(90, compiled.triton_products(90)))
    except compiled.NoCompiler as error:
        sys.exit(f"The kernels cannot be compiled: {error}.")
    FILE.write_text("\n".join(parts))
    print(f"{FILE} is written.")


if __name__ == "__main__":
    main()
