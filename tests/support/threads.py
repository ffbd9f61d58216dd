"""Operators called from several threads at once, on tensors of their own. `make sanitize-threads` runs it under
the thread sanitizer: the first calls race to choose the kernels. All that each thread has written is compared with the
reference.

Not a test of pytest: torch's own libraries have to be imported before the sanitizer watches anything that matters.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch import Tensor

from lomo_kernels import backends, reference
from lomo_kernels.ops import scalars

THREADS, ROUNDS = 4, 6
#: Around a tile, and above the chunk that torch's threads share out.
SIZES = (7, 4097, 65537)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Sums of squares, compared within this. All else is compared bit by bit.
TOLERANCE = 3e-5

Values = dict[str, list[Tensor]]


def made(seed: int) -> Values:
    """What the calls of one thread read and write. Layers get small integers: their sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float()

    params = [normal(n).to(dtype) for n in SIZES for dtype in DTYPES]
    return {
        "params": params,
        "grads": [normal(p.numel()).to(p.dtype) for p in params],
        "slots": list(torch.zeros(len(params) + 3, dtype=torch.float64).split(1)),
        "linear": [normal(300, 400), integers(64, 400).bfloat16(), integers(64, 300).bfloat16()],
        "embedding": [normal(30, 40), torch.randint(30, (50,), generator=generator), integers(50, 40)],
        "matrix": [normal(30, 40), normal(30, 40), normal(30).square(), normal(1, 40).square()],
        "sums": [torch.zeros(30, dtype=torch.float64), torch.zeros(1, 40, dtype=torch.float64)],
    }


def calls(v: Values, seed: int, step: int) -> list[tuple[str, tuple[Any, ...]]]:
    """Operators of updates, norms, layers and factors, with their arguments."""
    numbers = scalars.vector("threads", torch.device("cpu"), {"lr": 0.125, "weight_decay": 0.125, "step": step})
    *of_params, of_linear, of_embedding, of_matrix = v["slots"]
    weight, x, gy = v["linear"]
    table, index, rows = v["embedding"]
    matrix, grad, of_rows, of_columns = v["matrix"]
    ids = list(range(len(v["params"])))
    common = 0, True, seed
    return [
        ("update_", (v["params"], v["grads"], numbers, of_params, *common, ids, [], [])),
        ("sq_norm_", (of_params, v["grads"], None)),
        ("linear_update_", (weight, [x], [gy], numbers, None, *common, 0, [])),
        ("linear_sq_norm_", (of_linear, [x], [gy], None)),
        ("embedding_update_", (table, [index], [rows], [-1], numbers, of_embedding, *common, 0, [])),
        ("embedding_sq_norm_", (of_embedding, [index], [rows], [-1], None)),
        ("factor_sums_", (*v["sums"], grad, numbers)),
        ("factored_sq_norm_", (of_matrix, grad, of_rows, of_columns, numbers)),
        ("factored_update_", (matrix, grad, of_rows, of_columns, numbers, *common, 0, [])),
    ]


def work(number: int, barrier: threading.Barrier, wrong: list[str]) -> None:
    ours, expected = made(number), made(number)
    barrier.wait()  # the first call of each thread comes at the same time
    for step in range(ROUNDS):
        for name, arguments in calls(ours, number, step):
            getattr(torch.ops.lomo_kernels, name).default(*arguments)
    for step in range(ROUNDS):
        for name, arguments in calls(expected, number, step):
            reference.IMPLEMENTATIONS[name](*arguments)
    for name in ours:
        for i, (one, right) in enumerate(zip(ours[name], expected[name], strict=True)):
            if not (torch.allclose(one, right, TOLERANCE, 0.0) if name in ("slots", "sums") else one.equal(right)):
                wrong.append(f"thread {number}: {name} {i}")


def main() -> int:
    torch.set_num_threads(1)
    wrong: list[str] = []
    barrier = threading.Barrier(THREADS)
    threads = [threading.Thread(target=work, args=(i, barrier, wrong)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{THREADS} threads, {backends.choice('CPU').detail}: {wrong or 'equal to the reference'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
