"""What the optimizer keeps for each parameter and each device. No parameter-sized memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.scalars import NAMES, NEUTRAL, STEP
from .hyperparameters import GroupScalars
from .placement import Placement, shape_of

# A gradient up to this size waits in a buffer for one list call (per call from Python: 1.4 us for a list of many
# against 2.5 us each, one thread of a CPU).
SMALL_BYTES = 64 * 1024
# Why the gradient of a fused layer's weight was formed.
LARGE_FACTORS = "its factors were larger than its gradient"
OTHER_CALL = "a call that is not fused has used it (or somebody's hook is on it)"


class DeviceState:
    """The scalars of one device, which the kernels read and the host does not, and one norm slot per parameter.

    `vectors`: what updates read, a row for each group (`lomo_kernels.ops.scalars`).
    """

    def __init__(self, device: torch.device, parameters: int, groups: int) -> None:
        def scalar(dtype: torch.dtype) -> Tensor:
            return torch.zeros((), dtype=dtype, device=device)

        self.slots = torch.zeros(parameters, dtype=torch.float64, device=device)
        self.weights: Tensor | None = None  # of the slots; None: all 1
        self.inv_scale = scalar(torch.float64).fill_(1.0)
        self.clip_coef = scalar(torch.float64).fill_(1.0)
        self.found_inf = scalar(torch.float64)
        self.step = scalar(torch.int64)
        self.vectors = torch.empty(groups, len(NAMES), dtype=torch.float64, device=device)
        for column, value in zip(self.vectors.unbind(1), NEUTRAL, strict=True):
            column.fill_(value)

    def prepare_update(self, *, scaled: bool, norm_known: bool) -> None:
        """Writes what all groups have in common into their vectors.

        Args:
            scaled: gradients are multiplied by `inv_scale`.
            norm_known: `clip_coef` and `found_inf` are those of this step.
        """
        given = {"inv_scale": scaled, "clip_coef": norm_known, "found_inf": norm_known}
        for name, is_given in given.items():
            position = NAMES.index(name)
            column = self.vectors[:, position]
            column.copy_(getattr(self, name)) if is_given else column.fill_(NEUTRAL[position])
        self.vectors.view(torch.int64)[:, STEP].copy_(self.step)

    def squares(self) -> Tensor:
        """Each parameter's share of the sum of squares: a copy of the slots, weighted."""
        return self.slots.clone() if self.weights is None else self.slots * self.weights

    def sum_of_squares(self) -> Tensor:
        return self.slots.sum() if self.weights is None else self.slots.dot(self.weights)


class ManagedParameter:
    """One parameter under management. `index`, its place in `param_groups`, is its id and keys its random bits."""

    def __init__(self, param: torch.nn.Parameter, index: int, name: str) -> None:
        self.param = param
        self.index = index
        self.name = name
        self.supported = True  # the kernels can update it; False: frozen, and of a kind that they do not take
        self.is_embedding = False  # of an `nn.Embedding`, as far as the model is known
        self.hooked = False  # a frozen parameter has no hook
        self.attributes: dict[str, Any] | None = None  # the parameter's __dict__; swap_tensors exchanges it
        self.fused = False  # some of its layers hand over factors in place of its gradient
        self.why_formed = ""  # "", LARGE_FACTORS or OTHER_CALL: why its gradient existed in the last backward
        self.reused = False  # several layers have it, or one was used several times in a backward
        self.last_pass = -1  # the last pass in which its gradient came
        self.scaled_grad: Tensor | None = None  # what accumulate() left in .grad, with `grad_scale` in it
        self.grad_scale: Tensor | None = None
        self.zeros: tuple[Tensor, int] | None = None  # what zero_grad() left in .grad, and its version
        self.low: Tensor | None = None  # of a parameter that is split
        self.dtype: torch.dtype | None = None
        self.set_placement(Placement(param))

    def set_placement(self, placement: Placement) -> None:
        """Called before every step if there are several processes: an engine may have moved the parameter's part."""
        self.local, self.shard, self.weight, self.groups, self.blocks = placement

    @property
    def shape(self) -> Sequence[int]:
        """Of the whole parameter."""
        return shape_of(self.param)

    @property
    def scaled(self) -> bool:
        """Whether the gradient in ``.grad`` carries the loss scale, because `accumulate` left it there."""
        return self.scaled_grad is not None and self.param.grad is self.scaled_grad

    @property
    def zeroed(self) -> bool:
        """Whether ``.grad`` still has the zeros that `zero_grad` left. Zeros are right for any loss scale."""
        if self.zeros is None:
            return False
        grad, (zeros, version) = self.param.grad, self.zeros
        return grad is not None and grad is zeros and grad._version == version

    def note_zeros(self) -> None:
        """Called when the gradient in ``.grad``, if any, was filled with zeros."""
        grad = self.param.grad
        self.scaled_grad = None
        self.zeros = None if grad is None else (grad, grad._version)

    def forget_old_grad(self) -> None:
        """Drops references to gradients that are no longer in ``.grad``."""
        if not self.scaled:
            self.scaled_grad = None
        if not self.zeroed:
            self.zeros = None

    def not_dense(self, grad: Tensor) -> RuntimeError:
        """What to raise where a gradient of this parameter is not strided. The caller looks: it is a hot path."""
        return RuntimeError(
            f"Lomo: the gradient of {self.name} has layout {grad.layout}, expected a dense one; "
            "build the layer with sparse=False"
        )

    def bind(self, device_state: DeviceState, scalars: GroupScalars) -> None:
        """Binds this to where its parameter is now."""
        self.device, self.dtype = self.local.device, self.local.dtype
        self.on_gpu = self.device.type == "cuda"
        self.device_state, self.scalars = device_state, scalars
        self.slot = device_state.slots[self.index]
        self.bytes = self.local.numel() * self.local.element_size()
        self.small = self.bytes <= SMALL_BYTES
