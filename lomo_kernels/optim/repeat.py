"""Whether a second backward through a graph gives the gradients of the first, as clipping in two passes needs.

It does not after a backward that writes over what its forward saved, or that draws random numbers anew. Autograd sees
neither: a kernel that is given bare memory moves no version counter. So the first step of each new graph runs its norm
pass twice and compares the norm of every parameter, before any weight changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from .graph import Graph
from .ranks import Ranks
from .records import Device, Record
from .state import State

# A model whose graph is another in every step (experts, lengths) pays for this many. After them only a graph with a new
# kind of node is looked at twice.
_SHAPES = 64

_TWO_PASSES = (
    'clip_grad_norm and dynamic loss scaling run backward twice. Use clip_passes="one", which runs it once. No weight '
    "was changed"
)
_CHECKPOINTS = (
    "With reentrant checkpoints a backward that only looks precedes the update. Use torch.utils.checkpoint with "
    "use_reentrant=False, which needs none. No weight was changed"
)

# What a hook that gives a tensor up once, or torch for it, raises when it is asked again.
_FAILURES = (RuntimeError, LookupError, TypeError, ValueError, AttributeError, AssertionError)


class Repeats:
    """What an optimizer has seen of graphs whose backward repeats itself, and the checks of new ones.

    Args:
        records: its parameters: its own list, which grows with it.
        model: gives the model that it trains, if that is known.
    """

    def __init__(self, records: Sequence[Record], model: Callable[[], nn.Module | None]) -> None:
        self._records = records
        self._model = model
        self._shapes: set[int] = set()
        self._kinds: set[str] = set()
        self._checkpoints: int | None = None  # reentrant ones in a graph in which no gradient came twice

    def check_clipping(self, graph: Graph, state: State, look: Callable[[Ranks | None], None]) -> None:
        """Before a second backward, which updates: raises RuntimeError unless it will have the gradients of the first.

        Args:
            graph: through which a first `look` has just gone, over all ranks.
            state: whose slots hold its norms.
            look: a backward that adds up norms, in slots set to zero, and leaves the graph for another one; over these
                ranks.
        """
        if self._knows(graph):
            return
        # An engine that reduces inside backward needs all ranks for it, and only at first does each know that all look.
        first = not self._shapes
        ranks = state.ranks
        if ranks is not None and ranks.same_graphs and not first:
            return
        # A step without a finite norm changes nothing, and its norms say little.
        if not _can_compare(list(state.devices.values())) or state.home.found_inf.item():
            return
        self._compare(graph, state, look, ranks if first else None, _TWO_PASSES)
        self._shapes.add(graph.shape)
        self._kinds |= graph.kinds

    def check_checkpoints(self, graph: Graph, state: State, look: Callable[[Ranks | None], None]) -> None:
        """With one backward, a gradient that comes twice must be found before a weight has changed.

        So a backward with reentrant checkpoints, where their number is new, is preceded by one that only looks. It
        sends nothing where ranks count different numbers: the others would not be there. Arguments as `check_clipping`.
        """
        count = graph.reentrant_checkpoints(thorough=self._checkpoints is None)
        if count and count != self._checkpoints:
            ranks = state.ranks if state.ranks is not None and state.ranks.same_graphs else None
            look(ranks)
            if _can_compare(list(state.devices.values())):
                self._compare(graph, state, look, ranks, _CHECKPOINTS)
        self._checkpoints = count or self._checkpoints or 0

    def _knows(self, graph: Graph) -> bool:
        return graph.shape in self._shapes or (len(self._shapes) >= _SHAPES and graph.kinds <= self._kinds)

    def _compare(
        self, graph: Graph, state: State, look: Callable[[Ranks | None], None], ranks: Ranks | None, advice: str
    ) -> None:
        """Raises RuntimeError, on every one of `ranks`, unless a second `look` gives the norms that the slots hold."""
        devices = list(state.devices.values())
        kept = [device.slots.clone() for device in devices]
        if ranks is None and state.ranks is not None:  # this rank alone: its slots hold norms of all ranks' gradients
            look(None)
        first = [device.slots.clone() for device in devices]
        _look_again(lambda: look(ranks), self._model(), devices, advice)
        second = [device.slots.clone() for device in devices]
        indices = _differing(self._records, first, second)
        number = torch.tensor(float(len(indices)), dtype=torch.float64, device=state.norm.device)
        if ranks is not None:
            ranks.sum_(number)
        if number.item():
            raise _difference(self._records, indices, first, second, graph, advice)
        for device, slots in zip(devices, kept, strict=True):
            device.slots.copy_(slots)


def _can_compare(devices: Sequence[Device]) -> bool:
    """Whether the slots have numbers to read: not in a simulation (`lomo_kernels.plan`), nor on the meta device.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if any(device.slots.is_cuda for device in devices) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Lomo: a CUDA graph captures the first step of its shape, which reads on the host whether two backwards "
            "agree. Run one such step before the capture (as the warm-up that torch asks for)"
        )
    return not any(isinstance(device.slots, FakeTensor) or device.slots.is_meta for device in devices)


