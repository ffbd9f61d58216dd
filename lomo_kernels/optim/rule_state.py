"""What a rule with row and column factors (`factored_rules`) keeps between steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .engines.base import ParallelEngine
from .factored_rules import FactoredRule
from .managed_parameter import ManagedParameter
from .parameter_scalars import ParameterScalars


class RuleState:
    """The state of one rule.

    Args:
        scalars: of each parameter's update. The rule changes their coefficients.
        devices: those of the parameters.
        engine: adds up over ranks that have parts of a parameter; None: there is one process.
    """

    def __init__(
        self,
        rule: FactoredRule,
        managed_params: Sequence[ManagedParameter],
        scalars: ParameterScalars,
        devices: Iterable[torch.device],
        engine: ParallelEngine | None,
    ) -> None:
        self.rule = rule
        self.engine = engine
        self._managed_params = tuple(managed_params)  # parameters that are added later get a new `RuleState`
        self.scalars = scalars
        self._states = [rule.new_state(managed) if managed.supported else () for managed in managed_params]
        self._devices = tuple(devices)
        self._of_step: dict[torch.device, Tensor] = {}

    def begin_update(self, step: Tensor, skipped: Tensor) -> None:
        """An update begins. `step` steps came before it, and `skipped` of them were skipped."""
        self.scalars.begin_update()
        of_step = self.rule.of_step((step - skipped + 1).double())
        self._of_step = {device: of_step.to(device, non_blocking=True) for device in self._devices}

    def of_step(self, device: torch.device) -> Tensor:
        """What the rule makes of this step's number."""
        return self._of_step[device]

    def of(self, managed: ManagedParameter) -> tuple[Tensor, ...]:
        return self._states[managed.index]

    def replace(self, managed: ManagedParameter, new: Sequence[Tensor], is_finite: Tensor) -> None:
        """Replaces a parameter's state, if `is_finite` (one bool on its device)."""
        torch.ops.lomo_kernels.replace_states_.default(self._states[managed.index], new, is_finite)

    def by_parameter(self, index: int) -> dict[str, Tensor]:
        """A parameter's state by name, live."""
        return dict(zip(self.rule.states, self._states[index], strict=False))

    def export(self) -> list[dict[str, Any]]:
        """Copies of all parameters' states, and which parameters are embeddings. A copy of the optimizer has no model
        that tells it."""
        return [
            {name: state.clone() for name, state in self.by_parameter(managed.index).items()}
            | {"is_embedding": managed.is_embedding}
            for managed in self._managed_params
        ]

    def load(self, exported: Sequence[Mapping[str, Any]]) -> None:
        """Takes over the states of the first parameters. The other parameters have had no step."""
        for managed, states in zip(self._managed_params, exported, strict=False):
            managed.is_embedding = managed.is_embedding or states.get("is_embedding", False)
            for name, state in self.by_parameter(managed.index).items():
                if name in states:  # a parameter that could not be trained before has none
                    state.copy_(states[name])
