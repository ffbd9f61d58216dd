"""`Lomo.step`: a step from gradients that plain backwards left in ``.grad``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from .parameters import check_groups
from .training import Training
from .training_step import TrainingStep


class PlainSteps:
    """The steps of one optimizer, with warnings of what a user may not have meant."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._warned_of_memory = False

    def run(self, optimizer: Any, closure: Callable[[], Any] | None) -> Any:
        """`optimizer.step(closure)`: one step, if there are gradients. Returns what `closure` returns."""
        training = self._training
        training.check_not_ended()
        training.steps.check_not_inside()
        trained, training.trained = training.trained, False
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_groups(training.managed_params, training.groups)
        if optimizer._step_supports_amp_scaling and hasattr(optimizer, "found_inf"):
            del optimizer.found_inf
            raise RuntimeError(
                "Lomo: torch's GradScaler decides on every rank alone whether to step, from gradients that are not "
                'summed over the ranks yet. Use optimizer.backward(loss) and loss_scale="dynamic" in its place. No '
                "weight was changed"
            )
        if training.accumulation.has_gradients():
            if not self._warned_of_memory:
                self._warned_of_memory = True
                warnings.warn(
                    "Lomo.step() applies gradients that a plain backward has kept in memory, all of them. "
                    "optimizer.backward(loss) in place of loss.backward() frees each gradient as soon as it exists",
                    stacklevel=4,  # `as_step` wraps step() once, twice if there are hooks
                )
            optimizer._check_not_wrapped()
            training.steps.run(training, lambda step: TrainingStep(training, step).apply_plain())
        elif training.unpickled and closure is None:
            raise RuntimeError(
                "Lomo: the parameters of this optimizer have got no gradient since it was unpickled. They are copies, "
                "not the model's; pickle model and optimizer together, as one tuple, and use both from it"
            )
        elif training.passed_over and not (trained or training.trained):
            training.passed_over = False
            warnings.warn(
                "Lomo.step() found no gradients. The backward of another Lomo ran through these parameters, and gives "
                "gradients only to its own. Use this optimizer's backward() too, or one Lomo with parameter groups",
                stacklevel=4,
            )
        training.trained = False
        return loss
