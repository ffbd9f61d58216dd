"""What an optimizer puts on its parameters and their layers, and how that comes off again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Factors, factor_sinks, fuse, gated_layers_of, layers_of, stand_in, unfuse, weight_of
from .accumulation import unscale_grads
from .managed_parameter import ManagedParameter
from .owners import claim, forget, live, optimizer_backward, release


class Attachment:
    """The note of whose the parameters are, hooks on those that are trained, and fused layers.

    Keeps neither the optimizer nor the model alive. An optimizer that is dropped without `Lomo.remove` leaves nothing
    behind.

    Args:
        training: the `Training` of an optimizer.
        managed_params: its parameters: its own list, which grows with it.
        model: in which layers are fused; None: nowhere.
    """

    def __init__(self, training: Any, managed_params: list[ManagedParameter], model: nn.Module | None) -> None:
        self._training = weakref.ref(training)
        self._training_id = id(training)
        self._managed_params = managed_params
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
        self._claimed[:] = [id(managed.param) for managed in self._managed_params]  # first: see `_fuse`
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
        for managed in self._managed_params:
            if managed.attributes is managed.param.__dict__ and (managed.hooked or not managed.param.requires_grad):
                continue
            param: Any = managed.param
            if managed.attributes is not param.__dict__:
                if managed.hooked:
                    param._post_accumulate_grad_hooks = param._post_accumulate_grad_hooks  # makes torch call them
                managed.attributes = param.__dict__
            if not managed.hooked and param.requires_grad:
                hook = _hook(self._training, managed)
                self._handles.append(param.register_post_accumulate_grad_hook(hook))
                managed.hooked = True  # last: an interrupt before it leaves a second hook, which finds no gradient

    def _fuse(self, model: nn.Module) -> None:
        """Fuses the layers of `model` that can be fused and whose weights the optimizer manages."""
        managed_params = {id(managed.param): managed for managed in self._managed_params}
        known = {id(reference()) for reference in self._fused}
        for module, reason in layers_of(model, managed_params):
            if reason is not None:
                continue
            managed = managed_params[id(weight_of(module))]
            new = id(module) not in known
            if new:  # also where another optimizer fused it, whose weight was exchanged since
                self._fuse_one(module)
            managed.reused |= managed.fused and new
            if not managed.fused:
                managed.fused = True
                self._factor_sinks.append(id(managed.param))
                factor_sinks[id(managed.param)] = _factor_sink(self._training, managed)
        stand_in()
        for module in gated_layers_of(model, managed_params):
            if id(module) not in known:
                self._fuse_one(module)

    def _fuse_one(self, module: nn.Module) -> None:
        self._fused.append(weakref.ref(module))  # first: so that a layer is unfused even after an interrupt
        fuse(module)

    def remove(self) -> None:
        """Removes everything, also the loss scale that gradients in ``.grad`` carry."""
        release(self._claimed)
        forget(self._training_id)
        _detach(self._handles, self._factor_sinks, self._fused)
        unscale_grads(self._managed_params)

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
    stand_in()
    unfuse(fused)
    fused.clear()


def _hook(training: weakref.ref[Any], managed: ManagedParameter) -> Callable[[Tensor], None]:
    """The hook of one parameter. It does not keep the optimizer alive."""

    steps = training().steps  # type: ignore[union-attr]

    def on_gradient(_: Tensor) -> None:
        if len(live) > 1:  # asking whose backward runs takes 0.4 us
            backward = optimizer_backward()
            if backward is not None and backward.owner is not (owner := training()):
                if owner is not None:
                    backward.drop(managed.param)
                    owner.passed_over = True
                return
        step = steps.current
        if step is not None and step.sink is not None:
            step.sink.take(managed)
        elif (owner := training()) is not None:
            owner.accumulation.note(managed, scaled=step is not None and step.adds_scaled)

    return on_gradient


def _factor_sink(training: weakref.ref[Any], managed: ManagedParameter) -> Callable[[Factors], Sequence[Factors]]:
    """What a fused layer of the parameter calls with its factors. It does not keep the optimizer alive."""

    def on_factors(factors: Factors) -> Sequence[Factors]:
        owner = training()
        if owner is None:
            return (factors,)
        backward = optimizer_backward()
        if backward is not None and backward.owner is not owner:
            return ()  # its gradient would be dropped
        step = owner.steps.current
        return (factors,) if step is None or step.sink is None else step.sink.take_factors(managed, factors)

    return on_factors
