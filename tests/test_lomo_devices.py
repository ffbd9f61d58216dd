"""Several devices, threads and streams, without a GPU: what is kept apart, what waits for what and what is combined is
the optimizer's logic and not a driver's, so streams are imitated and a second device is a second set of scalars.
tests/test_gpu.py has the same on hardware."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import Options, loss_of, transformer
from support.oracle import assert_same_bits
from torch import Tensor, nn

from lomo_kernels import Lomo
from lomo_kernels.optim import streams
from lomo_kernels.optim.hyperparameters import GroupScalars
from lomo_kernels.optim.managed_parameter import SMALL_BYTES, DeviceState
from lomo_kernels.optim.passes import BUFFER_BYTES, Pass
from lomo_kernels.optim.step import Step
from lomo_kernels.optim.training_step import TrainingStep

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


# ---- Streams --------------------------------------------------------------------------------------------------------


class Stream:
    """Stands for a `torch.cuda.Stream`: remembers what it waited for."""

    def __init__(self) -> None:
        self.waited_for: list[Stream] = []
        self.cuda_stream = id(self)

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


class Lent(Tensor):
    """A gradient that remembers the streams it was lent to."""

    def record_stream(self, stream: Any) -> None:
        self.__dict__.setdefault("streams", []).append(stream)


class Calls(Pass):
    """A pass that remembers its list calls and, of each, the stream it was made on or what else is `current` then."""

    def __init__(self, current: Callable[[], Any]) -> None:
        super().__init__([GPU], scaled=False)
        self.current = current
        self.made: list[tuple[Any, list[Tensor]]] = []

    def _handle_list(self, records: Any, grads: list[Tensor]) -> None:
        self.made.append((self.current(), grads))


class Cuda:
    """Stands for `torch.cuda` where streams are asked for."""

    def __init__(self) -> None:
        self.stream = Stream()

    def current_stream(self, device: torch.device) -> Stream:
        assert device.type == "cuda"
        return self.stream


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    imitation = Cuda()
    monkeypatch.setattr("lomo_kernels.optim.streams.torch.cuda.current_stream", imitation.current_stream)
    monkeypatch.setattr("lomo_kernels.optim.streams.handle", lambda device: imitation.stream.cuda_stream)
    return imitation


def records_of(count: int, size: int = 8) -> list[Any]:
    """Records of CPU parameters that pass for a GPU's."""
    records = Lomo([nn.Parameter(torch.ones(size)) for _ in range(count)], lr=0.5)._training.managed_params
    for record in records:
        record.on_gpu, record.device = True, GPU
    return records


def lent_of(count: int, size: int = 8) -> list[Lent]:
    return [torch.ones(size).as_subclass(Lent) for _ in range(count)]


def test_a_stream_waits_once_for_the_callers(cuda: Cuda) -> None:
    caller, side = cuda.stream, Stream()
    first = streams.Streams([CPU, GPU])
    assert first.join(GPU) is caller and caller.waited_for == []
    cuda.stream = side
    assert first.join(GPU) is side and first.join(GPU) is side
    assert side.waited_for == [caller]
    assert streams.Streams([GPU]).join(GPU) is side
    assert side.waited_for == [caller], "there it is the caller's"
    assert first.join(CPU) is None


def test_the_callers_stream_waits_for_those_that_joined(cuda: Cuda) -> None:
    """Before anything is read or handed on: FSDP2's streams are tied to the caller's in the last backward only."""
    caller, side = cuda.stream, Stream()
    sweep = Calls(lambda: list(caller.waited_for))
    cuda.stream = side
    sweep.add(records_of(1)[0], lent_of(1)[0])
    cuda.stream = caller
    sweep.flush()
    assert [waited for waited, _ in sweep.made] == [[side]]


def test_gradients_of_two_streams_do_not_share_a_call(cuda: Cuda) -> None:
    caller, left, right = cuda.stream, Stream(), Stream()
    sweep = Calls(lambda: cuda.stream)
    grads = lent_of(5)
    for record, grad, stream in zip(records_of(5), grads, [left, right, left, right, caller], strict=True):
        cuda.stream = stream
        sweep.add(record, grad)
    cuda.stream = caller
    sweep.flush()
    assert left.waited_for == right.waited_for == [caller] and caller.waited_for == [left, right]
    together = [[[grad is other for other in grads].index(True) for grad in some] for _, some in sweep.made]
    assert sorted(together) == [[0, 2], [1, 3], [4]]
    assert all(stream is caller for stream, _ in sweep.made)
    for grad in grads[:4]:  # their memory is their stream's, and is read on the caller's
        assert grad.streams == [caller]
    assert not hasattr(grads[4], "streams")


