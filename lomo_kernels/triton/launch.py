"""What the launchers share: checks, scalars as kernel arguments, workspaces, and the table of a list."""

from __future__ import annotations

import functools
import struct
import threading
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, NoReturn

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import numbers as formulas
from ..ops import scalars as vectors
from ..ops._arguments import stream_handle
from ..ops._overlap import overlaps_itself
from ..rules import RULES
from .numerics import BLOCK

INTERPRETED: bool = triton.knobs.runtime.interpret

# 256 threads a program: 16 elements each, of a 16-bit dtype two 128-bit loads of each tensor. Compiled for Hopper the
# update takes 40 to 64 registers, so four to six programs share a multiprocessor and ask for 64 KiB and more at a time.
# AMD's warps are twice as wide.
WARPS = 4 if torch.version.hip else 8


def options(warps: int = WARPS) -> dict[str, Any]:
    """How kernels are compiled: without fused multiply-adds, which would change bits."""
    return {"num_warps": warps, "enable_fp_fusion": False}


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@functools.cache
def generation(device: torch.device) -> int:
    """Of NVIDIA's GPUs, 75 for sm_75; 0 for AMD's, and where Triton interprets."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# ---- Checks of what the public wrappers cannot know or a caller of torch.ops has not asked them. ---------------------


def fail(*parts: object) -> NoReturn:
    raise RuntimeError("".join(map(str, parts)))


def check_element_type(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.dtype not in TYPES:
        fail(op, ": ", name, " has dtype ", tensor.dtype, ", expected float32, bfloat16 or float16")
    if tensor.device != device:
        fail(op, ": ", name, " is on ", tensor.device, ", expected ", device, ", where the parameter or slot is")


def check_apart(op: str, name: str, tensor: Tensor) -> None:
    """Raises RuntimeError if elements share memory."""
    if tensor.numel() and not tensor.is_contiguous() and overlaps_itself(tensor):
        why = "(an expanded tensor?); it cannot be updated in place. Pass a contiguous one"
        fail(op, ": several elements of ", name, " share one place in memory ", why)


def check_slot(op: str, name: str, slot: Tensor, device: torch.device) -> None:
    if slot.numel() != 1 or slot.dtype != torch.float64 or slot.device != device:
        what = f"shape {list(slot.shape)}, dtype {slot.dtype} and device {slot.device}"
        fail(op, ": ", name, " has ", what, ", expected one element of dtype float64 on ", device)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in some order of the dimensions."""
    expected = 1
    for stride, n in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= n
    return True


# ---- Scalars ---------------------------------------------------------------------------------------------------------

#: Whether kernels read what lies on a CPU by its address, as a GPU's would be. For tests, where Triton interprets.
by_address = False


def is_known(tensor: Tensor) -> bool:
    """Whether the host may read it, so that kernels get numbers."""
    return tensor.is_cpu and not by_address


class StepScalars(NamedTuple):
    """The vector of scalars as kernels take it."""

    arguments: list[int]  # bits of the numbers, or their addresses
    on_device: int  # which of the two: 1 for addresses
    clamps: bool  # whether there may be a bound on gradients
    decays: bool  # whether there may be a weight decay


def step_scalars(op: str, vector: Tensor, device: torch.device) -> StepScalars:
    vectors.check_vector(op, vector, device)
    if is_known(vector):
        numbers = vectors.numbers_of(vector)
        clamps, decays = numbers["clip_value"] != float("inf"), numbers["weight_decay"] != 0.0
        return StepScalars(vector.view(torch.int64).tolist(), 0, clamps, decays)
    size = vector.element_size()
    addresses = [vector.data_ptr() + i * size for i in range(len(vectors.NAMES))]
    return StepScalars(addresses, 1, True, True)


def inv_scale(op: str, tensor: Tensor | None, device: torch.device) -> tuple[int, int]:
    """A norm's factor as kernels take it: the bits of a number, or an address, and its kind."""
    if tensor is None:
        return bits(1.0), 0
    if tensor.dtype not in (torch.float64, torch.float32) or tensor.numel() != 1:
        fail(op, ": inv_scale has shape ", list(tensor.shape), " and dtype ", tensor.dtype, ", expected one float64")
    if is_known(tensor):
        return bits(tensor.item()), 0
    if tensor.device != device:
        fail(op, ": inv_scale is on ", tensor.device, ", expected ", device, ", where the parameter or slot is")
    return tensor.data_ptr(), 1 if tensor.dtype == torch.float64 else 2


