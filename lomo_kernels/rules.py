"""The rules: what is done with a gradient after it was clipped. A rule is a function of one element, ``direction(g)``,
in ``param = param * decay - lr * direction(g)``.

The function itself stands in `lomo_kernels.reference`, ``csrc/numerics.h`` and ``lomo_kernels/triton/numerics.py``.
"""

from __future__ import annotations

#: Name: number by which the operators know the rule.
#: sgd: g. sign (SignSGD): 1, -1, or 0 where g is zero.
RULES = {"sgd": 0, "sign": 1}


def rule_number(rule: str, who: str) -> int:
    """The rule's number. Raises ValueError, in the name of `who`, if there is no such rule."""
    number = RULES.get(rule) if isinstance(rule, str) else None
    if number is None:
        raise ValueError(f"{who}: rule is {rule!r}, expected one of {', '.join(map(repr, RULES))}")
    return number
