"""Bits that no change of the code may change: hashes of outputs, written to bits.json by `python tests/test_bits.py`.

The other tests compare with the oracle, which a change may change too. Inputs come from integers, so that they are the
same on every machine. Updates have the same bits on every backend. Norms and products do not: those of this file are
sums of small integers, which are exact in any order, except the norms of the compiled CPU kernels.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from support import oracle

from lomo_kernels import backends, ops

EXPECTED = Path(__file__).parent / "bits.json"
CHOICE = backends.choice("CPU")
#: Sums have an order of their own there.
ORDERED = CHOICE.backend == "cpu" and "emulated" not in CHOICE.detail
SIZES = [0, 1, 2, *(n + d for n in (8, 16, 32, 64, 128, 512, 4096, 32768, 65536) for d in (-1, 0, 1)), 10007, 131075]
SHARDS = {"row": (3, 2**62, 2**62), "columns": (2, 7, 19), "far": (2**33 - 40, 64, 100), "farther": (2**40 + 1, 1, 3)}


def numbers(n, dtype, seed):
    """Multiples of 2**-12 in (-1, 1) in five of eight places, else any bit patterns but NaN's: which NaN comes out is
    the processor's choice."""
    steps = torch.randint(-4095, 4096, (n,), generator=oracle.generator(seed))
    odd = oracle.patterns(n, dtype, seed + 1)
    return torch.where(
        torch.arange(n) % 8 < 5, (steps * 2.0**-12).to(dtype), odd.nan_to_num(0.5, torch.inf, -torch.inf)
    )


class Hash:
    """Of tensors' bits, a NaN being any NaN."""

    def __init__(self):
        self.hash = hashlib.sha256()

    def add(self, *tensors):
        for tensor in tensors:
            canonical = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
            self.hash.update(oracle.bits(canonical).numpy().tobytes())

    def digest(self):
        return self.hash.hexdigest()[:16]


def updates(dtype, grad_dtype, rounding, given):
    """Of every size."""
    made = Hash()
    for size in SIZES:
        param = numbers(size, dtype, 11)
        ops.sgd_(param, numbers(size, grad_dtype, 13), rounding=rounding, seed=5, parameter_id=3, step=7, **given)
        made.add(param)
    return made


def shards(dtype, rounding):
    """Of every size and shard, aligned and not, and in columns."""
    made = Hash()
    for shard in SHARDS.values():
        for size in (1, 63, 64, 65, 4097, 65537):
            param, grad = numbers(size + 1, dtype, 17)[1:], numbers(size, dtype, 19)
            ops.sgd_(param, grad, lr=0.3, rounding=rounding, seed=-1, shard=shard, step=2**40)
            made.add(param)
        param, grad = numbers(66 * 70, dtype, 21).view(66, 70).t(), numbers(66 * 70, dtype, 23).view(70, 66)
        ops.sgd_(param, grad, lr=0.3, rounding=rounding, shard=shard)
        made.add(param)
    return made


def lists(rounding):
    """All dtypes in one call."""
    made = Hash()
    kinds = [(p, g, size) for p in oracle.DTYPES for g in oracle.DTYPES for size in (0, 1, 65, 4096, 4100)]
    params = [numbers(size, p, 31) for p, _, size in kinds]
    grads = [numbers(size, g, 33) for _, g, size in kinds]
    given = {"lr": 0.7, "weight_decay": 0.013, "inv_scale": 0.3, "clip_value": 0.9, "clip_coef": 0.123}
    ops.sgd_list_(params, grads, **given, rounding=rounding, seed=2, step=9)
    made.add(*params)
    shard = [(i, 5, 11) for i in range(len(params))]
    ids = [2**40 + i for i in range(len(params))]
    ops.sgd_list_(params, grads, lr=0.1, rounding=rounding, parameter_id=ids, shard=shard)
    ops.sgd_list_(params, grads, lr=0.1, rounding=rounding, found_inf=1.0)
    made.add(*params)
    return made


def integers(*shape, dtype, seed, largest=3):
    return torch.randint(-largest, largest + 1, shape, generator=oracle.generator(seed)).to(dtype)


def norms(dtype):
    """Of small integers, of every size, alone, in a list, and with an update."""
    made = Hash()
    grads = [integers(size, dtype=dtype, seed=41) for size in SIZES]
    slots = torch.full((3, len(grads)), 0.5, dtype=torch.float64)
    ops.sq_norm_list_(slots[0], grads, inv_scale=0.5)
    for slot, grad in zip(slots[1], grads, strict=True):
        ops.sq_norm_(slot, grad)
    for slot, grad in zip(slots[2], grads, strict=True):
        ops.sgd_(numbers(grad.numel(), dtype, 43), grad, lr=0.1, clip_value=1.0, sq_norm=slot, found_inf=1.0)
    made.add(slots)
    return made


