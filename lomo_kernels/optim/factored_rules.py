"""Rules that multiply a gradient by a factor for each row and each column. They need no norm of other gradients.

With g the gradient and u what the rule makes of it: ``p = (1 - lr * weight_decay) * p - lr * u``. RMS is the root of
the mean of the squares. These factors are not the factors of a fused layer.

===========  ===========================================================================================================
"tensor"     u = g / (RMS(g) + 1e-12)
"rows"       SCALE without momentum (arXiv 2506.16659): u = g / (RMS of its row + 1e-12); in an embedding, of its
             column; vectors as "tensor"
"adalomo"    AdaLomo (arXiv 2310.10195): see `AdaLomoRule`
===========  ===========================================================================================================

A tensor of more than two dimensions counts as several matrices, of its last two dimensions. A gradient of zeros gives
u = 0. A parameter whose gradient is not finite stays as it is, and so does its state. In a fused linear layer
with "rows" this holds for each row.

A step reads a gradient three times: for the sums; with "adalomo", for the size of u; for the update
(`lomo_kernels.ops.factored` says why no fewer are enough).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..rules import RULES
from .hyperparameters import check_positive
from .managed_parameter import ManagedParameter


class Sums(NamedTuple):
    """Sums of squares of a clipped gradient: [matrices * rows], [matrices, columns] and of all, float64."""

    rows: Tensor
    columns: Tensor
    total: Tensor  # one element; not finite if an element of the gradient is not

    @property
    def shape(self) -> tuple[int, int, int]:
        """Matrices, rows of each, columns."""
        matrices, columns = self.columns.shape
        return matrices, self.rows.shape[0] // matrices, columns


class Factors(NamedTuple):
    """u = g * coef * rows * columns, and times the number of `FactoredRule.scale_` if the rule needs it. Empty factors
    are ones."""

    rows: Tensor  # float32 [matrices * rows]
    columns: Tensor  # float32 [matrices, columns]
    coef: Tensor | None = None  # float64, no dimensions
    state: Sequence[Tensor] = ()  # the parameter's new state


class FactoredRule:
    """A rule with factors. Its methods compute on the parameter's device; the host reads nothing.

    Sums, factors and states are those of the whole parameter, whose shape is ``managed.shape``. If ranks have parts of
    it, all compute the same from the same sums.
    """

    name = ""
    #: By which a checkpoint knows the rule: above those of `lomo_kernels.rules.RULES`.
    number = 0
    #: Names of the float32 tensors that it keeps for each parameter, in ``optimizer.state``.
    states: tuple[str, ...] = ()
    #: Whether it needs the norm of u and that of the parameter.
    needs_scale = False

    def __repr__(self) -> str:
        """The same in every process: ranks compare it."""
        return f"{type(self).__name__}()"

    def is_by_row(self, managed: ManagedParameter) -> bool:
        """Whether u depends, in each row, on this row of the gradient only."""
        return False

    def new_state(self, managed: ManagedParameter) -> tuple[Tensor, ...]:
        """The state of a parameter before its first step."""
        return ()

    def of_step(self, step: Tensor) -> Tensor:
        """What `factors` needs of a step's number. It is the same for all parameters.

        Args:
            step: counts from 1 the steps that were not skipped; float64, no dimensions.
        """
        return step

    def factors(self, managed: ManagedParameter, sums: Sums, state: tuple[Tensor, ...], of_step: Tensor) -> Factors:
        """What u is made of. `of_step`: see there."""
        raise NotImplementedError

    def scale_(self, coef: Tensor, u_squares: Tensor, param_squares: Tensor, elements: int) -> None:
        """Multiplies `coef` by the number by which u is multiplied, from the sums of squares of u and of the parameter.
        All have one element of float64."""
        raise NotImplementedError


def shape_of_matrices(shape: Sequence[int]) -> tuple[int, int, int]:
    """Matrices, rows and columns of a parameter: those of its last two dimensions. A vector is one row."""
    if len(shape) < 2:
        return 1, 1, shape[0] if len(shape) else 1
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def _none(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=device)


class TensorRule(FactoredRule):
    """Each tensor's gradient over its RMS (arXiv 2502.06742, one iteration)."""

    name, number = "tensor", 100

    def factors(self, managed: ManagedParameter, sums: Sums, state: tuple[Tensor, ...], of_step: Tensor) -> Factors:
        none = _none(sums.rows.device)
        coef = torch.ops.lomo_kernels.inverse_rms.default(sums.total, math.prod(managed.shape), True)
        return Factors(none, none, coef)


