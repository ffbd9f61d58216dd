"""The GPU kernels as compiled for a GPU that need not be there: the CUDA library's by nvcc, Triton's by Triton."""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import sass
from .results import ROOT

BUILD = ROOT / "build" / "cuda"
OBJECTS = BUILD / "CMakeFiles" / "_cuda.dir" / "csrc" / "cuda"
#: Targets of `build_cuda`. sm_86 and sm_89 are left out: they run the code of sm_80, and each target takes 25 s of two
#: cores. `make wheel-cuda` compiles for all; LOMO_CUDA_ARCHS="75;80;86;89;90;100;120" checks all.
TARGETS = os.environ.get("LOMO_CUDA_ARCHS", "75;80;90;100;120")
LAYER = 4096 * 4096  # elements of a parameter whose launch is read
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes
#: How a parameter is rounded, by its dtype.
ROUNDINGS = {"fp32": ("nearest",), "bf16": ("nearest", "stochastic", "split"), "fp16": ("nearest", "stochastic")}
MANGLED = {"7Float32": "fp32", "13SplitBFloat16": "bf16", "8BFloat16": "bf16", "7Float16": "fp16"}


class NoCompiler(Exception):
    """There is no nvcc or no Triton, or nothing that prints machine code."""


def output_of(*command: str | Path) -> tuple[int, str]:
    """The exit status, and what was written to both streams."""
    process = subprocess.run(command, capture_output=True, text=True)
    return process.returncode, process.stdout + process.stderr


def tool(name: str) -> str:
    """A program of the environment that runs this."""
    return str(Path(sys.executable).parent / name)


