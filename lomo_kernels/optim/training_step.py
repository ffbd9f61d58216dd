"""One step of an optimizer: norm, clip coefficient, update, end."""

from __future__ import annotations

import functools
import math
import warnings

import torch
from torch import Tensor

from .backward import Backward
from .clip_memory import Fitting
from .defer_pass import DeferPass, MeasurePass
from .engines.base import ParallelEngine
from .graph import Graph, check_fused_weights, check_loss
from .hyperparameters import check_group
from .inside_accelerate import check_synchronised
from .managed_parameter import ManagedParameter
from .out_of_memory import ran_out_of_memory
from .passes import NormPass, Pass, UpdatePass
from .scaling import check_no_grad_scaler
from .step import Step
from .training import Training

_NOTHING_CHANGED = "no weight was changed"


class TrainingStep:
    """What one call of `Lomo.backward`, `fused_backward`, `grad_norm` or `step` does.

    Args:
        step: what is removed if this breaks off.
    """

    def __init__(self, training: Training, step: Step) -> None:
        self._training = training
        self._step = step
        self._settings = training.settings

    def backward(self, loss: Tensor, lr: float | Tensor | None = None, *, after_grad_norm: bool = False) -> None:
        """A step from `loss` and from gradients in ``.grad``. `lr`, if given, is the learning rate of all groups."""
        training = self._training
        self._check_loss(loss)
        if not after_grad_norm:
            training.drop_norm()
        training.refresh(loss, lr)
        training.check_unchanged()
        known, training.norm_is_known = training.norm_is_known, False
        kept = training.accumulation.gradients()
        if training.accumulating or kept or self._unreduced():
            Backward(training, self._step, loss).add_to_grads(kept)
            del kept
            if not training.accumulating:
                self._apply_grads(keep=False)
            return
        backward = Backward(training, self._step, loss)
        backward.start_scale()
        budget = training.budget()
        runs_once = not known and self._must_run_once(backward.graph, budget)
        if not known and (budget or runs_once):
            try:
                self._backward_within(backward, math.inf if runs_once else budget)
            except RuntimeError as error:
                halves = not runs_once and training.engine is None and ran_out_of_memory(error)
                if halves and training.clip_budget.halve():
                    warnings.warn(
                        'Lomo: memory ran out. clip_memory="auto" keeps half as many bytes from the next step on',
                        stacklevel=9,
                    )
                raise
            return
        training.clip_budget.evicted = training.managed_params if training.keeps_gradients else []
        if training.norm_comes_first:
            if not known:
                self._find_norm(backward)
            self._raise_if_not_finite(backward.scale, _NOTHING_CHANGED)
        else:
            if training.attachment.fuses:
                check_fused_weights(loss)
            training.repeat_check.check_checkpoints(backward.graph, training.state, backward.norm_only_pass)
            training.state.zero_slots()
        backward.run_pass(self._update_pass(backward.scale, training.engine), retain_graph=False)
        self._finish(backward.scale)

    def find_norm(self, loss: Tensor) -> None:
        """A backward for the norm, which the next `Lomo.fused_backward` uses."""
        training = self._training
        training.drop_norm()
        self._check_loss(loss)
        training.refresh(loss)
        if training.accumulation.gradients():
            raise RuntimeError(
                "Lomo: grad_norm() found gradients in .grad, expected none; use backward(), which includes them, "
                "or zero_grad(), which drops them"
            )
        backward = Backward(training, self._step, loss)
        backward.runs_loss_once = False  # a second backward comes with `fused_backward`, perhaps of another loss
        backward.start_scale()
        self._find_norm(backward)
        training.norm_is_known = True

    def fused_backward(self, loss: Tensor, lr: float | Tensor) -> None:
        check_group({"lr": lr, "weight_decay": 0.0, "clip_grad_value": None}, "Lomo.fused_backward")
        self.backward(loss, lr, after_grad_norm=True)

    def apply_plain(self) -> None:
        """A step from the gradients in ``.grad``, which stay there."""
        with torch.no_grad():
            self._training.refresh()
            self._apply_grads(keep=True)

    def _check_loss(self, loss: Tensor) -> None:
        """Raises TypeError, ValueError or RuntimeError unless `loss` is one number, no GradScaler has scaled it, and
        accelerate does not want this batch's gradients to be accumulated."""
        check_loss(loss)
        training = self._training
        if not training.accumulating:
            check_synchronised(training.optimizer())
        if not training.looked_for_scaler:  # once: some loops multiply by another tensor each time
            training.looked_for_scaler = check_no_grad_scaler(loss)

    def _must_run_once(self, graph: Graph, budget: float) -> bool:
        """Whether `torch.compile` allows one backward, and `budget` wants two. Over several ranks, which have to decide
        alike, such a backward is refused (`errors_explained`)."""
        training = self._training
        twice = training.norm_comes_first and budget < math.inf
        if not twice or training.engine is not None or not graph.donates_buffers:
            return False
        if not training.warned_of_donated_buffers:
            training.warned_of_donated_buffers = True
            warnings.warn(
                "Lomo: torch.compile has compiled this model for one backward (donated buffers). All gradients are "
                "kept until their norm is known, in more memory than clip_memory allows. For two backwards, set "
                "torch._functorch.config.donated_buffer = False before the model is compiled",
                stacklevel=10,
            )
        return True

    def _backward_within(self, backward: Backward, budget: float) -> None:
        """A step that keeps gradients, at most `budget` bytes of them, until the norm is known. If not all of them fit,
        a second backward through the layers nearest to the loss brings the others.

        The first step of a graph keeps nothing. It finds out what fits.
        """
        training, graph = self._training, backward.graph
        kind, fits = 0, Fitting([], 0)
        if budget < math.inf:
            kind = self._kind_of(graph)
            known = training.clip_budget.fitting(kind, budget) if training.repeat_check.is_known(graph) else None
            if known is None:
                self._measure(backward, kind, budget)
                return
            fits = known
        evicted = [managed for managed in fits.evicted if managed.param.requires_grad]
        training.clip_budget.evicted = evicted
        cut = graph.cut([managed.param for managed in evicted]) if evicted else None
        training.state.zero_slots()
        gradients = DeferPass(
            training.state.devices,
            training.fused_params,
            scaled=backward.scaled,
            engine=training.engine,
            evicted=evicted,
        )
        backward.run_pass(gradients, retain_graph=False, cut=cut)
        gradients.check(gradients.outcome)
        hidden = self._hidden(graph, gradients) if evicted else []
        if hidden:
            training.clip_budget.forget(kind)
            raise RuntimeError(
                f"Lomo: the graph does not show {hidden[0].name}, and did not use it in an earlier step with an equal "
                "graph (a checkpoint that hides its block, of which a parameter was unfrozen?). No weight was changed. "
                "The next step runs through all layers twice: run this batch again"
            )
        training.state.finish_norm(training.clip_grad_norm)
        self._raise_if_not_finite(backward.scale, _NOTHING_CHANGED)
        if budget < math.inf:
            more, nbytes = gradients.beyond(budget)
            training.clip_budget.remember(kind, Fitting([*fits.evicted, *more], nbytes))
        update = self._update_pass(backward.scale, factors_only_if_smaller=True)
        if evicted:  # first, because the layers between them and the loss must have their old weights
            backward.run_pass(update, retain_graph=False, only=evicted)
            gradients.check(update.outcome)
        gradients.apply(update)
        self._finish(backward.scale)

    def _measure(self, backward: Backward, kind: int, budget: float) -> None:
        """A step in two backwards, which keeps nothing and finds out what would fit into `budget` bytes."""
        training = self._training
        training.state.zero_slots()
        norm = MeasurePass(training.state.devices, training.fused_params, scaled=backward.scaled, budget=budget)
        backward.run_pass(norm, retain_graph=True)
        training.clip_budget.evicted = training.managed_params
        hidden = self._hidden(backward.graph, norm)
        training.state.finish_norm(training.clip_grad_norm)
        training.repeat_check.check_clipping(backward.graph, training.state, backward.norm_only_pass)
        self._raise_if_not_finite(backward.scale, _NOTHING_CHANGED)
        if not (hidden or backward.graph.has_reentrant_checkpoints):  # which refuse a backward through a part
            training.clip_budget.remember(kind, Fitting(norm.evicted, norm.nbytes))
        update = self._update_pass(backward.scale, factors_only_if_smaller=True)
        backward.run_pass(update, retain_graph=False)
        self._finish(backward.scale)

    def _hidden(self, graph: Graph, sink: Pass) -> list[ManagedParameter]:
        """Parameters whose gradients came and which are no leaves of the graph: a checkpoint of another library hides
        their layers, and no second backward could go through some of them only."""
        leaves = {id(leaf) for leaf in graph.leaves}
        return [
            managed
            for managed in self._training.managed_params
            if managed.last_pass == sink.serial and id(managed.param) not in leaves
        ]

    def _kind_of(self, graph: Graph) -> int:
        """A hash of the graph's shape and its parameters: one optimizer may train several equal models."""
        index_of = {id(managed.param): managed.index for managed in self._training.managed_params}
        return hash((graph.shape, *(index_of.get(id(leaf)) for leaf in graph.leaves)))

    def _find_norm(self, backward: Backward) -> None:
        training = self._training
        backward.norm_only_pass(training.engine)
        training.state.finish_norm(training.clip_grad_norm)
        training.repeat_check.check_clipping(backward.graph, training.state, backward.norm_only_pass)

    def _apply_grads(self, *, keep: bool) -> None:
        """Norm, update and end of a step from the gradients in ``.grad``. They stay there if `keep`."""
        training = self._training
        training.drop_norm()
        kept = training.accumulation.gradients()
        scale = training.accumulation.scale_of(kept)
        training.state.unscale_by(scale)
        if not keep:
            self._step.consume()
        if training.engine is not None:
            kept = training.engine.reduce_stored_grads(kept, copy=keep)
        training.state.zero_slots()
        if training.norm_comes_first:
            norm = NormPass(training.state.devices, scaled=training.state.is_scaled(scale))
            for managed, grad in kept:
                norm.add(managed, grad)
            norm.flush()
            training.state.finish_norm(training.clip_grad_norm)
            self._raise_if_not_finite(scale, _NOTHING_CHANGED)
        update = self._update_pass(scale)
        while kept:
            update.add(*kept.pop())
        update.flush()
        self._finish(scale)

    def _unreduced(self) -> bool:
        """Whether FSDP2 holds gradients of backwards without synchronisation. Only the first of two passes would see
        them, so they need one backward into ``.grad``. Raises RuntimeError if they may lack the loss scale."""
        training = self._training
        if training.engine is None or not training.engine.has_unreduced_grads():
            return False
        if training.state.scale.used:
            raise RuntimeError(
                "Lomo: gradients of backwards under set_requires_gradient_sync(False) wait in FSDP2. They may lack the "
                "loss scale. Leave synchronisation on and use optimizer.accumulate(). No weight was changed"
            )
        return training.norm_comes_first

    def _update_pass(
        self, scale: Tensor | None, engine: ParallelEngine | None = None, *, factors_only_if_smaller: bool = False
    ) -> UpdatePass:
        training = self._training
        state = training.state
        scaled, norm_known = state.is_scaled(scale), training.norm_comes_first
        state.prepare_update(scaled=scaled, norm_known=norm_known)
        self._step.update = state.strategy.make_pass(
            state.devices,
            training.fused_params,
            norm_known=norm_known,
            squares=state.squares,
            scaled=scaled,
            engine=engine,
            rule=self._settings.kernel_rule,
            stochastic=self._settings.stochastic,
            splits=self._settings.splits,
            seed=self._settings.seed,
            factors_only_if_smaller=factors_only_if_smaller,
        )
        return self._step.update

    def _finish(self, scale: Tensor | None) -> None:
        # In one line: an interrupt comes before both or after both.
        self._step.finish, self._step.applied = functools.partial(self._finish_again, scale), True
        if not self._training.norm_comes_first:
            self._training.state.finish_norm(None)
            self._training.repeat_check.end_step()
            assert self._step.update is not None
            outcome = (
                f"{self._step.update.kept_if_not_finite} whose gradient is not finite were kept, the others were "
                "updated (with clip_grad_norm or dynamic loss scaling, all would have been kept)"
            )
            self._raise_if_not_finite(scale, outcome)
        self._end(scale)

    def _finish_again(self, scale: Tensor | None) -> None:
        """Counts a step that broke off after its last update. Over several ranks there is no message: the others may
        have gone on."""
        training = self._training
        if training.engine is not None:
            return
        if not training.norm_comes_first:
            training.state.finish_norm(None)
        self._end(scale)

    def _raise_if_not_finite(self, scale: Tensor | None, outcome: str) -> None:
        """Ends the step with an error if ``nonfinite="raise"`` and the norm is not finite."""
        if self._settings.raise_nonfinite and self._training.state.primary.found_inf.item():
            names = [managed.name for managed in self._training.managed_params if not managed.slot.isfinite().item()]
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            self._end(scale)
            where = f"in {', '.join(names[:5])}{more}" if names else "on another rank"
            raise FloatingPointError(f"Lomo: the gradient is not finite {where}; {outcome}")

    def _end(self, scale: Tensor | None) -> None:
        step, training = self._step, self._training
        moves = training.after_step(scaled=scale is not None)  # all that needs memory and messages
        step.finish = functools.partial(training.count_step, moves)
        step.finish()
        step.ended = True
        step.finish = None
