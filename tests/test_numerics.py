"""csrc/numerics.h on the host, through the pybind11 module, equals reference.py; and the random bits are random."""

import lomo_kernels_testing as host
import pytest
import torch

from lomo_kernels import numbers, reference

FORMATS = {torch.bfloat16: (host.bfloat16, 16), torch.float16: (host.float16, 32)}
ROUND = {torch.bfloat16: reference.round_bfloat16, torch.float16: reference.round_float16}
DTYPES = pytest.mark.parametrize("dtype", FORMATS, ids=str)


def patterns(n=1_000_000):
    """float32 numbers of random bits, and of every exponent near what 16 bits can hold; a NaN is a quiet one."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (n,), generator=generator)
    exponents = torch.randint(90, 147, (n,), generator=generator) << 23
    near = exponents | torch.randint(0, 2**23, (n,), generator=generator)
    special = torch.tensor([0, 1, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F7F8000, 0x7F7F7FFF, 0x477FF000, 0x477FEFFF])
    bits = torch.cat([bits, near, near | -(2**31), special, special | -(2**31)])
    x = bits.to(torch.int32).view(torch.float32)
    return torch.where(x.isnan(), torch.nan, x)


def bits_of(x):
    return x.view(torch.int16)


@DTYPES
def test_widening_every_pattern(dtype):
    narrow = torch.arange(-(2**15), 2**15).to(torch.int16)
    out = torch.empty(2**16)
    FORMATS[dtype][0].widen(narrow.data_ptr(), out.data_ptr(), out.numel())
    expected = narrow.view(dtype).float()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out[~out.isnan()].view(torch.int32), expected[~out.isnan()].view(torch.int32))


@DTYPES
def test_nearest(dtype):
    x = patterns()
    out = torch.empty(x.shape, dtype=dtype)
    FORMATS[dtype][0].nearest(x.data_ptr(), out.data_ptr(), x.numel())
    assert torch.equal(bits_of(out), bits_of(ROUND[dtype](x)))
    number = ~x.isnan()
    assert torch.equal(bits_of(out)[number], bits_of(x.to(dtype))[number])
    assert torch.equal(out.isnan(), x.isnan())


@DTYPES
def test_stochastic(dtype):
    x = patterns()
    module, width = FORMATS[dtype]
    random = torch.randint(0, 2**width, x.shape, generator=torch.Generator().manual_seed(1))
    random[::5], random[1::5] = 0, 2**width - 1
    words = random.to(torch.int32)
    out = torch.empty(x.shape, dtype=dtype)
    module.stochastic(x.data_ptr(), words.data_ptr(), out.data_ptr(), x.numel())
    assert torch.equal(bits_of(out), bits_of(ROUND[dtype](x, random)))
    assert not (out.isinf() & ~x.to(dtype).isinf()).any()


@pytest.mark.parametrize("key", [(0, 0, 0), (1, 2, 3), (-1, 0, 2**40), (2**62, 2**33, 7)], ids=str)
def test_random_bits(key):
    stream = host.stream_key(*key)
    assert stream == numbers.stream_key(*key)
    assert host.mix64(stream) == numbers.mix64(stream)
    counters = [0, 1, 2**16, 2**32 - 1, 2**32, 2**33 + 5, 2**40 + 12345]
    assert [host.random_bits(stream, c) for c in counters] == reference.random_bits(
        stream, torch.tensor(counters)
    ).tolist()


def uniform(counter, *key):
    return reference.random_bits(numbers.stream_key(*key), counter).double() / 2**32 - 0.5


def in_standard_errors(first, second):
    """Correlation of two tensors of numbers uniform in [-0.5, 0.5)."""
    return abs(float((first * second).mean()) * 12 * first.numel() ** 0.5)


N = 2**20


@pytest.mark.parametrize("lag", [1, 2, 3, 7, 64, *(2**k for k in range(8, 21))])
def test_numbers_apart_are_uncorrelated(lag):
    drawn = uniform(torch.arange(N + lag), 0, 0, 0)
    assert in_standard_errors(drawn[:N], drawn[lag:]) < 4


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["seed", "parameter", "step"])
def test_streams_are_uncorrelated(other):
    counter = torch.arange(N)
    assert in_standard_errors(uniform(counter, 0, 0, 0), uniform(counter, *other)) < 4


def test_every_bit_is_balanced():
    bits = reference.random_bits(numbers.stream_key(3, 1, 4), torch.arange(N))
    ones = torch.stack([(bits >> k) & 1 for k in range(32)]).double().mean(1)
    assert ((ones - 0.5).abs() < 4 * 0.5 / N**0.5).all()


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 2.0**-17)], ids=str
)
def test_rounding_errors_have_no_mean(dtype, scale):
    x = (torch.rand(10**6, generator=torch.Generator().manual_seed(2)) + 0.5) * scale
    error = reference.round_to(x, dtype, numbers.stream_key(5, 0, 0), torch.arange(10**6)).double() - x.double()
    assert error.mean().abs() < 4 * error.std() / 10**3