def _look_again(look: Callable[[], None], model: nn.Module | None, devices: Sequence[Device], advice: str) -> None:
    """Runs the norm pass `look` once more, without a trace in random numbers and batch norms: a resumed run, which
    begins with it, goes on as the run that it resumes.

    Raises:
        RuntimeError: it failed, though the first did not.
    """
    indices = {device.slots.device.index for device in devices if device.slots.is_cuda}
    try:
        with torch.random.fork_rng(sorted(index for index in indices if index is not None)), _statistics_kept(model):
            look()
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        if str(error).startswith("Lomo:"):
            raise
        raise RuntimeError(
            f"Lomo: a second backward through the same graph failed, though the first did not: {error}. Selective "
            "activation checkpoints (context_fn) and hooks that give a saved tensor up once (offloading) allow one "
            f"backward only. {advice}"
        ) from error


@contextmanager
def _statistics_kept(model: nn.Module | None) -> Iterator[None]:
    """Gives batch norms, which a checkpoint runs again in every backward, their statistics back."""
    buffers = [
        buffer
        for module in (() if model is None else model.modules())
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training
        for buffer in module.buffers(recurse=False)
    ]
    copies = [buffer.detach().clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, before in zip(buffers, copies, strict=True):
            buffer.data.copy_(before)  # .data: with a version counter of its own, for autograd has saved the buffer


def _tolerance(record: Record) -> tuple[float, float]:
    """By how much a parameter's norm may differ in two passes: relative to itself, and to the norm of all.

    Eager kernels on a CPU repeat every bit. Code of torch.compile adds to an embedding's rows in any order there, and
    GPUs add with atomics. Another order of 100 terms an element moves a norm by up to 2e-6 in float32. In bfloat16, in
    which each sum is rounded, it is 3e-2 for one element, 1e-2 for 16, 2e-3 for 640 and 3e-4 for 25,600. On a GPU a
    float32 gradient may come through bfloat16 as well (autocast). A gradient that is zero except for rounding (of a
    key's bias) may be any other, so a share of the norm of all is added.
    """
    if record.device.type == "cpu" and record.dtype is torch.float32:
        return 1e-4, 1e-6
    return max(0.1 / max(record.local.numel(), 1) ** 0.5, 5e-3), 1e-3


def _differing(records: Sequence[Record], first: Sequence[Tensor], second: Sequence[Tensor]) -> list[int]:
    """Indices of the parameters whose norm is not the same in two passes, given as slots (one tensor per device)."""
    # One per parameter: the slots of other devices than its own are zero.
    a, b = (torch.stack([slots.cpu() for slots in some]).sum(0).sqrt() for some in (first, second))
    relative, share = torch.tensor([_tolerance(record) for record in records], dtype=torch.float64).unbind(1)
    both = torch.stack([a, b])
    total = both.nan_to_num(nan=0.0, posinf=0.0).norm(dim=1).max()
    near = (a - b).abs() <= relative * both.amax(0) + share * total
    same = torch.where(both.isfinite().all(0), near, a.isfinite() == b.isfinite())
    return same.logical_not().nonzero().flatten().tolist()


def _difference(
    records: Sequence[Record],
    indices: Sequence[int],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    graph: Graph,
    advice: str,
) -> RuntimeError:
    """What to raise when the passes differ in the norms of the parameters with these indices, perhaps none here."""
    where = "on another rank"
    if indices:
        norms = [
            max(float(slots[indices[0]]) ** 0.5 for slots in some)
            if len(some) > 1
            else float(some[0][indices[0]]) ** 0.5
            for some in (first, second)
        ]
        more = f" (and {len(indices) - 1} more)" if len(indices) > 1 else ""
        where = f"of {records[indices[0]].name}{more}, whose norm is {norms[0]:.4g} and then {norms[1]:.4g}"
    custom = f" This graph's own backwards: {', '.join(sorted(graph.custom))}." if graph.custom else ""
    return RuntimeError(
        f"Lomo: two backwards through the same graph gave different gradients {where}. The usual cause is a loss or a "
        "layer whose backward writes over what its forward saved (the cross entropies of Liger and unsloth, in-place "
        "attention), or dropout or noise that is drawn anew in backward (preserve_rng_state=False, a hook)."
        f"{custom} {advice}"
    )
