"""A rank that dies or hangs in the middle of a step: the others get an error, within the group's timeout."""

from __future__ import annotations

import os
import re
import time
from typing import Any

import pytest
import torch.distributed as dist
from support.models import loss_of, transformer, transformer_of_vectors
from support.processes import Failed, Processes
from test_distributed_sharded import fsdp

from lomo_kernels import Lomo

TIMEOUT = 3.0  # seconds


def step(rank: int, engine: str, what: str) -> None:
    """Raises a RuntimeError that says after how many seconds the other rank was given up."""
    if engine == "fsdp":
        model = transformer_of_vectors()
        fsdp(model)
        optimizer = Lomo(model, lr=0.1, clip_grad_norm=1.0, clip_passes="two")
    else:
        model = transformer()
        optimizer = Lomo(model, lr=0.1, clip_grad_norm=1.0, process_group=dist.group.WORLD, clip_passes="two")
    optimizer.backward(loss_of(model, rank))
    if rank == 1:

        def stop(*_: Any) -> None:
            os._exit(1) if what == "dies" else time.sleep(3600)

        model.blocks[0].register_full_backward_hook(stop)
    loss = loss_of(model, rank)
    began = time.monotonic()
    try:
        optimizer.backward(loss)
    except RuntimeError as error:
        raise RuntimeError(f"after {time.monotonic() - began:.3f} s") from error


@pytest.mark.parametrize("what", ["dies", "hangs"])
@pytest.mark.parametrize("engine", ["fsdp", "group"])
def test_the_others_get_an_error(engine: str, what: str) -> None:
    processes = Processes(2, timeout=TIMEOUT)
    try:
        results = processes.outcomes(step, engine, what)
    finally:
        processes.close()
    assert isinstance(results[0], Failed)
    after = re.search(r"RuntimeError: after ([0-9.]+) s", results[0].text)
    # The other one is waited for some milliseconds after backward began; the rest is for a machine that is busy.
    assert after and float(after[1]) < TIMEOUT + 5.0, results[0].text
    assert results[1].text == {"dies": "died", "hangs": "still at it"}[what]
