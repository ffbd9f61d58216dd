"""One sweep over gradients: adding up norms, or updating weights. A pass is what a hook hands its gradient to.

A fused layer hands over factors, for each of its uses, while backward runs; its weight's hook, which autograd calls
once after the last use, closes the sum.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from ..layers import Factors
from .engines.base import ParallelEngine
from .factor_store import FactorStore, SavedFactors
from .hyperparameters import GroupScalars
from .managed_parameter import ManagedParameter
from .split import low_parts_of
from .streams import Streams
from .weight_gradient import WeightGradient

# Bound on the small gradients that wait for a list call.
BUFFER_BYTES = 1024 * 1024

_serials = itertools.count()
_factors = attrgetter("factors")


class _Buffer:
    """Small gradients of one group, device and stream, waiting for one call."""

    __slots__ = ("bytes", "grads", "managed_params")

    def __init__(self) -> None:
        self.managed_params: list[ManagedParameter] = []
        self.grads: list[Tensor] = []
        self.bytes = 0


class Pass:
    """Takes each parameter's gradient once. Subclasses say what is done with one, and with a list of small ones.

    Args:
        devices: those of the parameters.
        params: in whose memory a fused layer's factors may lie, and change before they are used.
        scaled: whether the gradients carry the loss scale.
        engine: combines the hooks' gradients with those of other processes; None: what comes is a local gradient.
        factors_only_if_smaller: a fused layer returns its gradient if that is smaller than its factors, as in a pass
            that keeps gradients: so this one rounds alike.
    """

    #: Whether gradients are kept until backward has ended.
    keeps = False
    #: Whether a gradient that comes a second time can still be refused before a weight has changed.
    changes_weights = False
    #: What an error in this pass leaves behind, for its message.
    outcome = "No weight was changed"

    def __init__(
        self,
        devices: Iterable[torch.device],
        params: Iterable[Tensor] = (),
        *,
        scaled: bool,
        engine: ParallelEngine | None = None,
        factors_only_if_smaller: bool = False,
    ) -> None:
        self.scaled = scaled
        self._engine = engine
        if engine is not None:
            engine.begin_backward(again=not (self.keeps or self.changes_weights))
        self.serial = next(_serials)
        self._streams = Streams(devices)
        self._buffers: dict[tuple[GroupScalars, torch.cuda.Stream | None], _Buffer] = {}
        self._batch = 0  # if not zero: all gradients wait until there are so many
        self._lock = threading.Lock()  # backward runs the hooks of each device in a thread of its own
        self._store = FactorStore(
            self._streams, params, until_the_end=self.keeps, only_if_smaller=self.keeps or factors_only_if_smaller
        )

    def take(self, managed: ManagedParameter) -> None:
        """Consumes the gradient: what stands in ``managed.param.grad`` and what the weight's layers handed over.

        Neither there (a custom layer that keeps it to itself) is left alone.

        Raises:
            RuntimeError: the gradient comes a second time in this pass.
        """
        param = managed.param
        grad = param.grad
        saved: Sequence[SavedFactors] = ()
        if managed.fused:
            with self._lock:
                saved = self._store.close(managed, grad)
        if grad is None and not saved:
            return
        param.grad = None
        if managed.last_pass == self.serial:
            raise self._came_twice(managed)
        managed.last_pass = self.serial
        if self._engine is None:
            self.add(managed, grad, saved)
            return
        assert grad is not None  # no layer is fused
        ready = self._engine.reduce_grad(managed, grad)
        del grad
        for ready_param, local in ready:
            self.add(ready_param, local)

    def take_factors(self, managed: ManagedParameter, factors: Factors) -> Sequence[Factors]:
        """Takes what a fused layer has in place of a gradient, until the weight's hook is called.

        Returns:
            The factors, these and any taken before, whose gradient the layer has to return: holding them would take
            more memory than the gradient does. Usually none.
        """
        if not managed.param.requires_grad:  # frozen since its forward: autograd drops its gradient
            return ()
        if managed.last_pass == self.serial:
            raise self._came_twice(managed)
        with self._lock:
            return self._store.add(managed, factors, self.outcome)

    def add(self, managed: ManagedParameter, grad: Tensor | None, saved: Sequence[SavedFactors] = ()) -> None:
        """Hands one gradient to the kernels, now or with others. Raises RuntimeError unless it is dense."""
        if grad is not None and grad.layout is not torch.strided:
            raise managed.not_dense(grad)
        stream = self._streams.join(managed.device) if managed.on_gpu else None
        if saved:
            for held in saved:
                held.check(managed.name, self.outcome)
                if held.stream is not None:  # a call less on a CPU
                    held.join()
            del held  # so that `saved` alone keeps them
            self._handle_factors(managed, grad, saved)
            return
        assert grad is not None
        if not (managed.small or self._batch):
            self._handle(managed, grad)
            return
        key = managed.scalars, stream
        with self._lock:
            buffer = self._buffers.get(key)
            if buffer is None:
                buffer = self._buffers[key] = _Buffer()
            buffer.managed_params.append(managed)
            buffer.grads.append(grad)
            buffer.bytes += managed.bytes
            if len(buffer.grads) < self._batch if self._batch else buffer.bytes < BUFFER_BYTES:
                return
            del self._buffers[key]
        self._handle_list(buffer.managed_params, buffer.grads)

    def flush(self) -> None:
        """Hands on what still waits. Called when backward has ended, on the caller's streams."""
        self._streams.leave()
        if self._engine is not None:
            for managed, grad in self._engine.drain():
                self.add(managed, grad)
        while self._buffers:
            (_, stream), buffer = self._buffers.popitem()
            Streams.lend(buffer.grads, buffer.managed_params[0].device, stream)
            self._handle_list(buffer.managed_params, buffer.grads)

    def _handle(self, managed: ManagedParameter, grad: Tensor) -> None:
        raise NotImplementedError

    def _handle_list(self, managed_params: Sequence[ManagedParameter], grads: list[Tensor]) -> None:
        raise NotImplementedError

    def _handle_factors(self, managed: ManagedParameter, grad: Tensor | None, saved: Sequence[SavedFactors]) -> None:
        raise NotImplementedError

    def _came_twice(self, managed: ManagedParameter) -> RuntimeError:
        return RuntimeError(
            f"Lomo: the gradient of {managed.name} came twice in one backward, as when two reentrant checkpoints "
            f"share a parameter; each part alone is not its gradient. {self.outcome}. Use torch.utils.checkpoint "
            "with use_reentrant=False"
        )


