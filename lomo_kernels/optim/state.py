"""What a step needs that lives on devices, unread by the host: hyperparameters, norm slots, loss scale, counters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..numbers import clip_coefficient
from .engines.base import ParallelEngine
from .factored_rules import FactoredRule
from .hyperparameters import GroupScalars, check_group
from .managed_parameter import DeviceState, ManagedParameter
from .scaling import KINDS, LossScale, Moves
from .update_strategy import choose_strategy


def _send(number: Tensor, to: Tensor) -> None:
    """Copies between devices, without a host synchronisation unless `to` is on the CPU, where kernels read at once."""
    to.copy_(number, non_blocking=to.is_cuda)


class TrainingState:
    """The device side of one optimizer. Its first parameter's device is `primary`, where sums and counters are kept.

    Args:
        managed_params: all parameters, in the order of the groups.
        groups: torch parameter groups.
        loss_scale: as `Lomo` takes it.
        clip_tensor: as `Lomo` takes it.
        rule: if it has factors.
        engine: of several processes, which has placed the parameters; None: there is one process.
        before: the state that this one continues, on other devices or for more parameters.
    """

    def __init__(
        self,
        managed_params: Sequence[ManagedParameter],
        groups: Sequence[dict[str, Any]],
        loss_scale: Any,
        *,
        clip_tensor: float | None = None,
        rule: FactoredRule | None = None,
        engine: ParallelEngine | None = None,
        before: TrainingState | None = None,
    ) -> None:
        self.engine = engine
        devices = list(dict.fromkeys(managed.local.device for managed in managed_params if managed.supported))
        devices = devices or [torch.device("cpu")]
        self.devices = {device: DeviceState(device, len(managed_params), len(groups)) for device in devices}
        self.primary = self.devices[devices[0]]
        self.scalars: list[dict[torch.device, GroupScalars]] = []
        remaining = iter(managed_params)
        group_of = []
        for row, group in enumerate(groups):
            by_device: dict[torch.device, GroupScalars] = {}
            for _, managed in zip(group["params"], remaining, strict=False):
                device = managed.local.device if managed.supported else devices[0]
                if device not in by_device:
                    by_device[device] = GroupScalars(self.devices[device].vectors[row])
                managed.bind(self.devices[device], by_device[device])
                group_of.append(row)
            self.scalars.append(by_device)
        if any(managed.weight != 1.0 for managed in managed_params):
            weights = torch.tensor([managed.weight for managed in managed_params], dtype=torch.float64, device="cpu")
            for device, device_state in self.devices.items():
                device_state.weights = weights.to(device)
        if loss_scale == "auto":
            loss_scale = "dynamic" if any(managed.dtype is torch.float16 for managed in managed_params) else None
        self.scale = LossScale(loss_scale, devices[0])
        self.skipped = torch.zeros((), dtype=torch.int64, device=devices[0])
        self.norm = torch.zeros((), dtype=torch.float64, device=devices[0])
        self._measuring = False  # the slots are those of a step that has not ended
        self.strategy = choose_strategy(clip_tensor, rule, managed_params, group_of, self.devices, engine)
        if before is not None:
            self.load(before.export())

    def refresh(self, groups: Sequence[dict[str, Any]], lr: float | Tensor | None) -> None:
        """Takes over the groups' present hyperparameters, and `lr`, where given, for all of them."""
        for index, group in enumerate(groups):
            check_group(group, f"Lomo: param_groups[{index}]")
        for group, by_device in zip(groups, self.scalars, strict=True):
            for scalars in by_device.values():
                scalars.set(group, lr)

    def is_scaled(self, scale: Tensor | None) -> bool:
        """Whether gradients that carry this loss scale have to be divided: by it, or as sums over ranks."""
        return scale is not None or (self.engine is not None and self.engine.grad_divisor != 1)

    def unscale_by(self, scale: Tensor | None) -> None:
        """The gradients to come carry `scale` and the engine's divisor: has the inverse, float64, on every device."""
        if not self.is_scaled(scale):
            return
        divisor = 1 if self.engine is None else self.engine.grad_divisor
        inverse = (torch.ones_like(self.norm) if scale is None else scale.double()).mul(divisor).reciprocal()
        for device_state in self.devices.values():
            _send(inverse, device_state.inv_scale)

    def prepare_update(self, *, scaled: bool, norm_known: bool) -> None:
        """Makes every device's vectors of scalars those of the update that comes: see `DeviceState.prepare_update`."""
        for device_state in self.devices.values():
            device_state.prepare_update(scaled=scaled, norm_known=norm_known)

    def zero_slots(self) -> None:
        self._measuring = True
        for device_state in self.devices.values():
            device_state.slots.zero_()

    def finish_norm(self, clip_grad_norm: float | None) -> None:
        """From the slots to norm, overflow flag and clip coefficient, on every device: the same on every rank."""
        totals = [device_state.sum_of_squares().to(self.norm.device) for device_state in self.devices.values()]
        total = totals[0] if len(totals) == 1 else torch.stack(totals).sum()
        if self.engine is not None:
            self.engine.sum_(total)
        self.norm.copy_(total.sqrt())
        self.primary.found_inf.copy_(total.isfinite().logical_not())
        if clip_grad_norm is not None:
            self.primary.clip_coef.copy_(clip_coefficient(total, clip_grad_norm))
        for device_state in self.devices.values():
            if device_state is not self.primary:
                _send(self.primary.found_inf, device_state.found_inf)
                _send(self.primary.clip_coef, device_state.clip_coef)

    def forget_norms(self) -> None:
        """Makes all norms zero if they are, or some of them, of a step that has not ended."""
        if self._measuring:
            self.zero_slots()
            self.norm.zero_()
            self._measuring = False

    def after_step(self, scaled: bool, *, norm_known: bool, clipped: bool) -> Moves:
        """What the end of a step changes: it is counted and, if its gradients carried the loss scale, this moves.

        Args:
            norm_known: the norm was known before the update, which was skipped if it was not finite.
            clipped: the update used `clip_coef`.
        """
        primary = self.primary
        return [
            *self.strategy.after_step(
                self.squares, primary.clip_coef if clipped else None, primary.found_inf if norm_known else None
            ),
            *((device_state.step, device_state.step + 1) for device_state in self.devices.values()),
            (self.skipped, self.skipped + primary.found_inf.to(torch.int64)),
            *(self.scale.after_step(primary.found_inf) if scaled else ()),
        ]

    def after_dropped_norm(self) -> Moves:
        """What changes if no step used the norm that `grad_norm` found. If it overflowed, it is a skipped step."""
        overflowed = self.primary.found_inf.to(torch.int64)
        steps = (device_state.step for device_state in self.devices.values())
        return [
            *((step, step + overflowed.to(step.device)) for step in steps),
            (self.skipped, self.skipped + overflowed),
            *self.scale.after_dropped_norm(self.primary.found_inf),
        ]

    def move(self, moves: Moves) -> None:
        """Changes numbers, without memory. An interrupt may cut it short; then it is called again."""
        for tensor, value in moves:
            tensor.copy_(value)
        self._measuring = False

    def squares(self) -> Tensor:
        """Sum of squares of every parameter's gradient in the last step, on `primary`: float64, [parameters]. Over
        several ranks they are of whole parameters, and every rank has to call this."""
        totals = [device_state.squares().to(self.norm.device) for device_state in self.devices.values()]
        total = totals[0] if len(totals) == 1 else torch.stack(totals).sum(0)
        if self.engine is not None:
            self.engine.sum_(total)
        return total

    def export(self) -> dict[str, Any]:
        """Copies of what a resumed run needs."""
        numbers = {"step": self.primary.step.clone(), "skipped_steps": self.skipped.clone()}
        return numbers | self.scale.export() | self.strategy.export()

    def export_norms(self) -> dict[str, Tensor]:
        """Copies of the last step's norms, which a copy of the optimizer has too."""
        slots = torch.stack([device_state.slots.to(self.norm.device) for device_state in self.devices.values()]).sum(0)
        return {"norm": self.norm.clone(), "slots": slots}

    def load_norms(self, exported: dict[str, Tensor]) -> None:
        """Takes over what `export_norms` gave. All slots are on `primary` then, as good as on several devices."""
        self.norm.copy_(exported["norm"])
        self.primary.slots.copy_(exported["slots"])

    def by_parameter(self, index: int) -> dict[str, Any]:
        """The same numbers, live, as `torch.distributed.checkpoint` can keep them with a parameter: no string, and at
        least one dimension. Only what the strategy keeps is the parameter's own."""
        tensors = {
            "step": self.primary.step,
            "skipped_steps": self.skipped,
            "loss_scale": self.scale.scale,
            "growth_tracker": self.scale.growth_tracker,
        }
        numbers = {name: tensor.view(1) for name, tensor in tensors.items()}
        return numbers | self.strategy.by_parameter(index) | {"scaling": KINDS.index(self.scale.kind)}

    def load(self, exported: dict[str, Any]) -> None:
        """Takes over what `export` or `resume.read` gave: the loss scale only from the same kind of scaling."""
        for device_state in self.devices.values():
            device_state.step.copy_(exported["step"].reshape(()))
        self.skipped.copy_(exported["skipped_steps"].reshape(()))
        self.strategy.load(exported)
        if exported["scaling"] == self.scale.kind:
            self.scale.scale.copy_(exported["loss_scale"].reshape(()))
            self.scale.growth_tracker.copy_(exported["growth_tracker"].reshape(()))