def bits(number: float) -> int:
    """Those of a float64, as kernels take it: Triton's own arguments of a number are float32."""
    return int(struct.unpack("q", struct.pack("d", number))[0])


def check_rule(op: str, rule: int) -> None:
    if rule not in RULES.values():
        fail(op, ": rule is ", rule, ", expected a number below ", len(RULES))


@functools.lru_cache(maxsize=65536)
def parameter_key(seed: int, parameter_id: int) -> int:
    """`numbers.parameter_key`, as an int64. Kept: the same in every step."""
    key = formulas.parameter_key(seed, parameter_id)
    return key - 2**64 if key >= 2**63 else key


class Indices(NamedTuple):
    """Where a parameter's elements stand in the whole one, and what that allows; see `numerics.draw`."""

    offset: int = 0
    row_length: int = 2**62
    row_stride: int = 2**62
    rows: bool = False
    pairs: bool = True


WHOLE = Indices()


def indices_of(op: str, shard: Sequence[int], numel: int) -> Indices:
    if not shard:
        return WHOLE
    if len(shard) != 3:
        fail(op, ": shard has ", len(shard), " numbers, expected (offset, row_length, row_stride)")
    offset, row_length, row_stride = shard
    if offset < 0 or row_length <= 0 or row_stride < row_length:
        rule = "offset >= 0, row_length > 0 and row_stride >= row_length"
        fail(op, ": shard is ", tuple(shard), ", expected (offset, row_length, row_stride) with ", rule)
    rows = row_length < numel
    pairs = offset % 2 == 0 and not (rows and (row_length % 2 or row_stride % 2))
    return Indices(offset, row_length, row_stride, rows, pairs)


