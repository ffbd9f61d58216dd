# mypy: disable-error-code="no-untyped-def"
"""Element types, random bits and sums that the kernels share: `csrc/numerics.h` once more, in Triton.

Rounding and widening are stated on the bits: Triton's interpreter truncates where a float32 becomes a bfloat16, and the
bits must not depend on what a GPU's conversion does. Kernels are compiled with ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

# Elements that a program has in registers at a time. Sums of squares are formed per BLOCK, so their bits depend on it,
# but neither on the GPU nor on the number of warps.
BLOCK = 4096

# ---- Element types. Memory holds unsigned integers; arithmetic is in float32. ----------------------------------------


@triton.jit
def bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def elements(address, dtype: tl.constexpr, ALIGNED: tl.constexpr = False):
    """The address, or pointer, of elements of `dtype` as a pointer to their bits. ALIGNED: the address is known to be a
    multiple of 16, which a launch finds out by itself of a tensor, but not of a number in a table."""
    storage: tl.constexpr = tl.uint32 if dtype == tl.float32 else tl.uint16
    pointer = address.to(tl.pointer_type(storage), bitcast=True)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load(pointer, left, BLOCK: tl.constexpr, TOGETHER: tl.constexpr = 16):
    """The bits of BLOCK elements, zero from element `left` on, at most TOGETHER of them by one instruction. A full
    block has no mask: the compiler could not show it to be constant over 128 bits."""
    if left >= BLOCK:
        bits = tl.load(pointer + tl.max_contiguous(tl.arange(0, BLOCK), TOGETHER))
    else:
        offsets = tl.max_contiguous(tl.arange(0, BLOCK), TOGETHER)
        bits = tl.load(pointer + offsets, mask=offsets < left, other=0)
    return bits


@triton.jit
def store(pointer, bits, left, BLOCK: tl.constexpr):
    if left >= BLOCK:
        tl.store(pointer + tl.arange(0, BLOCK), bits)
    else:
        offsets = tl.arange(0, BLOCK)
        tl.store(pointer + offsets, bits, mask=offsets < left)


@triton.jit
def widen(bits, dtype: tl.constexpr):
    if dtype == tl.float32:
        x = float_of(bits)
    elif dtype == tl.bfloat16:
        x = float_of(bits.to(tl.uint32) << 16)
    else:  # exact, subnormals too: one instruction instead of the ten of numerics.h
        x = bits.to(tl.float16, bitcast=True).to(tl.float32)
    return x


@triton.jit
def nearest(x, dtype: tl.constexpr):
    u = bits_of(x)
    if dtype == tl.float32:
        bits = u
    elif dtype == tl.bfloat16:
        # Of a NaN nothing is rounded: a carry could make it zero.
        bits = ((u + tl.where(x != x, 0, 0x7FFF + ((u >> 16) & 1))) >> 16).to(tl.uint16)
    else:  # IEEE in the interpreter and on every GPU, subnormals too
        bits = x.to(tl.float16).to(tl.uint16, bitcast=True)
    return bits


@triton.jit
def stochastic(x, random, dtype: tl.constexpr):
    """`random`: 16 bits for bfloat16, 32 for float16, as uint32. See numerics.h for the formulas."""
    if dtype == tl.float32:
        bits = bits_of(x)
    elif dtype == tl.bfloat16:
        u = bits_of(x)
        plain = (x != x) | ((u & 0x7FFF8000) == 0x7F7F0000)  # NaN, or next to infinity
        bits = ((u + tl.where(plain, 0, random)) >> 16).to(tl.uint16)
    else:
        sign = (bits_of(x) >> 16) & 0x8000
        u = bits_of(x) & 0x7FFFFFFF
        field = u >> 23
        capped = tl.minimum(tl.maximum(field, 94), 113)
        cut = 126 - capped  # 13 bits, more below 2**-14; below 2**-33 nothing is kept
        m = tl.where(field < 94, 0, (u & 0x7FFFFF) | 0x800000)
        # What is kept, and the carry that the random bits make out of what is cut: a sum of 33 bits where 32 are cut.
        low = m << (32 - cut)
        kept = ((m >> 1) >> (cut - 1)) + (low + random < low).to(tl.uint32)
        largest = tl.where(u < 0x477FF000, 0x7BFF, 0x7C00)  # infinite only where nearest is
        magnitude = tl.minimum(((tl.maximum(field, 113) - 113) << 10) + kept, largest.to(tl.uint32))
        magnitude = tl.where(x != x, 0x7E00 | ((u >> 13) & 0x3FF), magnitude)
        bits = (sign | magnitude).to(tl.uint16)
    return bits


@triton.jit
def is_ordinary(x, dtype: tl.constexpr):
    """Whether `ordinary` rounds all of these numbers, [N]. bfloat16: none is NaN, or in the last binade's last step, or
    infinite. float16: the same, and none is zero or below 2**-24. That holds for 99 of 100 blocks of weights with a
    standard deviation of 0.02, for 90 with 0.002."""
    if dtype == tl.bfloat16:
        fits = tl.max(bits_of(x) & 0x7FFFFFFF, axis=0) < 0x7F7F0000
    else:  # twice the magnitude: the sign is shifted out
        fits = tl.max((bits_of(x) << 1) - 0x67000000, axis=0) < 0x8EFFC000 - 0x67000000
    return fits


@triton.jit
def ordinary(x, random, dtype: tl.constexpr):
    """`stochastic` of numbers that are as `is_ordinary` says."""
    u = bits_of(x)
    if dtype == tl.bfloat16:
        bits = ((u + random) >> 16).to(tl.uint16)
    else:
        # Of the significand 13 bits are cut, up to 23 below 2**-14, and as many random bits are added: a carry goes on
        # into the exponent. What is left is a float16, and two are converted by one instruction.
        kept = (bits_of(tl.minimum(tl.abs(x), 6.103515625e-05)) >> 23) - 94
        cut = (u + (random >> kept)) & ~(0xFFFFFFFF >> kept)
        bits = float_of(cut).to(tl.float16).to(tl.uint16, bitcast=True)
    return bits


# ---- Split weights: a bfloat16 and a low part of 16 bits that together are a float32. See numerics.h. ---------------


@triton.jit
def joined(high, low):
    """The float32 of both parts. A pair of which it is NaN, though `high` is not, has an old low part: then it counts
    as zero."""
    signed = low.to(tl.int16, bitcast=True).to(tl.int32).to(tl.uint32, bitcast=True)
    x = float_of((high.to(tl.uint32) << 16) + signed)
    return tl.where(x == x, x, float_of(high.to(tl.uint32) << 16))


@triton.jit
def high_part(x):
    """The nearest bfloat16. A tie goes away from zero. Of a NaN nothing is rounded: a carry could make it zero."""
    return ((bits_of(x) + tl.where(x != x, 0, 0x8000)) >> 16).to(tl.uint16)


@triton.jit
def low_part(x):
    return (tl.where(x != x, 0, bits_of(x)) & 0xFFFF).to(tl.uint16)


# ---- Scalars: numbers, or in the device's memory, in arguments of one type, so one kernel serves all. ----------------


@triton.jit
def scalar(argument, on_device, dtype: tl.constexpr):
    """A scalar of a step, of 64 bits: these bits, or their address."""
    value = argument.to(tl.int64)
    # Predicated loads: branches would cost more than all the rest of the scalars.
    value = tl.load(value.to(tl.pointer_type(tl.int64), bitcast=True), mask=on_device != 0, other=value)
    return value.to(dtype, bitcast=True)


@triton.jit
def clipping(inv_scale, clip_value, clip_coef, on_device, CLAMP: tl.constexpr):
    """The scalars of a step that clip, in float32: the factor that unscales a gradient, the limit, the coefficient."""
    unscale = scalar(inv_scale, on_device, tl.float64).to(tl.float32)
    limit = float("inf")
    if CLAMP:
        limit = scalar(clip_value, on_device, tl.float64).to(tl.float32)
    return unscale, limit, scalar(clip_coef, on_device, tl.float64).to(tl.float32)


@triton.jit
def step_scalars(lr, weight_decay, inv_scale, clip_value, clip_coef, on_device, CLAMP: tl.constexpr):
    """The scalars of a step in float32, as `updated` takes them, and the factor that unscales a gradient."""
    rate = scalar(lr, on_device, tl.float64)
    decay = (1.0 - rate * scalar(weight_decay, on_device, tl.float64)).to(tl.float32)
    unscale, limit, coef = clipping(inv_scale, clip_value, clip_coef, on_device, CLAMP)
    return rate.to(tl.float32), decay, unscale, limit, coef


FLOAT64, FLOAT32 = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def factor_of(argument, kind):
    """A norm's factor in float32: the bits of a float64, or the address of a float64 or float32."""
    argument = argument.to(tl.int64)
    value = argument.to(tl.float64, bitcast=True)
    value = tl.load(argument.to(tl.pointer_type(tl.float64), bitcast=True), mask=kind == FLOAT64, other=value)
    short = tl.load(argument.to(tl.pointer_type(tl.float32), bitcast=True), mask=kind == FLOAT32, other=0.0)
    return tl.where(kind == FLOAT32, short, value.to(tl.float32))


