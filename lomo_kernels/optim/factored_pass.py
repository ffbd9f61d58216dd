"""The pass of rules with row and column factors: see `factored_rules`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .factor_store import SavedFactors
from .factored_rules import Factors, Sums, shape_of_matrices
from .managed_parameter import ManagedParameter
from .passes import NormPass, UpdatePass
from .rule_state import RuleState


class FactoredPass(UpdatePass, NormPass):
    """Finds a gradient's sums of squares by rows and columns, the rule's factors, and the size of u. Then it updates.

    Args:
        rule_state: the rule, its state, and the scalars of each parameter's update.
    """

    kept_if_not_finite = "parameters"

    def __init__(self, *args: Any, rule_state: RuleState, **options: Any) -> None:
        super().__init__(*args, vector_of=rule_state.scalars.vector, **options)
        self._rule_state = rule_state

    def _handle(self, managed: ManagedParameter, grad: Tensor) -> None:
        if not grad.numel():
            return
        if not self.norm_known:
            NormPass._handle(self, managed, grad)
        local = managed.local.detach()
        matrices, rows, columns = shape_of_matrices(local.shape)
        matrix, weight = (tensor.reshape(matrices * rows, columns) for tensor in (grad, local))
        factors = self._find_factors(managed, matrix, local)
        cells = self._rule_state.scalars.cells(managed)
        self.changed = True
        self._rule_state.replace(managed, factors.state, cells.found_inf)
        torch.ops.lomo_kernels.factored_update_.default(
            weight,
            matrix,
            factors.rows,
            factors.columns,
            cells.vector,
            self.rule,
            self.stochastic,
            self.seed,
            managed.index,
            [],
        )
        if weight.data_ptr() != local.data_ptr():  # `reshape` made a copy: the rows do not follow each other in memory
            local.copy_(weight.view(local.shape))
        torch.autograd.graph.increment_version(managed.local)

    def _find_factors(self, managed: ManagedParameter, matrix: Tensor, local: Tensor) -> Factors:
        """The factors of a gradient. The coefficient and the overflow flag of the parameter's update take in what the
        gradient says.

        Args:
            matrix: the gradient, its matrices below each other.
            local: the parameter.
        """
        state, rule = self._rule_state, self._rule_state.rule
        cells, scalars = state.scalars.cells(managed), managed.scalars.vector
        matrices, rows, columns = shape_of_matrices(local.shape)
        sums = Sums(
            torch.zeros(matrices * rows, dtype=torch.float64, device=matrix.device),
            torch.zeros(matrices, columns, dtype=torch.float64, device=matrix.device),
        )
        torch.ops.lomo_kernels.factor_sums_.default(*sums, matrix, scalars)
        factors = rule.factors(managed, sums, state.of(managed), state.step(managed.device))
        coef = factors.coef
        if rule.needs_scale:
            size, of_param = torch.zeros(2, 1, dtype=torch.float64, device=matrix.device).unbind()
            torch.ops.lomo_kernels.factored_sq_norm_.default(size, matrix, factors.rows, factors.columns, scalars)
            # Not what the last update could have added up: ``.data`` may have changed the parameter since, unseen, and
            # a resumed run would add up in another order.
            torch.ops.lomo_kernels.sq_norm_.default([of_param], [local], None)
            coef = rule.scale(size[0], of_param[0], local.numel())
        if coef is not None:
            cells.clip_coef.mul_(coef)
        cells.found_inf.add_(sums.rows.sum() * 0.0)  # NaN, which is not zero, of infinity and of NaN
        return factors

    def _handle_list(self, managed_params: Sequence[ManagedParameter], grads: list[Tensor]) -> None:
        for managed, grad in zip(managed_params, grads, strict=True):
            self._handle(managed, grad)

    def _handle_factors(self, managed: ManagedParameter, grad: Tensor | None, saved: Sequence[SavedFactors]) -> None:
        raise AssertionError("no layer is fused")
