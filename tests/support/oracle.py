"""The numerics contract once more, one element at a time, and the inputs that the operators' tests share.

`lomo_kernels.reference` is the oracle of the kernels; this file is the oracle of `lomo_kernels.reference`. Nothing is
taken from there: float32 operations are exact rational arithmetic rounded once, rounding is stated for any binary
format by its precision and range, and the hash is written with Python's integers.
"""

import math
import os
import re
from fractions import Fraction
from typing import NamedTuple

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = ("nearest", "stochastic")
#: Around every width that a kernel works in: vectors, groups, blocks, tiles, chunks.
SIZES = [0, 1, 2, *(n + d for n in (8, 16, 32, 64, 512, 4096, 65536) for d in (-1, 0, 1)), 10007, 200003]


def name_of(value):
    """Short test ids: float32 for torch.float32."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


# ---- Binary formats -------------------------------------------------------------------------------------------------


class Format(NamedTuple):
    width: int  # bits of storage
    precision: int  # bits of a significand, with the leading one
    lowest: int  # the smallest subnormal is 2**lowest

    @property
    def infinity(self):
        return (1 << self.width - 1) - (1 << self.precision - 1)


FORMATS = {
    torch.float32: Format(32, 24, -149),
    torch.bfloat16: Format(16, 8, -133),
    torch.float16: Format(16, 11, -24),
}
BITS = {torch.float64: torch.int64, torch.float32: torch.int32} | dict.fromkeys(
    (torch.bfloat16, torch.float16, torch.int16), torch.int16
)


def decode(bits, form):
    """The value of a bit pattern, as a Python float (all three formats fit)."""
    magnitude = bits & ((1 << form.width - 1) - 1)
    sign = -1.0 if bits >> (form.width - 1) else 1.0
    if magnitude >= form.infinity:
        return sign * math.inf if magnitude == form.infinity else math.nan
    field, fraction = divmod(magnitude, 1 << form.precision - 1)
    significand = fraction + (1 << form.precision - 1 if field else 0)
    return sign * math.ldexp(significand, form.lowest + max(field - 1, 0))


def log2_floor(q):
    """floor(log2(q)) of a positive Fraction."""
    guess = q.numerator.bit_length() - q.denominator.bit_length()
    return guess if q >= Fraction(2) ** guess else guess - 1


def split(q, form):
    """A positive Fraction as (unit, steps, rest): q = (steps + rest) * 2**unit with 0 <= rest < 1."""
    unit = max(log2_floor(q) - form.precision + 1, form.lowest)
    steps, rest = divmod(q / Fraction(2) ** unit, 1)
    return unit, steps, rest


def encode(unit, steps, form):
    """The bit pattern of steps * 2**unit; infinity where it is too large."""
    return min(((unit - form.lowest) << form.precision - 1) + steps, form.infinity)


def nearest(q, form):
    """The bit pattern of the value nearest to a positive Fraction, ties to even."""
    unit, steps, rest = split(q, form)
    up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and steps % 2 == 1)
    return encode(unit, steps + up, form)


def stochastic(q, form, random):
    """The bit pattern that a positive Fraction takes with these random bits (16 for bfloat16, 32 for float16)."""
    unit, steps, rest = split(q, form)
    if form.precision == 8:
        cut, drawn = 16, random
    else:  # the field of a float32's exponent: below 113 the result is subnormal and more bits are cut
        field = max(log2_floor(q) + 127, 0)
        cut = 13 if field >= 113 else 126 - field
        drawn = random >> (32 - cut) if cut <= 32 else 0
    result = encode(unit, steps + (rest * 2**cut + drawn >= 2**cut), form)
    return nearest(q, form) if result == form.infinity else result


def rounded(x, form, random=None):
    """The bit pattern of a float, to nearest or with random bits; None stands for any quiet NaN."""
    if math.isnan(x):
        return None
    sign = int(math.copysign(1, x) < 0) << (form.width - 1)
    if math.isinf(x):
        return sign | form.infinity
    if x == 0:
        return sign
    q = Fraction(abs(x))
    return sign | (nearest(q, form) if random is None else stochastic(q, form, random))


# ---- float32 operations on Python floats ----------------------------------------------------------------------------


def float32(x):
    """A Python float rounded once to float32."""
    bits = rounded(x, FORMATS[torch.float32])
    return math.nan if bits is None else decode(bits, FORMATS[torch.float32])


def times(a, b):
    """a * b in float32. The float64 product of two float32 numbers is exact: 48 bits, exponents from -298 to 256."""
    return float32(a * b)


def minus(a, b):
    """a - b in float32. A float64 difference may be rounded already, so the exact one is taken."""
    if not (math.isfinite(a) and math.isfinite(b)) or a == b:
        return a - b  # infinities, NaN, and the sign of zero
    exact = Fraction(a) - Fraction(b)
    bits = nearest(abs(exact), FORMATS[torch.float32]) | (exact < 0) << 31
    return decode(bits, FORMATS[torch.float32])


# ---- Random bits ----------------------------------------------------------------------------------------------------


def mix64(z):
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def hashed(seed, parameter_id, step, counter):
    """The 32 random bits of one counter."""
    key = mix64(mix64(mix64(seed % 2**64) ^ parameter_id % 2**64) ^ step % 2**64)
    block = mix64(key ^ counter >> 32)
    x = counter % 2**32 ^ block % 2**32
    x = (x ^ x >> 7 ^ x >> 16) * 0x21F0AAAD % 2**32
    x = ((x ^ x >> 15) + (block >> 32)) * 0xD35A2D97 % 2**32
    return x ^ x >> 15


def random_of(dtype, seed, parameter_id, step, index):
    """The random bits of the element with this index in the whole parameter."""
    if dtype == torch.bfloat16:
        return hashed(seed, parameter_id, step, index // 2) >> (16 if index % 2 else 0) & 0xFFFF
    return hashed(seed, parameter_id, step, index)


# ---- The operators --------------------------------------------------------------------------------------------------


def updated_bits(
    param,
    grad,
    *,
    lr,
    weight_decay=0.0,
    inv_scale=None,
    clip_value=None,
    clip_coef=None,
    rounding="nearest",
    seed=0,
    parameter_id=0,
    step=0,
    shard=None,
    elements=None,
):
    """What `sgd_` makes of each of these elements, or of all: a list of bit patterns, None for any quiet NaN.
    Arguments: numbers only."""
    form = FORMATS[param.dtype]
    decay = float32(1.0 - lr * weight_decay)
    rate = float32(lr)
    result = []
    params, grads = unsigned(param), grad.double().flatten().tolist()
    for i in range(param.numel()) if elements is None else elements:
        p_bits, g = params[i], grads[i]
        if inv_scale is not None:
            g = times(g, float32(inv_scale))
        if not math.isfinite(g):
            result.append(p_bits)
            continue
        if clip_value is not None:
            g = min(max(g, -float32(clip_value)), float32(clip_value))
        if clip_coef is not None:
            g = times(g, float32(clip_coef))
        p = minus(times(decode(p_bits, form), decay), times(rate, g))
        random = None
        if rounding == "stochastic" and param.dtype != torch.float32:
            offset, length, stride = shard or (0, param.numel(), param.numel())
            random = random_of(param.dtype, seed, parameter_id, step, offset + i // length * stride + i % length)
        result.append(rounded(p, form, random))
    return result


def squares(grad, inv_scale=None):
    """The sum of float32(grad * inv_scale) ** 2, in float64: each square is exact there."""
    g = grad.detach().cpu().float()
    if inv_scale is not None:
        g = g * torch.tensor(inv_scale, dtype=torch.float64).float()
    g = g.double().flatten()
    if g.numel() <= 4096:
        return math.fsum(x * x for x in g.tolist())
    return g.square().sum().item()


# ---- Comparing ------------------------------------------------------------------------------------------------------


def unsigned(tensor):
    """The bit patterns in row-major order, as Python integers."""
    mask = (1 << 8 * tensor.element_size()) - 1
    return [b & mask for b in bits(tensor).tolist()]


def bits(tensor):
    """The bit patterns in row-major order, as an integer tensor on the CPU."""
    return tensor.detach().cpu().contiguous().view(BITS[tensor.dtype]).flatten()


def assert_same_bits(actual, expected, *what):
    """Equality of every bit. Which NaN an operation makes is the processor's choice, or numpy's in the interpreter of
    Triton: compared for compiled CPU kernels only."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    different = bits(actual) != bits(expected)
    if not actual.is_cpu or os.environ.get("TRITON_INTERPRET") == "1":
        different &= ~(actual.isnan() & expected.to(actual.device).isnan()).cpu().flatten()
    if different.any():
        i = int(different.nonzero()[0])
        raise AssertionError(
            f"{int(different.sum())} of {different.numel()} elements differ, the first at {i}: "
            f"{actual.flatten()[i]!r} instead of {expected.flatten()[i]!r} {what or ''}"
        )


