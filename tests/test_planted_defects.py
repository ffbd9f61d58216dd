"""The tests of the operators catch what they are there for.

The operators are replaced by Python ones with one defect planted, and a test of the contract must then fail; without a
defect it must pass. The inputs of the tests are therefore not weaker than they look: values on which the defect shows.
"""

import math

import pytest
import test_rules
import test_sgd
import test_sq_norm
import torch
from support import oracle

from lomo_kernels import numbers, ops, reference
from lomo_kernels.ops.scalars import vector

SQ_NORM = ops.sq_norm_
TINY = torch.finfo(torch.float32).smallest_normal


def float32(value):
    return torch.tensor(value, dtype=torch.float64).float()


def sign_with(defect, g):
    if defect == "the rule is ignored":
        return g
    if defect == "the sign of a small gradient is zero":
        g = torch.where(g.abs() < TINY, g * 0, g)
    return torch.where(g == 0, 1.0, g.sign()) if defect == "the sign of zero is one" else g.sign()


def updated(
    defect,
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
    rule="sgd",
):
    """The reference's update, but for the defect."""

    def flushed(x):
        return torch.where(x.abs() < TINY, x * 0, x) if defect == "subnormals are flushed" else x

    inv_scale = 1.0 if inv_scale is None else inv_scale
    clip_coef = 1.0 if clip_coef is None else clip_coef
    limit = float32(math.inf if clip_value is None else clip_value)
    g = flushed(flushed(grad.float()) * float32(inv_scale))
    clamped = g.clamp(-limit, limit)
    finite = (clamped if defect == "the clamp hides infinity" else g).isfinite()
    g = flushed(clamped * float32(clip_coef))
    if rule == "sign":
        g = sign_with(defect, clamped if defect == "the sign is that of the gradient before clipping" else g)
    decay = float32(1.0 - lr * weight_decay)
    if defect == "decay is computed in float32":
        decay = 1 - float32(lr) * float32(weight_decay)
    if defect == "decay is computed from the float32 lr":
        decay = float32(1.0 - float32(lr).item() * float32(weight_decay).item())
    p = flushed(flushed(param.float()) * decay)
    if defect == "the decayed weight is rounded to its dtype":
        p = p.to(param.dtype).float()
    if defect == "multiply and subtract are fused":
        p = (p.double() - float32(lr).double() * g.double()).float()
    elif defect == "lr and the clip coefficient are multiplied first":
        p = p - float32(lr) * float32(clip_coef) * clamped
    else:
        p = flushed(p - flushed(float32(lr) * g))

    index = reference.element_index(param.numel(), None if defect == "the shard is ignored" else shard)
    index = index & 0xFFFFFFFF if defect == "indices have 32 bits" else index
    keys = {"seed": seed, "parameter_id": parameter_id, "step": step}
    for name in keys:
        if defect == f"{name} is ignored":
            keys[name] = 0
        if defect == f"{name} has 32 bits":
            keys[name] &= 0xFFFFFFFF
    stream = numbers.stream_key(**keys) if rounding == "stochastic" else None
    new = reference.round_to(p, param.dtype, stream, index.view(param.shape))
    if defect == "nearest cuts bits off" and rounding == "nearest" and param.dtype == torch.bfloat16:
        new = reference.round_bfloat16(p, torch.zeros_like(index).view(param.shape))
    if defect == "ties go away from zero" and rounding == "nearest" and param.dtype == torch.bfloat16:
        new = reference.round_bfloat16(p, torch.full_like(index, 0x8000).view(param.shape))
    if defect == "stochastic rounding overflows" and rounding == "stochastic" and param.dtype == torch.bfloat16:
        new = ((p.contiguous().view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)
    if defect == "stochastic rounding is biased" and rounding == "stochastic" and param.dtype == torch.bfloat16:
        new = reference.round_bfloat16(p, reference.random_bits(stream, index // 2).view(param.shape) & 0xFF7F)
    if defect == "the last elements are skipped":
        whole = param.numel() // 16 * 16
        flat, old = new.flatten(), param.flatten()
        new = torch.cat([flat[:whole], old[whole:]]).view(param.shape)
    if defect == "an element whose gradient is not finite is updated":
        return new
    return torch.where(finite, new, param)


def sgd_with(defect):
    """`ops.sgd_` for CPU tensors and numbers, with a defect."""

    def sgd_(param, grad, *, found_inf=None, sq_norm=None, **arguments):
        found = found_inf is not None and float(found_inf) != 0
        if defect == "found_inf counts only where it is one":
            found = found_inf is not None and float(found_inf) == 1
        if sq_norm is not None and not (found and defect == "the norm is lost with found_inf"):
            norm_of = grad
            if defect == "the norm is that of the clipped gradient":
                norm_of = grad.float().clamp(-arguments["clip_value"], arguments["clip_value"])
            SQ_NORM(sq_norm, norm_of, inv_scale=arguments.get("inv_scale"))
        if found:
            return
        new = updated(defect, param, grad, **{name: value for name, value in arguments.items() if value is not None})
        (param.data if defect == "the version counter stands still" else param.detach()).copy_(new)

    return sgd_


def sq_norm_with(defect):
    """`ops.sq_norm_` for CPU tensors and numbers, with a defect."""

    def sq_norm_(slot, grad, *, inv_scale=None):
        g = grad.float() * float32(inv_scale or 1.0)
        if defect == "a product with inv_scale that is not rounded":
            g = grad.double() * (inv_scale or 1.0)
        if defect == "the last elements are skipped":
            g = g.flatten()[: g.numel() // 16 * 16]
        if defect == "what is not finite is dropped":
            g = g.nan_to_num(0.0, 0.0, 0.0)
        if defect == "squares in float32":
            total = g.square().double().sum()
        elif defect == "a running sum in float32":
            total = torch.from_numpy(g.square().numpy().cumsum())[-1]  # numpy's, since torch's accumulates in float64
        else:
            total = g.double().square().sum()
        slot.copy_(total) if defect == "the slot is overwritten" else slot.add_(total)

    return sq_norm_


F32, BF16, F16 = oracle.DTYPES
#: Defect: tests of `sgd_` that must notice, with their arguments.
SGD_DEFECTS = {
    "multiply and subtract are fused": [
        (test_sgd.test_operations_are_not_fused, "cpu"),
        (test_sgd.test_every_argument, "cpu", F32, F32, "nearest", "all"),
        (test_sgd.test_every_argument, "cpu", F32, BF16, "nearest", "lr"),
    ],
    "lr and the clip coefficient are multiplied first": [
        (test_sgd.test_every_argument, "cpu", F32, F32, "nearest", "clip_coef"),
    ],
    "subnormals are flushed": [
        (test_sgd.test_subnormal_numbers_are_kept, "cpu", F32, F32),
        (test_sgd.test_subnormal_numbers_are_kept, "cpu", BF16, F32),
        (test_sgd.test_subnormal_numbers_are_kept, "cpu", BF16, BF16),
        (test_sgd.test_subnormal_numbers_are_kept, "cpu", F16, BF16),
        (test_sgd.test_every_argument, "cpu", F32, F32, "nearest", "lr_subnormal"),
        (test_sgd.test_every_argument, "cpu", F32, F32, "nearest", "clip_value_subnormal"),
        (test_sgd.test_all_65536_parameters_and_gradients, "cpu", BF16, BF16, "nearest"),
    ],
    "decay is computed in float32": [
        (test_sgd.test_every_argument, "cpu", F32, F32, "nearest", "weight_decay_needs_float64"),
    ],
    "decay is computed from the float32 lr": [
        (test_sgd.test_every_argument, "cpu", F32, F32, "nearest", "weight_decay_needs_float64"),
    ],
    "the decayed weight is rounded to its dtype": [
        (test_sgd.test_every_argument, "cpu", BF16, F32, "nearest", "weight_decay"),
        (test_sgd.test_every_argument, "cpu", F16, F32, "nearest", "weight_decay"),
    ],
    "the clamp hides infinity": [
        (test_sgd.test_no_clip_value_hides_an_overflow, "cpu", F32),
        (test_sgd.test_every_argument, "cpu", BF16, F16, "nearest", "clip_value"),
    ],
    "an element whose gradient is not finite is updated": [
        (test_sgd.test_an_element_with_a_gradient_that_is_not_finite_keeps_its_parameter, "cpu", F32, "nearest"),
        (test_sgd.test_an_element_with_a_gradient_that_is_not_finite_keeps_its_parameter, "cpu", BF16, "stochastic"),
        (test_sgd.test_a_gradient_that_is_not_finite_leaves_its_neighbours_alone, "cpu", F16),
        (test_sgd.test_every_argument, "cpu", F32, F32, "nearest", "found_inf_zero"),
    ],
    "found_inf counts only where it is one": [
        (test_sgd.test_found_inf_leaves_every_bit, "cpu", F32, "nearest", math.nan),
        (test_sgd.test_found_inf_leaves_every_bit, "cpu", BF16, "stochastic", math.inf),
        (test_sgd.test_found_inf_may_be_a_number, "cpu", 2.5),
    ],
    "the norm is lost with found_inf": [
        (test_sgd.test_found_inf_leaves_every_bit, "cpu", F32, "nearest", 1.0),
    ],
    "the norm is that of the clipped gradient": [
        (test_sgd.test_sq_norm_in_the_same_pass, "cpu", F32, F32, "nearest", 511),
    ],
    "the last elements are skipped": [
        (test_sgd.test_every_size_and_alignment, "cpu", F32, F32, "nearest", 1),
        (test_sgd.test_every_size_and_alignment, "cpu", BF16, F32, "stochastic", 17),
        (test_sgd.test_every_size_and_alignment, "cpu", F16, BF16, "nearest", 4097),
        (test_sgd.test_every_size_and_alignment, "cpu", BF16, BF16, "nearest", 200003),
    ],
    "seed is ignored": [
        (test_sgd.test_every_key_of_the_random_bits, "cpu", BF16, "seed"),
        (test_sgd.test_every_key_changes_the_random_bits, "cpu", F16, "seed"),
    ],
    "parameter_id is ignored": [
        (test_sgd.test_every_key_of_the_random_bits, "cpu", BF16, "parameter_id"),
        (test_sgd.test_every_key_changes_the_random_bits, "cpu", F16, "parameter_id"),
    ],
    "step is ignored": [
        (test_sgd.test_every_key_of_the_random_bits, "cpu", BF16, "step"),
        (test_sgd.test_every_key_changes_the_random_bits, "cpu", F16, "step"),
    ],
    "seed has 32 bits": [(test_sgd.test_every_key_of_the_random_bits, "cpu", BF16, "seed_high")],
    "parameter_id has 32 bits": [(test_sgd.test_every_key_of_the_random_bits, "cpu", F16, "parameter_id_high")],
    "step has 32 bits": [(test_sgd.test_every_key_of_the_random_bits, "cpu", BF16, "step_high")],
    "the shard is ignored": [
        (test_sgd.test_every_key_of_the_random_bits, "cpu", F16, "shard"),
        (test_sgd.test_a_shard_equals_its_part_of_the_whole, "cpu", BF16, "columns"),
        (test_sgd.test_a_shard_equals_its_part_of_the_whole, "cpu", F16, "rows"),
        (test_sgd.test_a_shard_equals_its_part_of_the_whole, "cpu", F16, "uneven"),
    ],
    "indices have 32 bits": [
        (test_sgd.test_every_key_of_the_random_bits, "cpu", F16, "shard_beyond_32_bits"),
        (test_sgd.test_every_key_of_the_random_bits, "cpu", BF16, "shard_beyond_33_bits"),
        (test_sgd.test_indices_beyond_32_bits, "cpu", F16, 2**32 - 5, (1, 1)),
        (test_sgd.test_indices_beyond_32_bits, "cpu", BF16, 2**33 - 5, (3, 3)),
    ],
    "nearest cuts bits off": [(test_sgd.test_nearest_rounding_is_ieee, "cpu", BF16)],
    "ties go away from zero": [(test_sgd.test_nearest_rounding_is_ieee, "cpu", BF16)],
    "stochastic rounding overflows": [(test_sgd.test_stochastic_rounding_near_overflow, "cpu", BF16)],
    "stochastic rounding is biased": [(test_sgd.test_stochastic_rounding_is_unbiased, "cpu", BF16, 1.0)],
    "the version counter stands still": [
        (test_sgd.test_every_update_bumps_the_version_counter, "cpu", test_sgd.update_one, False),
        (test_sgd.test_every_update_bumps_the_version_counter, "cpu", test_sgd.update_one, True),
        (test_sgd.test_a_graph_that_saved_the_parameter_raises, "cpu", test_sgd.update_one),
        (test_sgd.test_a_view_shares_the_version_counter, "cpu", test_sgd.update_one),
    ],
}

#: Defect of the rule "sign": tests that must notice, with their arguments.
SIGN_DEFECTS = {
    defect: [(test_rules.test_sign_by_hand,), *extra]
    for defect, *extra in (
        ("the rule is ignored", (test_rules.test_update_has_the_reference_bits, "sign", BF16, F32, "stochastic")),
        ("the sign of zero is one", (test_rules.test_update_has_the_reference_bits, "sign", F32, F32, "nearest")),
        ("the sign is that of the gradient before clipping",),
        ("an element whose gradient is not finite is updated", (test_rules.test_ordinary_gradients_too, "sign")),
    )
} | {
    "the sign of a small gradient is zero": [
        (test_rules.test_update_has_the_reference_bits, "sign", F32, BF16, "nearest"),
        (test_rules.test_update_has_the_reference_bits, "sign", F16, F32, "stochastic"),
    ],
}

#: Defect: tests of `sq_norm_` that must notice, with their arguments.
SQ_NORM_DEFECTS = {
    "squares in float32": [
        (test_sq_norm.test_single_values_of_any_size, "cpu", 1e20),
        (test_sq_norm.test_single_values_of_any_size, "cpu", 1e-25),
        (test_sq_norm.test_adversarial_gradients, "cpu", BF16, "all_big", 5),
        (test_sq_norm.test_adversarial_gradients, "cpu", F32, "all_tiny", 1000),
    ],
    "a running sum in float32": [
        (test_sq_norm.test_adversarial_gradients, "cpu", F16, "all_equal", 3_000_001),
        (test_sq_norm.test_adversarial_gradients, "cpu", F32, "one_one_and_many_small", 3_000_001),
    ],
    "a product with inv_scale that is not rounded": [
        (test_sq_norm.test_the_scaled_gradient_is_rounded_before_it_is_squared, "cpu"),
        (test_sq_norm.test_a_scaled_gradient_that_overflows_shows_in_the_slot, "cpu"),
    ],
    "what is not finite is dropped": [
        (test_sq_norm.test_a_gradient_that_is_not_finite_shows_in_the_slot, "cpu", F32, math.inf, 17),
        (test_sq_norm.test_a_gradient_that_is_not_finite_shows_in_the_slot, "cpu", F16, math.nan, 70001),
    ],
    "the last elements are skipped": [
        (test_sq_norm.test_every_size_and_alignment, "cpu", F32, 1),
        (test_sq_norm.test_every_size_and_alignment, "cpu", BF16, 33),
        (test_sq_norm.test_every_size_and_alignment, "cpu", F16, 200003),
        (test_sq_norm.test_adversarial_gradients, "cpu", F16, "all_equal", 1000),
    ],
    "the slot is overwritten": [(test_sq_norm.test_the_slot_accumulates, "cpu", F32)],
}


def rows(defects):
    """One case per defect and test."""
    return [
        pytest.param(defect, test, arguments, id=f"{defect}: {test.__name__.removeprefix('test_')} {i}")
        for defect, tests in defects.items()
        for i, (test, *arguments) in enumerate(tests)
    ]


def fails(test, arguments):
    try:
        test(*arguments)
    except (AssertionError, pytest.fail.Exception):  # the second is what pytest.raises fails with
        return True
    return False


@pytest.mark.parametrize(("defect", "test", "arguments"), rows(SGD_DEFECTS) + rows(SIGN_DEFECTS))
def test_a_defect_of_sgd_is_noticed(monkeypatch, defect, test, arguments):
    monkeypatch.setattr(ops, "sgd_", sgd_with(None))
    assert not fails(test, arguments), "the Python operator without a defect must pass"
    monkeypatch.setattr(ops, "sgd_", sgd_with(defect))
    assert fails(test, arguments)


@pytest.mark.parametrize(("defect", "test", "arguments"), rows(SQ_NORM_DEFECTS))
def test_a_defect_of_sq_norm_is_noticed(monkeypatch, defect, test, arguments):
    monkeypatch.setattr(ops, "sq_norm_", sq_norm_with(None))
    assert not fails(test, arguments), "the Python operator without a defect must pass"
    monkeypatch.setattr(ops, "sq_norm_", sq_norm_with(defect))
    assert fails(test, arguments)


def test_without_the_wrapper_nothing_bumps_the_version_counter():
    """torch's operator alone does not, which is why the tests of the counter are worth having."""
    param, scalars = torch.ones(5), vector("test", torch.device("cpu"), {"lr": 0.1})
    torch.ops.lomo_kernels.update_.default([param], [torch.ones(5)], scalars, [], 0, False, 0, [0], [], [])
    assert param._version == 0 and (param != 1).all()
