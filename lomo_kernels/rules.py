"""The rules: what is done with a gradient after it was clipped.

A rule of one element, ``direction(g)`` in ``param = param * decay - lr * direction(g)``, stands in
`lomo_kernels.reference`, ``csrc/numerics.h`` and ``lomo_kernels/triton/numerics.py``. A rule with factors needs sums of
the whole gradient first: `lomo_kernels.optim.factored_rules`.
"""

from __future__ import annotations

from collections.abc import Iterable

from .numbers import shown

#: Rules of one element. Name: number by which the operators know the rule.
#: sgd: g. sign (SignSGD): 1, -1, or 0 where g is zero.
RULES = {"sgd": 0, "sign": 1}


def rule_number(rule: str, who: str, others: Iterable[str] = ()) -> int:
    """The number of a rule of one element. Raises ValueError, in the name of `who`, if there is no such rule.

    `others`: names that the error adds.
    """
    number = RULES.get(rule) if isinstance(rule, str) else None
    if number is None:
        raise ValueError(f"{who}: rule is {shown(rule)}, expected one of {', '.join(map(repr, (*RULES, *others)))}")
    return number
