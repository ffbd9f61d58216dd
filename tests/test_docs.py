"""README, CONTRIBUTING and docs: links lead somewhere, programs run, quoted messages are those of the sources."""

from __future__ import annotations

import ast
import os
import re
import runpy
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "csrc" / "README.md", *sorted((ROOT / "bench").rglob("*.md"))]
FENCE = re.compile(r"^( *)```.*?^\1```", re.S | re.M)
BLOCK = re.compile(r"(?:^ *<!-- not run: ([^\n]+) -->\n\n?)?^( *)```python\n(.*?)^\2```", re.S | re.M)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`[^`\n]*`")
QUOTE = re.compile(r'"([^"\n]+)"')


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = CODE.sub("", FENCE.sub("", page.read_text()))
    for link in LINK.findall(text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """`folder/file.ext` and `folder/`; in a name, <op> and the like stand for any."""
    named = re.findall(r"`((?:[\w<>*.-]+/)+(?:[\w<>*.-]+\.\w+)?)(?:::\w+)?`", page.read_text())
    for path in named:
        if path.startswith(("build/", "path/", ".venv")):
            continue
        pattern = re.sub(r"<\w+>", "*", path).rstrip("/")
        folders = (ROOT, ROOT / "csrc", ROOT / "lomo_kernels", page.parent)
        assert any(any(folder.glob(pattern)) for folder in folders), path


MODEL = """
import torch
from torch import nn
from lomo_kernels import Lomo
torch.manual_seed(0)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 16)
    def forward(self, batch):
        x = self.embedding(batch)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, -2), batch.flatten())
build = MyModel = Net
make_batch = lambda: torch.randint(16, (2, 4))
model, loader = build(), [make_batch() for _ in range(3)]
"""
SCHEDULER = """
class scheduler:
    step = staticmethod(lambda: None)
"""
SHARDED = """
import os, tempfile
from torch.distributed.fsdp import fully_shard
folder = tempfile.mkdtemp()
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
for block in model.blocks:
    fully_shard(block)
fully_shard(model)
optimizer = Lomo(model, lr=3e-2)
"""
AFTER_SHARDED = "optimizer.backward(model(loader[0]))\ntorch.distributed.destroy_process_group()\n"
SPLIT = """
model.bfloat16()
optimizer = Lomo(model, lr=3e-2, rounding="split")
optimizer.backward(model(loader[0]))
param = model.head.weight
"""
#: What a page's programs take for given, and what is run after them.
AROUND = {
    "README.md": (MODEL + SCHEDULER, ""),
    "docs/choosing.md": (MODEL, "optimizer.backward(model(loader[0]))"),
    "docs/faults.md": (
        MODEL
        + "import tempfile\noptimizer = Lomo(model)\nfolder = tempfile.TemporaryDirectory()\nos.chdir(folder.name)\n",
        'assert os.listdir() == ["checkpoint.pt"]',
    ),
    "docs/memory.md": (
        MODEL.replace("return nn", "return Loss(nn").replace("batch.flatten())", "batch.flatten()))")
        + "class Loss:\n    def __init__(self, loss): self.loss = loss\n",
        "",
    ),
    "docs/numerics.md": (
        MODEL + SPLIT,
        "rounded = (weights.view(torch.int32) + 0x8000 >> 16).short()  # half away, unlike bfloat16()\n"
        "assert low.any() and torch.equal(rounded, param.detach().view(torch.int16))",
    ),
    "docs/distributed/README.md": (MODEL + SHARDED, AFTER_SHARDED),
    "docs/distributed/dtensor.md": (MODEL + SHARDED, AFTER_SHARDED),
}


def blocks(page: Path) -> list[tuple[str, str]]:
    """Every Python block of a page, with the reason why it is not run here."""
    return [(reason, textwrap.dedent(code)) for reason, _, code in BLOCK.findall(page.read_text())]


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=name)
def test_programs_run(page: Path, tmp_path: Path, run_python: Any) -> None:
    """One after the other in one process, as a reader would. Those that are not run are compiled."""
    before, after = AROUND.get(name(page), ("", ""))
    run = [code for reason, code in blocks(page) if not reason]
    assert page.read_text().count("```python") == len(blocks(page))
    for _, code in blocks(page):
        ast.parse(code)
    if not run:
        return
    script = tmp_path / "page.py"
    script.write_text("\n".join(["import os", before, *run, after]))
    start = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = run_python(start, str(script), PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), *sys.path])))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_program_that_is_not_run_names_who_runs_it() -> None:
    for page in PAGES:
        for reason, _ in blocks(page):
            tests = re.findall(r"tests/\w+\.py", reason)
            assert not reason or (tests and all((ROOT / test).exists() for test in tests)), (name(page), reason)


