"""Live bytes by what they are for, while a training step runs, be its tensors real or simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..memory import Event, LiveBytes

PARAMETERS = "parameters"
GRADIENTS = "gradients"
STATES = "optimizer states"
GATHERED = "gathered parameters"  # of a model that is sharded
ACTIVATIONS = "activations"  # made in a forward, and in one that a checkpoint runs again
FACTORS = "kept factors"  # (input, grad_output) pairs that stand for gradients until backward has ended
TEMPORARIES = "temporaries"  # the rest: gradients of activations, copies
WORKSPACE = "workspace"  # what one operator takes and gives back
CATEGORIES = (PARAMETERS, GRADIENTS, STATES, GATHERED, ACTIVATIONS, FACTORS, TEMPORARIES, WORKSPACE)

# How autograd copies a gradient that it may not keep as it is.
_COPIES = ("aten.clone.default", "aten.new_empty_strided.default")

#: Bytes that an operator takes and gives back within one call, from its arguments.
Workspaces = Mapping[Any, Callable[..., int]]
#: Floating-point operations that an operator's products take, from its arguments and its result, which is ``out_val``.
Formulas = Mapping[Any, Callable[..., int]]

#: What a part of a step is called, and which block's it is, if one's.
Mark = tuple[str, int | None]
#: Bytes of each category, in the order of `CATEGORIES`.
Sample = tuple[int, ...]

_NEVER: Any = (float("inf"), None, "")


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

    @staticmethod
    def of(samples: Iterable[Sample]) -> Peak:
        every = list(samples)
        return Peak(
            dict(zip(CATEGORIES, max(every, key=sum), strict=True)),
            dict(zip(CATEGORIES, map(max, zip(*every, strict=True)), strict=True)),
        )


class Recorder(LiveBytes):
    """`LiveBytes` that knows what each storage is for.

    Most is only known later: a matrix product's result is a gradient when autograd brings it to its parameter. So
    events are recorded, and `parts` goes through them when all is known.

    torch's own `torch.distributed._tools.MemTracker` does this with a hook on every parameter, and a fused layer whose
    weight somebody watches returns its gradient.

    Args:
        workspaces: see `Workspaces`. A dispatch mode does not see inside an operator.
        formulas: see `Formulas`; without them `flops` stays zero.

    `flops` and `kept` are those of the step that began last: what its products took, and the bytes of the gradients and
    factors that waited for the norm.
    """

    def __init__(self, workspaces: Workspaces | None = None, formulas: Formulas | None = None) -> None:
        self._log: list[Event] = []
        super().__init__(self._log)
        self._workspaces = workspaces or {}
        self._formulas = formulas or {}
        self.flops = 0
        self.kept = 0
        self._purpose = PARAMETERS
        self._forwards = 0  # modules whose forward is running
        self._is: dict[int, str] = {}  # by key; from the storage's first byte on
        self._category_changes: list[tuple[int, int, str]] = []  # (events so far, key, category)
        self._marks: list[tuple[int, Mark]] = []

    def begin_step(self) -> None:
        """What came before is no part of the peak: it made the model and its optimizer, or was an earlier step."""
        self._marks.clear()
        self.flops = self.kept = 0
        self.mark("forward")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if result is NotImplemented:
            return result
        if func in self._workspaces:
            self._take_and_give_back(self._workspaces[func](*args, **(kwargs or {})), str(func))
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
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

    def _resized(self, storage: torch.UntypedStorage) -> None:
        entry = self._live.get(id(storage))
        if entry is not None and entry[1].nbytes != storage.nbytes():
            category = self._is[entry[1].key]
            self._free(id(storage))
            self._allocate(storage, entry[1].operator)
            self._is[self._log[-1].key] = category

    def _take_and_give_back(self, nbytes: int, operator: str) -> None:
        event = Event("alloc", self._made, nbytes, operator)
        self._made += 1
        self._is[event.key] = WORKSPACE
        self._log += [event, event._replace(kind="free")]
        self.peak = max(self.peak, self.current + nbytes)

    def _keys(self, tensors: Iterable[Tensor]) -> list[int]:
        local = (getattr(tensor, "_local_tensor", tensor) for tensor in tensors)  # of a DTensor
        entries = (self._live.get(id(tensor.untyped_storage())) for tensor in local)
        return [entry[1].key for entry in entries if entry is not None]

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

    def set_category(self, tensors: Iterable[Tensor], category: str) -> None:
        """The tensors are of this category from now on."""
        self._category_changes += [(len(self._log), key, category) for key in self._keys(tensors)]

    def mark(self, name: str, block: int | None = None) -> None:
        """What follows, up to the next mark, is this part of a step."""
        self._marks.append((len(self._log), (name, block)))

    @contextmanager
    def observe(self, model: nn.Module) -> Iterator[None]:
        """Tells gradients of the model's parameters, and forwards that run inside backward, from temporaries."""

        def arrives(grads: tuple[Tensor | None, ...]) -> None:
            self.is_((grad for grad in grads if grad is not None), GRADIENTS)

        def begins(*_: Any) -> None:
            self._forwards += 1

        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, nbytes: int) -> Any:  # no operator: how FSDP2 frees and gathers
            result = resize(storage, nbytes)
            self._resized(storage)
            return result

        def ends(*_: Any) -> None:
            self._forwards -= 1

        # On the node, not on the parameter, whose hooks make its layer return the gradient. A node lives as long as it
        # is held.
        leaves = [p for p in model.parameters() if p.requires_grad and not is_traceable_wrapper_subclass(p)]
        nodes = [torch.autograd.graph.get_gradient_edge(leaf).node for leaf in leaves]
        handles = [node.register_prehook(arrives) for node in nodes]
        handles += [register_module_forward_pre_hook(begins), register_module_forward_hook(ends, always_call=True)]
        try:
            with patch.object(torch.UntypedStorage, "resize_", resized):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def parts(self) -> Iterator[tuple[Mark, list[Sample]]]:
        """From the first mark on: each part's name, and the bytes of every category after each allocation in it."""
        now = [0] * len(CATEGORIES)
        place_of = {name: position for position, name in enumerate(CATEGORIES)}
        size: dict[int, int] = {}
        kind = {key: place_of[category] for key, category in self._is.items()}
        changes = iter(self._category_changes)
        change = next(changes, _NEVER)
        samples: list[Sample] = []
        part: Mark | None = None
        marks = iter([*self._marks, _NEVER])
        mark = next(marks)
        for position, event in enumerate([*self._log, None]):
            while mark[0] <= position:
                if part is not None:
                    yield part, samples
                part, samples, mark = mark[1], [tuple(now)], next(marks)
            while change[0] <= position:
                _, key, category = change
                now[kind[key]] -= size[key]
                kind[key] = place_of[category]
                now[kind[key]] += size[key]
                change = next(changes, _NEVER)
            if event is None:
                break
            size[event.key] = event.nbytes
            now[kind[event.key]] += event.nbytes if event.kind == "alloc" else -event.nbytes
            if event.kind == "alloc":
                samples.append(tuple(now))
        if part is not None:
            yield part, samples

    def peak_of_parts(self) -> Peak:
        """The peak from the first mark on."""
        return Peak.of(sample for _, samples in self.parts() for sample in samples)