def assert_close_sum(slot, expected):
    """Within 1e-6 relative, the promise for every finite gradient."""
    value = float(slot)
    assert math.isfinite(value) and abs(value - expected) <= 1e-6 * expected, f"{value!r} instead of {expected!r}"


def in_order(*messages):
    """A regular expression for parts, divided by ellipses, that a message must have in this order."""
    return "^" + ".*".join(re.escape(part) for message in messages for part in message.split(" … "))


# ---- Inputs ---------------------------------------------------------------------------------------------------------


def generator(seed):
    return torch.Generator().manual_seed(seed)


def patterns(n, dtype, seed=0):
    """Arbitrary bit patterns: every exponent as likely as any other, subnormals, infinities and NaN among them."""
    integers = BITS[dtype]
    info = torch.iinfo(integers)
    return torch.randint(info.min, info.max + 1, (n,), generator=generator(seed), dtype=integers).view(dtype)


def all_patterns(dtype, seed=None):
    """All 65536 bit patterns of a 16-bit dtype, in order or shuffled."""
    order = torch.arange(2**16) if seed is None else torch.randperm(2**16, generator=generator(seed))
    return order.to(torch.int32).to(torch.int16).view(dtype)


def specials(dtype):
    """The ends of the format: zeros, subnormals, the largest numbers, infinities, NaN."""
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    ends = [
        0.0,
        least,
        3 * least,
        info.smallest_normal - least,
        info.smallest_normal,
        1.0,
        info.max,
        math.inf,
        math.nan,
    ]
    ends = torch.tensor(ends, dtype=torch.float64)
    return torch.cat([ends, -ends]).to(dtype)


