"""A case is drawn as plain values (its spec), so that it can be printed, run again and made smaller."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, NamedTuple

Spec = dict[str, Any]


class Finding(AssertionError):
    """The library did something that it promises not to do."""


class Outcome(NamedTuple):
    """What came of a case: "equal" (the result was compared) or "refused", and how many operators it called."""

    what: str
    calls: int = 1


class Kind(NamedTuple):
    """A kind of cases: `draw` makes a spec, `run` runs it and raises `Finding`."""

    draw: Callable[[Random], Spec]
    run: Callable[[Spec], Outcome]


OWN = re.compile(
    r"(Lomo|AdaLomo|lomo_kernels|[a-z_]*(sgd|sq_norm|update|factors|factor_sums|total|rms|scale|states|product|gram)"
    r"(_list)?_?): "
)
#: What the dispatcher and torch's argument parser say of a raw call, before anything of this library runs.
OF_TORCH = re.compile(
    "|".join(
        (
            r"Could not run 'lomo_kernels::",
            r"lomo_kernels::\w+\(\) ",
            r"There were no tensor arguments to this function",
            r"Expected Tensor but got",  # None for a tensor
            r"'NoneType' object has no attribute",
            r"aoti_torch_\w+\(",
            r"Not yet supported ScalarType",  # of torch's stable interface
            r"setStorage: sizes",  # a view of a freed tensor
            r"lomo_kernels\._gram\.default",  # which nobody calls with a fake tensor
            r"no fake impl or Meta kernel",
            r"Multiple dispatch failed",
            r"unsupported tensor layout",
        )
    )
)
NEVER = re.compile(r"INTERNAL ASSERT|please report a bug|Exceeds the limit", re.I)


def check_words(error: Exception, *, raw: bool) -> None:
    """Raises `Finding` unless the exception is of a kind and in words that this library chose."""
    text = str(error)
    ours = isinstance(error, (TypeError, ValueError, RuntimeError)) and OWN.match(text) and not NEVER.search(text)
    if (
        not ours
        and "Please convert all Tensors to FakeTensors" not in text
        and not (raw and OF_TORCH.search(text) and not NEVER.search(text))
    ):
        raise Finding(f"refused in words that are not the library's: {type(error).__name__}: {text[:300]}") from error


#: Of the strings in specs: what is simpler.
SIMPLER = dict.fromkeys(("strided", "permuted", "expanded", "gapped", "unaligned"), "")
SIMPLER |= {"bfloat16": "float32", "float16": "float32", "mixed": "ordinary", "stochastic": "nearest"}
SIMPLER |= {"accumulate": "backward", "mixed way": "backward", "pair": "backward"}


def _smaller(value: Any) -> Iterator[Any]:
    """Simpler values in place of one, the simplest first."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in value.get("_optional", ()):
                yield {k: v for k, v in value.items() if k != key}
            yield from ({**value, key: new} for new in _smaller(inner) if not key.startswith("_"))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield value[:i] + value[i + 1 :]
        for i, inner in enumerate(value):
            yield from ([*value[:i], new, *value[i + 1 :]] for new in _smaller(inner))
    elif isinstance(value, bool):
        yield from [False] if value else []
    elif isinstance(value, int) and abs(value) > 1:
        yield from (0, 1, value // 2)
    elif isinstance(value, float) and value not in (0.0, 1.0):
        yield 1.0
    elif isinstance(value, str) and value in SIMPLER:
        yield SIMPLER[value]


def shrink(spec: Spec, fails: Callable[[Spec], bool], tries: int = 400) -> Spec:
    """A smaller spec that fails, too. A spec that cannot be built does not fail."""
    changed = True
    while changed and tries > 0:
        changed = False
        for new in _smaller(spec):
            tries -= 1
            if tries < 0:
                break
            if fails(new):
                spec, changed = new, True
                break
    return spec
