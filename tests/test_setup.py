"""What setup.py says and does, with a CMake that only pretends to compile: every known way to fail has its sentence."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
SETUP = ROOT / "setup.py"


@pytest.fixture
def module(monkeypatch):
    setuptools = pytest.importorskip("setuptools", minversion="77")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(SETUP))


@pytest.mark.parametrize(
    ("cxx", "expected"),
    [
        ("", ("", "")),
        ("clang++", ("", "clang++")),
        ("g++ -m64", ("", "g++")),
        ("ccache", ("", "ccache")),
        ("ccache clang++", ("ccache", "clang++")),
        ("some/tools/sccache 'my tools/g++' -m64", ("some/tools/sccache", "my tools/g++")),
    ],
)
def test_a_launcher_is_no_compiler(module, cxx, expected):
    assert module["split_compiler"](cxx) == expected


def find_torch_in(folder, module, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(module["importlib"].util, "find_spec", lambda name: None)
    monkeypatch.setattr(module["sysconfig"], "get_path", lambda name: str(folder))
    return module["find_torch"]()


def test_a_torch_that_is_hidden_is_explained(module, monkeypatch, tmp_path):
    """As it is by uv's isolation and that of `python -m build`."""
    said = r"finds none: .*uv pip install --no-build-isolation.*python -m build --no-isolation"
    with pytest.raises(SystemExit, match=said):
        find_torch_in(tmp_path, module, monkeypatch)


@pytest.mark.parametrize("version", ["2.10.1", "2.9.0+cu130", "1.13.1"])
def test_a_torch_that_is_too_old_is_named(module, monkeypatch, tmp_path, version):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    with pytest.raises(SystemExit) as said:
        find_torch_in(tmp_path, module, monkeypatch)
    assert f"finds {version}: `pip install 'torch>=2.11'` first" in str(said.value)


def test_a_torch_that_is_new_enough_is_taken(module, monkeypatch, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.11.0a0+git'\n")
    assert find_torch_in(tmp_path, module, monkeypatch) == str(tmp_path / "torch")


@pytest.mark.parametrize("version", ["65.5.0", "76.1.0"])
def test_an_old_setuptools_is_refused_before_it_reads_the_metadata(monkeypatch, version):
    old = ModuleType("setuptools")
    old.__version__ = version
    monkeypatch.setitem(sys.modules, "setuptools", old)
    with pytest.raises(SystemExit, match=rf"needs setuptools>=77 .* finds {version}: `pip install"):
        runpy.run_path(str(SETUP))


def test_a_full_disk_is_named(module, monkeypatch):
    monkeypatch.setattr(module["shutil"], "disk_usage", lambda path: SimpleNamespace(free=3 << 20))
    assert "has 3 MB of disk left" in module["why_not_compiled"]()
    monkeypatch.setattr(module["shutil"], "disk_usage", lambda path: SimpleNamespace(free=3 << 30))
    assert module["why_not_compiled"]() == "the reason stands above."


# ---- Whole builds, without a compiler -------------------------------------------------------------------------------

CMAKE = """#!{python}
import os, re, sys
from pathlib import Path
line = " ".join(sys.argv[1:])
folder = Path(sys.argv[sys.argv.index("-B") + 1] if "-B" in sys.argv else sys.argv[-1])
with open({log!r}, "a") as log:
    log.write(line + chr(10))
if "-B" in sys.argv:
    folder.mkdir(parents=True, exist_ok=True)
    entries = ["CMAKE_CXX_COMPILER:FILEPATH=" + os.environ["PRETENDED_CXX"]]
    entries += ["CMAKE_HOME_DIRECTORY:INTERNAL=" + os.getcwd()]
    entries += ["OUTPUT=" + re.search("-DLOMO_OUTPUT_DIR=(.*?)( -|$)", line)[1]]
    entries += ["CUDA=" + str(int("-DLOMO_CUDA=1" in line))]
    (folder / "CMakeCache.txt").write_text(chr(10).join(entries) + chr(10))
elif os.environ.get("PRETENDED_FAILURE"):
    sys.exit("fatal error: something")
else:
    entries = dict(entry.split("=", 1) for entry in (folder / "CMakeCache.txt").read_text().split(chr(10)) if entry)
    output = Path(entries["OUTPUT"])
    output.mkdir(parents=True, exist_ok=True)
    for name in ["_cpu.so"] + ["_cuda.so"] * int(entries["CUDA"]):
        (output / name).write_bytes(b"compiled")
"""
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


class Tree:
    """A copy of the sources, a PATH without a compiler, and a CMake that writes two lines in place of compiling."""

    def __init__(self, folder):
        pytest.importorskip("setuptools", minversion="77")
        self.root, self.bin, self.log = folder / "sources", folder / "bin", folder / "log"
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / "lomo_kernels", self.root / "lomo_kernels", ignore=ignored)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
            shutil.copy(ROOT / name, self.root)
        self.bin.mkdir()
        self.log.touch()
        self.program("cmake", CMAKE.format(python=sys.executable, log=str(self.log)))
        self.program("ninja", "#!/bin/sh\n")
        self.compiler = self.program("pretended-c++", "#!/bin/sh\n")

    def program(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)
        return str(self.bin / name)

    def build(self, *before, **env):
        """The exit status, the output, and the wheel's files."""
        to = self.root.parent / "wheels"
        shutil.rmtree(to, ignore_errors=True)
        clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "LOMO_CUDA", "LOMO_CUDA_ARCHS")}
        clean |= {"PATH": str(self.bin), "CXX": self.compiler, "PRETENDED_CXX": self.compiler}
        command = [*before, sys.executable, "-c", BUILD, str(to)]
        process = subprocess.run(command, cwd=self.root, env=clean | env, capture_output=True, text=True)
        files = set()
        for wheel in to.glob("*.whl"):
            with ZipFile(wheel) as archive:
                files |= set(archive.namelist())
        return process.returncode, process.stdout + process.stderr, files


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def test_cuda_can_be_switched_on_and_off(tree):
    """Neither the build folder nor setuptools' own copy brings back a library that was not asked for."""
    for cuda in "1", "0":
        status, output, files = tree.build(LOMO_CUDA=cuda)
        assert status == 0, output
        assert "lomo_kernels/_cpu.so" in files and ("lomo_kernels/_cuda.so" in files) == (cuda == "1")
    status, output, files = tree.build()
    assert status == 0 and "-ULOMO_CUDA " in tree.log.read_text().splitlines()[-2]


