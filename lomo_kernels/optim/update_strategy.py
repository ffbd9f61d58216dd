"""How gradients become updates: which pass applies them, and what is kept for it between steps.

Each class is one way. A step and the state of a training call its methods and do not ask which class it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .engines.base import ParallelEngine
from .factored_pass import FactoredPass
from .factored_rules import FactoredRule
from .managed_parameter import DeviceState, ManagedParameter
from .parameter_scalars import ParameterScalars
from .passes import UpdatePass
from .rule_state import RuleState
from .scaling import Moves
from .tensor_clip import TensorClip
from .tensor_clip_pass import TensorClipPass

#: The name of `TensorClip.means` in a state dict.
CLIP_MEANS = "clip_norm_mean"
#: The name of all parameters' states of a rule among the exported numbers. A state dict has them with the parameters.
RULE_STATE = "rule_state"


class UpdateStrategy:
    """Updates each element by its own gradient and the numbers of its group. Nothing is kept between steps."""

    #: Names of the tensors that are kept for each parameter and have a shape of their own.
    states: tuple[str, ...] = ()

    def begin_step(self, step: Tensor, skipped: Tensor) -> bool:
        """A step begins. `step` steps came before it, and `skipped` of them were skipped.

        Returns:
            Whether the step clips each gradient by its own norm, and not by the norm of all.
        """
        return False

    def make_pass(self, *args: Any, norm_known: bool, squares: Callable[[], Tensor], **options: Any) -> UpdatePass:
        """The pass that applies this step's gradients. The scalars of all groups are ready.

        Args:
            args, norm_known, options: as `UpdatePass` takes them.
            squares: gives the sums of squares of all gradients, if `norm_known`: float64 [parameters].
        """
        return UpdatePass(*args, norm_known=norm_known, **options)

    def after_step(self, squares: Callable[[], Tensor], coef: Tensor | None, found_inf: Tensor | None) -> Moves:
        """What the end of a step changes.

        Args:
            squares: as in `make_pass`.
            coef: of `clip_grad_norm`; None: it clipped nothing.
            found_inf: not zero if the step was skipped; None: it was not.
        """
        return []

    def count_step(self) -> None:
        """A step has ended."""

    def forget_count(self) -> None:
        """A step broke off, perhaps inside `count_step`."""

    def by_parameter(self, index: int) -> dict[str, Tensor]:
        """What is kept for one parameter, live, each with at least one dimension."""
        return {}

    def export(self) -> dict[str, Any]:
        """Copies of what is kept, for `load`."""
        return {}

    def load(self, exported: dict[str, Any]) -> None:
        """Takes over what `export` or `resume.read` gave."""


class TensorClipStrategy(UpdateStrategy):
    """Clips each gradient by its own norm when the warm-up has ended: see `tensor_clip`."""

    def __init__(self, clip: TensorClip) -> None:
        self.clip = clip
        self._clips = False
        self._squares: Tensor | None = None  # of this step, if they were summed over ranks before its end

    def begin_step(self, step: Tensor, skipped: Tensor) -> bool:
        self._squares = None
        self._clips = not self.clip.warms_up(step, skipped)
        return self._clips

    def make_pass(self, *args: Any, norm_known: bool, squares: Callable[[], Tensor], **options: Any) -> UpdatePass:
        if not self._clips:
            return UpdatePass(*args, norm_known=norm_known, **options)
        self.clip.begin_update()
        if not norm_known:
            return TensorClipPass(*args, tensor_clip=self.clip, **options)
        self._squares = squares()
        self.clip.clip_all(self._squares)
        return UpdatePass(*args, norm_known=True, vector_of=self.clip.scalars.vector, **options)

    def after_step(self, squares: Callable[[], Tensor], coef: Tensor | None, found_inf: Tensor | None) -> Moves:
        of_all = squares() if self._squares is None else self._squares
        return [(self.clip.means, self.clip.means_after_step(of_all, coef, found_inf))]

    def count_step(self) -> None:
        self.clip.count_step()

    def forget_count(self) -> None:
        self.clip.forget_count()

    def by_parameter(self, index: int) -> dict[str, Tensor]:
        return {CLIP_MEANS: self.clip.means[index].view(1)}

    def export(self) -> dict[str, Any]:
        return {CLIP_MEANS: self.clip.means.clone()}

    def load(self, exported: dict[str, Any]) -> None:
        self.clip.load(exported[CLIP_MEANS])


class FactoredStrategy(UpdateStrategy):
    """Multiplies each gradient by factors of its rows and columns: see `factored_rules`."""

    def __init__(self, rule_state: RuleState) -> None:
        self._rule_state = rule_state
        self.states = rule_state.rule.states

    def begin_step(self, step: Tensor, skipped: Tensor) -> bool:
        self._counts = step, skipped
        return False

    def make_pass(self, *args: Any, norm_known: bool, squares: Callable[[], Tensor], **options: Any) -> UpdatePass:
        self._rule_state.begin_update(*self._counts)
        return FactoredPass(*args, norm_known=norm_known, rule_state=self._rule_state, **options)

    def by_parameter(self, index: int) -> dict[str, Tensor]:
        return self._rule_state.by_parameter(index)

    def export(self) -> dict[str, Any]:
        return {RULE_STATE: self._rule_state.export()}

    def load(self, exported: dict[str, Any]) -> None:
        self._rule_state.load(exported.get(RULE_STATE, ()))  # a state dict has none if the rule keeps no state


def choose_strategy(
    clip_tensor: float | None,
    rule: FactoredRule | None,
    managed_params: Sequence[ManagedParameter],
    group_of: Sequence[int],
    devices: Mapping[torch.device, DeviceState],
    engine: ParallelEngine | None,
) -> UpdateStrategy:
    """The strategy for these options of `Lomo`, of which at most one is given.

    Args:
        managed_params, group_of, devices: as `ParameterScalars` takes them.
        engine: adds up over ranks that have parts of a parameter; None: there is one process.
    """
    if clip_tensor is None and rule is None:
        return UpdateStrategy()
    scalars = ParameterScalars(managed_params, group_of, devices)
    if rule is not None:
        return FactoredStrategy(RuleState(rule, managed_params, scalars, devices, engine))
    assert clip_tensor is not None
    return TensorClipStrategy(TensorClip(clip_tensor, scalars, devices, len(managed_params), engine))