def sources() -> str:
    """The package's text, with literals that follow each other made one and what is formatted in made "…"."""
    parts = [file.read_text() for file in sorted((ROOT / "lomo_kernels").rglob("*.py"))]
    text = re.sub(r"[\"']\s*\n\s*f?[\"']", "", "\n".join(parts))
    return re.sub(r"\{[^{}\n]*\}", "…", text)


def test_quoted_messages_are_those_of_the_sources() -> None:
    text, found = sources(), 0
    for quote in QUOTE.findall(CODE.sub("", (ROOT / "docs" / "limits.md").read_text())):
        if quote == "Refused":  # a word that the page itself defines
            continue
        pattern = r"[^\n]{0,200}?".join(map(re.escape, re.split(r" ?… ?", quote)))
        assert re.search(pattern, text), quote
        found += 1
    assert found >= 5


#: Of the bullets: the row of a written table that each figure stands in.
FIGURES = {
    "SGD, clip_grad_norm_": ["0.202"],
    "AdamW, clip_grad_norm_": ["0.601"],
    "lomo_optim, clipping": ["1.69", "1.85"],
    "Lomo, clipping, 1/2 kept": ["1.26", "1.34"],
    "Lomo, clipping, two passes, fused": ["0.027", "15.08"],
    "Lomo, clipping, one pass, fused": ["1.03", "1.07", "1.10"],
    "sgd_ nearest": ["0.94", "0.57", "0.09"],
    "add_": ["0.76", "0.70", "0.38"],
    "SGD": ["25.35"],
}


def test_figures_of_the_readme_stand_in_a_table() -> None:
    text = (ROOT / "README.md").read_text()
    bullets = re.findall(r"^- \*\*.*?(?=\n- |\n\n)", text[: text.index("## Quick start")], re.S | re.M)
    said = re.findall(r"\b\d+\.\d+\b", "\n".join(bullets))
    assert len(bullets) == 4
    assert sorted(said) == sorted(figure for figures in FIGURES.values() for figure in figures)
    rows: dict[str, str] = {}
    for line in (ROOT / "docs" / "benchmarks.md").read_text().splitlines():
        if line.startswith("|"):
            label, cells = line[1:].split("|", 1)
            label = label.strip().strip("*")
            rows[label] = rows.get(label, "") + cells
    for label, figures in FIGURES.items():
        for figure in figures:
            assert re.search(rf"[| ]{figure}[ |]", rows[label]), (label, figure)


def test_the_readme_is_short_and_begins_with_the_installation() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 125
    assert "pip install ." in "\n".join(lines[:15])


def test_commands_select_tests_and_questions() -> None:
    from bench.results import QUESTIONS

    text = "\n".join(page.read_text() for page in PAGES)
    selected = [word for words in re.findall(r"""-k '?([\w ]+)""", text) for word in words.split(" or ")]
    assert len(selected) > 10
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    for word in selected:  # -k takes parts of names
        assert any(name.startswith(word) or f"\ndef {word}" in text for name, text in files.items()), word
    asked = {one or other for one, other in re.findall(r"make bench ARGS=(\w+)|python -m bench (\w+)", text)}
    assert asked and asked <= set(QUESTIONS)


def test_the_figure_is_what_its_code_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib, of the extra 'bench'")
    code = ROOT / "docs" / "figures" / "gradient_life.py"
    new, committed = tmp_path / "new.svg", code.with_suffix(".svg")
    runpy.run_path(str(code))["draw"](new)
    drawn, shown = (re.findall(r"<text[^>]*>([^<]+)", file.read_text()) for file in (new, committed))
    assert drawn == shown and "factors x, gy" in drawn
