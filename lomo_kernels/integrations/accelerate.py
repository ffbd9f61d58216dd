"""accelerate: `attach` makes ``accelerator.backward(loss)`` a step of `Lomo`, and clipping what `Lomo` does anyway."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..optim import Lomo
from ..optim.copies import remake
from ..optim.parameters import check_groups
from ._versions import require


def attach(accelerator: Any) -> None:
    """Replaces `backward`, `lomo_backward`, `no_sync`, `clip_grad_norm_`, `clip_grad_value_` and `prepare` of this
    `Accelerator`.

    ``accelerator.backward(loss)`` then frees each gradient inside backward. It adds to ``.grad`` if accelerate does not
    synchronise gradients (inside `accumulate` and `no_sync`), otherwise it makes a step. ``optimizer.step()`` stays in
    the loop: it does nothing more, and a second backward before it is refused, because accelerate would add up the two.
    Call it before or after ``accelerator.prepare``; a second call does nothing.

    Args:
        accelerator: with one optimizer, a `Lomo`, once the first backward comes. On one process, with FSDP2, or with
            `Lomo`'s own data parallel (``process_group``).

    Raises:
        ImportError: another version of accelerate than those tested.
        RuntimeError, TypeError: now or at a backward: a GradScaler, DistributedDataParallel, DeepSpeed, FSDP1, several
            optimizers, another one than `Lomo`, two backwards without ``optimizer.step()`` in between. No weight was
            changed.
    """
    require("accelerate", "1.15", "2.0")
    if not hasattr(accelerator, "sync_gradients"):
        raise TypeError(
            f"Lomo: attach got {type(accelerator).__name__}, expected an accelerate.Accelerator. For a "
            "transformers.Trainer there is lomo_kernels.integrations.transformers.attach"
        )
    if not isinstance(getattr(accelerator.backward, "__self__", None), _Attached):
        attached = _Attached(accelerator)
        attached.check_accelerator()
        attached.follow_parameters()
        # At once: an interrupt between two of them would leave some of accelerate's own.
        names = ("backward", "lomo_backward", "no_sync", "clip_grad_norm_", "clip_grad_value_", "prepare")
        vars(accelerator).update({name: getattr(attached, name) for name in names})


class _Attached:
    """What one accelerator has in place of its own methods."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._prepare, self._no_sync = accelerator.prepare, accelerator.no_sync
        self._open_no_syncs = 0
        self._clip_norm, self._clip_value = accelerator.clip_grad_norm_, accelerator.clip_grad_value_

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """As accelerate's."""
        result = self._prepare(*args, **kwargs)
        self.follow_parameters()
        for prepared in self._accelerator._optimizers:
            if isinstance(prepared.optimizer, Lomo):  # a loop that begins anew, perhaps after an error
                prepared.optimizer._training.trained = False
        return result

    def backward(self, loss: Tensor, *, learning_rate: Any = None, scale_wrt_gas: bool = True, **kwargs: Any) -> None:
        """A step, or a part of one if gradients are accumulated. Divides the loss by the accumulation steps.

        Args:
            learning_rate: of all groups in this step, as with lomo_optim, unless it is that of some group already.
            scale_wrt_gas: False: the loss is divided already.
        """
        optimizer = self._optimizer()
        if kwargs:
            raise TypeError(
                f"Lomo: accelerator.backward got {', '.join(kwargs)}, which a step inside backward cannot honour. "
                "For a plain backward call loss.backward(); optimizer.step() then applies its gradients"
            )
        steps = self._accelerator.gradient_accumulation_steps
        if scale_wrt_gas and steps != 1:
            loss = loss / steps
        if not self._synchronises():
            with optimizer.accumulate():
                optimizer.backward(loss)
        elif learning_rate is None and optimizer._training.trained:
            raise RuntimeError(
                "Lomo: accelerator.backward came twice without optimizer.step() in between. The first one was a step, "
                "and this one would be another; accelerate adds up their gradients. Add the losses and call backward "
                "once, or put all but the last backward inside `with accelerator.no_sync(model):`. If each is a step, "
                "call optimizer.step() or optimizer.zero_grad() after each. This call changed no weight"
            )
        elif learning_rate is None or any(float(group["lr"]) == learning_rate for group in optimizer.param_groups):
            optimizer.backward(loss)
        else:
            optimizer.fused_backward(loss, learning_rate)

    def lomo_backward(self, loss: Tensor, learning_rate: float) -> None:
        """accelerate's own call for lomo_optim, of a loss that is divided already."""
        self.backward(loss, learning_rate=learning_rate, scale_wrt_gas=False)

    @contextlib.contextmanager
    def no_sync(self, model: Any) -> Iterator[None]:
        """As accelerate's. On one process too, a backward inside it only adds to ``.grad``."""
        self._open_no_syncs += 1
        try:
            with self._no_sync(model):
                yield
        finally:
            self._open_no_syncs -= 1

    def clip_grad_norm_(self, parameters: Any, max_norm: Any, norm_type: Any = 2) -> Tensor:
        """Returns the last step's norm before clipping: a copy of `Lomo.last_grad_norm`. If gradients are being
        accumulated, clips what stands in ``.grad``, as accelerate does."""
        optimizer = self._optimizer()
        bound = optimizer._training.settings.clip_grad_norm
        if float(max_norm) not in (math.inf, math.inf if bound is None else bound):
            raise ValueError(
                f"Lomo: accelerator.clip_grad_norm_ got max_norm={float(max_norm)}, and Lomo was made with "
                f"clip_grad_norm={bound}. Lomo clips inside backward, which is over: give both the same bound"
            )
        if float(norm_type) != 2:
            raise ValueError(f"Lomo: accelerator.clip_grad_norm_ got norm_type={norm_type}, expected 2")
        params = self._all_of(optimizer, parameters, "clip_grad_norm_")
        if self._accumulates(optimizer):
            return self._clip_norm(params, max_norm, norm_type)
        return optimizer.last_grad_norm.clone()

    def clip_grad_value_(self, parameters: Any, clip_value: Any) -> None:
        """Does nothing: `Lomo` has clamped inside backward. If gradients are being accumulated, as accelerate."""
        optimizer = self._optimizer()
        bounds = [group["clip_grad_value"] for group in optimizer.param_groups]
        if any(bound is None or float(bound) != float(clip_value) for bound in bounds):
            raise ValueError(
                f"Lomo: accelerator.clip_grad_value_ got clip_value={float(clip_value)}, and Lomo was made with "
                f"clip_grad_value={bounds[0]}. Lomo clamps inside backward, which is over: give both the same bound"
            )
        params = self._all_of(optimizer, parameters, "clip_grad_value_")
        if self._accumulates(optimizer):
            self._clip_value(params, clip_value)

    def follow_parameters(self) -> None:
        """FSDP2: `prepare` has put other parameters into the groups of an optimizer that was made before."""
        for prepared in self._accelerator._optimizers if self._accelerator.is_fsdp2 else ():
            optimizer = prepared.optimizer
            if isinstance(optimizer, Lomo):
                try:
                    check_groups(optimizer._training.managed_params, optimizer.param_groups)
                except RuntimeError:
                    remake(optimizer)

    def check_accelerator(self) -> None:
        """Raises RuntimeError if accelerate does with gradients what `Lomo` cannot follow."""
        accelerator = self._accelerator
        if accelerator.scaler is not None and accelerator.scaler.is_enabled():
            raise RuntimeError(
                "Lomo: mixed_precision='fp16' makes accelerate scale the loss, and Lomo's update would be too large by "
                "that factor. Lomo scales the loss itself (loss_scale): turn accelerate's scaler off with "
                "Accelerator(mixed_precision='fp16', kwargs_handlers=[GradScalerKwargs(enabled=False)]), or use 'bf16'"
            )
        kind = accelerator.distributed_type.value
        if kind not in ("NO", "MULTI_CPU", "MULTI_GPU") and not accelerator.is_fsdp2:
            instead = "fsdp_version=2" if kind == "FSDP" else "FSDP2, or Lomo without accelerate (docs/distributed/)"
            raise RuntimeError(
                f"Lomo: accelerate runs with distributed_type {kind}, expected one process or FSDP2. Use {instead}"
            )

    def _optimizer(self) -> Lomo:
        """The one optimizer, looked up each time: `Accelerator.free_memory` empties the list, and others follow."""
        accelerator = self._accelerator
        self.check_accelerator()
        kinds = [type(prepared.optimizer).__name__ for prepared in accelerator._optimizers]
        if len(kinds) != 1:
            raise RuntimeError(
                f"Lomo: the accelerator has {len(kinds)} optimizers {kinds}, expected one. Prepare one Lomo: parameter "
                "groups take the place of several optimizers"
            )
        optimizer = accelerator._optimizers[0].optimizer
        if not isinstance(optimizer, Lomo):
            raise TypeError(f"Lomo: the accelerator's optimizer is {kinds[0]}, expected Lomo")
        wrapped = any(isinstance(model, torch.nn.parallel.DistributedDataParallel) for model in accelerator._models)
        if wrapped or (accelerator.num_processes > 1 and optimizer._training.engine is None):
            raise RuntimeError(
                f"Lomo: accelerate runs {accelerator.num_processes} processes with DistributedDataParallel, which "
                "reduces gradients after Lomo has used them. Use FSDP2; or Lomo(..., process_group=torch.distributed."
                "group.WORLD) and model = accelerator.prepare_model(model, evaluation_mode=True), which wraps nothing"
            )
        return optimizer

    def _synchronises(self) -> bool:
        return self._accelerator.sync_gradients and not self._open_no_syncs

    def _accumulates(self, optimizer: Lomo) -> bool:
        """Whether gradients stand in ``.grad`` for a later step. Raises RuntimeError if the loss scale is in them."""
        if self._synchronises():
            return False
        if optimizer._training.state.scale.used:
            raise RuntimeError(
                "Lomo: gradients that are accumulated carry the loss scale, and cannot be clipped now. Call "
                "accelerator's clipping only if accelerator.sync_gradients"
            )
        return True

    @staticmethod
    def _all_of(optimizer: Lomo, parameters: Tensor | Iterable[Tensor], caller: str) -> list[Tensor]:
        """`parameters` as a list. Raises ValueError unless they are all that the optimizer trains."""
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        managed_params = optimizer._training.managed_params
        given = {id(param) for param in params if param.requires_grad}
        lacking = [
            managed.name for managed in managed_params if managed.param.requires_grad and id(managed.param) not in given
        ]
        others = len(given - {id(managed.param) for managed in managed_params})
        if lacking or others:
            said = f"not {lacking[0]}" if lacking else f"{others} that the optimizer does not train (added later?)"
            raise ValueError(
                f"Lomo: accelerator.{caller} got {len(given)} trained parameters, and {said}. Lomo clips all of its "
                "parameters together: pass model.parameters(), and make the optimizer when all parameters exist"
            )
        return params
