"""The factors that fused layers handed over and that are not used yet, and the memory they take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers import Pair
from .records import Record

# A factor that is a view of memory more than this many times its own size is copied, to let that memory go.
ROOMY = 1.25


class Held(NamedTuple):
    """A pair, and its tensors' versions when it was taken."""

    pair: Pair
    versions: tuple[int, int]
    stream: torch.cuda.Stream | None = None  # on which grad_output was made
    made: torch.cuda.Event | None = None  # when it was

    @staticmethod
    def now(pair: Pair) -> Held:
        versions = pair.input._version, pair.grad_output._version
        if not pair.grad_output.is_cuda:
            return Held(pair, versions)
        stream = torch.cuda.current_stream(pair.grad_output.device)
        return Held(pair, versions, stream, stream.record_event())

    def join(self) -> None:
        """Makes the current stream wait for the pair: autograd makes it wait for gradients, and the weight has none."""
        if self.stream is None or self.made is None:
            return
        current = torch.cuda.current_stream(self.pair.grad_output.device)
        if current != self.stream:
            current.wait_event(self.made)
            for tensor in self.pair[:2]:
                tensor.record_stream(current)

    def check(self, name: str, state: str) -> None:
        """Raises RuntimeError where the pair's tensors were altered in place since then."""
        for what, tensor, version in zip(self.pair.names, self.pair[:2], self.versions, strict=True):
            if tensor._version != version:
                raise RuntimeError(
                    f"Lomo: the {what} of the layer of {name}, which its weight's update needs, was altered in place "
                    f"during backward (version {tensor._version}, expected {version}). {state}. Leave tensors that "
                    "backward hands on unaltered (a custom backward or hook may work in place), or use "
                    "fused_layers=False"
                )


class _Open:
    """The pairs of one weight until its hook is called."""

    __slots__ = ("bytes", "held")

    def __init__(self) -> None:
        self.held: list[Held] = []
        self.bytes = 0


class Holdings:
    """The pairs of one pass, by weight.

    Args:
        params: a factor in their memory is copied: they may change before it is used.
        until_the_end: pairs are kept after their weight's hook was called, so even one must not be larger than the
            gradient it stands for. Otherwise that holds only for weights that are used more than once.
    """

    def __init__(self, params: Iterable[Tensor] = (), *, until_the_end: bool = False) -> None:
        self._params = {_address(param) for param in params}
        self._until_the_end = until_the_end
        self._open: dict[tuple[int, int], _Open] = {}
        self._returned: set[tuple[int, int]] = set()  # weights whose gradient exists, so that no more is held
        self._users: Counter[int] = Counter()  # of each piece of memory: inputs are shared, as by query, key and value

    def add(self, record: Record, pair: Pair, state: str) -> Sequence[Pair]:
        """Holds the pair, or returns the pairs of the weight that are better returned as a gradient.

        Raises RuntimeError, which says `state`, where one of those was altered since it was taken.
        """
        key = _key(record)
        ours = self._open.setdefault(key, _Open())
        if key not in self._returned:
            pair = pair._replace(input=self._own(pair.input), grad_output=self._own(pair.grad_output))
            more = self._more_bytes(pair)
            record.reused |= bool(ours.held)
            # The only pair of a weight, used at once, may be larger than the gradient: it exists anyway.
            if ours.bytes + more <= record.bytes or not (record.reused or self._until_the_end):
                ours.held.append(Held.now(pair))
                ours.bytes += more
                self._users.update(_addresses(pair))
                return ()
            self._returned.add(key)
        for one in ours.held:
            one.check(record.name, state)
            one.join()
        self._forget(ours.held)
        pairs = [one.pair for one in ours.held]
        ours.held.clear()
        return [*pairs, pair]

    def close(self, record: Record) -> Sequence[Held]:
        """The weight's pairs: its hook was called. Those of other backwards, inside this one or around, stay."""
        ours = self._open.pop(_key(record), None)
        if ours is None:
            return ()
        if not self._until_the_end:
            self._forget(ours.held)
        return ours.held

    def _forget(self, held: Sequence[Held]) -> None:
        for one in held:
            self._users.subtract(_addresses(one.pair))

    def _more_bytes(self, pair: Pair) -> int:
        """The memory that holding the pair adds to what is held; memory that is shared counts with its first holder."""
        pieces = {_address(tensor): tensor.untyped_storage().nbytes() for tensor in pair[:2]}
        return sum(size for address, size in pieces.items() if not self._users[address])

    def _own(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy where its memory is a parameter's, or much larger and not to be kept."""
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        roomy = self._until_the_end and storage.nbytes() > ROOMY * tensor.numel() * tensor.itemsize
        if roomy or _address(tensor) in self._params:
            return tensor.clone(memory_format=torch.contiguous_format)
        return tensor


def _key(record: Record) -> tuple[int, int]:
    """A backward inside this one (autograd.grad in a hook, a reentrant checkpoint) calls hooks for its own part."""
    return torch._C._current_graph_task_id(), record.index


def _address(tensor: Tensor) -> int:
    """Of the storage, not of its memory, which a simulated tensor has none of (`lomo_kernels.plan`)."""
    return tensor.untyped_storage()._cdata


def _addresses(pair: Pair) -> tuple[int, int]:
    return _address(pair.input), _address(pair.grad_output)