# The rules, by number: see lomo_kernels/rules.py.
SGD, SIGN = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def direction(g, RULE: tl.constexpr):
    """What becomes of a clipped gradient, by the rule's number."""
    if RULE == SIGN:  # zero becomes +0
        g = tl.where(g > 0.0, 1.0, 0.0) - tl.where(g < 0.0, 1.0, 0.0)
    else:
        tl.static_assert(RULE == SGD, "direction() in lomo_kernels/triton/numerics.py has no branch for this rule")
    return g


@triton.jit
def updated(p, scaled, rate, decay, limit, coef, RULE: tl.constexpr, CLAMP: tl.constexpr):
    """Parameters after the step, in float32. Where `scaled`, the unscaled gradient, is not finite they mean nothing:
    the clamp drops NaN."""
    g = scaled
    if CLAMP:
        g = tl.minimum(tl.maximum(g, -limit), limit)
    g = g * coef
    p = p * decay
    return p - rate * direction(g, RULE)


# ---- Random bits: a counter through a hash. --------------------------------------------------------------------------


@triton.jit
def mix64(z):
    z = z + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def begin_hash(block, counter):
    x = counter ^ block.to(tl.uint32)
    return x ^ (x >> 7) ^ (x >> 16)


@triton.jit
def finish_hash(block, begun):
    x = begun * 0x21F0AAAD
    # (x + key) * factor, the key times the factor being the same for all: one instruction instead of two. That product
    # is the high half of one of 64 bits: in a product of 32 the compiler sees the common factor, and adds first.
    addend = (((block >> 32 << 32) * 0xD35A2D97) >> 32).to(tl.uint32)
    x = (x ^ (x >> 15)) * 0xD35A2D97 + addend
    return x ^ (x >> 15)