def test_a_full_buffer_is_emptied_on_its_own_stream(cuda: Cuda) -> None:
    side = Stream()
    sweep = Calls(lambda: cuda.stream)
    cuda.stream = side
    count, size = BUFFER_BYTES // SMALL_BYTES, SMALL_BYTES // 4
    grads = lent_of(count, size)
    for record, grad in zip(records_of(count, size), grads, strict=True):
        sweep.add(record, grad)
    assert [stream for stream, _ in sweep.made] == [side] and len(sweep.made[0][1]) == count
    assert not any(hasattr(grad, "streams") for grad in grads)


def test_the_cpu_is_never_asked_for_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams.torch.cuda, "current_stream", None)
    monkeypatch.setattr(streams, "handle", None)
    model = transformer(Options())
    Lomo(model, lr=0.1, clip_grad_norm=1.0, clip_passes="two").backward(loss_of(model, 0))


# ---- Threads --------------------------------------------------------------------------------------------------------


def test_hooks_of_many_threads_lose_nothing() -> None:
    """Backward runs the hooks of each device in a thread of its own; here eight hand over 200 gradients each."""
    params = [nn.Parameter(torch.zeros(1000)) for _ in range(1600)]
    optimizer = Lomo(params, lr=1.0)
    optimizer._training.refresh()
    sweep = TrainingStep(optimizer._training, Step(optimizer._training.managed_params))._update_pass(None)
    start = threading.Barrier(8)

    def hand_over(first: int) -> None:
        start.wait()
        for record in optimizer._training.managed_params[first::8]:
            sweep.add(record, torch.full((1000,), -float(record.index)))

    threads = [threading.Thread(target=hand_over, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sweep.flush()
    for index, param in enumerate(params):
        assert torch.equal(param, torch.full((1000,), float(index))), index
    expected = torch.arange(1600.0).double().square() * 1000
    torch.testing.assert_close(optimizer._training.state.primary.slots, expected, rtol=1e-6, atol=0)


# ---- Devices --------------------------------------------------------------------------------------------------------


def spread(optimizer: Lomo, second: Callable[[int], bool]) -> None:
    """Gives some parameters scalars and slots of their own, as those on a second device have."""
    state = optimizer._training.state
    there = torch.device("meta")  # only a name
    device = state.devices[there] = DeviceState(
        CPU, len(optimizer._training.managed_params), len(optimizer.param_groups)
    )
    for scalars, vector in zip(state.scalars, device.vectors, strict=True):
        scalars[there] = GroupScalars(vector)
    groups = [index for index, group in enumerate(optimizer.param_groups) for _ in group["params"]]
    for record, group in zip(optimizer._training.managed_params, groups, strict=True):
        if second(record.index):
            record.bind(device, state.scalars[group][there])


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm": {"clip_grad_norm": 0.1, "clip_passes": "two"},
    "scale": {"loss_scale": "dynamic", "clip_passes": "two"},
    "static": {"loss_scale": 64.0, "clip_grad_norm": 0.1, "rounding": "stochastic", "clip_passes": "two"},
}


@pytest.mark.parametrize("second", ["odd", "even", "all"])
@pytest.mark.parametrize("rule", RULES)
def test_two_devices_equal_one(rule: str, second: str) -> None:
    models = [transformer(Options(dtype=torch.bfloat16)) for _ in range(2)]
    one, two = [Lomo(model, lr=0.1, weight_decay=0.01, **RULES[rule]) for model in models]
    spread(two, {"odd": lambda i: i % 2 == 1, "even": lambda i: i % 2 == 0, "all": lambda i: True}[second])
    for step in range(4):
        for model, optimizer in zip(models, (one, two), strict=True):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.backward(loss_of(model, step))
        # The slots are added up in another order: the norm may differ in its last bit, the weights' bits do not.
        assert two.last_grad_norm.item() == pytest.approx(one.last_grad_norm.item(), rel=1e-12)
        for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
            assert_same_bits(ours, theirs)
    assert [device.step.item() for device in two._training.state.devices.values()] == [4, 4]


@pytest.mark.parametrize("overflows", [0, 1])
def test_an_overflow_on_one_device_skips_the_step_on_both(overflows: int) -> None:
    params = [nn.Parameter(torch.ones(5)) for _ in range(2)]
    optimizer = Lomo(params, lr=0.5, clip_grad_norm=1.0, weight_decay=0.1, clip_passes="two")
    spread(optimizer, lambda i: i == 1)
    factors = [torch.ones(()), torch.ones(())]
    factors[overflows].fill_(torch.inf)
    optimizer.backward(sum((p * f).sum() for p, f in zip(params, factors, strict=True)))
    assert all(torch.equal(param, torch.ones(5)) for param in params)
    assert optimizer.skipped_steps.item() == 1
    optimizer.backward(sum(param.sum() for param in params))
    expected = 1 - 0.5 * 0.1 - 0.5 / 10**0.5
    assert all(torch.allclose(param, torch.full((5,), expected)) for param in params)
