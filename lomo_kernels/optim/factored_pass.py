"""The pass of rules with row and column factors: see `factored_rules`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .factor_store import SavedFactors
from .factored_part import FactoredPart
from .factored_rules import Factors
from .fused_factored import LookedUpRows, formed, update_by_row
from .managed_parameter import ManagedParameter
from .passes import NormPass, UpdatePass
from .rule_state import RuleState
from .tensor_clip_pass import BATCH
from .weight_gradient import WeightGradient


class FactoredPass(UpdatePass, NormPass):
    """Finds a gradient's sums of squares by rows and columns, the rule's factors, and the size of u. Then it updates.

    If ranks have parts of gradients, some gradients wait for each other, because one message brings the sums of all,
    and another one the sizes, if the rule needs them. Gradients come in the same order on all ranks: the engines' own
    messages need that, too. A rank without elements of a parameter takes part with zeros.

    Args:
        rule_state: the rule, its state, and the scalars of each parameter's update.
    """

    kept_if_not_finite = "parameters"

    def __init__(self, *args: Any, rule_state: RuleState, **options: Any) -> None:
        super().__init__(*args, vector_of=rule_state.scalars.vector, **options)
        self._rule_state = rule_state
        engine = rule_state.engine  # the gradients that come may be local ones already, and `self._engine` None
        if engine is not None and not engine.has_whole_grads:
            self._batch = BATCH  # a count, because parts have different sizes and ranks must send alike

    def _handle(self, managed: ManagedParameter, grad: Tensor) -> None:
        self._handle_list([managed], [grad])

    def _handle_list(self, managed_params: Sequence[ManagedParameter], grads: list[Tensor]) -> None:
        if not self.norm_known and managed_params[0].scalars.clamps:
            NormPass._handle_list(self, managed_params, grads)
        together: dict[tuple[dist.ProcessGroup, ...], list[FactoredPart]] = {}
        for managed, grad in zip(managed_params, grads, strict=True):
            part = FactoredPart(managed, grad)
            if managed.groups or not self._batch:
                together.setdefault(managed.groups or (), []).append(part)
            else:  # a large one, which may be a copy in another layout: not many of them at a time
                self._apply([part], ())
        for groups, parts in together.items():
            self._apply(parts, groups)

    def _apply(self, parts: Sequence[FactoredPart], groups: Sequence[dist.ProcessGroup]) -> None:
        """Updates some parameters of one device. `groups`: of the ranks that have their other parts."""
        state, rule, device = self._rule_state, self._rule_state.rule, parts[0].managed.device
        lengths = [length for part in parts for length in part.lengths]
        of_sums = sum(lengths)
        zeros = torch.zeros(of_sums + len(parts), dtype=torch.float64, device=device)
        pieces = torch.split_with_sizes(zeros, [*lengths, *[1] * len(parts)])
        for i, part in enumerate(parts):
            part.add_sums(*pieces[3 * i : 3 * i + 3], of_param=rule.needs_scale)
        # If nothing has clipped the gradient, its sum is its norm: a read less, of four with "adalomo".
        slots = [None if self.norm_known or part.managed.scalars.clamps else part.managed.slot for part in parts]
        if groups:
            for part, slot in zip(parts, slots, strict=True):
                if slot is not None:  # of this rank's own part
                    slot.add_(part.row_sums.sum())
            self._add_other_ranks(zeros[:of_sums], groups)
            slots = [None] * len(parts)
        scalars = [state.scalars.cells(part.managed) for part in parts]
        factors: list[Factors] = []
        for part, cells, slot in zip(parts, scalars, slots, strict=True):
            part.add_total(slot, cells.found_inf)
            factors.append(rule.factors(part.managed, part.sums, state.of(part.managed), state.of_step(device)))
        if rule.needs_scale:
            sizes = pieces[len(lengths) :]
            for part, of_part, size in zip(parts, factors, sizes, strict=True):
                part.add_sq_norm(of_part, size)
            if groups:
                self._add_other_ranks(zeros[of_sums:], groups)
            for part, cells, size in zip(parts, scalars, sizes, strict=True):
                rule.scale_(cells.clip_coef, size, part.param_squares, part.elements)
        self.changed = True
        for part, of_part, cells in zip(parts, factors, scalars, strict=True):
            if of_part.coef is not None:
                cells.clip_coef.mul_(of_part.coef)
            part.update(of_part, cells.vector, rule=self.rule, stochastic=self.stochastic, seed=self.seed)
            if of_part.state:  # last, and without memory: if memory runs out, the state is that of the weight
                state.replace(part.managed, of_part.state, part.is_finite)

    def _add_other_ranks(self, sums: Tensor, groups: Sequence[dist.ProcessGroup]) -> None:
        assert self._rule_state.engine is not None
        self._rule_state.engine.sum_parts_(sums, groups)

    def _handle_factors(self, managed: ManagedParameter, grad: Tensor | None, saved: Sequence[SavedFactors]) -> None:
        """Factors of a layer's uses: see `fused_factored`. No rank has a part of a fused layer's weight."""
        uses, param = [held.factors for held in saved], managed.param.detach()
        add_norm = None if self.norm_known else partial(NormPass._handle, self, managed)
        if self._rule_state.rule.is_by_row(managed):
            self.changed, self.kept_if_not_finite = True, "parameters (in fused layers, rows)"
            draws = self.rule, self.stochastic, self.seed, managed.index
            update_by_row(managed, WeightGradient(uses, grad).tiles(param), self._rule_state, add_norm, draws)
            return
        rows = LookedUpRows(uses, param, managed.low) if grad is None and LookedUpRows.suit(uses, param) else None
        gradient = formed(uses, grad, param) if rows is None else rows.grad
        uses.clear()  # frees the factors, as autograd would have done by now
        if isinstance(saved, list):
            saved.clear()
        if add_norm is not None and managed.scalars.clamps:
            add_norm(gradient)
        self._apply([FactoredPart(managed, gradient if rows is None else rows)], ())