def values(n, dtype, seed=0, scale=0.02):
    """Ordinary N(0, scale) numbers in five of eight places, else arbitrary bit patterns and the format's ends."""
    ordinary = (torch.randn(n, generator=generator(seed)) * scale).to(dtype)
    odd = patterns(n, dtype, seed + 1)
    choice = torch.randint(len(specials(dtype)), (n,), generator=generator(seed + 2))
    kind = torch.arange(n) % 8
    mixed = torch.where(kind < 5, ordinary, torch.where(kind < 7, odd, specials(dtype)[choice]))
    return mixed


def param_of(n, dtype, seed=0):
    return values(n, dtype, 1000 + seed)


def grad_of(n, dtype, seed=0):
    """As `values`, but the odd ones stand in other places than the parameter's too."""
    return values(n, dtype, 2000 + seed, scale=1.0).roll(seed % 8)


def ordinary(n, dtype, seed=0, scale=1.0):
    """N(0, scale) numbers only."""
    return (torch.randn(n, generator=generator(3000 + seed)) * scale).to(dtype)


def misaligned(tensor, offset):
    """A copy that starts `offset` elements into a larger tensor, and that larger tensor."""
    whole = torch.full((tensor.numel() + offset + 3,), 7.0, dtype=tensor.dtype, device=tensor.device)
    part = whole[offset : offset + tensor.numel()].view(tensor.shape)
    part.copy_(tensor)
    return part, whole