def build_cuda() -> str:
    """Builds _cuda.so for `TARGETS` in build/cuda, if something has changed, and returns nvcc's path.

    nvcc is that of PATH, CUDACXX, CUDA_HOME or /usr/local/cuda, else that of ``pip install nvidia-cuda-nvcc
    nvidia-cuda-runtime``. What ptxas says of each source is kept beside its object, as ``<source>.o.log``.

    Raises:
        NoCompiler: there is no nvcc.
        RuntimeError: the build failed.
    """
    settings = [
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DPYTHON={sys.executable}",
        "-DLOMO_CUDA=1",
        f"-DLOMO_CUDA_ARCHS={TARGETS}",
        f"-DCMAKE_CUDA_COMPILER_LAUNCHER={ROOT / 'tests' / 'support' / 'keep_output.sh'}",
        "-DCMAKE_CUDA_FLAGS=-Xptxas=-v",
    ]
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of pytest-xdist stand side by side
        failed, output = output_of(tool("cmake"), "-S", ROOT, "-B", BUILD, "-G", "Ninja", *settings)
        if failed and "no nvcc" in output:
            raise NoCompiler("there is no nvcc. Install CUDA, or `pip install nvidia-cuda-nvcc nvidia-cuda-runtime`")
        if not failed:
            failed, output = output_of(tool("cmake"), "--build", BUILD, "--target", "_cuda")
        if failed:
            raise RuntimeError(output)
    cached = re.search(r"^LOMO_NVCC:FILEPATH=(.*)", (BUILD / "CMakeCache.txt").read_text(), re.MULTILINE)
    assert cached is not None
    return os.environ.get("CUDACXX") or cached[1]


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    operator: str
    param: str  # "fp32", "bf16", "fp16"; that of the gradient, if there is no parameter
    grad: str
    rounding: str  # "nearest", "stochastic" or "split"
    norm: bool  # whether it adds up squares
    code: list[sass.Instruction]
    registers: int  # of a thread
    stack: int  # bytes of a thread's own memory: spilled registers, and arrays that are indexed
    shared: int  # bytes of a block's memory
    threads: int  # of a block
    elements: int  # of a tile that a thread handles
    tiles: int = 1  # that a block takes one after the other, of `LAYER` elements
    markers: tuple[tuple[str, int], ...] = ()  # instructions of the path, beside the accesses; see `sass.hot_path`
    ahead: int = 0  # bytes of a tile that a thread loads before it handles the tile before

    @property
    def has_factors(self) -> bool:
        """Whether it multiplies by factors, or forms the sums that they are made of."""
        return self.operator.startswith("factor")

    @property
    def written(self) -> tuple[str, ...]:
        """Dtypes of the tensors that it updates."""
        if self.operator not in ("sgd_", "factored_update_"):
            return ()
        return (self.param, self.param) if self.rounding == "split" else (self.param,)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Of the tensors that it reads by wide accesses: the factors of columns, too."""
        factors = ("fp32",) if self.operator.startswith("factored_") else ()
        return (self.grad, *self.written, *factors)

    @property
    def widths(self) -> dict[str, int]:
        """Bytes of an access at least, by dtype: 16, but 8 for 16-bit elements beside those of 32 bits."""
        own = (self.grad, *self.written)
        largest = max(SIZES[dtype] for dtype in own)
        return {dtype: 16 * SIZES[dtype] // largest for dtype in own}

    @property
    def most_loads(self) -> int:
        """Loads of a thread per tile, if none is narrower than `widths`."""
        return sum(self.elements * SIZES[dtype] // self.widths.get(dtype, 16) for dtype in self.dtypes)

    @property
    def bytes_moved(self) -> int:
        """Per element, between the GPU and its memory. Caches have the factors."""
        return SIZES[self.grad] + 2 * sum(SIZES[dtype] for dtype in self.written)


def cuobjdump() -> str:
    """Triton brings one, with the nvdisasm that it calls."""
    try:
        import triton

        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    except ImportError:
        bundled = Path()
    for path in (bundled, shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump"):
        if path and os.access(path, os.X_OK) and not Path(path).is_dir():
            return str(path)
    raise NoCompiler("there is no cuobjdump. Install Triton, which brings one, or CUDA")


def _dumped(file: Path, arch: int) -> Iterator[tuple[str, list[sass.Instruction], dict[str, int]]]:
    """Name, code and resources of each kernel in `file`."""
    target = [] if file.suffix == ".cubin" else ["-arch", f"sm_{arch}"]
    _, text = output_of(cuobjdump(), *target, "-res-usage", file)
    usage = dict(re.findall(r"Function (\S+):\s+(REG:.*)", text))
    failed, text = output_of(cuobjdump(), *target, "-sass", file)
    if failed:
        raise RuntimeError(text)
    for name, code in sass.read(text.splitlines()).items():
        yield name, code, {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", usage[name])}


# ---- CUDA ------------------------------------------------------------------------------------------------------------


def _constant(name: str) -> int:
    """One of csrc/cuda/kernels.h, as nvcc sees it: the last, after those of the emulation."""
    values = re.findall(rf"\b{name} = (\d+)[;,]", (ROOT / "csrc/cuda/kernels.h").read_text())
    assert values, f"csrc/cuda/kernels.h has no {name}"
    return int(values[-1])


def cuda_kernels(arch: int) -> Iterator[Kernel]:
    """Those of one tensor, from `build_cuda`'s objects."""
    threads, elements = _constant("kThreads"), _constant("kShare")
    tiles = LAYER // (threads * elements)
    operators = {"update_kernel.cu": "sgd_", "sq_norm_kernel.cu": "sq_norm_"}
    operators |= {"factored_kernel.cu": "factored_update_", "factor_sums_kernel.cu": "factor_sums_"}
    for source, operator in operators.items():
        for name, code, usage in _dumped(OBJECTS / f"{source}.o", arch):
            if "4Sign" in name or ("factor" not in source and "Li1E" not in name):  # another rule, a launch of a list
                continue
            if operator == "factor_sums_" and "strips" not in name:  # small matrices, and sums of sums
                continue
            dtypes = [MANGLED[dtype] for dtype in re.findall("|".join(MANGLED), name)]
            # The mangled name of a gradient of the parameter's dtype refers back to it.
            rounding = "split" if "13SplitBFloat16" in name else "stochastic" if "Lb1E" in name else "nearest"
            what = dtypes[0], dtypes[-1], rounding
            resources = code, usage["REG"], usage["STACK"] + usage["LOCAL"], usage["SHARED"], threads, elements
            # A norm votes per tile whether a sum must be formed again in float64, and sums up a warp in float64 once.
            of_norm = -(-tiles // _constant("kNormBlocks"))
            norm = ("VOTE", of_norm), ("SHFL", 10)
            if operator == "factor_sums_":  # a warp adds up two rows in float64 per tile
                each = -(-tiles // _constant("kSumBlocks"))
                yield Kernel(operator, *what, True, *resources, each, (("SHFL", 10 * each),))
            elif "factored_sq_norm" in name:  # without the loads of factors, the way would be that of more tiles
                loads = "LDG.E.128", of_norm * elements * SIZES["fp32"] // 16
                ahead = elements * SIZES[dtypes[-1]]
                yield Kernel("factored_sq_norm_", *what, True, *resources, of_norm, (loads, *norm), ahead)
            else:
                if operator != "sq_norm_":
                    yield Kernel(operator, *what, False, *resources, -(-tiles // _constant("kTensorBlocks")))
                if operator != "factored_update_":  # an update with a norm is the same code on another way
                    yield Kernel(operator, *what, True, *resources, of_norm, norm)


# ---- Triton ----------------------------------------------------------------------------------------------------------


def triton_source(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], unaligned: tuple[str, ...] = ()
) -> Any:
    """`kernel` as a launch would specialise it; every pointer is aligned to 16 bytes, except those named."""
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    values, hints = {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or constants.get(name, 0) is None:
            signature[name], values[i,] = "constexpr", constants[name]
        elif name in pointers:
            signature[name] = pointers[name]
            if name not in unaligned:
                hints[i,] = [["tt.divisibility", 16]]
        else:
            signature[name] = parameter.annotation_type
    return ASTSource(kernel, signature, values, hints)


def _triton_update(
    arch: int,
    p: str,
    g: str,
    rounding: str,
    norm: bool,
    clamp: bool = False,
    listed: bool = False,
) -> tuple[Any, dict[str, Any]]:
    import torch
    import triton.language as tl

    from lomo_kernels.triton import launch, numerics, sgd

    types = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
    stochastic, split = rounding == "stochastic", rounding == "split"
    constants = {"P": types[p], "G": types[g], "STOCHASTIC": stochastic, "ROWS": False, "PAIRS": True, "NORM": norm}
    constants |= {"RULE": 0, "CLAMP": clamp, "SPLIT": split, "BLOCK": numerics.BLOCK, "ALIGNED": listed}
    if listed:
        constants |= {"param": None, "grad": None, "low": None, "COLUMNS": launch.COLUMNS.value}
    else:
        constants |= {"table": None, "COLUMNS": 0} | ({} if split else {"low": None})
    if not norm:
        constants |= {"partials": None, "counters": None}
    pointers = {"param": f"*{p}", "grad": f"*{g}", "low": "*i16"}
    pointers |= {"table": "*i64", "partials": "*fp64", "counters": "*i64"}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[p]
    options = sgd.options(arch, dtype, stochastic, False, norm, clamp)
    return triton_source(sgd.sgd_kernel, pointers, constants), options


def _triton_norm(arch: int, g: str) -> tuple[Any, dict[str, Any]]:
    import triton.language as tl

    from lomo_kernels.triton import numerics, sq_norm

    types = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
    constants = {"G": types[g], "BLOCK": numerics.BLOCK, "ALIGNED": False, "table": None, "COLUMNS": 0}
    pointers = {"grad": f"*{g}", "partials": "*fp64", "counters": "*i64"}
    return triton_source(sq_norm.sq_norm_kernel, pointers, constants), sq_norm.options(arch)


def _triton_factored(arch: int, p: str | None, g: str, rounding: str) -> tuple[Any, dict[str, Any]]:
    """With factors of rows and of columns. p: None for the sum of squares."""
    import triton.language as tl

    from lomo_kernels.triton import factored, launch, matrices

    types = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
    constants = {"G": types[g], "ALIGNED": True, "CLAMP": False, **matrices.tile_of(1, 4096, 4096)._asdict()}
    pointers = {"grad": f"*{g}", "row_factors": "*fp32", "column_factors": "*fp32"}
    if p is None:
        pointers |= {"partials": "*fp64", "counter": "*i64"}
        return triton_source(factored.factored_sq_norm_kernel, pointers, constants), launch.options()
    constants |= {"P": types[p], "RULE": 0, "STOCHASTIC": rounding == "stochastic", "ROWS": False, "PAIRS": True}
    constants |= {} if rounding == "split" else {"low": None}
    pointers |= {"param": f"*{p}", "low": "*i16"}
    return triton_source(factored.factored_update_kernel, pointers, constants), launch.options()


def triton_compile(source: Any, options: dict[str, Any], arch: int, folder: Path) -> tuple[Any, list[Any]]:
    import triton
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    ((_, code, usage),) = _dumped(file, arch)
    return compiled, [code, usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared]


def triton_kernels(arch: int, clamp: bool = False, listed: bool = False) -> Iterator[Kernel]:
    """Those of whole parameters: of one tensor, or of the plain tensors of a list."""
    from lomo_kernels.triton import numerics, sq_norm

    cases = [
        ("sgd_", p, g, rounding, norm, _triton_update(arch, p, g, rounding, norm, clamp, listed))
        for p, g, norm in itertools.product(SIZES, SIZES, (False, True))
        for rounding in ROUNDINGS[p]
    ]
    if not clamp and not listed:
        cases += [("sq_norm_", g, g, "nearest", True, _triton_norm(arch, g)) for g in SIZES]
        # Of gradients of another dtype than the parameter, Triton reads one of the two by narrow accesses.
        cases += [
            ("factored_update_", p, p, rounding, False, _triton_factored(arch, p, p, rounding))
            for p in SIZES
            for rounding in ROUNDINGS[p]
        ]
        cases += [("factored_sq_norm_", g, g, "nearest", True, _triton_factored(arch, None, g, "")) for g in SIZES]
    with tempfile.TemporaryDirectory() as folder:
        for *what, (source, options) in cases:
            _, resources = triton_compile(source, options, arch, Path(folder))
            threads = 32 * options["num_warps"]
            blocks = LAYER // numerics.BLOCK
            each = blocks // sq_norm.programs_of(LAYER) if source.fn is sq_norm.sq_norm_kernel else 1
            yield Kernel(*what, *resources, threads, numerics.BLOCK // threads, each)


@dataclass(frozen=True)
class Product:
    """A kernel of a linear layer, which forms tiles of the gradient and uses them up."""

    name: str
    registers: int
    stack: int
    shared: int
    threads: int
    maxnreg: int | None  # the bound on registers that it was compiled with
    serialized: bool  # the assembler waits for each asynchronous product before it issues the next


def triton_products(arch: int) -> Iterator[Product]:
    """`linear_sgd_` and `linear_sq_norm_` for whole and aligned tiles."""
    import torch
    import triton.language as tl

    from lomo_kernels.triton import linear

    types = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

    def tiled(g: str, tile: Any, **constants: Any) -> dict[str, Any]:
        constants |= {"G": types[g], "ALIGNED": True, "BM": tile.rows, "BN": tile.columns, "BK": tile.tokens}
        return constants | {"WIDEN": linear.widened(dtypes[g], arch), "TOKENS": None}

    def update(p: str, g: str, stochastic: bool, norm: bool, clamp: bool) -> tuple[Any, dict[str, Any]]:
        tile = linear.tile_of(dtypes[g], arch, True)
        constants = tiled(g, tile, P=types[p], RULE=0, CLAMP=clamp, STOCHASTIC=stochastic, PAIRS=True, NORM=norm)
        constants |= {"PARTS": tile.parts} | ({} if norm else {"partials": None, "counter": None})
        pointers = {"weight": f"*{p}", "gy": f"*{g}", "x": f"*{g}", "partials": "*fp64", "counter": "*i64"}
        return triton_source(linear.linear_sgd_kernel, pointers, constants), tile.options()

    def norm_of(g: str) -> tuple[Any, dict[str, Any]]:
        tile = linear.tile_of(dtypes[g], arch, True)
        pointers = {"gy": f"*{g}", "x": f"*{g}", "partials": "*fp64", "counter": "*i64"}
        constants = tiled(g, tile, GRAM=False, done=None)
        return triton_source(linear.linear_sq_norm_kernel, pointers, constants), tile.options()

    cases = {
        f"`linear_sgd_` {p} by {g}{', stochastic' * stochastic}{', norm' * norm}{', clamp' * clamp}": update(
            p, g, stochastic, norm, clamp
        )
        for p, g, stochastic, norm, clamp in (
            ("bf16", "bf16", False, False, False),
            ("bf16", "bf16", False, True, False),
            ("bf16", "bf16", True, True, True),
            ("fp16", "fp16", False, True, False),
            ("fp16", "fp16", True, True, True),
            ("fp32", "bf16", False, True, False),
            ("fp32", "fp32", False, True, False),
        )
    }
    cases |= {f"`linear_sq_norm_` {g}": norm_of(g) for g in ("bf16", "fp16", "fp32")}
    with tempfile.TemporaryDirectory() as folder:
        for name, (source, options) in cases.items():
            compiled, (_, *resources) = triton_compile(source, options, arch, Path(folder))
            said = assembler_remarks(compiled.asm["ptx"], arch, compiled.metadata)
            yield Product(name, *resources, 32 * options["num_warps"], options.get("maxnreg"), "serialized" in said)


def assembler_remarks(ptx: str, arch: int, options: Any) -> str:
    """What the assembler says of a kernel when Triton calls it, which Triton keeps to itself.

    Args:
        options: those of the kernel's compilation, as its metadata has them.
    """
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    with knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as said:
        knobs.nvidia.dump_ptxas_log = True
        make_backend(GPUTarget("cuda", arch, 32)).make_cubin(ptx, {}, options, arch)
    if "Used" not in said.getvalue():
        raise RuntimeError(f"Triton does not print what the assembler says: {said.getvalue()!r}")
    return said.getvalue()
