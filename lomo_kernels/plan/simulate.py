"""Steps of training, simulated: the real model, optimizer and hooks on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from .. import tiled
from ..optim.passes import KeepPass
from .kernels import KERNELS
from .methods import Method
from .recorder import ACTIVATIONS, FACTORS, STATES, TEMPORARIES, Peak, Recorder, Workspaces


def simulate(
    build: Callable[[], nn.Module],
    loss: Callable[[Any], Tensor],
    method: Method,
    *,
    kernels: str = "gpu",
) -> Peak:
    """Peak of live bytes of a few steps. No memory is used, and nothing is computed.

    Args:
        build: makes the model on the CPU, in its final dtype (see `default_dtype`): a simulated module cannot be cast.
        loss: from the model to a scalar; makes its own inputs.
        method: one of `lomo_kernels.plan.METHODS`, or another.
        kernels: "gpu": where torch's kernels differ by device, those of a GPU; "cpu"; "unfused": attention and RMSNorm
            as of 2023.

    Raises:
        KeyError: another name of kernels.
    """
    chosen = KERNELS[kernels]
    # What lives beyond a step must not be a simulated tensor; and shapes must not depend on what tensors hold.
    real_buffer = patch.object(tiled.buffer, "memory", torch.empty(0))
    unread = patch.object(tiled, "_may_be_read", lambda device: False)
    fill = [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]
    nothing: dict[str, Any] = dict.fromkeys(fill, _untouched)
    unset = patch.multiple(nn.init, **nothing)  # filling weights is half of the time otherwise
    with real_buffer, unread, unset, FakeTensorMode(allow_non_fake_inputs=True), chosen.in_force():
        return record(build, loss, method, workspaces=chosen.workspaces)


def record(
    build: Callable[[], nn.Module],
    loss: Callable[[Any], Tensor],
    method: Method,
    *,
    workspaces: Workspaces | None = None,
) -> Peak:
    """As `simulate`, but the steps are taken, with whatever tensors `build` makes: on the CPU every byte outside of
    operators is counted."""
    recorder = Recorder(workspaces)
    with recorder:
        model = build()
        recorder.begin()
        with recorder.watching(model), _kept_factors(recorder):
            with recorder.making(STATES):
                attached = method.attach(model)
            for _ in range(method.steps):
                with recorder.making(ACTIVATIONS):
                    value = loss(model)
                with recorder.making(TEMPORARIES):
                    attached.update(value)
                del value
                recorder.is_(attached.states(), STATES)
    return recorder.by_category()


def _untouched(tensor: Tensor, *_: Any, **__: Any) -> Any:
    return tensor


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """`torch.set_default_dtype` for a while: modules made inside have their parameters in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _kept_factors(recorder: Recorder) -> Iterator[None]:
    """Tells the recorder which tensors wait, as a gradient's factors, for the end of backward."""
    add = KeepPass.add

    def noted(self: KeepPass, record: Any, grad: Any, pairs: Any = ()) -> None:
        add(self, record, grad, pairs)
        recorder.becomes((tensor for held in pairs for tensor in held.pair[:2]), FACTORS)

    with patch.object(KeepPass, "add", noted):
        yield