class RowsRule(TensorRule):
    """Each row's gradient over its RMS; each column's in an embedding; vectors as `TensorRule`."""

    name, number = "rows", 101

    def is_by_row(self, managed: ManagedParameter) -> bool:
        # Not of a user's subclass, whose factors may be others.
        return type(self) is RowsRule and managed.param.dim() > 1 and not managed.is_embedding

    def factors(self, managed: ManagedParameter, sums: Sums, state: tuple[Tensor, ...], of_step: Tensor) -> Factors:
        if len(managed.shape) < 2:
            return super().factors(managed, sums, state, of_step)
        none = _none(sums.rows.device)
        _, rows, columns = sums.shape
        if managed.is_embedding:
            return Factors(none, torch.ops.lomo_kernels.inverse_rms.default(sums.columns, rows, False))
        return Factors(torch.ops.lomo_kernels.inverse_rms.default(sums.rows, columns, False), none)


class AdaLomoRule(FactoredRule):
    """AdaLomo: Adafactor's second moments of rows and columns, without momentum, and an update of bounded size.

    With S = g² + eps[0] and beta = 1 - t^decay_rate: rows and columns are running means of the means of S along columns
    and rows; u = g * (rows / mean(rows))^-1/2 * columns^-1/2; then u is divided by max(1, RMS(u) / clip_threshold) and
    multiplied by max(eps[1], RMS(p)). A vector has a running mean of each element of S.

    Args:
        eps: of the squares, and of the parameter's RMS.
        clip_threshold: bound on the RMS of u.
        decay_rate: below 0.
    """

    name, number = "adalomo", 102
    states = ("row", "column")
    needs_scale = True

    def __init__(
        self, eps: tuple[float, float] = (1e-30, 1e-3), clip_threshold: float = 1.0, decay_rate: float = -0.8
    ) -> None:
        if not isinstance(eps, Sequence) or len(eps) != 2:
            raise ValueError(f"Lomo: eps is {eps!r}, expected two numbers")
        for index, value in enumerate(eps):
            check_positive(f"eps[{index}]", value)
        check_positive("clip_threshold", clip_threshold)
        if isinstance(decay_rate, bool) or not isinstance(decay_rate, (int, float)) or not -math.inf < decay_rate < 0:
            raise ValueError(f"Lomo: decay_rate is {decay_rate!r}, expected a finite number < 0")
        self.eps, self.clip_threshold, self.decay_rate = (float(eps[0]), float(eps[1])), clip_threshold, decay_rate

    def __repr__(self) -> str:
        return f"AdaLomoRule(eps={self.eps}, clip_threshold={self.clip_threshold}, decay_rate={self.decay_rate})"

    def new_state(self, managed: ManagedParameter) -> tuple[Tensor, ...]:
        matrices, rows, columns = shape_of_matrices(managed.shape)
        row = (matrices, rows) if len(managed.shape) > 1 else (0,)
        return tuple(
            torch.zeros(shape, dtype=torch.float32, device=managed.local.device) for shape in (row, (matrices, columns))
        )

    def of_step(self, step: Tensor) -> Tensor:
        """beta, float32."""
        return (1.0 - step**self.decay_rate).float()

    def factors(self, managed: ManagedParameter, sums: Sums, state: tuple[Tensor, ...], of_step: Tensor) -> Factors:
        if not sums.columns.numel():  # nothing changes
            return Factors(_none(of_step.device), _none(of_step.device))
        operator = torch.ops.lomo_kernels.adalomo_factors.default
        of_rows, of_columns, *new = operator(sums.rows, sums.columns, *state, of_step, self.eps[0])
        return Factors(of_rows, of_columns, state=new)

    def scale_(self, coef: Tensor, u_squares: Tensor, param_squares: Tensor, elements: int) -> None:
        torch.ops.lomo_kernels.adalomo_scale_.default(
            coef, u_squares, param_squares, elements, self.clip_threshold, self.eps[1]
        )


#: All of them by name, with their defaults.
FACTORED_RULES = {rule.name: rule for rule in (TensorRule(), RowsRule(), AdaLomoRule())}
#: Names of all their states.
STATES = tuple(state for rule in FACTORED_RULES.values() for state in rule.states)
#: All rules, those of one element too. Name: number by which a checkpoint knows the rule.
NUMBERS = RULES | {rule.name: rule.number for rule in FACTORED_RULES.values()}


def factored_rule(rule: object) -> FactoredRule | None:
    """The rule of this name, or `rule` itself if it is an object. None: `rule` has no row and column factors.

    Raises ValueError if its name is not in `FACTORED_RULES`, which numbers rules in a state dict.
    """
    if isinstance(rule, FactoredRule):
        if rule.name not in FACTORED_RULES:
            raise ValueError(f"Lomo: the name of {rule} is {rule.name!r}, expected one of {', '.join(FACTORED_RULES)}")
        return rule
    return FACTORED_RULES.get(rule) if isinstance(rule, str) else None
