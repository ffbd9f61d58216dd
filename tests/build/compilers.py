"""Builds the CPU library with several compilers, warnings being errors, and compares its bits with the recorded ones.

    python tests/build/compilers.py g++-11 g++-12 clang++-14 "ccache clang++-22"

Each compiler gets a build folder and a copy of the package in a temporary folder. Then tests/test_bits.py runs on every
instruction set that this processor has, and the symbols are compared with those that glibc 2.28 and GCC 8's libstdc++
have. The Python that runs this needs torch, pytest, cmake and ninja. The table on standard output is that of
docs/install.md.
"""

from __future__ import annotations

import datetime
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEADER = "| date | compiler | warnings | symbols | bits |\n|---|---|---|---|---|"
#: What manylinux_2_28 allows, by auditwheel's list.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}


class Failed(Exception):
    """What went wrong, with the last lines of a command's output."""


def run(*command: str | Path, **env: str) -> str:
    """Its output. Raises Failed if it fails."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **env}
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    output = process.stdout + process.stderr
    if process.returncode:
        raise Failed("\n".join(output.splitlines()[-30:]))
    return output


def check_symbols(library: Path) -> None:
    """Raises Failed if a system that torch runs on lacks one."""
    for family, version in re.findall(r"\b(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", run("objdump", "-T", library)):
        if tuple(map(int, version.split("."))) > NEWEST[family]:
            raise Failed(f"the library asks for {family}_{version}")


def check(cxx: str, folder: Path) -> str:
    """Builds and tests with this compiler. Returns its cells of the table."""
    launcher, _, compiler = cxx.rpartition(" ")
    version = run(compiler, "--version").splitlines()[0]
    package = folder / "site" / "lomo_kernels"
    shutil.copytree(ROOT / "lomo_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    settings = [f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_CXX_FLAGS=-Werror", "-DLOMO_CUDA=0"]
    settings += [f"-DPYTHON={sys.executable}", f"-DLOMO_OUTPUT_DIR={package}"]
    settings += [f"-DCMAKE_CXX_COMPILER_LAUNCHER={launcher}"] if launcher else []
    run("cmake", "-S", ROOT, "-B", folder / "build", "-G", "Ninja", *settings)
    run("cmake", "--build", folder / "build")
    check_symbols(package / "_cpu.so")
    sets = []
    for isa in ("baseline", "avx2", "avx512", "avx512bf16", "amx"):
        env = {"LOMO_KERNELS_ISA": isa, "PYTHONPATH": str(package.parent)}
        offered = subprocess.run(
            [sys.executable, "-c", "import lomo_kernels"], env={**os.environ, **env}, capture_output=True, cwd=folder
        )
        if not offered.returncode:
            pytest = (sys.executable, "-P") if sys.version_info >= (3, 11) else (sys.executable,)
            run(*pytest, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "tests/test_bits.py", **env)
            sets.append(isa)
    if not sets:
        raise Failed("the library could not be loaded with any instruction set")
    return f"{f'{launcher}, ' if launcher else ''}{version} | none | manylinux_2_28 | equal ({', '.join(sets)})"


def main() -> int:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    rows, failures = [], 0
    for cxx in sys.argv[1:]:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as temporary:
            try:
                if not shutil.which(shlex.split(cxx)[-1]):
                    raise Failed(f"{cxx} is not installed")
                cells = check(cxx, Path(temporary))
            except Failed as error:
                failures += 1
                print(error, file=sys.stderr)
                cells = f"{cxx} | failed | |"
        rows.append(f"| {datetime.date.today().isoformat()} | {cells} |")
        print(rows[-1], f"{time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(HEADER, *rows, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
