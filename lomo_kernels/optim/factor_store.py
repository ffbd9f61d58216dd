"""The factors that fused layers handed over and that are not used yet, and the memory they take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers import Factors
from .managed_parameter import LARGE_FACTORS, OTHER_CALL, ManagedParameter
from .streams import Streams, use_here

# A factor that is a view of memory more than this many times its own size is copied, to let that memory go.
ROOMY = 1.25


class SavedFactors(NamedTuple):
    """The factors of one use, and what was true when they were taken."""

    factors: Factors
    versions: tuple[int, int]  # of its two tensors
    bytes: int  # of these and of those of the weight before them
    stream: torch.cuda.Stream | None = None  # on which grad_output was made; None: of a CPU

    def join(self) -> None:
        """Makes the current stream wait for the factors. Autograd makes it wait for gradients; the weight has none."""
        use_here(self.factors.tensors, self.factors.grad_output.device, self.stream)

    def check(self, name: str, outcome: str) -> None:
        """Raises RuntimeError, which says `outcome`, if the tensors were altered in place since then."""
        for what, tensor, version in zip(self.factors.names, self.factors[:2], self.versions, strict=True):
            if tensor._version != version:
                raise RuntimeError(
                    f"Lomo: the {what} of the layer of {name}, which its weight's update needs, was altered in place "
                    f"during backward (version {tensor._version}, expected {version}). {outcome}. Leave tensors that "
                    "backward hands on unaltered (a custom backward or hook may work in place), or use "
                    "fused_layers=False"
                )
        head = self.factors.head
        if head is not None and head.weight._version != head.version:
            raise RuntimeError(
                f"Lomo: {name} was changed in place during backward, before its update, which computes the logits "
                f"again (version {head.weight._version}, expected {head.version}). {outcome}. Change weights before "
                "the forward or after backward, or use fused_layers=False"
            )


class FactorStore:
    """The factors of one pass, by weight.

    Args:
        streams: of the pass.
        params: a factor in their memory is copied: they may change before it is used.
        until_the_end: factors are kept after their weight's hook was called, so a factor that is a view of much more
            memory is copied.
        only_if_smaller: factors that are larger than the gradient that they stand for are returned. If this is False,
            only those of weights with several uses are: the factors of one use exist anyway until the hook is called.
    """

    def __init__(
        self,
        streams: Streams,
        params: Iterable[Tensor] = (),
        *,
        until_the_end: bool = False,
        only_if_smaller: bool = False,
    ) -> None:
        self._streams = streams
        self._params = {param.untyped_storage()._cdata for param in params}
        self._until_the_end = until_the_end
        self._only_if_smaller = only_if_smaller
        # By backward, and by index of the parameter: a backward inside this one (autograd.grad in a hook, a reentrant
        # checkpoint) calls hooks for its own part.
        self._open: dict[tuple[int, int], list[SavedFactors]] = {}
        self._returned: set[tuple[int, int]] = set()  # weights whose gradient exists, so that no more is held

    def add(self, managed: ManagedParameter, factors: Factors, outcome: str) -> Sequence[Factors]:
        """Holds the factors, or returns those of the weight that are better returned as a gradient.

        Raises RuntimeError, which says `outcome`, if one of those was altered since it was taken.
        """
        key = torch._C._current_graph_task_id(), managed.index
        ours = self._open.setdefault(key, [])
        if key not in self._returned:
            held = self._hold(factors, ours[-1].bytes if ours else 0)
            managed.reused |= bool(ours)
            if held.bytes <= managed.bytes or not (managed.reused or self._only_if_smaller):
                ours.append(held)
                return ()
            factors = held.factors
            self._returned.add(key)
        for saved in ours:
            saved.check(managed.name, outcome)
            saved.join()
        uses = [saved.factors for saved in ours]
        ours.clear()
        return [*uses, factors]

    def close(self, managed: ManagedParameter, grad: Tensor | None) -> Sequence[SavedFactors]:
        """The weight's factors: its hook was called. Those of other backwards, inside this one or around, stay.

        Args:
            grad: what came beside them.
        """
        key = torch._C._current_graph_task_id(), managed.index
        managed.why_formed = "" if grad is None else LARGE_FACTORS if key in self._returned else OTHER_CALL
        return self._open.pop(key, ())

    def _hold(self, factors: Factors, bytes_before: int) -> SavedFactors:
        """The factors, with a copy of each tensor whose memory is a parameter's, or much larger and not to be kept."""
        tensors = []
        for tensor in factors[:2]:
            tensor = tensor.detach()
            storage = tensor.untyped_storage()
            roomy = self._until_the_end and storage.nbytes() > ROOMY * tensor.numel() * tensor.itemsize
            if roomy or storage._cdata in self._params:
                tensor = tensor.clone(memory_format=torch.contiguous_format)
            tensors.append(tensor)
        input, grad_output = tensors
        return SavedFactors(
            factors._replace(input=input, grad_output=grad_output),
            (input._version, grad_output._version),
            bytes_before + input.nbytes + grad_output.nbytes,
            self._streams.join(grad_output.device) if grad_output.is_cuda else None,
        )
