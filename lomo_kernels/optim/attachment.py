"""What an optimizer puts on its parameters and their layers, and how that comes off again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Factors, factor_sinks, fuse, layers_of, unfuse
from .accumulation import unscale_grads
from .owners import claim, forget, optimizer_backward, release
from .records import Record


class Attachment:
    """The note of whose the parameters are, hooks on those that are trained, and fused layers.

    Keeps neither the optimizer nor the model alive. An optimizer that is dropped without `Lomo.remove` leaves nothing
    behind.

    Args:
        training: the `Training` of an optimizer.
        records: its parameters: its own list, which grows with it.
        model: in which layers are fused; None: nowhere.
    """

    def __init__(self, training: Any, records: list[Record], model: nn.Module | None) -> None:
        self._training = weakref.ref(training)
        self._training_id = id(training)
        self._records = records
        self._model = None if model is None else weakref.ref(model)
        self._claimed: list[int] = []  # ids of the parameters noted as the optimizer's
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._fused: list[weakref.ref[nn.Module]] = []
        self._factor_sinks: list[int] = []  # ids of their weights
        weakref.finalize(training, self.remove).atexit = False

    @property
    def model(self) -> nn.Module | None:
        """The model in which layers are fused."""
        return None if self._model is None else self._model()

    @property
    def fuses(self) -> bool:
        """Whether the weight of some fused layer is among the parameters."""
        return bool(self._factor_sinks)

    def attach(self) -> None:
        """Registers the optimizer as the owner of all its parameters, and puts hooks on those that are trained."""
        self._claimed[:] = [id(record.param) for record in self._records]  # first: see `_fuse`
        claim(self._claimed, self._training)
        self.hook_all()
        model = self.model
        if model is not None:
            self._fuse(model)

    def hook_all(self) -> None:
        """Puts hooks on trainable parameters without a hook: all at first, later those that were unfrozen or swapped.

        `torch.utils.swap_tensors` exchanges a parameter's memory and its dict of attributes. The hooks stay, but torch
        does not call them any more. This is called before every backward, also one of another optimizer.
        """
        for record in self._records:
            if record.attributes is record.param.__dict__ and (record.hooked or not record.param.requires_grad):
                continue
            param: Any = record.param
            if record.attributes is not param.__dict__:
                if record.hooked:
                    param._post_accumulate_grad_hooks = param._post_accumulate_grad_hooks  # makes torch call them
                record.attributes = param.__dict__
            if not record.hooked and param.requires_grad:
                hook = _hook(self._training, record)
                self._handles.append(param.register_post_accumulate_grad_hook(hook))
                record.hooked = True  # last: an interrupt before it leaves a second hook, which finds no gradient

    def _fuse(self, model: nn.Module) -> None:
        """Fuses the layers of `model` that can be fused and whose weights the optimizer manages."""
        records = {id(record.param): record for record in self._records}
        known = {id(reference()) for reference in self._fused}
        for module, reason in layers_of(model, records):
            if reason is not None:
                continue
            record = records[id(module.weight)]
            new = id(module) not in known
            if new:  # also where another optimizer fused it, whose weight was exchanged since
                self._fused.append(weakref.ref(module))  # first: so that a layer is unfused even after an interrupt
                fuse(module)
            record.reused |= record.fused and new
            if not record.fused:
                record.fused = True
                self._factor_sinks.append(id(record.param))
                factor_sinks[id(record.param)] = _factor_sink(self._training, record)

    def remove(self) -> None:
        """Removes everything, also the loss scale that gradients in ``.grad`` carry."""
        release(self._claimed)
        forget(self._training_id)
        _detach(self._handles, self._factor_sinks, self._fused)
        unscale_grads(self._records)

    def extent(self) -> tuple[int, int, int, int]:
        """How much is attached now, for `cut_back`."""
        return len(self._claimed), len(self._handles), len(self._factor_sinks), len(self._fused)

    def cut_back(self, extent: tuple[int, int, int, int]) -> None:
        """Takes off what was attached since `extent` was asked for."""
        claimed, handles, sinks, layers = extent
        release(cut(self._claimed, claimed))
        _detach(cut(self._handles, handles), cut(self._factor_sinks, sinks), cut(self._fused, layers))


def cut(some: list[Any], length: int) -> list[Any]:
    """Shortens a list to `length`, and returns the removed end."""
    beyond = some[length:]
    del some[length:]
    return beyond


def _detach(
    handles: list[torch.utils.hooks.RemovableHandle], ids: list[int], fused: list[weakref.ref[nn.Module]]
) -> None:
    """Removes hooks, and makes fused layers plain ones again."""
    while handles:
        handles.pop().remove()
    while ids:
        factor_sinks.pop(ids.pop(), None)
    unfuse(fused)
    fused.clear()


def _hook(training: weakref.ref[Any], record: Record) -> Callable[[Tensor], None]:
    """The hook of one parameter. It does not keep the optimizer alive."""

    def on_gradient(_: Tensor) -> None:
        owner = training()
        if owner is None:
            return
        backward = optimizer_backward()
        if backward is not None and backward.owner is not owner:
            backward.drop(record.param)
            owner.passed_over = True
            return
        step = owner.steps.current
        if step is not None and step.sink is not None:
            step.sink.take(record)
        else:
            owner.accumulation.note(record, scaled=step is not None and step.adds_scaled)

    return on_gradient


def _factor_sink(training: weakref.ref[Any], record: Record) -> Callable[[Factors], Sequence[Factors]]:
    """What a fused layer of the parameter calls with its factors. It does not keep the optimizer alive."""

    def on_factors(factors: Factors) -> Sequence[Factors]:
        owner = training()
        if owner is None:
            return (factors,)
        backward = optimizer_backward()
        if backward is not None and backward.owner is not owner:
            return ()  # its gradient would be dropped
        step = owner.steps.current
        return (factors,) if step is None or step.sink is None else step.sink.take_factors(record, factors)

    return on_factors
