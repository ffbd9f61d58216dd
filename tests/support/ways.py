"""Ways to a step that give the same bits: one backward, gradients that wait in ``.grad``, the norm first."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lomo_kernels import Lomo

Loss = Callable[[], Tensor]


def backward(optimizer: Lomo, loss: Loss, lr: float) -> None:
    optimizer.backward(loss())


def step(optimizer: Lomo, loss: Loss, lr: float) -> None:
    loss().backward()
    optimizer.step()
    optimizer.zero_grad()


def accumulate(optimizer: Lomo, loss: Loss, lr: float) -> None:
    with optimizer.accumulate():
        optimizer.backward(loss())
    optimizer.backward(loss() * 0.0)


def grad_norm(optimizer: Lomo, loss: Loss, lr: float) -> None:
    value = loss()
    optimizer.grad_norm(value)
    optimizer.fused_backward(value, lr)


#: Each takes an optimizer, a function that gives the loss of one batch, and the optimizer's learning rate.
WAYS = (backward, step, accumulate, grad_norm)
