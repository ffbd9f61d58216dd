"""What setup.py says and does before CMake starts."""

import runpy
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "setup.py"


@pytest.fixture
def module(monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    pytest.importorskip("setuptools.command.bdist_wheel", reason="needs setuptools>=77")
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
        ("/usr/bin/sccache '/opt/my compiler/g++' -m64", ("/usr/bin/sccache", "/opt/my compiler/g++")),
    ],
)
def test_a_launcher_is_no_compiler(module, cxx, expected):
    assert module["split_compiler"](cxx) == expected


def test_a_torch_that_is_hidden_is_explained(module, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(module["importlib"].util, "find_spec", lambda name: None)
    monkeypatch.setattr(module["sysconfig"], "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match=r"finds none: .*uv pip install --no-build-isolation"):
        module["find_torch"]()
