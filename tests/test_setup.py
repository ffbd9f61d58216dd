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
        ("some/tools/sccache 'my tools/g++' -m64", ("some/tools/sccache", "my tools/g++")),
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
