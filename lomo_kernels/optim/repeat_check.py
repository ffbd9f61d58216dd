"""Checks that a second backward through a graph gives the gradients of the first. Clipping in two passes needs that.

The gradients differ if a backward overwrites what its forward saved, or draws new random numbers. Autograd notices
neither: a kernel that writes through a pointer changes no version counter. So the first step of each new graph runs its
norm pass twice. It compares the norm of every parameter before any weight changes.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.module import register_module_forward_pre_hook

from .engines.base import ParallelEngine
from .graph import Graph
from .managed_parameter import DeviceState, ManagedParameter
from .out_of_memory import ran_out_of_memory
from .owners import optimizer_backward
from .state import TrainingState

# A model's graph may differ in every step (experts, sequence lengths). Graphs of this many shapes are checked. After
# that, a graph is checked only if it has a new kind of node.
_SHAPES = 64

_TWO_PASSES = (
    "clip_memory has no room for all gradients, so a part of backward runs twice for the norm. Use clip_memory=None "
    '(clip_passes="one"), with which backward runs once. No weight was changed'
)
_CHECKPOINTS = (
    "With reentrant checkpoints, backward runs twice: the first one changes nothing. Use torch.utils.checkpoint with "
    "use_reentrant=False, which needs one backward only. No weight was changed"
)

# Errors of a second backward whose saved tensors are gone. Hooks that give a saved tensor once raise them, and torch.
_FAILURES = (RuntimeError, LookupError, TypeError, ValueError, AttributeError, AssertionError)


class RepeatCheck:
    """What an optimizer has seen of graphs whose backward repeats itself, and the checks of new ones.

    Args:
        training: the `Training` of an optimizer, which this does not keep alive.
        managed_params: its parameters: its own list, which grows with it.
        model: gives the model that it trains, if that is known.
    """

    def __init__(
        self, training: Any, managed_params: Sequence[ManagedParameter], model: Callable[[], nn.Module | None]
    ) -> None:
        self._training = weakref.ref(training)
        self._managed_params = managed_params
        self._model = model
        self._shapes: set[int] = set()
        self._kinds: set[str] = set()
        self._has_reentrant_checkpoints = False  # the last graph
        self._nodes_made = -1  # between the end of the step before and the last loss
        self._walked_number = -1  # of the last loss's node
        self._sequence_number = -1  # of autograd's nodes, when the last step ended
        self._warned = False

    def check_clipping(
        self, graph: Graph, state: TrainingState, norm_pass: Callable[[ParallelEngine | None], None]
    ) -> None:
        """Before a second backward, which updates: raises RuntimeError unless it will have the gradients of the first.

        Args:
            graph: through which a first `norm_pass` has just gone, over all ranks.
            state: whose slots hold its norms.
            norm_pass: a backward that adds up norms, in slots set to zero, and leaves the graph for another one; over
                the engine's ranks.
        """
        if self.is_known(graph):
            return
        # An engine that reduces inside backward needs all ranks for this check. They all run it in the first step only.
        first = not self._shapes
        engine = state.engine
        if engine is not None and engine.same_graphs and not first:
            return
        if _can_compare(list(state.devices.values())):
            # A step whose norm is not finite changes nothing, and its norms cannot be compared.
            if state.primary.found_inf.item():
                return
            self._compare(graph, state, norm_pass, engine if first else None, _TWO_PASSES)
        self._remember(graph)

    def check_checkpoints(
        self, graph: Graph, state: TrainingState, norm_pass: Callable[[ParallelEngine | None], None]
    ) -> None:
        """Before the only backward of a step: if the graph has reentrant checkpoints, runs `norm_pass` first.

        A parameter in two such checkpoints has its gradient in two parts, and the backward of the second checkpoint
        computes with the weight that the first part has updated. The norm pass finds this before a weight has changed.
        It sends nothing between ranks whose graphs may differ, because the other ranks may not run it. Arguments and
        errors as `check_clipping`.
        """
        if not self._may_have_checkpoints(graph):
            return
        if not self._warned:
            self._warned = True
            warnings.warn(
                "Lomo: reentrant checkpoints hide parts of the graph, so each step runs backward twice, first without "
                "an update. torch.utils.checkpoint with use_reentrant=False needs one backward",
                stacklevel=10,
            )
        engine = state.engine if state.engine is not None and state.engine.same_graphs else None
        with _statistics_kept(self._training(), self._model()):
            norm_pass(engine)
        if not self.is_known(graph) and _can_compare(list(state.devices.values())):
            self._compare(graph, state, norm_pass, engine, _CHECKPOINTS)
            self._remember(graph)

    def _may_have_checkpoints(self, graph: Graph) -> bool:
        """Whether a graph has reentrant checkpoints. The last graph once more, or a graph of as many nodes, counts as
        equal to it: to walk through a graph takes 0.7 us per node, and this takes 2 us."""
        number = graph.sequence_number
        made = number - self._sequence_number
        if number != self._walked_number and made != self._nodes_made:
            self._has_reentrant_checkpoints = graph.has_reentrant_checkpoints
            self._nodes_made = made
        self._walked_number = number
        return self._has_reentrant_checkpoints

    def end_step(self) -> None:
        """Called when a step without clipping ends: nodes that are made from here on belong to the next graph."""
        self._sequence_number = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]

    def is_known(self, graph: Graph) -> bool:
        """Whether a second backward through such a graph has given the gradients of the first."""
        return graph.shape in self._shapes or (len(self._shapes) >= _SHAPES and graph.kinds <= self._kinds)

    def _remember(self, graph: Graph) -> None:
        self._shapes.add(graph.shape)
        self._kinds |= graph.kinds

    def _compare(
        self,
        graph: Graph,
        state: TrainingState,
        norm_pass: Callable[[ParallelEngine | None], None],
        engine: ParallelEngine | None,
        advice: str,
    ) -> None:
        """Raises RuntimeError, on every rank of `engine`, unless a second `norm_pass` gives the norms in the slots."""
        devices = list(state.devices.values())
        kept = [device.slots.clone() for device in devices]
        if engine is None and state.engine is not None:  # only this rank checks: its slots hold norms of averages
            norm_pass(None)
        first = [device.slots.clone() for device in devices]
        _run_again(lambda: norm_pass(engine), self._training(), self._model(), devices, advice)
        second = [device.slots.clone() for device in devices]
        indices = _differing(self._managed_params, first, second)
        number = torch.tensor(float(len(indices)), dtype=torch.float64, device=state.norm.device)
        if engine is not None:
            engine.sum_(number)
        if number.item():
            raise _difference(self._managed_params, indices, first, second, graph, advice)
        for device, slots in zip(devices, kept, strict=True):
            device.slots.copy_(slots)


def _can_compare(devices: Sequence[DeviceState]) -> bool:
    """Whether norms can be read. They cannot in a simulation (`lomo_kernels.plan`) and on the meta device.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if any(device.slots.is_cuda for device in devices) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Lomo: a CUDA graph captures the first step with this graph. The first step compares two backwards on the "
            "host, which a capture does not allow. Run one such step before the capture, as torch's warm-up does"
        )
    return not any(isinstance(device.slots, FakeTensor) or device.slots.is_meta for device in devices)


