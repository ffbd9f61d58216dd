"""Triton's interpreter in less time, for the processes of tests that run kernels under it; import it before they run.

While a kernel runs, the functions of `triton.language` are replaced by those of the interpreter, in each of its modules
that a function sees. Triton replaces them again for every function that the kernel calls, by the same.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch = interpreter._patch_lang
_seen: set[bool] | None = None  # while a kernel runs, which modules have been patched: triton.language, or its core


class _Outermost:
    def __init__(self, scope: Any) -> None:
        self._scope = scope

    def restore(self) -> None:
        global _seen
        _seen = None
        self._scope.restore()


def _patch_once(fn: Any) -> Any:
    global _seen
    needed = {value is tl for value in fn.__globals__.values() if value is tl or value is tl.core}
    if _seen is None:
        scope = _Outermost(_patch(fn))
        _seen = needed
        return scope
    if not needed <= _seen:
        _patch(fn)
        _seen |= needed
    return None  # those who call from within a kernel restore nothing


if hasattr(interpreter, "_LangPatchScope"):  # other versions restore by other means
    interpreter._patch_lang = _patch_once
