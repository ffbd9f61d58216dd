"""What an optimizer has that outlives a step: settings, parameters, what is attached to them, and device state."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..rules import RULES
from .accumulation import Accumulation
from .attachment import Attachment
from .hyperparameters import numbers_of, unused_momentum
from .owners import other_owners
from .parameters import check_groups, check_parameter, check_unchanged, is_served
from .ranks import Ranks, is_here, ranks_of, shape_of
from .records import Record
from .repeat import Repeats
from .scaling import computes_in_float16
from .settings import Settings
from .state import State
from .step import Steps


class Training:
    """One optimizer's parameters under training. Hooks on the parameters keep neither this nor the optimizer alive.

    Args:
        optimizer: a `Lomo`.
        fused_model: in which layers are fused; None: nowhere.
        whole: gives the model that was passed to the optimizer, if one was.
    """

    state: State

    def __init__(
        self,
        optimizer: Any,
        settings: Settings,
        fused_model: nn.Module | None,
        whole: Callable[[], nn.Module | None],
    ) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.settings = settings
        self.records: list[Record] = []
        self.ranks: Ranks | None = None
        self.attachment = Attachment(self, self.records, fused_model)
        self.steps = Steps(self.records)
        self.accumulation = Accumulation(self.records)
        self.repeats = Repeats(self, self.records, whole if fused_model is None else weakref.ref(fused_model))
        self.accumulating = False  # inside `Lomo.accumulate`
        self.norm_is_known = False  # grad_norm() was called and fused_backward() not yet
        self.passed_over = False  # another optimizer's backward dropped a gradient of ours
        self.trained = False  # there was a step since `Lomo.step` was last called
        self.unpickled = False  # until the first step
        self.started = False  # there are records, state and hooks
        self.ended = ""  # why it cannot be used any more
        self._whole: Callable[[], nn.Module | None] | None = whole  # until the first step, which compares parameters
        self.scale_is_open = settings.loss_scale == "auto"  # until a backward says whether it computes in float16
        self.looked_for_scaler = False  # a torch GradScaler, behind a loss
        self._warned_of_momentum = False
        self._stale = False  # `make_state` was begun and not ended

    @property
    def groups(self) -> list[dict[str, Any]]:
        """torch's parameter groups as they are now: loading a state dict replaces them."""
        optimizer = self.optimizer()
        assert optimizer is not None
        groups: list[dict[str, Any]] = optimizer.param_groups
        return groups

    @property
    def norm_comes_first(self) -> bool:
        """Whether an update needs the norm of all gradients."""
        return self.settings.clip_grad_norm is not None or self.state.scale.kind == "dynamic"

    @property
    def keeps_gradients(self) -> bool:
        """Whether one backward keeps every gradient until the norm is known."""
        return self.settings.one_pass and self.norm_comes_first

    @property
    def fused_params(self) -> list[Tensor]:
        """In whose memory a fused layer's factors may lie."""
        return [record.param for record in self.records if record.served] if self.attachment.fuses else []

    def start(self) -> None:
        """Makes the state, and puts hooks on all parameters."""
        self.ranks = self.join_ranks(self.records, self.groups)
        self.state = State(self.records, self.groups, self.settings.loss_scale, ranks=self.ranks)
        self.show_state()
        model = self.attachment.model
        managed = {id(record.param) for record in self.records}
        if model is not None and managed.isdisjoint(id(param) for param in model.parameters()):
            raise ValueError("Lomo: fused_layers is a module with none of the parameters given, expected their model")
        self._replace_owners(self.records)
        self.attachment.attach()
        self.started = True

    def extend(self, records: Sequence[Record], ranks: Ranks | None) -> None:
        """Attaches `records`, which were added to the others, to all of which `ranks` belongs."""
        self.ranks = ranks
        self.make_state()
        self._replace_owners(records)
        self.attachment.attach()

    def refresh(self, loss: Tensor | None = None, lr: float | Tensor | None = None) -> None:
        """Reads what changed since the last step: hyperparameters, devices, dtypes, what is frozen, the loss scale."""
        self.check_not_ended()
        groups = self.groups
        check_groups(self.records, groups)
        for record in self.records:
            if self.ranks is not None:
                self.ranks.place(record)
            unfrozen = record.param.requires_grad and not record.served
            stale = self._stale or unfrozen
            if stale or record.local.dtype is not record.dtype or record.local.device != record.device:
                self.make_state()
            if record.scaled_grad is not None or record.zeros is not None:
                record.forget_old_grad()
        self.attachment.hook_all()
        if loss is not None:
            self._scale_float16(loss)
        if not self._warned_of_momentum and (text := unused_momentum(groups)):
            self._warned_of_momentum = True
            warnings.warn(text, stacklevel=8)
        self.state.refresh(groups, lr)

    def check_unchanged(self) -> None:
        """In the first step: raises RuntimeError if parameters were exchanged since the optimizer was made."""
        if self._whole is not None:
            check_unchanged(self.records, self._whole() if self.ranks is None else None)
            self._whole = None

    def _scale_float16(self, loss: Tensor) -> None:
        """The first backward decides what ``loss_scale="auto"`` means if no parameter is float16."""
        if not self.scale_is_open:
            return
        self.scale_is_open = False
        if self.state.scale.used or not computes_in_float16(loss):
            return
        if self.ranks is not None:  # which would have to agree on it
            warnings.warn(
                "Lomo: backward computes in float16 (autocast?) without a loss scale, so small gradients become zero. "
                'Over several processes, pass loss_scale="dynamic" (or None) to Lomo',
                stacklevel=9,
            )
            return
        self.set_loss_scale("dynamic")

    def set_loss_scale(self, loss_scale: Any) -> None:
        """Changes the kind of loss scaling."""
        self.settings = replace(self.settings, loss_scale=loss_scale)
        self.make_state()

    def drop_norm(self) -> None:
        """Drops a norm that `grad_norm` found and no `fused_backward` used."""
        if self.norm_is_known:
            self.norm_is_known = False
            self.state.abandon_step()

    def make_state(self) -> None:
        """Makes the device state again: parameters were added, or moved to another device or dtype."""
        for record in self.records:
            check_parameter(record.name, record.param)
            record.served = is_served(record.param)
        self.drop_norm()
        self._stale = True
        loss_scale = self.settings.loss_scale
        self.state = State(self.records, self.groups, loss_scale, ranks=self.ranks, before=self.state)
        self.show_state()
        self._stale = False

    def show_state(self) -> None:
        """Puts the optimizer's numbers into its ``state``, where torch looks for a parameter's state.

        If the state were empty, `torch.distributed.checkpoint` would make gradients for all parameters and run a step.
        """
        optimizer = self.optimizer()
        assert optimizer is not None
        for record in self.records:
            optimizer.state[record.param] = self.state.by_parameter() | {
                "seed": self.settings.seed,
                "rule": RULES[self.settings.rule],
            }

    def join_ranks(self, records: Sequence[Record], groups: Sequence[dict[str, Any]]) -> Ranks | None:
        """Finds the processes that take part in training these parameters, and starts from the same everywhere."""
        settings = self.settings
        ranks = ranks_of(records, settings.process_group, stochastic=settings.stochastic)
        if ranks is None:
            return None
        if self.attachment.model is not None:
            raise ValueError(
                "Lomo: fused_layers apply a weight's gradient from its factors, which are this rank's own; over "
                "several ranks the gradient has to be summed first, and so to exist. Use fused_layers=False"
            )
        for record in records:
            ranks.place(record)
        ranks.agree(
            {
                "parameters": [
                    (one.name, tuple(shape_of(one.param)), one.param.dtype, is_here(one.param)) for one in records
                ],
                "frozen parameters": [one.param.requires_grad for one in records],
                "hyperparameters": [(len(group["params"]), *numbers_of(group)) for group in groups],
                "options": settings.same_everywhere(),
                "seeds": settings.seed,
            }
        )
        ranks.start(records, None if self._whole is None else self._whole())
        return ranks

    def _replace_owners(self, records: Sequence[Record]) -> None:
        """Ends the use of other optimizers that manage some of `records`. Raises RuntimeError if one is amid a step."""
        for owner in other_owners(records, self):
            owner.end_use(
                "this optimizer was replaced by a newer Lomo, which took over some or all of its parameters. A "
                "parameter has one optimizer. Use the newer one, or make another one of the other parameters"
            )

    def end_use(self, reason: str) -> None:
        """Removes all hooks from the parameters. `reason`: the error message of a later use."""
        self.attachment.remove()
        self.ended = self.ended or reason

    def check_not_ended(self) -> None:
        if self.ended:
            raise RuntimeError(f"Lomo: {self.ended}")

    def grad_norms(self) -> dict[str, Tensor]:
        """See `Lomo.grad_norms`."""
        norms: dict[str, Tensor] = {}
        for record, norm in zip(self.records, self.state.norms().unbind(), strict=True):
            name = record.name if record.name not in norms else f"{record.name} (parameter {record.index})"
            norms[name] = norm
        return norms

    def count_step(self, *, scaled: bool) -> None:
        """Ends a step: counts it, updates the loss scale, and informs the ranks' engine, schedulers and autocast."""
        if self.ranks is not None:
            self.ranks.end()
        self.state.end_step(scaled)
        torch.clear_autocast_cache()  # it may hold low-precision copies of the weights before the update
        self.trained = True
        self.unpickled = False
        optimizer = self.optimizer()
        if optimizer is not None:
            optimizer._opt_called = True  # what schedulers look at to see that the optimizer went before them
