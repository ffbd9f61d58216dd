"""Compiles the CPU library for aarch64, warnings being errors, and runs the operators' contract on it under qemu.

    apt install g++-aarch64-linux-gnu qemu-user debootstrap
    python tests/build/aarch64.py FOLDER 2.13.0 bits sgd sq_norm

FOLDER keeps what is fetched: a Debian for aarch64, which has a Python and the C and C++ libraries, and this torch from
the package index. The rest of the command names test files; "bits" compares with the bits recorded on x86. The Python
that runs this needs pip, cmake, ninja and pyelftools (`pip install -e '.[wheel]'`). Importing torch takes qemu 20 s,
test_bits.py 70 s.

What a torch for CUDA links of CUDA is replaced by libraries whose functions do nothing: no GPU is there.
"""

from __future__ import annotations

import datetime
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).resolve().parents[2]
COMPILER, TRIPLE = "aarch64-linux-gnu-g++", "aarch64-linux-gnu"
PYTHON = "3.11"  # of Debian 12
PACKAGES = [
    "numpy>=1.26,<2.5",
    "pytest>=8,<10",
    "pytest-timeout>=2.3,<3",
    "hypothesis>=6.100,<7",
    "expecttest>=0.2,<0.4",
]
PACKAGES += ["filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "setuptools>=77,<85"]  # of torch
#: Where torch looks for the processor, whose name qemu is given. It crashes if it finds the one that is there.
PROCESSOR = "neoverse-n1"
FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs"
CPUINFO = f"processor\t: %d\nBogoMIPS\t: 50.00\nFeatures\t: {FEATURES}\nCPU implementer\t: 0x41\n"
CPUINFO += "CPU architecture: 8\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\nCPU revision\t: 1\n\n"
IDENTIFICATION = "sys/devices/system/cpu/cpu0/regs/identification/midr_el1"


def run(*command: str | Path, **env: str) -> str:
    """Its output. Ends with this output if the command fails."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    process = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path, **env}, capture_output=True, text=True)
    output = process.stdout + process.stderr
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{output[-3000:]}")
    return output


def fetch_debian(folder: Path) -> None:
    """Unpacks a minimal Debian 12 of aarch64 with Python. None of its programs run while it is unpacked."""
    packages = "--include=python3,libgomp1,libstdc++6"
    run("debootstrap", "--arch=arm64", "--foreign", "--variant=minbase", packages, "bookworm", folder)
    for package in sorted((folder / "var/cache/apt/archives").glob("*.deb")):
        run("dpkg-deb", "-x", package, folder)
    cpuinfo = "".join(CPUINFO % number for number in range(os.cpu_count() or 1))  # torch crashes if one is missing
    for name, text in (("proc/cpuinfo", cpuinfo), (IDENTIFICATION, "0x00000000413fd0c1\n")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def fetch_packages(folder: Path, torch: str) -> None:
    """Installs torch and what the tests need, for another processor than this one."""
    platforms = [f"--platform=manylinux_2_{n}_aarch64" for n in range(28, 16, -1)] + [
        "--platform=manylinux2014_aarch64"
    ]
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--target", folder, "--upgrade")
    only = (*platforms, "--only-binary=:all:", f"--python-version={PYTHON}")
    run(*pip, *only, "--no-deps", f"torch=={torch}")
    run(*pip, *only, *PACKAGES)


class Library:
    """What a shared library links, defines and asks for."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            elf = ELFFile(file)
            tags = elf.get_section_by_name(".dynamic").iter_tags()
            self.links = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
            versions = elf.get_section_by_name(".gnu.version_r")
            names = {
                one.entry.vna_other & 0x7FFF: (library.name, one.name)
                for library, some in (versions.iter_versions() if versions else ())
                for one in some
            }
            numbers = elf.get_section_by_name(".gnu.version")
            self.defines, self.asks_for = set(), {}
            for i, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
                if symbol.entry.st_shndx != "SHN_UNDEF":
                    self.defines.add(symbol.name)
                elif symbol.name:
                    number = numbers.get_symbol(i).entry["ndx"] if numbers else 0
                    self.asks_for[symbol.name] = names.get(number, ("", ""))


def replace_cuda(libraries: Path, debian: Path) -> None:
    """Makes each library that torch links and that is not there: its functions return 100, "no device"."""
    some = {path.name: Library(path) for path in libraries.glob("*.so*")}
    system = {path.name for path in debian.glob(f"**/{TRIPLE}/*.so*")} | {"ld-linux-aarch64.so.1"}
    missing = sorted(set().union(*(one.links for one in some.values())) - some.keys() - system)
    defined = set().union(*(one.defines for one in some.values()))
    wanted = {name: origin for one in some.values() for name, origin in one.asks_for.items() if name not in defined}
    for library in missing:
        versions: dict[str, list[str]] = {}
        for name, (origin, version) in wanted.items():
            unknown = not origin and library == missing[0] and re.fullmatch(r"(?!_Z)\w+", name)
            if origin == library or unknown:
                versions.setdefault(version, []).append(name)
        functions = [name for names in versions.values() for name in names]
        source, exports = libraries / "replaced.s", libraries / "replaced.map"
        source.write_text("".join(f".global {f}\n.type {f},%function\n{f}:\n mov w0,#100\n ret\n" for f in functions))
        exports.write_text("".join(f"{v} {{ global: {'; '.join(n)}; }};\n" for v, n in versions.items() if v))
        script = [f"-Wl,--version-script={exports}"] if any(versions) else []
        run(COMPILER, "-shared", "-nostdlib", f"-Wl,-soname,{library}", *script, "-o", libraries / library, source)


def build(folder: Path, torch: Path) -> Path:
    """The library. Ends if the kernels that have bits to keep fuse a multiplication and an addition."""
    settings = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"]
    settings += ["-DCMAKE_CXX_FLAGS=-Werror", "-DLOMO_CUDA=0", f"-DTORCH_DIR={torch}", f"-DLOMO_OUTPUT_DIR={folder}"]
    run("cmake", "-S", ROOT, "-B", folder / "build", "-G", "Ninja", *settings)
    run("cmake", "--build", folder / "build")
    for kernels in (folder / "build").glob("**/kernels_*/**/*.o"):
        fused = re.findall(r"\tf(?:n?madd|n?msub|mla|mls)\t.*", run(f"{TRIPLE}-objdump", "-d", kernels))
        if fused:
            sys.exit(f"{kernels.name} has {len(fused)} fused operations: {fused[0]}")
    return folder / "_cpu.so"


def main() -> int:
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    for program in (COMPILER, "qemu-aarch64", "debootstrap"):
        if not shutil.which(program):
            sys.exit(f"{program} is not installed")
    folder, torch, *tests = Path(sys.argv[1]).resolve(), *sys.argv[2:]
    debian, site = folder / "debian", folder / f"site-{torch}"
    if not (debian / IDENTIFICATION).exists():
        fetch_debian(debian)
    if not (site / "torch").exists():
        fetch_packages(site, torch)
        replace_cuda(site / "torch" / "lib", debian)
    shutil.rmtree(folder / "contract", ignore_errors=True)
    shutil.copytree(ROOT / "tests", folder / "contract" / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    package = folder / "contract" / "lomo_kernels"
    shutil.copytree(ROOT / "lomo_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(build(folder / "library", site / "torch"), package)
    (folder / "contract" / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    slow\n")
    # Tests start this Python anew: by a program of this machine, which starts qemu.
    python = folder / "python"
    paths = ":".join(str(debian / lib / TRIPLE) for lib in ("usr/lib", "lib"))
    python.write_text(
        f"#!/bin/sh\nexec qemu-aarch64 -0 {python} -cpu {PROCESSOR} -L {debian} -E PYTHONHOME={debian}/usr "
        f'-E LD_LIBRARY_PATH={paths} {debian}/usr/bin/python{PYTHON} "$@"\n'
    )
    python.chmod(0o755)
    failures, rows = 0, []
    for name in tests:
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "pytest.ini", f"tests/test_{name}.py"]
        env = {**os.environ, "PYTHONPATH": f"{site}:{package.parent}", "OMP_NUM_THREADS": "1"}
        process = subprocess.run(command, cwd=package.parent, env=env, capture_output=True, text=True)
        outcome = re.search(r"\d+ (?:passed|failed)[^\n]*?(?= in )", process.stdout)
        failures += bool(process.returncode)
        if process.returncode:
            print(process.stdout[-4000:], process.stderr[-2000:], file=sys.stderr)
        rows.append(
            f"| {datetime.date.today().isoformat()} | {torch} | test_{name}.py | {outcome[0] if outcome else '?'} |"
        )
        print(rows[-1], file=sys.stderr, flush=True)
    print("| date | torch | tests | outcome |\n|---|---|---|---|", *rows, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
