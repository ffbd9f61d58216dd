"""The constructor's options, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..ops.update import check_rounding
from ..rules import RULES, rule_number
from .clip_memory import clip_memory_of
from .factored_rules import FACTORED_RULES, FactoredRule, factored_rule
from .hyperparameters import check_positive, check_seed
from .scaling import LossScale


@dataclass(frozen=True)
class Settings:
    """What `Lomo` was told, as far as it is the same for all groups. A resumed run may replace seed and loss scale."""

    clip_grad_norm: float | None
    clip_memory: float | str
    clip_tensor: float | None
    loss_scale: float | str | None
    rounding: str
    raise_nonfinite: bool
    seed: int
    process_group: Any
    rule: str
    factored_rule: FactoredRule | None

    @staticmethod
    def checked(
        clip_grad_norm: Any,
        clip_memory: Any,
        clip_passes: Any,
        clip_tensor: Any,
        loss_scale: Any,
        rounding: Any,
        nonfinite: Any,
        seed: Any,
        group: Any,
        rule: Any,
    ) -> Settings:
        """Raises TypeError or ValueError unless the options are as `Lomo` describes them."""
        clip_memory = clip_memory_of(clip_memory, clip_passes)
        if clip_grad_norm is not None:
            check_positive("clip_grad_norm", clip_grad_norm)
        if clip_tensor is not None:
            check_positive("clip_tensor", clip_tensor)
        if nonfinite not in ("skip", "raise"):
            raise ValueError(f'Lomo: nonfinite is {nonfinite!r}, expected "skip" or "raise"')
        LossScale.check(loss_scale)
        rounding = check_rounding("Lomo", rounding)
        seed = check_seed(seed, "Lomo: seed")
        factored = factored_rule(rule)
        if factored is None:
            rule_number(rule, "Lomo", FACTORED_RULES)
        elif clip_tensor is not None:
            raise ValueError(f"Lomo: clip_tensor bounds a gradient that the rule {factored.name!r} scales anyway")
        raises = nonfinite == "raise"
        name = rule if factored is None else factored.name
        return Settings(
            clip_grad_norm, clip_memory, clip_tensor, loss_scale, rounding, raises, seed, group, name, factored
        )

    @property
    def stochastic(self) -> bool:
        return self.rounding == "stochastic"

    @property
    def splits(self) -> bool:
        return self.rounding == "split"

    @property
    def kernel_rule(self) -> int:
        """The rule's number for kernels. What factors have made of a gradient is applied as by SGD."""
        return RULES["sgd" if self.factored_rule is not None else self.rule]

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments that give these settings."""
        return {
            "clip_grad_norm": self.clip_grad_norm,
            "clip_memory": self.clip_memory,
            "clip_tensor": self.clip_tensor,
            "loss_scale": self.loss_scale,
            "rounding": self.rounding,
            "nonfinite": "raise" if self.raise_nonfinite else "skip",
            "process_group": self.process_group,
            "seed": self.seed,
            "rule": self.factored_rule or self.rule,
        }

    def same_everywhere(self) -> tuple[Any, ...]:
        """What has to be equal on every rank, besides the seed."""
        return tuple(value for name, value in self.arguments().items() if name not in ("process_group", "seed"))
