"""Live bytes by what they are for, while a training step runs, be its tensors real or simulated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ..memory import Event, LiveBytes

PARAMETERS = "parameters"
GRADIENTS = "gradients"
STATES = "optimizer states"
ACTIVATIONS = "activations"  # made in a forward, and in one that a checkpoint runs again
FACTORS = "kept factors"  # (input, grad_output) pairs that stand for gradients until backward has ended
TEMPORARIES = "temporaries"  # the rest: gradients of activations, copies
WORKSPACE = "workspace"  # what one operator takes and gives back
CATEGORIES = (PARAMETERS, GRADIENTS, STATES, ACTIVATIONS, FACTORS, TEMPORARIES, WORKSPACE)

# How autograd copies a gradient that it may not keep as it is.
_COPIES = ("aten.clone.default", "aten.new_empty_strided.default")

#: Bytes that an operator takes and gives back within one call, from its arguments.
Workspaces = Mapping[Any, Callable[..., int]]


@dataclass(frozen=True)
class Peak:
    """Bytes of one run.

    `at_peak` divides the largest total, `peak`; `most` is each category's own maximum, at whatever time, which is what
    the paper's Table 1 lists.
    """

    at_peak: dict[str, int]
    most: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())


class Recorder(LiveBytes):
    """`LiveBytes` that knows what each storage is for.

    Most is only known later: a matrix product's result is a gradient when autograd brings it to its parameter. So
    events are recorded, and `by_category` goes through them when all is known.

    torch's own `torch.distributed._tools.MemTracker` does this with a hook on every parameter, and a fused layer whose
    weight somebody watches returns its gradient.

    Args:
        workspaces: see `Workspaces`. A dispatch mode does not see inside an operator.
    """

    def __init__(self, workspaces: Workspaces | None = None) -> None:
        self._log: list[Event] = []
        super().__init__(self._log)
        self._workspaces = workspaces or {}
        self._purpose = PARAMETERS
        self._forwards = 0  # modules whose forward is running
        self._is: dict[int, str] = {}  # by key; from the storage's first byte on
        self._becomes: list[tuple[int, int, str]] = []  # (events so far, key, category)
        self._start = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func in self._workspaces:
            self._take_and_give_back(self._workspaces[func](*args, **(kwargs or {})), str(func))
        return result

    def _allocate(self, storage: torch.UntypedStorage, operator: str) -> None:
        super()._allocate(storage, operator)
        category = self._purpose
        if category == TEMPORARIES:
            node = torch._C._current_autograd_node()
            if self._forwards:
                category = ACTIVATIONS
            elif operator in _COPIES and node is not None and node.name() == "torch::autograd::AccumulateGrad":
                category = GRADIENTS
        self._is[self._log[-1].key] = category

    def _take_and_give_back(self, nbytes: int, operator: str) -> None:
        event = Event("alloc", self._made, nbytes, operator)
        self._made += 1
        self._is[event.key] = WORKSPACE
        self._log += [event, event._replace(kind="free")]
        self.peak = max(self.peak, self.current + nbytes)

    def _keys(self, tensors: Iterable[Tensor]) -> list[int]:
        found = (self._live.get(id(tensor.untyped_storage())) for tensor in tensors)
        return [entry[1].key for entry in found if entry is not None]

    @contextmanager
    def making(self, purpose: str) -> Iterator[None]:
        """What is made inside is for `purpose`, unless it shows otherwise."""
        before, self._purpose = self._purpose, purpose
        try:
            yield
        finally:
            self._purpose = before

    def is_(self, tensors: Iterable[Tensor], category: str) -> None:
        """The tensors have been of this category since they were made."""
        self._is |= dict.fromkeys(self._keys(tensors), category)

    def becomes(self, tensors: Iterable[Tensor], category: str) -> None:
        """The tensors are of this category from now on."""
        self._becomes += [(len(self._log), key, category) for key in self._keys(tensors)]

    def begin(self) -> None:
        """What happened until now made the model, and is no part of the peak."""
        self._start = len(self._log)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Tells gradients of the model's parameters, and forwards that run inside backward, from temporaries."""

        def arrives(grads: tuple[Tensor | None, ...]) -> None:
            self.is_((grad for grad in grads if grad is not None), GRADIENTS)

        def begins(*_: Any) -> None:
            self._forwards += 1

        def ends(*_: Any) -> None:
            self._forwards -= 1

        # On the node, not on the parameter, whose hooks make its layer return the gradient. A node lives as long as it
        # is held.
        nodes = [torch.autograd.graph.get_gradient_edge(p).node for p in model.parameters() if p.requires_grad]
        handles = [node.register_prehook(arrives) for node in nodes]
        handles += [register_module_forward_pre_hook(begins), register_module_forward_hook(ends, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def by_category(self) -> Peak:
        """The peak since `begin`."""
        now: Counter[str] = Counter()
        most: Counter[str] = Counter()
        size: dict[int, int] = {}
        at_peak: dict[str, int] = {}
        highest, total = -1, 0
        kind = dict(self._is)
        changes = iter([*self._becomes, (len(self._log) + 1, -1, "")])
        change = next(changes)
        for place, event in enumerate(self._log):
            while change[0] <= place:
                _, key, category = change
                now[kind[key]] -= size[key]
                now[category] += size[key]
                kind[key] = category
                change = next(changes)
            size[event.key] = event.nbytes
            sign = 1 if event.kind == "alloc" else -1
            now[kind[event.key]] += sign * event.nbytes
            total += sign * event.nbytes
            if place >= self._start:
                for name in CATEGORIES:
                    most[name] = max(most[name], now[name])
                if total > highest:
                    highest, at_peak = total, {name: now[name] for name in CATEGORIES}
        return Peak(at_peak, {name: most[name] for name in CATEGORIES})
