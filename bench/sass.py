"""Reads NVIDIA's machine code (SASS): how many instructions a thread executes on the hot path of a kernel, on which
units, whether its loads are under way together, and how many blocks fit on a multiprocessor. No GPU is needed.

The hot path is the shortest way through the code on which all elements of a tile are read and written by wide accesses.
So it is the path of a whole and aligned tile: the ends of a tensor take narrow accesses, and rare cases longer ways.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import add, ge
from typing import NamedTuple

import networkx

# ---- Instructions ----------------------------------------------------------------------------------------------------

#: The unit that executes an instruction, by its name's first part. Hopper's and Blackwell's names are among them.
UNITS = {
    "fma": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 HADD2 HMUL2 HFMA2 FSWZADD",
    "imad": "IMAD",  # half as many lanes as the other products have
    "fp64": "DADD DMUL DFMA DSETP",
    "conversion": "F2F I2F F2I I2I MUFU FRND",
    "lsu": "LDG STG LD ST LDS STS LDL STL LDSM STSM LDGSTS SHFL ATOM ATOMG ATOMS RED REDG REDUX LDTM STTM LDGDEPBAR",
    "tensor": "HMMA IMMA DMMA HGMMA QGMMA IGMMA UTCHMMA UTCQMMA",
    "constant": "LDC LDCU ULDC S2R S2UR CS2R CS2UR",
    "control": "BRA BRX JMP EXIT CALL RET BSSY BSYNC BREAK BAR WARPSYNC NOP VOTE VOTEU MEMBAR ERRBAR CGAERRBAR DEPBAR "
    "CCTL YIELD NANOSLEEP ENDCOLLECTIVE WARPGROUP PREEXIT ACQBULK ELECT FENCE SYNCS BMOV KILL",
}
UNIT_OF = {name: unit for unit, names in UNITS.items() for name in names.split()}


class Instruction(NamedTuple):
    address: int
    text: str  # without its predicate
    predicate: str  # "@!P0", or empty
    sets: int  # the barrier that the arrival of its result releases, 7: none
    waits: int  # a bit for each barrier that must be released before it is issued

    @property
    def name(self) -> str:
        return self.text.split(maxsplit=1)[0]

    @property
    def unit(self) -> str:
        """One of `UNITS`; "uniform" for what a warp does once; else "alu"."""
        name = self.name.partition(".")[0]
        return UNIT_OF.get(name) or ("uniform" if name.startswith("U") else "alu")

    @property
    def is_load(self) -> bool:
        """From global memory."""
        return self.name.startswith("LDG.")

    @property
    def wide(self) -> int:
        """Bytes that a thread reads from or writes to global memory, if they are at least 64 bits; else 0. A load of 64
        bits with a predicate is that of a scalar, which may be in memory or an argument."""
        if not self.name.startswith(("LDG.", "STG.")):
            return 0
        bits = re.search(r"\.(64|128|256)(\.|$)", self.name)
        is_scalar = self.is_load and self.predicate and ".64" in self.name
        return int(bits[1]) // 8 if bits and not is_scalar else 0

    @property
    def is_narrow(self) -> bool:
        """Whether it accesses global memory by less: elements one by one, as at the ends of a tensor."""
        return self.name.startswith(("LDG.", "STG.")) and not self.wide

    @property
    def target(self) -> int | None:
        """Where a jump or a call leads."""
        found = re.search(r"0x([0-9a-f]+)\b", self.text)
        return int(found[1], 16) if found and self.name.startswith(("BRA", "CALL.REL")) else None

    @property
    def ends(self) -> bool:
        """Whether the next instruction is never executed after it, unless through a jump."""
        # A second predicate may stand among the operands: "@P3 BRA !P4, 0x750", "BRA.U UP0, 0x90", "BRA.DIV UR4, …".
        conditional = self.predicate or re.search(r"^\S+ (?:!?U?P\d|~?UR|R\d+, 0x)", self.text)
        return self.name.startswith(("RET", "BRX")) or (self.name.startswith(("BRA", "EXIT")) and not conditional)


LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/")


def read(sass: Iterable[str]) -> dict[str, list[Instruction]]:
    """The instructions of each function in what ``cuobjdump -sass`` prints."""
    functions: dict[str, list[Instruction]] = {}
    lines = iter(sass)
    for line in lines:
        if "Function : " in line:
            code = functions.setdefault(line.split(" : ")[1].strip(), [])
        elif match := LINE.match(line):
            # Control bits of Volta and later, from bit 105 of 128: stall 4, yield 1, two barriers 3 each, waits 6.
            control = int(next(lines).split("0x")[1][:16], 16) >> 41
            address, predicate, text = match.groups()
            barriers = control >> 5 & 7, control >> 11 & 63
            code.append(Instruction(int(address, 16), text, (predicate or "").strip(), *barriers))
    return functions


# ---- The hot path ----------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """Instructions that are executed one after the other, and the blocks that can follow."""

    code: list[Instruction]
    follow: list[int] = field(default_factory=list)
    call: int | None = None  # the block of the function that is called last

    def accesses(self, narrowest: int) -> tuple[int, int]:
        """Bytes that wide accesses read and write."""
        read = sum(i.wide for i in self.code if i.wide >= narrowest and i.is_load)
        return read, sum(i.wide for i in self.code if i.wide >= narrowest) - read


def blocks_of(code: list[Instruction]) -> list[Block]:
    ends = [i for i in code if i.target is not None or i.name.startswith(("EXIT", "RET", "BRX"))]
    starts = {i.target for i in ends} | {i.address + 16 for i in ends}
    blocks: list[Block] = []
    at: dict[int, int] = {}
    for instruction in code:
        if not blocks or instruction.address in starts:
            at[instruction.address] = len(blocks)
            blocks.append(Block([]))
        blocks[-1].code.append(instruction)
    for number, block in enumerate(blocks):
        last = block.code[-1]
        if not last.ends and number + 1 < len(blocks):
            block.follow.append(number + 1)
        if last.target is not None:
            if last.name.startswith("CALL"):
                block.call = at[last.target]
            else:
                block.follow.append(at[last.target])
    # A jump by a table, which is not in the code: to whatever nothing else leads to.
    led_to = {0} | {then for block in blocks for then in (*block.follow, block.call)}
    orphans = [number for number in range(len(blocks)) if number not in led_to]
    for block in blocks:
        if block.code[-1].name.startswith("BRX"):
            block.follow += orphans
    return blocks


def aside(blocks: list[Block]) -> set[int]:
    """Blocks that a whole tile does not need: those with narrow accesses, and loops that read and write no tile.
    Both handle elements one by one, so a path that goes through such a loop once would be too short."""
    graph = networkx.DiGraph((number, then) for number, block in enumerate(blocks) for then in block.follow)
    graph.add_edges_from((number, block.call) for number, block in enumerate(blocks) if block.call is not None)
    graph.add_node(0)
    dominators = networkx.immediate_dominators(graph, 0)
    side = {number for number, block in enumerate(blocks) if any(i.is_narrow for i in block.code)}
    for last, first in graph.edges:
        above = last
        while above != first and dominators.get(above, above) not in (above, None):
            above = dominators[above]
        if above != first or last not in dominators:
            continue  # no loop: `first` is not on every way to `last`
        loop, pending = {first}, [last]
        while pending:
            if (number := pending.pop()) not in loop:
                loop.add(number)
                pending += graph.predecessors(number)
        if not any(instruction.wide for number in loop for instruction in blocks[number].code):
            side |= loop
    return side


#: Such a block is avoided, unless that costs this many instructions.
AVOID = 10_000


def hot_path(
    code: list[Instruction], reads: int, writes: int, narrowest: int = 16, **others: int
) -> list[Instruction] | None:
    """The shortest way through the code on which a thread reads and writes so many bytes of global memory.

    Args:
        reads, writes: bytes. Accesses of fewer than `narrowest` bytes are not counted. More may be read. More may be
            written by a scalar at most: else the way would be that of more tiles, some without all of their loads.
        others: instructions that must be on the way, by the beginning of their names, and how many.

    Returns:
        None if there is no such way.
    """
    blocks = blocks_of(code)
    side = aside(blocks)
    wanted = reads, writes, *others.values()
    gains = [
        (*block.accesses(narrowest), *(sum(i.name.startswith(name) for i in block.code) for name in others))
        for block in blocks
    ]
    start = (0, (0,) * len(wanted), ())
    lengths = {start: 0}
    before: dict[tuple, tuple | None] = {start: None}
    queue = [(0, start)]
    reached: dict[tuple, list[tuple[int, ...]]] = {}
    while queue:
        length, state = heapq.heappop(queue)
        number, had, returns = state
        # A way that was no longer and had as much of everything has been here before: this one leads to nothing better.
        others_here = reached.setdefault((number, returns, had[1]), [])
        if any(all(map(ge, other, had)) for other in others_here):
            continue
        others_here.append(had)
        block = blocks[number]
        if had[1] + gains[number][1] > writes + 8:
            continue
        had = tuple(map(min, wanted, map(add, had, gains[number])))
        last = block.code[-1]
        if last.name.startswith("EXIT") and had == wanted:
            return list(_unwound(blocks, state, before))
        if block.call is not None:
            next_states = [(block.call, had, (*returns, number + 1))]
            next_states += [(then, had, returns) for then in block.follow if last.predicate]
        elif last.name.startswith("RET") and returns:
            next_states = [(returns[-1], had, returns[:-1])]
        else:
            next_states = [(then, had, returns) for then in block.follow]
        for then in next_states:
            longer = length + len(block.code) + AVOID * (number in side)
            if longer < lengths.get(then, longer + 1):
                lengths[then], before[then] = longer, state
                heapq.heappush(queue, (longer, then))
    return None


def _unwound(blocks: list[Block], state: tuple | None, before: dict[tuple, tuple | None]) -> Iterator[Instruction]:
    path = []
    while state is not None:
        path.append(state[0])
        state = before[state]
    for number in reversed(path):
        yield from blocks[number].code


def loads_of_tiles(
    path: list[Instruction], bytes_of_tile: int, tiles: int, narrowest: int = 16, ahead: int = 0
) -> list[list[int]]:
    """Where on the path the loads of each tile stand, one tile's after the other's.

    Args:
        ahead: bytes that are loaded with those of the tile before. They count as that tile's. The first tile's are then
            left out, and so is the last tile, which loads nothing ahead.
    """
    places: list[list[int]] = [[] for _ in range(tiles - (ahead > 0))]
    tile, left = (-1, ahead) if ahead else (0, bytes_of_tile)
    for place, instruction in enumerate(path):
        if tile < len(places) and instruction.is_load and instruction.wide >= narrowest:
            if tile >= 0:
                places[tile].append(place)
            left -= instruction.wide
            if left <= 0:
                tile, left = tile + 1, bytes_of_tile
    return places


def loads_together(path: list[Instruction], loads: list[int]) -> int:
    """How many of these loads are issued before an instruction waits for one of them."""
    barriers = 0
    for place in range(loads[0], loads[-1] + 1):
        if path[place].waits & barriers:
            return sum(load < place for load in loads)
        if place in loads:
            barriers |= 1 << path[place].sets
    return len(loads)


def units(path: Iterable[Instruction]) -> Counter[str]:
    """How many of the instructions each unit executes."""
    return Counter(instruction.unit for instruction in path)