def _run_again(
    norm_pass: Callable[[], None], training: Any, model: nn.Module | None, devices: Sequence[DeviceState], advice: str
) -> None:
    """Runs `norm_pass` once more, and restores random number generators and batch norm statistics after it.

    A resumed run runs this pass too. It has to continue exactly as the run that it resumes.

    Raises:
        RuntimeError: this pass failed, and the first did not.
    """
    indices = {device.slots.device.index for device in devices if device.slots.is_cuda}
    try:
        with (
            torch.random.fork_rng(sorted(index for index in indices if index is not None)),
            _statistics_kept(training, model),
        ):
            norm_pass()
    except _FAILURES as error:
        if str(error).startswith("Lomo:") or ran_out_of_memory(error):
            raise
        raise RuntimeError(
            f"Lomo: a second backward through the same graph failed, and the first did not: {error}. Selective "
            "activation checkpoints (context_fn) and hooks that give a saved tensor only once (offloading) allow one "
            f"backward. {advice}"
        ) from error


@contextmanager
def _statistics_kept(training: Any, model: nn.Module | None) -> Iterator[None]:
    """Restores the statistics of batch norms. A checkpoint runs them again in every backward.

    Restored are the batch norms of `model`, and all that are called inside a backward of `training`. The optimizer may
    have been given parameters in place of a model, and its loss may come from several models.
    """
    copies: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(modules: Iterable[nn.Module]) -> None:
        for module in modules:
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.training:
                for buffer in module.buffers(recurse=False):
                    if id(buffer) not in copies:
                        copies[id(buffer)] = buffer, buffer.detach().clone()

    def before_forward(module: nn.Module, _: object) -> None:
        if torch.compiler.is_compiling():
            return
        backward = optimizer_backward()
        if backward is not None and backward.owner is training:
            keep(module.modules() if "_orig_mod" in module._modules else [module])  # compiled: calls no hooks inside

    if model is not None:
        keep(model.modules())
    handle = register_module_forward_pre_hook(before_forward)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)  # on modules with global hooks
            yield
    finally:
        handle.remove()
        for buffer, before in copies.values():
            buffer.data.copy_(before)  # .data has its own version counter: autograd may have saved the buffer