def ordered_norms(dtype):
    """Of any numbers: their bits depend on the order of the sum."""
    made = Hash()
    for size in SIZES:
        grad, slot = numbers(size, dtype, 47), torch.zeros(3, dtype=torch.float64)
        finite = torch.where(grad.isfinite(), grad, 0)
        for i, one in enumerate((finite, (finite * 1e-3).to(dtype), grad)):
            ops.sq_norm_(slot[i], one, inv_scale=1 / 3)
        made.add(slot)
    return made


def layers(dtype, rounding):
    """Products and rows of small integers, of several uses, with every argument."""
    made = Hash()
    given = {"weight_decay": 0.1, "inv_scale": 0.25, "clip_value": 20.0, "clip_coef": 0.3}
    for rows, columns, tokens in ((1, 1, 1), (7, 9, 5), (65, 33, 40), (300, 130, 9), (40, 4100, 3)):
        for factors in oracle.DTYPES:
            xs = [integers(tokens, columns, dtype=factors, seed=51 + i) for i in range(2)]
            gys = [integers(tokens, rows, dtype=factors, seed=53 + i) for i in range(2)]
            rows_of = [torch.randint(0, rows, (tokens,), generator=oracle.generator(55 + i)) for i in range(2)]
            for uses in (1, 2):
                slots = torch.zeros(2, dtype=torch.float64)
                weights = [numbers(rows * columns, dtype, 57).view(rows, columns) for _ in range(2)]
                keys = {"lr": 0.3, "rounding": rounding, "seed": 3, "parameter_id": 4, "step": 5, **given}
                ops.linear_sgd_(weights[0], xs[:uses], gys[:uses], **keys, sq_norm=slots[0])
                ops.embedding_sgd_(weights[1], rows_of[:uses], xs[:uses], padding_idx=0, **keys, sq_norm=slots[1])
                made.add(*weights, slots)
                ops.linear_sq_norm_(slots[0], xs[:uses], gys[:uses])
                ops.embedding_sq_norm_(slots[1], rows_of[:uses], xs[:uses], inv_scale=0.5)
                made.add(slots)
    return made


SETTINGS = {
    "plain": {"lr": 0.3},
    "clipped": {"lr": 0.3, "clip_coef": 0.37},
    "decay": {"lr": 0.3, "weight_decay": 0.1},
    "all": {
        "lr": 0.7,
        "weight_decay": 0.013,
        "inv_scale": 0.3,
        "clip_value": 0.9,
        "clip_coef": 0.123,
        "found_inf": 0.0,
    },
    "found": {"lr": 0.3, "found_inf": 1.0},
}


def cases():
    """name -> (function, arguments)."""
    made = {}
    short = oracle.name_of
    for dtype in oracle.DTYPES:
        made[f"norms {short(dtype)}"] = norms, (dtype,)
        made[f"ordered norms {short(dtype)}"] = ordered_norms, (dtype,)
        for rounding in oracle.ROUNDINGS:
            made[f"shards {short(dtype)} {rounding}"] = shards, (dtype, rounding)
            made[f"layers {short(dtype)} {rounding}"] = layers, (dtype, rounding)
            for grad in oracle.DTYPES:
                for name, given in SETTINGS.items():
                    made[f"{short(dtype)} by {short(grad)} {rounding} {name}"] = updates, (dtype, grad, rounding, given)
    for rounding in oracle.ROUNDINGS:
        made[f"lists {rounding}"] = lists, (rounding,)
    return made


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_before(name):
    function, arguments = CASES[name]
    if function is ordered_norms and not ORDERED:
        pytest.skip("another backend adds in another order")
    assert function(*arguments).digest() == json.loads(EXPECTED.read_text())[name]


def test_one_bit_shows():
    tensors = torch.zeros(9), torch.zeros(9)
    tensors[1].view(torch.int32)[8] = 1
    digests = []
    for tensor in tensors:
        made = Hash()
        made.add(tensor)
        digests.append(made.digest())
    assert digests[0] != digests[1]


if __name__ == "__main__":
    EXPECTED.write_text(
        json.dumps({name: function(*given).digest() for name, (function, given) in CASES.items()}, indent=1) + "\n"
    )
