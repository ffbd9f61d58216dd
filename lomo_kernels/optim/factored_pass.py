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
            if managed.groups:
                together.setdefault(managed.groups, []).append(part)
            else:
                self._apply([part], ())
        for groups, parts in together.items():
            self._apply(parts, groups)

    def _apply(self, parts: Sequence[FactoredPart], groups: Sequence[dist.ProcessGroup]) -> None:
        """Updates some parameters of one device. `groups`: of the ranks that have their other parts."""
        state, rule, device = self._rule_state, self._rule_state.rule, parts[0].managed.device
        lengths = [part.length for part in parts]
        zeros = torch.zeros(sum(lengths) + len(parts), dtype=torch.float64, device=device)
        sums, sizes = zeros.split([sum(lengths), len(parts)])
        for part, piece in zip(parts, _pieces(sums, lengths), strict=True):
            part.add_sums(piece, of_param=rule.needs_scale)
            if not (self.norm_known or part.managed.scalars.clamps):
                # Nothing has clipped the gradient, so its sum is its norm: a read less, of four with "adalomo".
                part.managed.slot.add_(part.sums.total)
        if groups:
            self._add_other_ranks(sums, groups)
            for part in parts:
                part.add_up_rows()
        factors = [
            rule.factors(part.managed, part.sums, state.of(part.managed), state.of_step(device)) for part in parts
        ]
        coefs = [of_part.coef for of_part in factors]
        if rule.needs_scale:
            for part, of_part, slot in zip(parts, factors, _pieces(sizes, [1] * len(parts)), strict=True):
                part.add_sq_norm(of_part, slot)
            self._add_other_ranks(sizes, groups)
            coefs = [
                rule.scale(size, part.param_squares[0], part.elements)
                for part, size in zip(parts, sizes.unbind(), strict=True)
            ]
        for part, of_part, coef in zip(parts, factors, coefs, strict=True):
            self._update(part, of_part, coef)

    def _add_other_ranks(self, sums: Tensor, groups: Sequence[dist.ProcessGroup]) -> None:
        if groups:
            assert self._rule_state.engine is not None
            self._rule_state.engine.sum_parts_(sums, groups)

    def _update(self, part: FactoredPart, factors: Factors, coef: Tensor | None) -> None:
        """The coefficient and the overflow flag of the parameter's update take in what the gradient says."""
        cells = self._rule_state.scalars.cells(part.managed)
        if coef is not None:
            cells.clip_coef.mul_(coef)
        cells.found_inf.add_(part.sums.total, alpha=0.0)  # NaN, which is not zero, of infinity and of NaN
        is_right = cells.found_inf == 0 if factors.state else None
        self.changed = True
        part.update(factors, cells.vector, rule=self.rule, stochastic=self.stochastic, seed=self.seed)
        if is_right is not None:  # last, and without memory: if memory runs out, the state is that of the weight
            self._rule_state.replace(part.managed, factors.state, is_right)

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


def _pieces(tensor: Tensor, lengths: list[int]) -> Sequence[Tensor]:
    return tensor.split(lengths) if len(lengths) > 1 else (tensor,)
