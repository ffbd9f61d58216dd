"""Lightning: `LomoCallback` lets a ``Trainer`` free each gradient inside backward, and clip and accumulate as told."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

from ..optim import Lomo
from ._versions import require

_STRATEGIES = ("SingleDeviceStrategy", "ModelParallelStrategy")
_PRECISIONS = ("Precision", "MixedPrecision", "HalfPrecision")


class LomoCallback(Callback):
    """For ``Trainer(callbacks=[LomoCallback()])``, if ``configure_optimizers`` returns a `Lomo`.

    Automatic optimization: each backward frees its gradients. It adds to ``.grad`` if Lightning accumulates batches.
    `Lomo` clips as ``gradient_clip_val`` and ``gradient_clip_algorithm`` say. ``grad_norm`` (before clipping) and
    ``skipped_steps`` are logged.

    Manual optimization: ``self.optimizers().backward(loss)`` is one step, and ``trainer.global_step`` counts it.
    ``with self.optimizers().accumulate():`` makes it a part of the next step. `manual_backward` and ``step()`` work as
    with torch's SGD, at its memory. There may be several optimizers, not all of them `Lomo`.

    Hooks between backward and step see no gradients: `Lomo.grad_norms` has their norms.

    Raises:
        ImportError: another version of Lightning than those tested.
        RuntimeError, TypeError, ValueError: when a fit begins: a GradScaler, a strategy that reduces gradients itself,
            no `Lomo`, two with the same parameters, two bounds of clipping, hooks that replace backward or clipping.
            No weight was changed.
    """

    def __init__(self) -> None:
        require("lightning", "2.6", "3.0")
        self._attached = contextlib.ExitStack()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            _check_trainer(trainer)
            if pl_module.automatic_optimization:
                _check_hooks(pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if next(callback for callback in trainer.callbacks if isinstance(callback, LomoCallback)) is not self:
            return  # given twice: one is enough
        optimizers = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, Lomo)]
        if not optimizers:
            kinds = [type(optimizer).__name__ for optimizer in trainer.optimizers]
            raise TypeError(f"Lomo: the LightningModule's optimizers are {kinds}, expected Lomo")
        for optimizer in optimizers:
            optimizer._training.check_not_ended()  # by another one of them, with the same parameters
            _check_clipping(trainer, optimizer)
        self._attached.close()
        for optimizer in optimizers:
            _set_clipping(trainer, optimizer, self._attached)
        plugin = _Plugin(trainer.precision_plugin)
        for name in ("backward", "optimizer_step", "clip_gradients"):
            setattr(trainer.precision_plugin, name, getattr(plugin, name))
            self._attached.callback(vars(trainer.precision_plugin).pop, name, None)
        wrappers = pl_module.optimizers()
        for wrapper in wrappers if isinstance(wrappers, list) else [wrappers]:
            if isinstance(wrapper, Lomo):
                _forward_calls(wrapper, trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        optimizers = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, Lomo)]
        if len(optimizers) == 1 and not trainer.barebones:
            pl_module.log("grad_norm", optimizers[0].last_grad_norm)
            pl_module.log("skipped_steps", optimizers[0].skipped_steps.float())

    def on_exception(self, *_: Any) -> None:
        self._attached.close()

    def teardown(self, *_: Any, **__: Any) -> None:
        self._attached.close()


class _Plugin:
    """What one precision plugin has in place of its own methods while a fit runs."""

    def __init__(self, plugin: Any) -> None:
        self._backward, self._step, self._clip = plugin.backward, plugin.optimizer_step, plugin.clip_gradients
        self._stepped: bool | None = None  # inside a step: whether its backward has run

    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        """As the plugin's. Lightning calls it if gradients are to be used, and `closure` alone if they accumulate."""
        self._stepped = False
        try:
            return self._step(optimizer, model=model, closure=closure, **kwargs)
        finally:
            self._stepped = None

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Automatic optimization: a step, or a part of one. `optimizer` is None in `manual_backward`: a plain one."""
        if not isinstance(optimizer, Lomo):
            self._backward(tensor, model, optimizer, *args, **kwargs)
        elif self._stepped is None:
            with optimizer.accumulate():
                optimizer.backward(tensor)
        elif self._stepped:
            raise RuntimeError(
                "Lomo: optimizer_step ran its closure twice. The first backward of the step has used its gradients. "
                "Call the closure once, or set automatic_optimization=False"
            )
        else:
            self._stepped = True
            optimizer.backward(tensor)

    def clip_gradients(self, optimizer: Any, clip_val: Any = 0.0, gradient_clip_algorithm: Any = "norm") -> None:
        """Does nothing if `Lomo` clips so in its step. Otherwise clips what plain backwards left in ``.grad``."""
        if not isinstance(optimizer, Lomo) or clip_val <= 0:
            self._clip(optimizer, clip_val, gradient_clip_algorithm)
            return
        training = optimizer._training
        name, bounds = _bounds(optimizer, gradient_clip_algorithm)
        if all(bound is not None and float(bound) == float(clip_val) for bound in bounds):
            return
        grads = training.accumulation.gradients()
        if not grads or training.accumulation.scale_of(grads) is not None:
            raise ValueError(
                f"Lomo: clip_gradients got {float(clip_val)}, and Lomo was made with {name}={bounds[0]}. Lomo clips "
                "inside backward, which is over: give both the same bound"
            )
        self._clip(optimizer, clip_val, gradient_clip_algorithm)


def _forward_calls(wrapper: Any, trainer: Any, module: Any) -> None:
    """Lightning's wrapper is of a subclass of `Lomo`, with attributes of its own: its calls go to the optimizer."""
    optimizer, plugin = wrapper.optimizer, trainer.precision_plugin

    def step(method: Callable[..., None], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if module.automatic_optimization:
            raise RuntimeError(
                "Lomo: Lightning runs backward itself: return the loss from training_step. Or set "
                "self.automatic_optimization = False. No weight was changed"
            )

        def closure() -> None:
            scaled = plugin.pre_backward(loss, module)  # Lightning's hooks
            method(scaled, *args, **kwargs)
            plugin.post_backward(loss, module)

        closure() if optimizer._training.accumulating else wrapper.step(closure)

    for name in ("backward", "fused_backward"):
        setattr(wrapper, name, functools.partial(step, getattr(optimizer, name)))
    for name in ("accumulate", "grad_norm", "zero_grad", "remove", "add_param_group", "load_state_dict"):
        setattr(wrapper, name, getattr(optimizer, name))


def _bounds(optimizer: Lomo, algorithm: Any) -> tuple[str, list[Any]]:
    """The option of `Lomo` that Lightning calls `algorithm`, and its values."""
    if algorithm == "value":
        return "clip_grad_value", [group["clip_grad_value"] for group in optimizer.param_groups]
    return "clip_grad_norm", [optimizer._training.settings.clip_grad_norm]


def _check_clipping(trainer: Any, optimizer: Lomo) -> None:
    """Raises ValueError if Trainer and optimizer have different bounds."""
    name, bounds = _bounds(optimizer, trainer.gradient_clip_algorithm)
    clip = trainer.gradient_clip_val
    if clip and any(bound is not None and float(bound) != float(clip) for bound in bounds):
        raise ValueError(
            f"Lomo: Trainer has gradient_clip_val={clip}, and Lomo was made with {name}={bounds[0]}. Set one only"
        )


def _set_clipping(trainer: Any, optimizer: Lomo, undo: contextlib.ExitStack) -> None:
    """Gives the optimizer Trainer's bound until `undo` is closed."""
    clip, training = trainer.gradient_clip_val, optimizer._training
    if not clip:
        return
    if trainer.gradient_clip_algorithm == "value":
        for group in optimizer.param_groups:
            undo.callback(group.update, clip_grad_value=group["clip_grad_value"])
            group["clip_grad_value"] = clip
    else:
        undo.callback(setattr, training, "settings", training.settings)
        training.settings = dataclasses.replace(training.settings, clip_grad_norm=float(clip))


def _check_trainer(trainer: Any) -> None:
    """Raises RuntimeError if Lightning does with gradients what `Lomo` cannot follow."""
    plugin, strategy = trainer.precision_plugin, type(trainer.strategy).__name__
    scaler = getattr(plugin, "scaler", None)
    if scaler is not None and scaler.is_enabled():
        raise RuntimeError(
            "Lomo: precision='16-mixed' makes Lightning scale the loss, and Lomo's update would be too large by that "
            "factor. Use 'bf16-mixed'; or '16-true', for which Lomo scales the loss itself (loss_scale)"
        )
    if type(plugin).__name__ not in _PRECISIONS:
        raise RuntimeError(
            f"Lomo: Lightning's precision is {type(plugin).__name__}, expected '32-true', 'bf16-mixed', 'bf16-true' or "
            "'16-true'"
        )
    if strategy not in _STRATEGIES:
        raise RuntimeError(
            f"Lomo: Lightning's strategy is {strategy}, expected one device or ModelParallelStrategy (FSDP2). Others "
            "reduce gradients after Lomo has used them. Use devices=1, or apply fully_shard in configure_model"
        )


def _check_hooks(module: Any) -> None:
    """Raises RuntimeError if the module replaces what `Lomo` does. Warns of hooks that would see gradients."""

    def own(name: str) -> bool:
        defined = getattr(getattr(module, name), "__module__", "")
        return defined.split(".")[0] not in ("lightning", "pytorch_lightning")

    for name in ("backward", "configure_gradient_clipping", "optimizer_zero_grad"):
        if own(name):
            raise RuntimeError(
                f"Lomo: {type(module).__name__} replaces {name}. Lomo runs backward, clips and drops gradients "
                "itself. Remove it, or leave LomoCallback out: gradients then stay until the step, as with torch's SGD"
            )
    for name in ("on_after_backward", "on_before_optimizer_step"):
        if own(name):
            warnings.warn(
                f"Lomo: in {type(module).__name__}.{name} gradients are used and freed already; .grad is None. "
                "optimizer.grad_norms() has their norms",
                stacklevel=2,
            )