def _tolerance(managed: ManagedParameter) -> tuple[float, float]:
    """By how much a parameter's norm may differ in two passes: relative to this norm, and to the norm of all.

    Eager kernels on a CPU repeat every bit. Code of torch.compile adds to an embedding's rows in any order there, and
    GPUs add with atomics. Another order of 100 terms per element changes a norm by up to 2e-6 in float32. In bfloat16
    each sum is rounded: the change is 3e-2 for one element, 1e-2 for 16, 2e-3 for 640 and 3e-4 for 25,600. On a GPU a
    float32 gradient may come through bfloat16 as well (autocast). Some gradients are zero except for rounding (of a
    key's bias, say) and differ completely. So a share of the norm of all is added.
    """
    if managed.device.type == "cpu" and managed.dtype is torch.float32:
        return 1e-4, 1e-6
    return max(0.1 / max(managed.local.numel(), 1) ** 0.5, 5e-3), 1e-3


def _differing(
    managed_params: Sequence[ManagedParameter], first: Sequence[Tensor], second: Sequence[Tensor]
) -> list[int]:
    """Indices of the parameters whose norm is not the same in two passes, given as slots (one tensor per device)."""
    # A parameter's slot is zero on every device except its own.
    a, b = (torch.stack([slots.cpu() for slots in some]).sum(0).sqrt() for some in (first, second))
    tolerances = torch.tensor([_tolerance(managed) for managed in managed_params], dtype=torch.float64, device="cpu")
    relative, share = tolerances.unbind(1)
    both = torch.stack([a, b])
    total = both.nan_to_num(nan=0.0, posinf=0.0).norm(dim=1).max()
    near = (a - b).abs() <= relative * both.amax(0) + share * total
    same = torch.where(both.isfinite().all(0), near, a.isfinite() == b.isfinite())
    return same.logical_not().nonzero().flatten().tolist()


def _difference(
    managed_params: Sequence[ManagedParameter],
    indices: Sequence[int],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    graph: Graph,
    advice: str,
) -> RuntimeError:
    """The error for two passes that differ in the norms of the parameters `indices`; empty: another rank saw it."""
    where = "on another rank"
    if indices:
        norms = [max(float(slots[indices[0]]) ** 0.5 for slots in some) for some in (first, second)]
        more = f" (and {len(indices) - 1} more)" if len(indices) > 1 else ""
        where = f"of {managed_params[indices[0]].name}{more}: its norm is first {norms[0]:.4g}, then {norms[1]:.4g}"
    custom = f" Custom backwards in this graph: {', '.join(sorted(graph.custom))}." if graph.custom else ""
    return RuntimeError(
        f"Lomo: two backwards through the same graph gave different gradients {where}. The usual cause is a loss or a "
        "layer whose backward overwrites what its forward saved (the cross entropies of Liger and unsloth, in-place "
        "attention), or dropout or noise that draws new random numbers in backward (preserve_rng_state=False, a hook)."
        f"{custom} {advice}"
    )
