"""The operators in Triton, for GPUs without a compiled CUDA library: no compiler is needed, and AMD is served too.

A kernel is compiled at its first call for a pair of dtypes and a rounding, and kept in Triton's cache on disk. That
call must not be captured in a CUDA graph: run a step before, as for everything that is captured.
"""

from __future__ import annotations

from collections.abc import Collection

#: The oldest version that the kernels were tried with.
OLDEST = (3, 6)


def register(key: str, names: Collection[str] | None = None) -> str:
    """Registers operators for a dispatch key: "CUDA", or "CPU" where TRITON_INTERPRET=1 is set.

    Args:
        names: of the operators; None for all of them.

    Returns:
        what is in force, as ``"Triton 3.6.0"`` or ``"Triton 3.6.0, interpreted"``.

    Raises:
        ImportError: Triton is missing or too old, or cannot serve `key`; the message says what to do.
    """
    try:
        import triton
    except ImportError as error:
        raise ImportError(f"Triton cannot be imported ({error}): `pip install 'triton>=3.6'` (Linux)") from error
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        raise ImportError(f"Triton {triton.__version__} is too old: `pip install 'triton>=3.6'`")
    interpreted = bool(triton.knobs.runtime.interpret)
    if interpreted != (key == "CPU"):
        advice = "unset TRITON_INTERPRET" if interpreted else "TRITON_INTERPRET=1 interprets them there (slow)"
        raise ImportError(f"Triton kernels cannot serve {key} tensors as things are: {advice}")

    from ..ops._arguments import library
    from .adalomo import adalomo_factors
    from .embedding import embedding_sq_norm_, embedding_update_
    from .factor_sums import factor_sums_
    from .factored import factored_sq_norm_, factored_update_
    from .linear import linear_sq_norm_, linear_update_
    from .sgd import update_
    from .sq_norm import sq_norm_

    layers = (linear_update_, linear_sq_norm_, embedding_update_, embedding_sq_norm_)
    factored = (factor_sums_, factored_sq_norm_, factored_update_, adalomo_factors)
    for function in (update_, sq_norm_, *layers, *factored):
        if names is None or function.__name__ in names:
            library.impl(function.__name__, function, key)
    return f"Triton {triton.__version__}" + (", interpreted" if interpreted else "")
