"""Builds lomo_kernels/_cpu.so: finds torch's headers and libraries, hands over to CMake. The rest is in pyproject.toml."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    sys.exit("lomo_kernels needs setuptools>=77 to build without isolation: `pip install -U setuptools` first.")

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "cpu"  # pinned, so that a reinstall compiles only what changed


def find_torch() -> str:
    """The folder of the torch package. It is not imported: pip's build isolation hides it, and its files are enough."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    for place in places:
        version = place / "version.py"
        found = version.is_file() and re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", version.read_text())
        if found and (int(found[2]), int(found[3])) >= (2, 11):
            return str(place)
        if found:
            sys.exit(f"lomo_kernels needs torch>=2.11 and found {found[1]} in {place}: upgrade it, then install again.")
    sys.exit(
        "lomo_kernels is built against the installed torch and finds none: `pip install torch` (>=2.11) first, "
        "then install again; where torch is installed but hidden, install with --no-build-isolation."
    )


def find_program(name: str, *, needed: str, candidates: list[str]) -> str:
    """The first candidate on PATH or in the virtual environment, which need not be activated."""
    for candidate in candidates:
        if path := shutil.which(candidate) or shutil.which(candidate, path=sysconfig.get_path("scripts")):
            return path
    sys.exit(f"lomo_kernels is compiled with {name} and finds none ({', '.join(candidates)}): {needed}, then install again.")


def find_all() -> tuple[str, str, str, str]:
    """torch, cmake, ninja and the C++ compiler, or one sentence about the first that is missing."""
    names = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    return (
        find_torch(),
        find_program("CMake", needed="`pip install cmake`", candidates=["cmake"]),
        find_program("Ninja", needed="`pip install ninja`", candidates=["ninja"]),
        find_program("a C++17 compiler", needed="install g++ or set CXX", candidates=names),
    )


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # without Python symbols, so without a Python version

    def build_extension(self, ext: Extension) -> None:
        torch, cmake, ninja, compiler = find_all()
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        settings = [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DTORCH_DIR={torch}", f"-DLOMO_OUTPUT_DIR={output}"]
        cache = BUILD / "CMakeCache.txt"
        remembered = cache.read_text().splitlines() if cache.exists() else []
        if not {f"CMAKE_CXX_COMPILER:FILEPATH={compiler}", f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}"} <= set(remembered):
            settings.append("--fresh")  # else CMake keeps the compiler of its first run, whatever CXX says now
        configure = [cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", *settings]
        if subprocess.call(configure) or subprocess.call([cmake, "--build", str(BUILD)]):
            sys.exit("lomo_kernels could not be compiled: the reason stands above.")


class Wheel(bdist_wheel):
    def run(self) -> None:
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)  # may hold deleted files
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class Metadata(dist_info):
    def run(self) -> None:
        find_all()  # says now what is missing, not after pip has downloaded a torch of its own choice
        super().run()


setup(
    ext_modules=[Extension("lomo_kernels._cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel, "dist_info": Metadata},
)
