"""What an optimizer has that outlives a step: settings, parameters, what is attached to them, and device state."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import stand_in
from .accumulation import Accumulation
from .attachment import Attachment
from .clip_memory import ClipBudget
from .engines.base import ParallelEngine
from .engines.choose import choose_engine
from .factored_rules import NUMBERS
from .hyperparameters import numbers_of, unused_momentum
from .loss_chain import LossChains
from .managed_parameter import ManagedParameter
from .owners import other_owners
from .parameters import check_adapters, check_groups, check_parameter, check_unchanged, is_supported
from .placement import is_here, shape_of
from .repeat_check import RepeatCheck
from .scaling import Moves, computes_in_float16
from .settings import Settings
from .split import lacks_low_part, make_low_parts, state_of
from .state import TrainingState
from .step import Steps
from .summary import summary


class Training:
    """One optimizer's parameters under training. Hooks on the parameters keep neither this nor the optimizer alive.

    Args:
        optimizer: a `Lomo`.
        fused_model: in which layers are fused; None: nowhere.
        given_model: gives the model that was passed to the optimizer, if one was.
    """

    state: TrainingState

    def __init__(
        self,
        optimizer: Any,
        settings: Settings,
        fused_model: nn.Module | None,
        given_model: Callable[[], nn.Module | None],
    ) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.settings = settings
        self.managed_params: list[ManagedParameter] = []
        self.engine: ParallelEngine | None = None
        self.attachment = Attachment(self, self.managed_params, fused_model)
        self.steps = Steps(self.managed_params)
        self.accumulation = Accumulation(self.managed_params)
        self.repeat_check = RepeatCheck(
            self, self.managed_params, given_model if fused_model is None else weakref.ref(fused_model)
        )
        self.loss_chains = LossChains()
        self.clip_budget = ClipBudget(settings.clip_memory)
        # Over several ranks: the number of trained parameters, and whether all their gradients fit on every rank.
        self._ranks_keep_all: tuple[int, bool] | None = None
        self.clips_tensors = False  # this step clips each gradient by its own norm
        self.accumulating = False  # inside `Lomo.accumulate`
        self.norm_is_known = False  # grad_norm() was called and fused_backward() not yet
        self.passed_over = False  # another optimizer's backward dropped a gradient of ours
        self.trained = False  # there was a step since `Lomo.step` or `zero_grad` was last called
        self.unpickled = False  # until the first step
        self.started = False  # there are parameters, state and hooks
        self.ended = ""  # why it cannot be used any more
        self._given_model = given_model
        self._compares_parameters = True  # until the first step has done so
        self.scale_is_open = settings.loss_scale == "auto"  # until a backward says whether it computes in float16
        self.looked_for_scaler = False  # a torch GradScaler, behind a loss
        self.warned_of_donated_buffers = False
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
    def clip_grad_norm(self) -> float | None:
        """The bound on the norm of all gradients, if this step has one."""
        return None if self.clips_tensors else self.settings.clip_grad_norm

    @property
    def norm_comes_first(self) -> bool:
        """Whether an update needs the norm of all gradients."""
        return self.clip_grad_norm is not None or self.state.scale.kind == "dynamic"

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients may be kept until the norm is known."""
        return self.settings.clip_memory != 0 and self.norm_comes_first

    def budget(self) -> float:
        """Bytes that a step which needs the norm may keep: infinite: all gradients; 0: none.

        Over several ranks a second backward through some layers only is not possible: FSDP2 and ZeRO-3 bring gradients
        to other tensors than the graph's leaves. There it is all or nothing. All ranks decide alike, once for each set
        of trained parameters.
        """
        if not self.keeps_gradients:
            return 0.0
        if self.engine is None:
            return self.clip_budget.of_step(self.managed_params)
        trained = sum(managed.param.requires_grad for managed in self.managed_params)
        if self._ranks_keep_all is None or self._ranks_keep_all[0] != trained:
            lacking = torch.tensor(
                float(self.clip_budget.of_step(self.managed_params) < math.inf),
                dtype=torch.float64,
                device=self.state.norm.device,
            )
            self.engine.sum_(lacking)
            self._ranks_keep_all = trained, lacking.item() == 0
        return math.inf if self._ranks_keep_all[1] else 0.0

    @property
    def fused_params(self) -> list[Tensor]:
        """In whose memory a fused layer's factors may lie."""
        return [managed.param for managed in self.managed_params if managed.supported] if self.attachment.fuses else []

    def start(self) -> None:
        """Makes the state, and puts hooks on all parameters."""
        self.engine = self.join_engine(self.managed_params, self.groups)
        self._prepare_rule()
        self.state = self._new_state()
        self.show_state()
        model = self.attachment.model
        ids = {id(managed.param) for managed in self.managed_params}
        if model is not None and ids.isdisjoint(id(param) for param in model.parameters()):
            raise ValueError("Lomo: fused_layers is a module with none of the parameters given, expected their model")
        self._replace_owners(self.managed_params)
        self.attachment.attach()
        self.started = True

    def _prepare_rule(self) -> None:
        """For a rule with factors: finds the embeddings' weights. Raises NotImplementedError if a gradient's sums
        cannot be had."""
        rule = self.settings.factored_rule
        if rule is None:
            return
        for managed in self.managed_params:
            if managed.groups and managed.blocks is None:
                raise NotImplementedError(
                    f"Lomo: rule {rule.name!r} needs sums along rows and columns of {managed.name}, and the placements "
                    f"{getattr(managed.param, 'placements', None)} give a rank rows that do not follow each other. "
                    "Redistribute it to Shard and Replicate, or use rule='sgd'"
                )
        model = self._given_model() if self.attachment.model is None else self.attachment.model
        if model is not None:
            self.note_embeddings(model)

    def note_embeddings(self, model: nn.Module) -> None:
        """Finds the embeddings' weights, which the rule "rows" treats otherwise. Parameter groups do not name them."""
        weights = {
            id(getattr(module, "weight", None)) for module in model.modules() if isinstance(module, nn.Embedding)
        }
        for managed in self.managed_params:
            managed.is_embedding = managed.is_embedding or id(managed.param) in weights

    def extend(self, managed_params: Sequence[ManagedParameter], engine: ParallelEngine | None) -> None:
        """Attaches `managed_params`, which were added to the others, to all of which `engine` belongs."""
        self.engine = engine
        self._prepare_rule()
        self.make_state()
        self._replace_owners(managed_params)
        self.attachment.attach()

    def refresh(self, loss: Tensor | None = None, lr: float | Tensor | None = None) -> None:
        """Reads what changed since the last step: hyperparameters, devices, dtypes, what is frozen, the loss scale."""
        self.check_not_ended()
        groups = self.groups
        check_groups(self.managed_params, groups)
        engine, splits, stale = self.engine, self.settings.splits, self._stale
        for managed in self.managed_params:
            if engine is not None:
                managed.set_placement(engine.localize(managed))
            local = managed.local
            moved = local.dtype is not managed.dtype or local.device != managed.device
            unfrozen = not managed.supported and managed.param.requires_grad
            stale = stale or moved or unfrozen or (splits and lacks_low_part(managed))
            if managed.scaled_grad is not None or managed.zeros is not None:
                managed.forget_old_grad()
        if stale:
            self.make_state()
        self.attachment.hook_all()
        if self.attachment.fuses:
            stand_in()  # for a loss whose package was imported since then
        if loss is not None:
            self._scale_float16(loss)
        if not self._warned_of_momentum and (text := unused_momentum(groups)):
            self._warned_of_momentum = True
            warnings.warn(text, stacklevel=10)
        self.state.refresh(groups, lr)
        self.clips_tensors = self.state.strategy.begin_step(self.state.primary.step, self.state.skipped)

    def check_unchanged(self) -> None:
        """Raises RuntimeError if parameters were exchanged since the optimizer was made (asked in the first step), or
        if PEFT has added some to the model."""
        model = self._given_model() if self.engine is None else None
        if hasattr(model, "peft_config"):
            assert model is not None
            check_adapters(self.managed_params, model)
        if self._compares_parameters:
            check_unchanged(self.managed_params, model)
            self._compares_parameters = False

    def _scale_float16(self, loss: Tensor) -> None:
        """The first backward decides what ``loss_scale="auto"`` means if no parameter is float16."""
        if not self.scale_is_open:
            return
        self.scale_is_open = False
        if self.state.scale.used or not computes_in_float16(loss):
            return
        if self.engine is not None:  # which would have to agree on it
            warnings.warn(
                "Lomo: backward computes in float16 (autocast?) without a loss scale, so small gradients become zero. "
                'Over several processes, pass loss_scale="dynamic" (or None) to Lomo',
                stacklevel=11,
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
            moves = self.state.after_dropped_norm()
            self.norm_is_known = False
            self.state.move(moves)

    def after_zero_grad(self) -> None:
        """Gradients in ``.grad`` were dropped, or filled with zeros."""
        for managed in self.managed_params:
            managed.note_zeros()
        self.drop_norm()
        self.trained = False

    def make_state(self) -> None:
        """Makes the device state again: parameters were added, or moved to another device or dtype."""
        for managed in self.managed_params:
            check_parameter(managed.name, managed.param)
            managed.supported = is_supported(managed.param)
        self.drop_norm()
        self._ranks_keep_all = None
        self.clip_budget.clear()
        self._stale = True
        self.state = self._new_state(self.state)
        self.show_state()
        self._stale = False

    def _new_state(self, before: TrainingState | None = None) -> TrainingState:
        settings = self.settings
        if settings.splits:
            make_low_parts(self.managed_params)
        return TrainingState(
            self.managed_params,
            self.groups,
            settings.loss_scale,
            clip_tensor=settings.clip_tensor,
            rule=settings.factored_rule,
            engine=self.engine,
            before=before,
        )

    def show_state(self) -> None:
        """Puts the optimizer's numbers into its ``state``, where torch looks for a parameter's state.

        If the state were empty, `torch.distributed.checkpoint` would make gradients for all parameters and run a step.
        """
        optimizer = self.optimizer()
        assert optimizer is not None
        for managed in self.managed_params:
            numbers = {"seed": self.settings.seed, "rule": NUMBERS[self.settings.rule]}
            optimizer.state[managed.param] = self.state.by_parameter(managed.index) | numbers | state_of(managed)

    def join_engine(
        self, managed_params: Sequence[ManagedParameter], groups: Sequence[dict[str, Any]]
    ) -> ParallelEngine | None:
        """Finds the processes that take part in training these parameters, and starts from the same everywhere."""
        settings = self.settings
        engine = choose_engine(managed_params, settings.process_group, stochastic=settings.stochastic)
        if engine is None:
            return None
        if self.attachment.model is not None:
            raise ValueError(
                "Lomo: fused_layers apply a weight's gradient from its factors, which are this rank's own; over "
                "several ranks the gradient has to be summed first, and so to exist. Use fused_layers=False"
            )
        for managed in managed_params:
            managed.set_placement(engine.localize(managed))
        engine.check_consistent(
            {
                "parameters": [
                    (managed.name, tuple(shape_of(managed.param)), managed.param.dtype, is_here(managed.param))
                    for managed in managed_params
                ],
                "frozen parameters": [managed.param.requires_grad for managed in managed_params],
                "hyperparameters": [(len(group["params"]), *numbers_of(group)) for group in groups],
                "options": settings.same_everywhere(),
                "seeds": settings.seed,
            }
        )
        engine.begin_training(managed_params, self._given_model() if self._compares_parameters else None)
        return engine

    def _replace_owners(self, managed_params: Sequence[ManagedParameter]) -> None:
        """Ends the use of other optimizers of these parameters. Raises RuntimeError if one is amid a step."""
        for owner in other_owners(managed_params, self):
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

    def summary(self) -> str:
        """See `Lomo.summary`."""
        return summary(
            self.managed_params,
            self.attachment.model,
            kept=self.keeps_gradients,
            evicted=self.clip_budget.evicted,
            rule=self.settings.factored_rule,
        )

    def grad_norms(self) -> dict[str, Tensor]:
        """See `Lomo.grad_norms`."""
        norms: dict[str, Tensor] = {}
        for managed, norm in zip(self.managed_params, self.state.squares().sqrt().unbind(), strict=True):
            name = managed.name if managed.name not in norms else f"{managed.name} (parameter {managed.index})"
            norms[name] = norm
        return norms

    def after_step(self, *, scaled: bool) -> Moves:
        """What the end of a step changes. Informs the ranks' engine."""
        if self.engine is not None:
            self.engine.end()
        return self.state.after_step(scaled, norm_known=self.norm_comes_first, clipped=self.clip_grad_norm is not None)

    def count_step(self, moves: Moves) -> None:
        """Ends a step: counts it, updates the loss scale, and informs schedulers and autocast. An interrupt may cut it
        short; then it is called again."""
        self.state.move(moves)
        self.state.strategy.count_step()
        torch.clear_autocast_cache()  # it may hold low-precision copies of the weights before the update
        self.trained = True
        self.unpickled = False
        optimizer = self.optimizer()
        if optimizer is not None:
            optimizer._opt_called = True  # what schedulers look at to see that the optimizer went before them