#: Whatever changes the update, one by one and together. Numbers; every one is also tried as a tensor.
ARGUMENTS = {
    "lr": {"lr": 3e-2},
    "lr_zero": {"lr": 0.0},
    "lr_large": {"lr": 1e4},
    "lr_subnormal": {"lr": 1e-40},
    "weight_decay": {"lr": 3e-2, "weight_decay": 0.1},
    "weight_decay_to_zero": {"lr": 1.0, "weight_decay": 1.0},
    "weight_decay_past_zero": {"lr": 2.0, "weight_decay": 1.1},
    "weight_decay_needs_float64": {"lr": 0.7, "weight_decay": 1.1},
    "inv_scale": {"lr": 1.0, "inv_scale": 2.0**-16},
    "inv_scale_third": {"lr": 3e-2, "inv_scale": 1 / 3},
    "inv_scale_overflows": {"lr": 3e-2, "inv_scale": 1e30},
    "clip_value": {"lr": 3e-2, "clip_value": 0.1},
    "clip_value_subnormal": {"lr": 1.0, "clip_value": 1e-41},
    "clip_value_infinite": {"lr": 3e-2, "clip_value": math.inf},
    "clip_coef": {"lr": 3e-2, "clip_coef": 0.37},
    "clip_coef_zero": {"lr": 3e-2, "clip_coef": 0.0},
    "found_inf_zero": {"lr": 3e-2, "found_inf": 0.0},
    "all": {
        "lr": 0.7,
        "weight_decay": 0.013,
        "inv_scale": 0.3,
        "clip_value": 0.9,
        "clip_coef": 0.123,
        "found_inf": 0.0,
    },
}

#: What keys the random bits.
KEYS = {
    "none": {},
    "seed": {"seed": 1},
    "seed_high": {"seed": 2**32},
    "seed_negative": {"seed": -(2**63)},
    "parameter_id": {"parameter_id": 1},
    "parameter_id_high": {"parameter_id": 2**40},
    "step": {"step": 1},
    "step_high": {"step": 2**40},
    "shard": {"shard": (1, 1, 1)},
    "shard_beyond_32_bits": {"shard": (2**32, 10**6, 10**6)},
    "shard_beyond_33_bits": {"shard": (2**33, 10**6, 10**6)},
    "shard_beyond_40_bits": {"shard": (2**40 + 2, 10**6, 10**6)},
}


def reference_arguments(arguments):
    """Arguments of `ops.sgd_` as those of `reference.updated`."""
    renamed = {k: v for k, v in arguments.items() if k not in ("found_inf", "rounding", "sq_norm")}
    return renamed | ({"stochastic": arguments["rounding"] == "stochastic"} if "rounding" in arguments else {})


def subnormals(n, dtype, seed=0):
    """Subnormal numbers of `dtype`, both signs, none of them zero."""
    form = FORMATS[dtype]
    magnitude = torch.randint(1, 2 ** (form.precision - 1), (n,), generator=generator(4000 + seed))
    sign = torch.randint(0, 2, (n,), generator=generator(4001 + seed)) << (form.width - 1)
    return (magnitude | sign).to(torch.int32).to(BITS[dtype]).view(dtype)


CONTRACTION_LR = 0.3


def contraction(n):
    """float32 parameters and gradients whose products do not fit float32, and are as large as the parameters."""
    return ordinary(n, torch.float32, 10, scale=0.3), ordinary(n, torch.float32, 11)
