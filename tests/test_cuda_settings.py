"""What CMake says before it compiles for GPUs, with an nvcc and a torch that have no more than versions."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NVCC = """#!/bin/sh
case $1 in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\n' ;;
  *) exit 1 ;;
esac
"""


class Configuration:
    """CMake's answers to settings, from one build folder, so that the C++ compiler is looked at only once."""

    def __init__(self, folder):
        self.folder = folder
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
        self.cmake, self.ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
        if not self.cmake or not self.ninja:
            pytest.skip("cmake or ninja is missing")

    def __call__(self, nvcc, torch_cuda, cuda="1", archs="80;90"):
        """The exit status, and the output as one line. `torch_cuda`: None for a torch without CUDA."""
        torch = self.folder / "torch"
        header = torch / "include" / "torch" / "csrc" / "stable" / "library.h"
        header.parent.mkdir(parents=True, exist_ok=True)
        header.touch()
        named = f"'{torch_cuda}'" if torch_cuda else None
        (torch / "version.py").write_text(f"__version__ = '2.13.0'\ncuda: Optional[str] = {named}\n")
        compiler = self.folder / "nvcc"
        compiler.write_text(NVCC.format(version=nvcc))
        compiler.chmod(0o755)
        settings = [f"-DTORCH_DIR={torch}", f"-DLOMO_CUDA={cuda}", f"-DLOMO_CUDA_ARCHS={archs}"]
        settings += [f"-DCMAKE_MAKE_PROGRAM={self.ninja}", f"-DPYTHON={sys.executable}"]
        command = [self.cmake, "-S", str(ROOT), "-B", str(self.folder / "build"), "-G", "Ninja", *settings]
        env = {**os.environ, "CUDACXX": str(compiler)}
        process = subprocess.run(command, env=env, capture_output=True, text=True)
        return process.returncode, " ".join((process.stdout + process.stderr).split())


@pytest.fixture(scope="module")
def configure(tmp_path_factory):
    return Configuration(tmp_path_factory.mktemp("cuda"))


def test_an_nvcc_newer_than_torch_says_which_driver_is_needed(configure):
    _, said = configure(nvcc="13.0", torch_cuda="12.8")
    assert "CUDA kernels by nvcc 13.0 for sm_80 sm_90 compute_90." in said
    assert "CUDA kernels need a driver for CUDA 13, the nvcc's, and torch one for CUDA 12: with an older driver" in said
    for nvcc, torch_cuda in ("12.8", "13.2"), ("13.1", "13.0"), ("13.0", None):
        _, said = configure(nvcc, torch_cuda)
        assert f"CUDA kernels by nvcc {nvcc} for" in said and "need a driver" not in said


def test_unknown_gpus_are_left_out_or_refused(configure):
    _, said = configure(nvcc="13.0", torch_cuda="13.0", archs="80;123")
    assert "for sm_80 compute_80." in said and "leave out what nvcc 13.0 does not know: sm_123." in said
    status, said = configure(nvcc="13.0", torch_cuda="13.0", archs="123")
    assert status and "LOMO_CUDA_ARCHS is '123', none of which nvcc 13.0 knows: expected numbers like 80;90." in said


def test_an_old_nvcc_is_refused_or_left_out(configure):
    status, said = configure(nvcc="11.8", torch_cuda="13.0")
    assert status and "LOMO_CUDA=1, but " in said and "is of CUDA 11.8, expected 12.1 or newer." in said
    status, said = configure(nvcc="11.8", torch_cuda="13.0", cuda="auto")
    assert status == 0 and "CUDA kernels are left out: " in said and "is of CUDA 11.8" in said


def test_a_torch_without_cuda_gets_no_cuda_kernels_by_itself(configure):
    status, said = configure(nvcc="13.0", torch_cuda=None, cuda="auto")
    assert status == 0 and "CUDA kernels are left out: torch is built without CUDA" in said