@triton.jit
def random_bits(block, counter):
    """32 bits for each counter; `block` is the key of its 2**32 counters."""
    return finish_hash(block, begin_hash(block, counter))


@triton.jit
def random_bits_from(block, counter, N: tl.constexpr, TOGETHER: tl.constexpr):
    """`random_bits` of the N counters from `counter` on, [N].

    TOGETHER of them, up to 128, share a `begin_hash`, if `counter` is a multiple of TOGETHER: the low bits that tell
    them apart only pass through it.
    """
    if counter % TOGETHER == 0:
        begun = begin_hash(block, counter + tl.arange(0, N // TOGETHER).to(tl.uint32) * TOGETHER)
        begun = tl.reshape(begun[:, None] ^ tl.arange(0, TOGETHER).to(tl.uint32)[None, :], (N,))
    else:
        begun = begin_hash(block, counter + tl.arange(0, N).to(tl.uint32))
    return finish_hash(block, begun)


@triton.jit
def index_of(element, offset, row_length, row_stride):
    """Where an element of a shard stands in the whole parameter."""
    row = element // row_length
    return offset + row * row_stride + (element - row * row_length)


@triton.jit
def draw(
    stream,
    start,
    left,
    offset,
    row_length,
    row_stride,
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr = None,
):
    """The random bits of the elements from `start` on, as `stochastic` takes them.

    ROWS: the shard has several rows; else element i has index offset + i. PAIRS: every even element and the next one
    share a hash, which is then computed once; else it is computed for both. KEYS: how many keys
    there are, 1 or 2; None: it is found out.
    """
    SHIFT: tl.constexpr = 1 if dtype == tl.bfloat16 else 0
    STEP: tl.constexpr = 2 if PAIRS and dtype == tl.bfloat16 else 1
    position = tl.arange(0, BLOCK // STEP) * STEP
    if ROWS:
        first = index_of(start, offset, row_length, row_stride)
        last = index_of(start + left - 1, offset, row_length, row_stride)
        # Divisions in 32 bits: places count from the end of the first row, and no row need be longer than a block.
        first_row_end = tl.minimum(row_length - start % row_length, BLOCK).to(tl.int32)
        length = tl.minimum(row_length, BLOCK).to(tl.int32)
        after_first_row = tl.maximum(position - first_row_end, 0)
        row = after_first_row // length
        next_row = (start // row_length + 1) * row_stride + offset
        later_index = next_row + row.to(tl.int64) * row_stride + (after_first_row - row * length)
        index = tl.where(position < first_row_end, first + position, later_index)
        counter = (index >> SHIFT).to(tl.uint32)
        # One key to a block is common and costs nothing; several are in any number, and rare.
        first_high = first >> (32 + SHIFT)
        if last >> (32 + SHIFT) == first_high:
            bits = random_bits(mix64(stream ^ first_high.to(tl.uint64)), counter)
        else:
            bits = random_bits(mix64(stream ^ (index >> (32 + SHIFT)).to(tl.uint64)), counter)
        bits = share_of(bits, index.to(tl.uint32) & 1, dtype, PAIRS)
    elif KEYS == 1 and dtype == tl.float16:
        # A thread has eight elements, 128 bits, side by side. bfloat16 has half as many hashes and would gain 1.4 of 25
        # instructions, which memory hides.
        key = mix64(stream ^ ((offset + start) >> 32).to(tl.uint64))
        bits = random_bits_from(key, (offset + start).to(tl.uint32), BLOCK, 8)
    else:
        bits = draw_at(stream, offset + start, offset + start + left - 1, position, dtype, PAIRS, KEYS)
    return bits


@triton.jit
def share_a_key(first, last, dtype: tl.constexpr):
    """Whether the elements with index `first` to `last` draw from one key's 2**32 counters: almost always."""
    SHIFT: tl.constexpr = 33 if dtype == tl.bfloat16 else 32
    return first >> SHIFT == last >> SHIFT


@triton.jit
def draw_at(stream, first, last, position, dtype: tl.constexpr, PAIRS: tl.constexpr, KEYS: tl.constexpr = None):
    """The random bits of the elements with index first + position, as `stochastic` takes them.

    position: int32, any shape, below 2**31. For bfloat16 with PAIRS it is even, and `first` is even: each stands for
    its neighbour, too, so that the last dimension of the result is twice as long. last: no index is larger.
    """
    SHIFT: tl.constexpr = 1 if dtype == tl.bfloat16 else 0
    parity = (first & SHIFT).to(tl.int32)
    counter = (first >> SHIFT).to(tl.uint32) + ((position + parity) >> SHIFT).to(tl.uint32)
    first_high = first >> (32 + SHIFT)
    last_high = last >> (32 + SHIFT)
    first_key = mix64(stream ^ first_high.to(tl.uint64))
    # One key to all is common and costs nothing: two would be a comparison and two selections for each hash.
    if KEYS == 1:
        bits = random_bits(first_key, counter)
    elif KEYS == 2:
        last_key = mix64(stream ^ last_high.to(tl.uint64))
        key = tl.where(counter >= (first >> SHIFT).to(tl.uint32), first_key, last_key)
        bits = random_bits(key, counter)
    elif last_high == first_high:
        bits = random_bits(first_key, counter)
    else:
        last_key = mix64(stream ^ last_high.to(tl.uint64))
        key = tl.where(counter >= (first >> SHIFT).to(tl.uint32), first_key, last_key)
        bits = random_bits(key, counter)
    return share_of(bits, ((position + parity) & 1).to(tl.uint32), dtype, PAIRS)


@triton.jit
def share_of(bits, odd, dtype: tl.constexpr, PAIRS: tl.constexpr):
    """One hash serves two bfloat16 elements: what each element gets of it."""
    if dtype == tl.bfloat16:
        if PAIRS:
            bits = tl.interleave(bits & 0xFFFF, bits >> 16)
        else:
            bits = (bits >> (odd * 16)) & 0xFFFF
    return bits


# ---- Sums of squares. ------------------------------------------------------------------------------------------------


@triton.jit
def fold(x, LEVELS: tl.constexpr):
    """Adds neighbours, LEVELS times. A sum of two has one result whatever the layout, so the bits depend neither on the
    GPU nor on how wide the loads are, and `sgd_` and `sq_norm_` agree."""
    for _ in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2)), axis=1)
    return x


@triton.jit
def sum_block(x, BLOCK: tl.constexpr):
    """The float64 sum of squares of BLOCK float32 numbers. 512 are added in float32, in nine levels: with the rounding
    of the squares the error is below 10 * 2**-24 = 6.0e-7. The other levels (three of 4096 numbers) in float64, which
    consumer GPUs do slowly."""
    LEVELS: tl.constexpr = (BLOCK > 512) + (BLOCK > 1024) + (BLOCK > 2048) + (BLOCK > 4096) + (BLOCK > 8192)
    halves = tl.sum(tl.reshape(x * x, (2, BLOCK // 2)), axis=0)  # in one thread, however wide its loads are
    return tl.sum(fold(fold(halves, 8).to(tl.float64), LEVELS), axis=0)


@triton.jit
def sum_of_squares(x, BLOCK: tl.constexpr):
    """As `sum_block`, for numbers of any size; not finite exactly where one of them is not."""
    total = sum_block(x, BLOCK)
    # Below 2**-100 the squares' own underflow (at most 2**-150 each) could be seen in the sum; above, it is under
    # 2**-38 of it. Then, and where a square overflowed, once more with the largest number brought near 1. Not in
    # float64: that would cost registers that every block pays for.
    if not ((total >= 7.888609052210118e-31) & (total < float("inf"))):
        largest = tl.max(bits_of(x) & 0x7FFFFFFF, axis=0).to(tl.int64)
        exponent = tl.minimum(tl.maximum(largest >> 23, 1), 250)
        scale = float_of(((254 - exponent) << 23).to(tl.uint32))
        back = ((exponent + (1023 - 127)) << 52).to(tl.float64, bitcast=True)
        total = sum_block(x * scale, BLOCK) * back * back
        total = tl.where(largest < 0x7F800000, total, float("inf"))
    return total


#: The last program adds up so many numbers at a time. `sq_norm_` takes no more programs than these for a tensor.
PROGRAMS = tl.constexpr(1024)


@triton.jit
def blocks_per_program(blocks):
    """How many blocks are added up one after the other: in large tensors several, so that PROGRAMS sums are left. It
    depends on the size alone, and so do the bits of a norm."""
    return tl.cdiv(blocks, PROGRAMS)


@triton.jit
def add_up(partials, blocks):
    """The sum of `blocks` numbers that other programs stored, in fixed order: neighbours one after the other, as in
    `blocks_per_program`, then these sums in pairs."""
    several = blocks_per_program(blocks)
    first_of_program = tl.arange(0, PROGRAMS) * several
    sums = tl.zeros((PROGRAMS,), tl.float64)
    i = several * 0
    while i < several:  # range() of a tensor fails in the interpreter of Triton 3.6 with numpy 2.4
        for k in tl.static_range(4):  # loads that are under way together
            limit = tl.where(i + k < several, blocks - i - k, 0)
            sums += tl.load(
                partials + i + k + first_of_program, mask=first_of_program < limit, other=0.0, cache_modifier=".cg"
            )
        i += 4
    return tl.sum(fold(sums, 10), axis=0)


@triton.jit
def slot_at(address):
    """The address of a slot as a pointer."""
    return address.to(tl.int64).to(tl.pointer_type(tl.float64), bitcast=True)


@triton.jit
def add_to_slot(total, slot, partials, counter, block, blocks):
    """Adds the sums of all blocks of one tensor to its slot: the block that comes last adds them up, in fixed order.

    counter: int64, zero before and after. It orders the blocks' stores before the last one's loads (acq_rel).
    """
    last = True
    if blocks > 1:
        tl.store(partials + block, total)
        last = tl.atomic_add(counter, 1, sem="acq_rel") == blocks - 1
        if last:
            tl.store(counter, 0)
            total = add_up(partials, blocks)
    if last:
        tl.store(slot, tl.load(slot) + total)
