"""Operators called from several threads at once, on tensors of their own. `make sanitize-threads` runs it under
the thread sanitizer: the first calls race to choose the kernels, and the parameters that each thread has updated in
lists are compared with the reference.

Not a test of pytest: torch's own libraries have to be imported before the sanitizer watches anything that matters.
"""

from __future__ import annotations

import sys
import threading

import torch

from lomo_kernels import backends, ops, reference

THREADS, ROUNDS = 4, 6
#: Around a tile, and above the chunk that torch's threads share out.
SIZES = (7, 4097, 65537)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def work(number: int, barrier: threading.Barrier, wrong: list[str]) -> None:
    generator = torch.Generator().manual_seed(number)
    params = [torch.randn(n, generator=generator).to(dtype) for n in SIZES for dtype in DTYPES]
    grads = [torch.randn(p.numel(), generator=generator).to(p.dtype) for p in params]
    factors = torch.randn(9, 40, generator=generator).bfloat16(), torch.randn(9, 30, generator=generator).bfloat16()
    weight = torch.randn(30, 40, generator=generator)
    index = torch.randint(30, (50,), generator=generator)
    rows = torch.randn(50, 40, generator=generator)
    expected = [p.clone() for p in params]
    barrier.wait()  # the first call of each thread comes at the same time
    for step in range(ROUNDS):
        slots = torch.zeros(len(params), dtype=torch.float64)
        numbers = {"lr": 0.1, "weight_decay": 0.1, "step": step, "seed": number}
        ops.sgd_list_(params, grads, sq_norm=slots, rounding="stochastic", **numbers)
        ops.sq_norm_list_(slots, grads)
        ops.linear_sgd_(weight, *factors, lr=0.1)
        ops.linear_sq_norm_(slots[:1], *factors)
        ops.embedding_sgd_(weight, index, rows, lr=0.1, sq_norm=slots[1:2])
        for i, (param, grad) in enumerate(zip(expected, grads, strict=True)):
            new = reference.updated(param, grad, **numbers, stochastic=True, parameter_id=i)
            param.copy_(new)
    wrong += [
        f"thread {number}: parameter {i}"
        for i, (p, e) in enumerate(zip(params, expected, strict=True))
        if not p.equal(e)
    ]


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
