"""Builds lomo_kernels/_cpu.so and perhaps _cuda.so: finds torch's headers and libraries and hands over to CMake."""

import gzip
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(
        f"lomo_kernels needs setuptools>=77 to build without isolation and finds {setuptools.__version__}: "
        "`pip install 'setuptools>=77'` first."
    )

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "library"  # pinned, so that a reinstall compiles only what changed
NEEDED_MB = 100  # of disk: a build for CPUs takes 3, one for all GPUs 77


def find_torch() -> str:
    """The folder of the torch package. It is not imported: pip's build isolation hides it, and its files are enough."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    version = next(filter(Path.is_file, (place / "version.py" for place in places)), None)
    found = version and re.search(r"__version__ = '((\d+)\.(\d+).*)'", version.read_text())
    if not version or not found or (int(found[2]), int(found[3])) < (2, 11):
        sys.exit(
            f"lomo_kernels is built against the installed torch and finds {found[1] if found else 'none'}: "
            "`pip install 'torch>=2.11'` first. If torch is installed, uv, pip or build hides it from this build: "
            "`pip install 'setuptools>=77' cmake ninja`, then `uv pip install --no-build-isolation .` "
            "(or the same with pip, or `python -m build --no-isolation`)."
        )
    return str(version.parent)


def find_program(what: str, *names: str) -> str:
    """The first of these names on PATH or in the virtual environment, which need not be activated."""
    paths = [shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts")) for name in names]
    return next(filter(None, paths), None) or sys.exit(f"lomo_kernels needs {what} and finds no {' or '.join(names)}.")


LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")


def split_compiler(cxx: str) -> tuple[str, str]:
    """Launcher and compiler that CXX names, each may be "". CMake takes no launcher as part of a compiler's name."""
    words = shlex.split(cxx)
    launcher = words.pop(0) if len(words) > 1 and Path(words[0]).name in LAUNCHERS else ""
    return launcher, words[0] if words else ""


def find_all() -> tuple[str, str, str, str]:
    """torch, cmake, ninja and the C++ compiler, or one sentence about the first that is missing."""
    _, compiler = split_compiler(os.environ.get("CXX", ""))
    compilers = [compiler] if compiler else ["c++", "g++", "clang++"]
    compiler = find_program("a C++17 compiler (install g++ or set CXX)", *compilers)
    cmake, ninja = find_program("CMake (`pip install cmake`)", "cmake"), find_program("`pip install ninja`", "ninja")
    return find_torch(), cmake, ninja, compiler


def check_writable() -> None:
    """setuptools writes into the source folder, and says no more than "Permission denied" if it cannot."""
    for folder in (ROOT, ROOT / "build", BUILD, *ROOT.glob("*.egg-info")):
        if folder.exists() and not os.access(folder, os.W_OK):
            sys.exit(
                f"lomo_kernels is built inside its source folder, and this user cannot write to {folder}: copy the "
                "source folder to one of your own (`cp -r`), delete `build` and `*.egg-info` there, and install it."
            )


def why_not_compiled() -> str:
    """The end of a sentence about a build that failed."""
    free = shutil.disk_usage(BUILD if BUILD.exists() else ROOT).free >> 20
    if free < NEEDED_MB:
        return f"{BUILD} has {free} MB of disk left, and a build takes up to {NEEDED_MB}: make room and repeat."
    return "the reason stands above."


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # without Python symbols, so without a Python version

    def copy_extensions_to_source(self) -> None:
        (ROOT / "lomo_kernels" / "_cuda.so").unlink(missing_ok=True)  # of an earlier build; this one may have none
        super().copy_extensions_to_source()

    def build_extensions(self) -> None:
        torch, cmake, ninja, compiler = find_all()
        output = Path(self.get_ext_fullpath("lomo_kernels._cpu")).resolve().parent
        settings = [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DTORCH_DIR={torch}", f"-DLOMO_OUTPUT_DIR={output}"]
        for name in ("LOMO_CUDA", "LOMO_CUDA_ARCHS"):  # -U: not what CMake remembers of an earlier build
            settings.append(f"-D{name}={os.environ[name]}" if os.environ.get(name) else f"-U{name}")
        launcher, _ = split_compiler(os.environ.get("CXX", ""))
        if launcher:
            settings += [f"-DCMAKE_CXX_COMPILER:FILEPATH={compiler}"]
            settings += [f"-DCMAKE_CXX_COMPILER_LAUNCHER={find_program('the launcher that CXX names', launcher)}"]
        else:
            settings.append("-UCMAKE_CXX_COMPILER_LAUNCHER")
        cache = BUILD / "CMakeCache.txt"
        remembered = cache.read_text().splitlines() if cache.exists() else []
        if not {f"CMAKE_CXX_COMPILER:FILEPATH={compiler}", f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}"} <= set(remembered):
            settings.append("--fresh")  # else CMake keeps the compiler of its first run, whatever CXX says now
        configure = [cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", *settings]
        if subprocess.call(configure) or subprocess.call([cmake, "--build", str(BUILD)]):
            sys.exit(f"lomo_kernels could not be compiled: {why_not_compiled()}")


class Wheel(bdist_wheel):
    def run(self) -> None:
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)  # may hold deleted files
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]

    def write_wheelfile(self, wheelfile_base: str, *arguments: str) -> None:
        super().write_wheelfile(wheelfile_base, *arguments)
        for path in Path(self.bdist_dir).rglob("*"):  # the same bytes whatever the builder's umask is
            path.chmod(0o755 if path.is_dir() or path.suffix == ".so" else 0o644)


class Sources(sdist):
    def make_archive(self, base_name: str, format: str, root_dir: str | None = None, base_dir: str | None = None,
                     owner: str | None = None, group: str | None = None) -> str:  # fmt: skip
        """A .tar.gz with the same bytes whoever packs it: sorted, of nobody, dated SOURCE_DATE_EPOCH."""
        epoch = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))

        def normalized(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = epoch, 0, 0, "", ""
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            return entry

        name = f"{base_name}.tar.gz"
        with (
            open(name, "wb") as file,
            gzip.GzipFile("", "wb", mtime=epoch, fileobj=file) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.add(str(base_dir), filter=normalized)  # sorts
        return name


class Metadata(dist_info):
    def run(self) -> None:
        find_all()  # says now what is missing, not after pip has downloaded a torch of its own choice
        super().run()


def long_description() -> str:
    """The README, whose links to files lead to the project's repository when a package index shows them."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    source, version = (re.search(rf'^{name} = "(.+)"', project, re.M)[1] for name in ("Source", "version"))

    def absolute(match: re.Match[str]) -> str:
        return f"{match[1]}]({source}/{'raw' if match[1].startswith('!') else 'blob'}/v{version}/{match[2]})"

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?\[[^][]*)\]\((?![a-z]+://|#)([^)\s]+)\)", absolute, readme)


# _cuda is optional: CMake decides whether there is one (cmake/cuda.cmake).
libraries = [Extension("lomo_kernels._cpu", sources=[]), Extension("lomo_kernels._cuda", sources=[], optional=True)]
check_writable()
setup(
    ext_modules=libraries,
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel, "dist_info": Metadata, "sdist": Sources},
    long_description=long_description(),
    long_description_content_type="text/markdown",
)
