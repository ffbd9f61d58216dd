"""``PYTHONPATH=.:tests python tests/support/pretended_run.py FOLDER …``: `make gpu` on the pretended device, in forks.

A fork has torch already; 20 processes that import it would take a minute. pytest-xdist, whose workers are no forks, is
left out. Two stages are planted: one hangs and one fails. FOLDER/bin stands in for the programs that are not here.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from pathlib import Path

import hypothesis  # noqa: F401
import pytest
import torch._dynamo
import torch.distributed.fsdp  # noqa: F401

import lomo_kernels.plan  # noqa: F401
from bench import budget, gpu
from bench.budget import Stage

HANG = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('hangs', flush=True)\ntime.sleep(600)"
FAIL = "print('planted'); raise SystemExit(3)"


class Fork:
    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status: int | None = None

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status


def start(stage: Stage, output: Path) -> budget.Process:
    if stage.name in ("hang", "fail"):
        return budget.spawn(stage, output)
    if pid := os.fork():
        return Fork(pid)
    code = 1
    try:
        os.setpgrp()
        os.environ.update(stage.environment)
        with output.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(1, 2)
        code = pretended(stage)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def pretended(stage: Stage) -> int:
    """Calls pytest with the stage's own arguments."""
    if stage.name == "build":
        return 0
    arguments = stage.command[stage.command.index("pytest") + 1 :]
    if "-n" in arguments:
        position = arguments.index("-n")
        arguments[position : position + 2] = ["-p", "no:xdist"]
    if stage.name == "more":  # NCCL, and memory that is really allocated
        arguments.append("--collect-only")
    return int(pytest.main([*arguments, "-p", "support.pretended_gpu"]))


def planted(capability: str, cores: int) -> list[Stage]:
    first, second, *rest = gpu.stages(capability, cores)
    hang = Stage("hang", 2, [sys.executable, "-c", HANG])
    return [first, second, hang, Stage("fail", 30, [sys.executable, "-c", FAIL]), *rest]


if __name__ == "__main__":
    gc.freeze()  # the benches collect garbage often, and all that is imported here would be looked through
    folder = Path(sys.argv[1])
    os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    os.environ["LOMO_SELECTED"] = str(folder / "selected.jsonl")
    sys.exit(gpu.main([*sys.argv[2:], "--results", str(folder / "results")], planted, start))
