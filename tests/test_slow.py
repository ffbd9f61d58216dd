"""Slow tests run if continuous integration or somebody asks for them. The summary says how many were left out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

#: Runs pytest once for each line of standard arguments: the variable CI, and pytest's arguments.
PYTEST = """
import os, sys, pytest
for line in sys.argv[1:]:
    ci, *arguments = line.split("|")
    os.environ["CI"] = ci
    print("begin")
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "conftest"]
    pytest.main(["-q", "-rs", *plugins, "-o", "markers=slow", *arguments])
"""
TESTS = """
import pytest
@pytest.mark.slow
@pytest.mark.parametrize("n", range(3))
def test_long(n): pass
def test_short(): pass
"""
#: Of the variable CI and of arguments: how many run.
EXPECTED = {
    ("", "FILE"): "1 passed, 3 skipped",
    ("", "FILE", "--slow"): "4 passed",
    ("true", "FILE"): "4 passed",
    ("", "FILE", "-k", "long or short"): "4 passed",
    ("", "FILE", "-m", "slow or not slow"): "4 passed",
    ("", "FILE::test_long"): "3 passed",
    ("", "FILE::test_long[1]"): "1 passed",
}


def test_slow_tests_run_if_asked_for(run_python: Any, tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(TESTS)
    lines = ["|".join(case).replace("FILE", str(tmp_path / "test_x.py")) for case in EXPECTED]
    done = run_python(PYTEST, *lines)
    for said, expected in zip(done.stdout.split("begin\n")[1:], EXPECTED.values(), strict=True):
        assert re.search(rf"^{expected} in", said, re.M), said + done.stderr
        left_out = re.findall(r"^SKIPPED \[(\d+)\] .*make test ARGS=--slow", said, re.M)
        assert left_out == (["3"] if "skipped" in expected else []), said
