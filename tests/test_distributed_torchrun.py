"""The documents' programs, started by their `torchrun` lines: on one node, and on two whose ranks repeat each other's
LOCAL_RANK. Both nodes are this machine, with two ranks each, and gloo takes NCCL's place."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.models import assert_close, loss_of, transformer_of_vectors
from support.textbook import Textbook

DOCUMENTS = Path(__file__).parent.parent / "docs" / "distributed"
RANKS, STEPS, LR = 2, 3, 0.5  # ranks of a node; the learning rate of the documents

BEFORE = """
import os
import sys
import torch
from support import models
from lomo_kernels import Lomo

def build():
    model = models.transformer_of_vectors()
    model.forward = lambda seed, forward=model.forward: forward(*models.batch(seed))
    return model

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
loader = [world * step + rank for step in range({steps})]
"""
AFTER = """
torch.save((optimizer.last_grad_norm, models.whole_weights(model), os.environ["LOCAL_RANK"]), f"{sys.argv[1]}/{rank}")
torch.distributed.barrier()  # without it a rank aborted once, in some dozens of runs, at a time unknown
torch.distributed.destroy_process_group()
"""


def document(page: str, pattern: str) -> str:
    found = re.search(pattern, (DOCUMENTS / page).read_text(), re.S | re.M)
    assert found, pattern
    return found[1]


def program(page: str, sharding: str = "") -> str:
    """The first Python block of a page, on the CPU; with the calls of `fully_shard` of one of its sections."""
    block = r".*?```python\n(.*?)```"
    code = document(page, rf"^# {block}")
    if sharding:
        code, changed = re.subn(
            r"for block .*?fully_shard\(model\)[^\n]*\n", document(page, rf"^### {sharding}{block}"), code, flags=re.S
        )
        assert changed == 1
    code, changed = re.subn(r"\.cuda\(\)|torch\.cuda\.set_device\([^\n]*\n", "", code)
    assert changed == 2
    code = code.replace("init_process_group()", 'init_process_group("gloo")')
    return BEFORE.replace("{steps}", str(STEPS)) + code + AFTER


def torchrun(nodes: int, script: Path, folder: Path) -> None:
    """The document's line for so many nodes, on each of them."""
    line = document("README.md", rf"^torchrun ({'--nnodes 2' if nodes == 2 else '--nproc'}[^\n]*) train.py$")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = line.replace("--nproc-per-node 8", f"--nproc-per-node {RANKS}")
    line = line.replace("node0:29500", f"127.0.0.1:{port}")
    here = ["--local-addr", "127.0.0.1", *(["--master-port", str(port)] if nodes == 1 else [])]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *here, *line.split(), str(script), str(folder)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(nodes)
    ]
    try:
        said = [one.communicate(timeout=120)[0] for one in running]
    finally:
        for one in running:
            one.kill()
    assert [one.returncode for one in running] == [0] * nodes, "\n".join(said)


@pytest.mark.slow
@pytest.mark.parametrize(
    "code, nodes",
    [
        (("data_parallel.md",), 1),
        (("dtensor.md",), 2),
        (("dtensor.md", "What to gather together"), 1),
    ],
)
def test_documents_program(code: tuple[str, ...], nodes: int, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(program(*code))
    torchrun(nodes, script, tmp_path)
    book, world = Textbook(transformer_of_vectors(), lr=LR, clip_grad_norm=1.0), RANKS * nodes
    for step in range(STEPS):
        book.step(sum(loss_of(book.model, world * step + n) for n in range(world)) / world)
    for rank in range(world):
        norm, weights, local = torch.load(tmp_path / str(rank))
        assert int(local) == rank % RANKS
        assert norm.item() == pytest.approx(book.norm, rel=1e-6)
        assert weights.keys() == dict(book.model.named_parameters()).keys()
        assert_close(weights, book.model)
