"""Steps of training, simulated: the real model, optimizer and hooks on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..composite import tiled
from ..optim.defer_pass import DeferPass, DeferredGradient
from .blocks import blocks_of
from .extrapolate import Parts, extrapolate, peak_of
from .kernels import KERNELS
from .methods import LR, Method
from .recorder import ACTIVATIONS, FACTORS, STATES, TEMPORARIES, Formulas, Peak, Recorder, Workspaces


def simulate(
    build: Callable[[], nn.Module],
    loss: Callable[[Any], Tensor],
    method: Method,
    *,
    kernels: str = "gpu",
) -> Peak:
    """Peak of live bytes of a method's last step. No memory is used, and nothing is computed.

    Args:
        build: makes the model on the CPU, in its final dtype (see `default_dtype`): a simulated module cannot be cast.
        loss: from the model to a scalar; makes its own inputs.
        method: one of `lomo_kernels.plan.METHODS`, or another.
        kernels: "gpu": where torch's kernels differ by device, those of a GPU; "cpu"; "unfused": attention and RMSNorm
            as of 2023.

    Raises:
        KeyError: another name of kernels.
    """
    return simulation(build, loss, method, kernels).peak_of_parts()


def simulate_blocks(
    build: Callable[[int], Callable[[], nn.Module]],
    blocks: int,
    loss: Callable[[Any], Tensor],
    method: Method,
    *,
    edge: int = 2,
) -> Peak:
    """`simulate` for a model of many equal blocks, in the time of few. The same numbers: tests/test_plan_blocks.py.

    What is alive at a given operator of a given block is a linear function of the number of blocks and of the block's
    place among them, but for `edge` blocks at either end. So two models of few blocks tell it for all: in the middle,
    the largest value stands at one of its ends.

    Args:
        build: from a number of blocks to what `simulate` takes. The blocks are the model's longest `nn.ModuleList`.
        blocks: how many there are.
        loss, method: as in `simulate`.
        edge: one does, in half of the time, but where FSDP2 gathers whole blocks: while one is at work it gathers the
            next, which the last does not have.
    """
    return peak_of(step_of_blocks(build, blocks, loss, method, edge))


def step_of_blocks(
    build: Callable[[int], Callable[[], nn.Module]], blocks: int, loss: Any, method: Method, edge: int
) -> Parts:
    """The samples behind `simulate_blocks`."""
    few = 2 * edge
    if blocks <= few + 1:
        return _by_place(simulation(build(blocks), loss, method, "gpu"), blocks, edge)
    less, more = (_by_place(simulation(build(n), loss, method, "gpu"), n, edge) for n in (few, few + 1))
    return extrapolate(less, more, blocks - few)


def _by_place(recorder: Recorder, blocks: int, edge: int) -> Parts:
    """The parts of a step, those of blocks by their distance from the nearer end."""
    parts: Parts = {}
    for (name, number), samples in recorder.parts():
        position = number if number is None or number < edge else number - blocks
        parts.setdefault((name, position), []).extend(samples)
    return parts


def simulation(
    build: Callable[[], nn.Module], loss: Any, method: Method, kernels: str, formulas: Formulas | None = None
) -> Recorder:
    chosen = KERNELS[kernels]
    fill = [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]
    nothing: dict[str, Any] = dict.fromkeys(fill, _untouched)
    unset = patch.multiple(nn.init, **nothing)  # filling weights is half of the time otherwise
    with tiled.simulated(chosen.device), unset, FakeTensorMode(allow_non_fake_inputs=True), chosen.in_force():
        return _recorded(build, loss, method, Recorder(chosen.workspaces, formulas))


def record(
    build: Callable[[], nn.Module],
    loss: Callable[[Any], Tensor],
    method: Method,
    *,
    workspaces: Workspaces | None = None,
) -> Peak:
    """As `simulate`, but the steps are taken, with whatever tensors `build` makes: on the CPU every byte outside of
    operators is counted."""
    return _recorded(build, loss, method, Recorder(workspaces)).peak_of_parts()


def _recorded(build: Callable[[], nn.Module], loss: Any, method: Method, recorder: Recorder) -> Recorder:
    with recorder:
        model = build()
        with recorder.observe(model), _kept_factors(recorder), _sharding(recorder, model):
            with recorder.making(STATES):
                attached = method.attach(model, LR)
                if method.makes_states:  # as a whole step would, in a tenth of its time
                    for param in model.parameters():
                        param.grad = torch.zeros_like(param)
                    attached.update(torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True))
            with _marked(recorder, model):
                for _ in range(method.steps):
                    recorder.begin_step()
                    with recorder.making(ACTIVATIONS):
                        value = loss(model)
                    recorder.mark("update")
                    with recorder.making(TEMPORARIES):
                        attached.update(value)
                    del value
                    recorder.is_(attached.states(), STATES)
    return recorder


@contextmanager
def _marked(recorder: Recorder, model: nn.Module) -> Iterator[None]:
    """Marks where each block begins, forward and backward, and where an optimizer's step does."""
    with ExitStack() as stack:
        for number, block in enumerate(blocks_of(model)):

            def begins(*_: Any, number: int = number) -> None:
                recorder.mark("block", number)

            def ends(_: nn.Module, __: Any, output: Any, number: int = number) -> None:
                recorder.mark("after block", number)
                if isinstance(output, Tensor) and output.grad_fn is not None:
                    output.grad_fn.register_prehook(lambda _: recorder.mark("backward of block", number))

            stack.enter_context(block.register_forward_pre_hook(begins))
            stack.enter_context(block.register_forward_hook(ends))
        stack.enter_context(register_optimizer_step_pre_hook(lambda *_: recorder.mark("step")))
        yield


def _sharding(recorder: Recorder, model: nn.Module) -> AbstractContextManager[None]:
    if not any(hasattr(param, "placements") for param in model.parameters()):
        return nullcontext()
    from . import sharded  # only here: FSDP2 takes a second to import

    return sharded.observe_sharding(recorder)


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
    """Tells the recorder which tensors wait for the end of backward, which of them are a gradient's factors, and when
    the end has come."""
    waiting: dict[int, int] = {}  # bytes, by address of the storage: layers with one input share it

    def noted(gradient: DeferredGradient | None) -> None:
        if gradient is None:
            recorder.mark("apply")
            recorder.kept = sum(waiting.values())
            waiting.clear()
        else:
            storages = [tensor.untyped_storage() for tensor in gradient.tensors()]
            waiting.update((storage._cdata, storage.nbytes()) for storage in storages)
            recorder.set_category((tensor for held in gradient.saved for tensor in held.factors.tensors), FACTORS)

    DeferPass.observers.append(noted)
    try:
        yield
    finally:
        DeferPass.observers.remove(noted)
