"""`LiveBytes`: exact on allocations that can be counted by hand, also inside backward and hooks."""

import gc

import pytest
import torch
from torch import nn

from lomo_kernels import Lomo
from lomo_kernels.memory import LiveBytes

KB = 1000


def kilobyte():
    return torch.zeros(KB // 4)


def test_counts_each_allocation_and_each_free():
    with LiveBytes() as live:
        a = kilobyte()
        assert (live.current, live.peak) == (KB, KB)
        b = a + 1
        assert (live.current, live.peak) == (2 * KB, 2 * KB)
        del a
        assert (live.current, live.peak) == (KB, 2 * KB)
        del b
        assert (live.current, live.peak) == (0, 2 * KB)


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 2), (torch.float64, 8), (torch.uint8, 1)])
def test_counts_bytes_of_every_dtype(dtype, width):
    with LiveBytes() as live:
        kept = torch.empty(3, 5, dtype=dtype)
    assert live.current == 15 * width
    del kept


def test_views_and_in_place_results_are_not_counted_again():
    with LiveBytes() as live:
        whole = kilobyte()
        views = [whole[3:7], whole.view(2, -1).t(), whole.detach(), whole.add_(1), *whole.chunk(4)]
        assert live.peak == KB
        del whole
        assert live.current == KB  # the views keep the storage
        del views
        assert live.current == 0


def test_views_of_older_tensors_count_nothing():
    older, other = kilobyte(), kilobyte()
    with LiveBytes() as live:
        views = [older[:5], older.mul_(2), torch.add(older, 1, out=other)]
        del views, older
    assert (live.current, live.peak) == (0, 0)


def test_tensors_of_python_numbers_count():
    with LiveBytes() as live:
        kept = torch.tensor([1.0, 2.0, 3.0])
    assert live.current == 12
    del kept


def test_an_output_argument_that_grows_is_counted_with_its_new_size():
    with LiveBytes() as live:
        out = torch.empty(0)
        torch.arange(250, dtype=torch.float32, out=out)
        assert live.current == KB
        del out
    assert live.current == 0


def test_frees_are_noticed_after_exit():
    with LiveBytes() as live:
        kept = kilobyte()
    del kept
    assert live.current == 0


def test_frees_by_the_garbage_collector_are_noticed():
    with LiveBytes() as live:
        cycle = [kilobyte()]
        cycle.append(cycle)
        del cycle
        gc.collect()
        assert live.current == 0


def test_reset_peak_goes_down_to_what_is_alive():
    with LiveBytes() as live:
        kept, dropped = kilobyte(), kilobyte()
        del dropped
        assert live.peak == 2 * KB
        live.reset_peak()
        assert live.peak == KB
    del kept


def test_a_loop_that_drops_its_tensor_does_not_pile_up():
    """Fails if frees go unnoticed: the peak would be that of ten tensors."""
    with LiveBytes() as live:
        x = kilobyte()
        for _ in range(10):
            x = x + 1
    assert live.peak == 2 * KB


def test_sees_activations_saved_for_backward_and_gradients_made_in_it():
    weight = torch.ones(KB // 4, requires_grad=True)
    with LiveBytes() as live:
        saved = weight.exp()  # kept by autograd too: backward of exp needs it
        total = saved.sum()
        del saved
        assert live.current == KB + 4
        total.backward()
        del total
        assert live.current == KB  # the gradient
        assert live.peak >= 2 * KB  # beside the saved activation
        weight.grad = None
        assert live.current == 0


def test_events_pair_allocations_with_frees():
    events = []
    with LiveBytes(events) as live:
        a = kilobyte()
        b = a + 1
        del a, b
    assert [(event.kind, event.key, event.nbytes) for event in events] == [
        ("alloc", 0, KB),
        ("alloc", 1, KB),
        ("free", 0, KB),
        ("free", 1, KB),
    ]
    assert events[1].operator == events[3].operator == "aten.add.Tensor"
    assert live.current == 0


WIDTH, LAYERS = 512, 6  # weights of 1 MiB: none is small enough to wait in a buffer
WEIGHT_BYTES = WIDTH * WIDTH * 4


def most_weights_alive(step):
    """Largest number of storages as big as a weight that were alive at once while `step` ran.

    With one row per batch, nothing but gradients is as big.
    """
    events = []
    with LiveBytes(events):
        step()
    alive = most = 0
    for event in events:
        if event.nbytes >= WEIGHT_BYTES:
            alive += 1 if event.kind == "alloc" else -1
            most = max(most, alive)
    return most


def deep_model():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def test_lomo_has_at_most_one_gradient_alive():
    model = deep_model()
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=1.0, clip_passes="two")
    assert most_weights_alive(lambda: optimizer.backward(model(torch.ones(1, WIDTH)).sum())) <= 1


def test_a_plain_backward_has_all_gradients_alive():
    model = deep_model()
    assert most_weights_alive(lambda: model(torch.ones(1, WIDTH)).sum().backward()) == LAYERS