def test_a_half_built_folder_is_configured_anew(tree):
    """As an interrupted CMake leaves it. A complete one is kept, so that only what changed is compiled."""
    assert tree.build()[0] == 0 and tree.build()[0] == 0
    configured = [line for line in tree.log.read_text().splitlines() if " -B " in line]
    assert ["--fresh" in line for line in configured] == [True, False]
    cache = tree.root / "build" / "library" / "CMakeCache.txt"
    cache.write_text(cache.read_text()[:20])
    assert tree.build()[0] == 0
    assert "--fresh" in [line for line in tree.log.read_text().splitlines() if " -B " in line][-1]


def test_a_compiler_that_fails_has_the_last_word_above(tree):
    status, output, files = tree.build(PRETENDED_FAILURE="1")
    assert status and not files
    assert output.strip().endswith("lomo_kernels could not be compiled: the reason stands above.")
    assert "fatal error: something" in output and "Traceback" not in output.split("fatal error")[1]


def test_a_missing_compiler_is_named(tree):
    status, output, _ = tree.build(CXX="")
    assert status and output.strip().endswith(
        "lomo_kernels needs a C++17 compiler (install g++ or set CXX) and finds no c++ or g++ or clang++."
    )
    status, output, _ = tree.build(CXX="ccache no-such-compiler")
    assert status and output.strip().endswith("finds no no-such-compiler.")


def test_no_network_is_needed_without_isolation(tree):
    """In a network namespace that has no device, if this user may make one."""
    alone = [shutil.which("unshare"), "--net"]
    if not alone[0] or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this user cannot be cut off from the network")
    status, output, files = tree.build(*alone)
    assert status == 0 and "lomo_kernels/_cpu.so" in files, output


def test_a_source_folder_that_cannot_be_written_is_explained(tree):
    """As to an unprivileged user; root loses the right to ignore permissions."""
    drop = []
    if os.geteuid() == 0:
        drop = [shutil.which("setpriv"), "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override"]
        if not drop[0] or subprocess.run([*drop, "true"], capture_output=True).returncode:
            pytest.skip("root cannot give up its privileges here")
    folders = [tree.root, *filter(Path.is_dir, tree.root.rglob("*"))]
    for folder in folders:
        folder.chmod(0o555)
    status, output, _ = tree.build(*drop)
    for folder in folders:
        folder.chmod(0o755)
    assert status and f"this user cannot write to {tree.root}: copy the source folder" in output
    assert "Traceback" not in output.rsplit("\n", 3)[-1]