class NormPass(Pass):
    """Adds every gradient's sum of squares to its parameter's slot, and drops the gradient."""

    def _handle(self, managed: ManagedParameter, grad: Tensor) -> None:
        inv_scale = managed.device_state.inv_scale if self.scaled else None
        torch.ops.lomo_kernels.sq_norm_.default([managed.slot], [grad], inv_scale)

    def _handle_list(self, managed_params: Sequence[ManagedParameter], grads: list[Tensor]) -> None:
        inv_scale = managed_params[0].device_state.inv_scale if self.scaled else None
        torch.ops.lomo_kernels.sq_norm_.default([managed.slot for managed in managed_params], grads, inv_scale)

    def _handle_factors(self, managed: ManagedParameter, grad: Tensor | None, saved: Sequence[SavedFactors]) -> None:
        inv_scale = managed.device_state.inv_scale if self.scaled else None
        WeightGradient(map(_factors, saved), grad).sq_norm_(managed.slot, managed.param, inv_scale)


class UpdatePass(Pass):
    """Applies every gradient to its parameter, and drops the gradient.

    Args:
        norm_known: clip coefficient and overflow flag are known (a norm pass came before). Otherwise this pass adds up
            the norms.
        rule: its number in `lomo_kernels.rules.RULES`.
        stochastic, splits, seed: of the rounding.
        vector_of: gives the scalars of a parameter's update; None: they are its group's.
    """

    changes_weights = True
    outcome = "Some weights of this step may have changed already"
    #: Whether a kernel was called that may have changed one.
    changed = False
    #: What stays as it was if its gradient is not finite and no norm came first.
    kept_if_not_finite = "elements"

    def __init__(
        self,
        devices: Iterable[torch.device],
        params: Iterable[Tensor] = (),
        *,
        scaled: bool,
        norm_known: bool,
        rule: int,
        stochastic: bool,
        splits: bool,
        seed: int,
        engine: ParallelEngine | None = None,
        factors_only_if_smaller: bool = False,
        vector_of: Callable[[ManagedParameter], Tensor] | None = None,
    ) -> None:
        super().__init__(devices, params, scaled=scaled, engine=engine, factors_only_if_smaller=factors_only_if_smaller)
        self._vector_of = vector_of
        self.norm_known = norm_known
        self.rule = rule
        self.stochastic = stochastic
        self.splits = splits
        self.seed = seed

    def _handle(self, managed: ManagedParameter, grad: Tensor) -> None:
        self.changed = True
        torch.ops.lomo_kernels.update_.default(
            [managed.local],
            [grad],
            managed.scalars.vector if self._vector_of is None else self._vector_of(managed),
            [] if self.norm_known else [managed.slot],
            self.rule,
            self.stochastic,
            self.seed,
            [managed.index],
            [] if managed.shard is None else list(managed.shard),
            [] if managed.low is None else [managed.low],
        )
        torch.autograd.graph.increment_version(managed.local)
        if managed.shard is not None:
            torch.autograd.graph.increment_version(managed.param)

    def _handle_factors(self, managed: ManagedParameter, grad: Tensor | None, saved: Sequence[SavedFactors]) -> None:
        param = managed.param
        self.changed = True
        WeightGradient(map(_factors, saved), grad).update_(
            param,
            managed.scalars.vector if self._vector_of is None else self._vector_of(managed),
            None if self.norm_known else managed.slot,
            self.rule,
            self.stochastic,
            self.seed,
            managed.index,
            [],
            managed.low,
        )
        torch.autograd.graph.increment_version(param)

    def _handle_list(self, managed_params: Sequence[ManagedParameter], grads: list[Tensor]) -> None:
        if self._vector_of is not None:  # a list has one vector of scalars
            for managed, grad in zip(managed_params, grads, strict=True):
                UpdatePass._handle(self, managed, grad)
            return
        params = [managed.local for managed in managed_params]
        sharded = managed_params[0].shard is not None
        self.changed = True
        torch.ops.lomo_kernels.update_.default(
            params,
            grads,
            managed_params[0].scalars.vector,
            [] if self.norm_known else [managed.slot for managed in managed_params],
            self.rule,
            self.stochastic,
            self.seed,
            [managed.index for managed in managed_params],
            [number for managed in managed_params for number in managed.shard or ()] if sharded else [],
            low_parts_of(managed_params) if self.splits else [],
        )
        torch.autograd.graph.increment_version(params)
        if sharded:
            torch.autograd.graph.increment_version([managed.param for managed in managed_params])
