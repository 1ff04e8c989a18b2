"""Plans: what an architecture gets, and that its ranges fit the accumulators."""

import dataclasses

import numpy as np
import pytest
import strategies

from sagepp.schedule import attention_grid
from sagepp.plan import ARCHITECTURES, FP16_MAX, P_MAX, kernels, make_plan, padded_head_dim, row_sum_unit, v_range
from sagepp.reference import formats, quantize, tensor_core

PLANS = strategies.plans()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", [1, 64, 65, 128])
def test_every_architecture_has_a_default(arch, head_dim):
    plan = make_plan(arch, head_dim)
    assert plan.arch == arch
    assert plan.head_dim == padded_head_dim(head_dim)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_default_is_the_first_of_the_kernels(arch):
    assert make_plan(arch, 64) == make_plan(arch, 64, kernels(arch)[0])


@pytest.mark.parametrize("head_dim, padded", [(1, 64), (64, 64), (65, 128), (128, 128), (129, 256), (256, 256)])
def test_head_dim_is_padded(head_dim, padded):
    assert padded_head_dim(head_dim) == padded


@pytest.mark.parametrize("kernel, head_dim, channels", [
    ("wgmma", 1, 64), ("wgmma", 64, 64), ("wgmma", 65, 96), ("wgmma", 96, 96), ("wgmma", 97, 128), ("wgmma", 129, 192),
    ("wgmma_fast", 192, 192), ("wgmma_fast", 193, 256), ("mma", 65, 128),
])  # fmt: skip
def test_channels_beyond_those_that_are_needed_are_not_computed(kernel, head_dim, channels):
    """And nothing else of the plan depends on that: the bits are those of the padded head dimension."""
    plan = make_plan("sm_90a", head_dim, kernel)
    assert plan.channels == channels <= plan.head_dim
    assert dataclasses.replace(plan, channels=plan.head_dim) == make_plan("sm_90a", plan.head_dim, kernel)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86"])
def test_fp8_where_there_is_none_is_an_error(arch):
    for kernel in ("mma", "wgmma"):
        with pytest.raises(ValueError, match=f"'{kernel}'.*{arch}.*'mma_fp16'"):
            make_plan(arch, 64, kernel)
    assert make_plan(arch, 64).v_dtype == "f16"


def test_unknown_kernel_is_an_error():
    with pytest.raises(ValueError, match="'fast'.*'mma_fp16'"):
        make_plan("sm_89", 64, "fast")


def test_a_plan_is_made_once():
    assert make_plan("sm_89", 128) is make_plan("sm_89", 128)


@pytest.mark.parametrize("interval, v_dtype, expected", [
    (64, "e4m3", 8), (128, "e4m3", 4), (192, "e4m3", 2.75), (256, "e4m3", 2), (64, "f16", 480),
])  # fmt: skip
def test_v_range(interval, v_dtype, expected):
    assert v_range(interval, v_dtype) == expected
    assert row_sum_unit(interval, v_dtype) <= expected


@pytest.mark.parametrize("plan", PLANS, ids=strategies.plan_id)
def test_ranges_cannot_overflow_an_fp16_accumulator(plan):
    keys = plan.block_n * plan.promote_every
    assert keys * P_MAX[plan.v_dtype] * max(plan.v_max, plan.row_sum_unit) <= FP16_MAX
    if plan.v_dtype == "e4m3":
        for value in (plan.v_max, plan.row_sum_unit, P_MAX["e4m3"]):
            assert formats.from_e4m3(formats.to_e4m3(np.float32(value))) == value
    assert np.float16(plan.v_max) == plan.v_max
    assert np.log2(plan.row_sum_unit) % 1 == 0


@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan.sample], ids=strategies.plan_id)
def test_sums_by_a_sample_cannot_overflow_either(plan):
    """They are rounded, up at worst, by every instruction."""
    keys = plan.block_n * plan.promote_every
    instructions = keys // tensor_core.behaviour(*plan.mma_behaviour).terms
    assert keys * P_MAX[plan.v_dtype] * plan.v_max * (1 + 2.0**-11) ** instructions <= FP16_MAX


@pytest.mark.parametrize("plan", PLANS, ids=strategies.plan_id)
def test_the_worst_case_is_never_rounded(plan):
    """w(k) of docs/numerics.md, "No partial sum overflows": an FP16 number wherever a sum is rounded."""
    terms = tensor_core.behaviour(*plan.mma_behaviour).terms
    keys = np.arange(terms, plan.block_n * plan.promote_every + 1, terms)
    for value in (plan.v_max, plan.row_sum_unit):
        worst = keys * P_MAX[plan.v_dtype] * value
        np.testing.assert_array_equal(worst.astype(np.float16), worst)


@pytest.mark.parametrize("plan", PLANS, ids=strategies.plan_id)
def test_the_tensor_core_of_a_plan_is_known(plan):
    assert tensor_core.behaviour(*plan.mma_behaviour).accumulator == "f16"


@pytest.mark.parametrize("plan", PLANS, ids=strategies.plan_id)
def test_a_tile_holds_every_key_once(plan):
    for order in (quantize.k_order(plan), quantize.v_order(plan)):
        np.testing.assert_array_equal(np.sort(order), np.arange(plan.block_n))


@pytest.mark.parametrize("plan", PLANS, ids=strategies.plan_id)
def test_a_thread_multiplies_the_scores_that_it_holds(plan):
    """S's accumulator gives thread t the columns 8 i + 2 t, + 1; P's fragment wants them from it."""
    column = np.arange(plan.block_n)
    thread_of_key = np.empty(plan.block_n, int)
    thread_of_key[quantize.k_order(plan)] = column % 8 // 2
    np.testing.assert_array_equal(thread_of_key, column // (plan.block_n // 4))
    position = column
    thread_of_position = position % 16 // 4 if plan.v_dtype == "e4m3" else position % 8 // 2
    np.testing.assert_array_equal(thread_of_key[quantize.v_order(plan)], thread_of_position)


def test_a_grid_that_cuda_does_not_have_is_an_error():
    plan = make_plan("sm_89", 64)
    assert attention_grid(plan, 65535, 1, 200, 100) == ((2, 1, 65535), 128)
    with pytest.raises(ValueError, match="batch 65536"):
        attention_grid(plan, 65536, 1, 200, 100)
    assert attention_grid(make_plan("sm_90a", 64), 65536, 1, 200, 100)[0] == (100, 1, 1)