# ---- Device, stream, workspaces --------------------------------------------------------------------------------------


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` current, where it is not: Triton launches there, on its current stream."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. A call of `triton.cdiv` by the host takes 10 us: a fifth of what a launcher takes."""
    return -(-a // b)


def blocks_of(numel: int) -> int:
    return cdiv(numel, BLOCK)


class Workspaces:
    """Device memory that kernels need beside their tensors: one per kind, device and stream, grown and never shrunk.

    Work on one stream is done in order, so its calls can use the same memory. A call that is captured in a CUDA graph
    gets memory of its own from the graph's pool, where it stays, at the same address, as long as the graph: a graph may
    be replayed on any stream, beside anything.
    """

    def __init__(self, dtype: torch.dtype, zeroed: bool) -> None:
        self._make = torch.zeros if zeroed else torch.empty
        self._dtype = dtype
        self._kept: dict[tuple[torch.device, int], Tensor] = {}

    def get(self, device: torch.device, size: int) -> Tensor:
        """At least `size` elements, on the current stream of `device`, which is the current device."""
        if is_capturing(device):
            return self._make(size, dtype=self._dtype, device=device)
        stream = stream_handle(device) if device.type == "cuda" else 0
        buffer = self._kept.get((device, stream))
        if buffer is None or buffer.numel() < size:
            # Powers of two: an eighth more each time would allocate in many steps.
            with torch.inference_mode(False):  # else it could not be written to outside of such a mode
                buffer = self._make(1 << max(size - 1, 4095).bit_length(), dtype=self._dtype, device=device)
            self._kept[device, stream] = buffer
        return buffer


partials = Workspaces(torch.float64, zeroed=False)  # sums of blocks
counters = Workspaces(torch.int64, zeroed=True)  # blocks done, back at zero when the kernel ends

#: A list of one is launched without a table, if its tensor is larger. A CUDA graph may be captured with other lists of
#: small tensors than those before it; see `run`.
LIST_BYTES = 64 * 1024


def is_alone(tensors: list[Tensor]) -> bool:
    """Whether a list is launched without a table: one tensor that the optimizer would not keep for a list."""
    return len(tensors) == 1 and tensors[0].numel() * tensors[0].element_size() > LIST_BYTES


# ---- Lists -----------------------------------------------------------------------------------------------------------

#: Numbers per row of a table: addresses of parameter, gradient and slot, elements, first program, key, and the indices.
COLUMNS = tl.constexpr(9)

_tables = Workspaces(torch.int64, zeroed=False)
#: Held from the upload of a table until the kernels that read it are launched: another thread may use the stream too.
table_lock = threading.Lock()
#: Host copies of captured tables: a replay reads them again.
_captured: list[Tensor] = []
#: Pinned memory set aside for them by calls that are not captured, since a capture may refuse to allocate any. 8 MiB:
#: 200 captured calls of 500 small tensors.
RESERVE = 2**20
_reserve = torch.empty(0, dtype=torch.int64, device="cpu")


class Row(NamedTuple):
    """One tensor of a list."""

    param: int
    grad: int
    slot: int
    numel: int
    key: int  # or the address of the low part
    indices: Indices
    variant: tuple[Any, ...]  # dtypes and rounding
    plain: bool  # aligned, in one row, and its pairs are those of the whole parameter


class Launch(NamedTuple):
    """The rows of one variant that are plain, or those that are not."""

    variant: tuple[Any, ...]
    plain: bool
    first_program: int
    programs: int


def rounds(rows: list[Row]) -> list[list[Row]]:
    """`rows`, divided so that no slot stands twice in a part: two kernels' additions to it must come one by one."""
    if not rows or not rows[0].slot:
        return [rows] if rows else []
    parts: list[list[Row]] = []
    seen: dict[int, int] = {}
    for row in rows:
        turn = seen[row.slot] = seen.get(row.slot, -1) + 1
        if turn == len(parts):
            parts.append([])
        parts[turn].append(row)
    return parts


def _staged(numbers: Tensor, device: torch.device) -> Tensor:
    """`numbers` in host memory from which they can be copied to `device` later."""
    global _reserve
    if device.type != "cuda":
        return numbers
    size = numbers.numel()
    if not is_capturing(device):
        if _reserve.numel() < min(16 * size, RESERVE):
            with torch.inference_mode(False):
                _reserve = torch.empty(RESERVE, dtype=torch.int64, device="cpu", pin_memory=True)
        return numbers.pin_memory()
    if _reserve.numel() < size:
        pinned = numbers.pin_memory()
    else:
        pinned, _reserve = _reserve[:size].copy_(numbers), _reserve[size:]
    _captured.append(pinned)
    return pinned


def upload(
    rows: list[Row], device: torch.device, programs_of: Callable[[int], int]
) -> tuple[Tensor, int, list[Launch]]:
    """The table of `rows` on the device: a row each, then for each program the row it belongs to.

    Copied from pinned memory, without a sync. torch pins that memory once: its `CachingHostAllocator` keeps blocks of
    2**n bytes, records an event on the stream of the copy, and hands a block out again after that event. In a graph
    capture it is kept for the life of the process, because every replay copies it again: 72 bytes per tensor and 8 per
    program of each captured call.

    Args:
        programs_of: how many programs a tensor of some size gets.

    Returns:
        the table, where in it the programs begin, and the launches. The caller holds `table_lock`.
    """
    variants: dict[tuple[tuple[Any, ...], bool], list[Row]] = {}
    for row in rows:
        variants.setdefault((row.variant, row.plain), []).append(row)
    numbers, owners = array("q"), array("q")
    launches = []
    for (variant, plain), alike in variants.items():
        begin = len(owners)
        for row in alike:
            owner = len(numbers) // COLUMNS.value
            numbers.extend((row.param, row.grad, row.slot, row.numel, len(owners), row.key, *row.indices[:3]))
            owners.extend([owner] * programs_of(row.numel))
        launches.append(Launch(variant, plain, begin, len(owners) - begin))
    numbers.extend(owners)
    staged = _staged(torch.frombuffer(numbers, dtype=torch.int64), device)
    table = _tables.get(device, len(numbers))
    table[: len(numbers)].copy_(staged, non_blocking=True)
    return table, len(rows) * COLUMNS.value, launches


#: Kernels, devices and variants of which both kernels, for plain rows and for others, are loaded.
_loaded: set[tuple[Any, ...]] = set()


def run(
    kernel: Any,
    launched: Launch,
    device: torch.device,
    arguments: Sequence[Any],
    constants: Callable[[bool], dict[str, Any]],
) -> None:
    """Launches the kernel for some rows of a list, and before its first launch loads the one for the other rows too.

    A list that is captured in a CUDA graph may have other rows than those before it, for example a gradient that has
    become a view. A kernel cannot be compiled or loaded during a capture.

    Args:
        constants: what the kernel is compiled for, with or without the promise that rows are plain.
    """
    kernel[(launched.programs,)](*arguments, **constants(launched.plain))
    key = kernel, device, *constants(True).items()
    if key not in _loaded and not is_capturing(device):
        other = kernel.warmup(*arguments, grid=(1,), **constants(not launched.plain))
        if not INTERPRETED:
            other._init_handles()  # warmup compiles; this loads
        _loaded.add(key)
