"""What the reference promises, whatever the plan: accuracy, invariances, safety. No GPU."""

from dataclasses import replace

import numpy as np
import pytest
import strategies
import worst_case
from bits import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FINITE_VALUES, Problem, problems

from sagepp.plan import P_MAX, make_plan
from sagepp.reference import exact, formats, layout, quantize, tensor_core
from sagepp.reference.attention import attention

PLANS = strategies.plans()
#: One plan for each way to multiply and to form P: these differ in kind, the others in degree.
SAMPLE = list({
    (tensor_core.behaviour(*plan.mma_behaviour), plan.p_form, plan.block_n, plan.promote_every): plan
    for plan in strategies.plans() if plan.head_dim == 64
}.values())  # fmt: skip
#: Kinds of values that no format rounds away or overflows.
ORDINARY = ("normal", "constant channels", "channel offsets", "outlier channels", "small integers", "rising")


def plan_for(plan, head_dim):
    """The same kind of plan for another head dimension."""
    return make_plan(plan.arch, head_dim, strategies.kernel_name(plan))


def run(problem, plan, arrays=None):
    return attention(*(arrays or problem.arrays()), plan=plan_for(plan, problem.head_dim), **problem.options())


def same(actual, expected, note=""):
    for name, x, y in zip(("o", "lse"), actual, expected):
        assert_same_bits(x, y, note=f"{name} {note}")


each_kind_of_plan = pytest.mark.parametrize("plan", SAMPLE, ids=strategies.plan_id)
small = {"max_seq_q": 140, "max_seq_kv": 200}


# ---------------------------------------------------------------------------- accuracy

#: Distribution of (q, k, v) -> largest relative L1 against float64 with FP8 P and V, the same with FP16,
#: and the mean error of the LSE.
ACCURACY = {
    ("normal", "normal", "normal"): (0.042, 0.014, 0.004),
    ("normal", "channel offsets", "normal"): (0.042, 0.014, 0.004),
    ("normal", "normal", "channel offsets"): (0.003, 0.001, 0.004),
    ("heavy tails", "heavy tails", "heavy tails"): (0.06, 0.03, 0.15),
    ("normal", "outlier channels", "normal"): (0.06, 0.045, 0.02),
    ("normal", "normal", "constant channels"): (0.0004, 0.0004, 0.004),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kinds", ACCURACY, ids="/".join)
@pytest.mark.parametrize("plan", SAMPLE, ids=strategies.plan_id)
def test_error_against_float64(plan, kinds, is_causal):
    problem = Problem(group=2, seq_q=128, seq_kv=512, kinds=kinds, is_causal=is_causal)
    arrays = problem.arrays()
    o, lse = run(problem, plan, arrays)
    o_exact, lse_exact = exact.attention(*arrays, is_causal=is_causal)
    e4m3_limit, fp16_limit, lse_limit = ACCURACY[kinds]
    limit = fp16_limit if plan.v_dtype == "f16" else e4m3_limit * (1.2 if plan.p_form == "code" else 1)
    assert exact.errors(o, o_exact)["relative_l1"] <= limit
    assert np.abs(lse - lse_exact).mean() <= lse_limit


@pytest.mark.parametrize("kernel", ["wgmma", "wgmma_fast"])
@pytest.mark.parametrize("head_dim", [129, 256])
def test_error_of_large_head_dims(kernel, head_dim):
    problem = Problem(group=2, seq_q=100, seq_kv=400, head_dim=head_dim, is_causal=True)
    arrays = problem.arrays()
    o, lse = run(problem, make_plan("sm_90a", head_dim, kernel), arrays)
    o_exact, lse_exact = exact.attention(*arrays, is_causal=True)
    assert exact.errors(o, o_exact)["relative_l1"] <= 0.042 * (1.2 if kernel == "wgmma_fast" else 1)
    assert np.abs(lse - lse_exact).mean() <= 0.004


@each_kind_of_plan
@settings(max_examples=8)
@given(problem=problems(**small, kinds=ORDINARY, sm_scale=None))
def test_error_is_a_small_part_of_the_spread_of_v(plan, problem):
    arrays = problem.arrays()
    o, lse = run(problem, plan, arrays)
    o_exact, lse_exact = exact.attention(
        *arrays, is_causal=problem.is_causal, causal_alignment=problem.causal_alignment)
    v = arrays[2].astype(np.float64)
    spread = np.repeat(v.max(axis=2) - v.min(axis=2), problem.group, axis=1)[:, :, None]
    output_rounding = np.abs(o_exact) * 2.0**-8
    assert (np.abs(o.astype(np.float64) - o_exact) <= 0.5 * spread + output_rounding + 1e-6).all()
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(lse_exact))


@each_kind_of_plan
@pytest.mark.parametrize("factor", [1, 10_000])
def test_huge_keys_do_not_flatten_the_other_scores(plan, factor):
    """Where they are hidden, or have the least scores of all; of those a step is many octaves (`p_forms.STEEP`)."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 300, 64))
    k[:, :, 192:224] = factor * k[:, :, 192:193]  # whole key groups
    q, k, v = (x.astype(np.float16) for x in (q, k, v))
    least = (q.astype(np.float64) @ k[:, :, 192, :, None].astype(np.float64) < 0)[..., 0] | (np.arange(300) < 192)
    o, lse = attention(q, k, v, is_causal=True, smooth_k=False, plan=plan)  # the mean of K would spread them
    o_exact, lse_exact = exact.attention(q, k, v, is_causal=True)
    assert exact.errors(o[least], o_exact[least])["relative_l1"] < (0.05 if plan.p_form == "code" else 0.042)
    assert np.abs(lse - lse_exact)[least].mean() < 0.01
    assert exact.errors(o[~least], o_exact[~least])["relative_l1"] < 0.042


@each_kind_of_plan
def test_without_smoothing(plan):
    problem = Problem(seq_q=128, seq_kv=512, smooth_k=False)
    arrays = problem.arrays()
    o, lse = run(problem, plan, arrays)
    o_exact, lse_exact = exact.attention(*arrays)
    assert exact.errors(o, o_exact)["relative_l1"] < 0.05
    assert np.abs(lse - lse_exact).max() < 0.02
    smoothed = run(replace(problem, smooth_k=True), plan, arrays)
    assert (o != smoothed[0]).any()


def test_smoothing_pays_where_k_has_offsets():
    problem = Problem(seq_q=128, seq_kv=512, kinds=("normal", "channel offsets", "normal"))
    arrays = problem.arrays()
    o_exact, _ = exact.attention(*arrays)
    error = {
        smooth_k: exact.errors(run(replace(problem, smooth_k=smooth_k), SAMPLE[0], arrays)[0], o_exact)["rmse"]
        for smooth_k in (False, True)
    }
    assert error[True] < error[False] / 2


@pytest.mark.parametrize("parts", [{"qk"}, {"p"}, {"v"}, {"qk", "p", "v"}], ids=lambda p: "-".join(sorted(p)))
def test_exact_parts_have_no_error(parts):
    plan = make_plan("sm_89", 64, "mma")
    arrays = Problem(seq_q=128, seq_kv=512).arrays()
    o_exact, _ = exact.attention(*arrays)
    everything, without = (
        exact.errors(attention(*arrays, plan=plan, exact_parts=x)[0], o_exact)["rmse"] for x in (set(), parts)
    )
    assert without < everything * (0.01 if len(parts) == 3 else 0.99)


# ---------------------------------------------------------------------------- invariances


@each_kind_of_plan
@settings(max_examples=5)
@given(problem=problems(**small, kinds=("normal",), sm_scale=None, is_causal=False), seed=st.integers(0, 99))
def test_order_of_keys_matters_within_rounding(plan, problem, seed):
    q, k, v = problem.arrays()
    order = np.random.default_rng(seed).permutation(problem.seq_kv)
    (o, lse), (o2, lse2) = (run(problem, plan, x) for x in ((q, k, v), (q, k[:, :, order], v[:, :, order])))
    assert np.abs(lse - lse2).max() < 0.05
    spread = np.abs(v.astype(np.float32)).max()
    assert np.abs(o.astype(np.float32) - o2.astype(np.float32)).max() <= 0.15 * spread


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@each_kind_of_plan
@settings(max_examples=5)
@given(data=st.data())
def test_a_vector_added_to_every_key_shifts_the_lse_alone(plan, dtype, data):
    """In FP32 the same numbers are left of K; in FP16 others, as the mean is rounded: two errors of INT8."""
    problem = data.draw(problems(**small, kinds=("normal",), dtype=dtype, smooth_k=True, sm_scale=None))
    q, k, v = problem.arrays()
    k = (np.round(k.astype(np.float32) * 16) / 16).astype(k.dtype)  # so that the sum is exact
    vector = np.random.default_rng(problem.seed).integers(-8, 9, problem.head_dim).astype(k.dtype)
    (o, lse), (o2, lse2) = (run(problem, plan, x) for x in ((q, k, v), (q, k + vector, v)))
    shift = q.astype(np.float64) @ vector.astype(np.float64) * problem.head_dim**-0.5
    seen = np.isfinite(lse)
    lse_bound, o_bound = 0.02, 0.1
    if dtype == "float16":
        lse_bound = 0.08 if plan.p_form == "code" else 0.05  # 6% of P, where a row sees one key
        o_bound = 0.15 * np.abs(v.astype(np.float32)).max()
    assert np.abs((lse + shift)[seen] - lse2[seen]).max(initial=0) < lse_bound
    assert np.abs(o.astype(np.float32) - o2.astype(np.float32)).max() <= o_bound


@each_kind_of_plan
@settings(max_examples=5)
@given(problem=problems(**small))
def test_grouped_query_heads_equal_repeated_heads(plan, problem):
    q, k, v = problem.arrays()
    repeated = (q, *(np.repeat(x, problem.group, axis=1) for x in (k, v)))
    same(run(problem, plan), run(problem, plan, repeated), problem)


@each_kind_of_plan
@settings(max_examples=5)
@given(problem=problems(**small))
def test_a_batch_equals_its_members(plan, problem):
    whole = run(problem, plan)
    for i in range(problem.batch):
        member = run(problem, plan, [x[i : i + 1] for x in problem.arrays()])
        same([x[i : i + 1] for x in whole], member, problem)


@settings(max_examples=10)
@given(problem=problems(**small))
def test_a_call_repeats_itself_and_writes_nothing_else(problem):
    arrays = problem.arrays()
    kept = [x.copy() for x in arrays]
    same(run(problem, SAMPLE[0], arrays), run(problem, SAMPLE[0], arrays))
    for x, y in zip(arrays, kept):
        assert_same_bits(x, y)


@settings(max_examples=10)
@given(problem=problems(**small))
def test_storage_does_not_matter(problem):
    arrays = problem.arrays()
    stored = [problem.stored(x) for x in arrays]
    if problem.tensor_layout == "NHD":
        stored = [x.transpose(0, 2, 1, 3) for x in stored]
    for x, y in zip(stored, arrays):
        assert x.strides[-1] == x.itemsize
    same(run(problem, SAMPLE[0], arrays), run(problem, SAMPLE[0], stored))


@each_kind_of_plan
@settings(max_examples=5)
@given(problem=problems(**small, is_causal=True), more=st.integers(1, 200))
def test_top_left_is_bottom_right_of_as_many_queries_as_keys(plan, problem, more):
    """And the first rows of a longer top-left problem are those of the shorter one."""
    square = replace(problem, seq_q=problem.seq_kv)
    arrays = square.arrays()
    top_left = run(replace(square, causal_alignment="top-left"), plan, arrays)
    same(run(replace(square, causal_alignment="bottom-right"), plan, arrays), top_left)
    longer = replace(square, seq_q=problem.seq_kv + more, causal_alignment="top-left")
    q = np.concatenate([arrays[0], longer.arrays()[0][:, :, :more]], axis=2)
    o, lse = run(longer, plan, (q, *arrays[1:]))
    same((o[:, :, : square.seq_q], lse[:, :, : square.seq_q]), top_left)


# ---------------------------------------------------------------------------- safety


@each_kind_of_plan
@settings(max_examples=8)
@given(problem=problems(**small, kinds=FINITE_VALUES, dtype="float16"))
def test_finite_fp16_gives_no_nan(plan, problem):
    o, lse = run(problem, plan)
    assert not np.isnan(o).any()
    assert (lse < np.inf).all()


@each_kind_of_plan
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-7, 6e4])
def test_a_constant_channel_of_v_comes_back(plan, value):
    problem = Problem(seq_q=70, seq_kv=200, is_causal=True)
    q, k, v = problem.arrays()
    v[..., 5] = value
    o, _ = run(problem, plan, (q, k, v))
    expected = v[0, 0, 0, 5]
    assert np.abs(o[..., 5] - expected).max() <= np.spacing(np.abs(expected)) * (value != 0)


@each_kind_of_plan
@pytest.mark.parametrize("alignment, seq_q, blind", [("bottom-right", 200, 70), ("top-left", 60, 0)])
def test_rows_that_see_no_key(plan, alignment, seq_q, blind):
    problem = Problem(seq_q=seq_q, seq_kv=130, is_causal=True, causal_alignment=alignment)
    o, lse = run(problem, plan)
    assert (o[:, :, :blind].view(np.uint16) == 0).all()
    assert np.isneginf(lse[:, :, :blind]).all()
    assert np.isfinite(lse[:, :, blind:]).all()
    assert (o[:, :, blind:] != 0).any(axis=-1).all()


@each_kind_of_plan
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_spoiled_query_row_spoils_itself_alone(plan, value):
    problem = Problem(group=2, seq_q=150, seq_kv=150, is_causal=True)
    q, k, v = problem.arrays()
    o, lse = run(problem, plan, (q, k, v))
    q[0, 1, 77, 3] = value
    o2, lse2 = run(problem, plan, (q, k, v))
    assert np.isnan(o2[0, 1, 77]).all() and np.isnan(lse2[0, 1, 77])
    o2[0, 1, 77], lse2[0, 1, 77] = o[0, 1, 77], lse[0, 1, 77]
    same((o2, lse2), (o, lse))


@each_kind_of_plan
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_spoiled_element_of_k_or_v_counts_as_zero(plan, value):
    problem = Problem(group=2, seq_q=150, seq_kv=150, is_causal=True)
    q, k, v = problem.arrays()
    results = []
    for x in (value, 0):
        k[0, 0, 20, 3], v[0, 0, 90, 7] = x, x
        results.append(run(problem, plan, (q, k, v)))
    same(*results)
    assert np.isfinite(results[0][0]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@each_kind_of_plan
def test_largest_values_keep_their_sign(plan, dtype):
    """Every V at the end of the range: P is 2**aim in the first tile, and nothing overflows."""
    if dtype == "bfloat16" and plan.v_max < 1:
        pytest.skip("v_scale overflows: BF16's largest values over a v_max below 1")
    problem = Problem(seq_q=33, seq_kv=333, dtype=dtype, kinds=("zeros", "zeros", "largest"))
    q, k, v = problem.arrays()
    v[..., 0] = np.abs(v[..., 0])
    o, _ = run(problem, plan, (q, k, v))
    o = o.astype(np.float64)
    assert np.isfinite(o).all()
    np.testing.assert_allclose(o, np.broadcast_to(v.astype(np.float64).mean(axis=2, keepdims=True), o.shape),
                               atol=0.02 * np.abs(v.astype(np.float64)).max())


@st.composite
def _worst_factors(draw, plan):
    """P and V of a promotion interval at the ends of their ranges, some of them 0 or below."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    full = draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))

    def factor(shape, top, signed):
        x = np.where(rng.random(shape) < full, 1.0, rng.random(shape)) * top
        if signed:
            x *= rng.choice([-1, 1], shape) if draw(st.booleans()) else rng.choice([-1, 1], shape[-1])
        return x

    keys = plan.block_n * plan.promote_every
    p = factor((16, keys), P_MAX[plan.v_dtype], False)
    v = factor((keys, 8), plan.v_max, True)
    if plan.v_dtype == "f16":
        return p.astype(np.float16).astype(np.float32), v.astype(np.float16).astype(np.float32)
    rounded = (formats.to_e4m3(x.astype(np.float32)) for x in (p, v))
    return tuple(formats.from_e4m3(x) for x in rounded)


@settings(max_examples=20)
@given(data=st.data())
@pytest.mark.parametrize("plan", PLANS, ids=strategies.plan_id)
def test_fp16_accumulator_never_overflows(plan, data):
    p, v = data.draw(_worst_factors(plan))
    for key in tensor_core.BEHAVIOURS:
        if key[2:] == (plan.v_dtype, "f16"):
            assert np.isfinite(tensor_core.mma(p, v, np.float32(0), key)).all(), key


@pytest.mark.parametrize("plan", PLANS, ids=strategies.plan_id)
def test_fp16_accumulator_holds_the_worst_case_exactly(plan):
    """Everything at its maximum: beyond any other partial sum, and one step of V more would overflow."""
    keys = plan.block_n * plan.promote_every
    p = np.full((1, keys), P_MAX[plan.v_dtype], np.float32)
    for top in (plan.v_max, -plan.v_max, plan.row_sum_unit):
        v = np.full((keys, 1), top, np.float32)
        total = keys * P_MAX[plan.v_dtype] * top
        for key in tensor_core.BEHAVIOURS:
            if key[2:] == (plan.v_dtype, "f16"):
                result = tensor_core.mma(p, v, np.float32(0), key)[0, 0]
                assert abs(result - total) <= 2.0**-7 * abs(total), key


@settings(max_examples=3)
@given(**worst_case.DRAWN)
@pytest.mark.parametrize("plan", PLANS, ids=strategies.plan_id)
def test_inputs_that_drive_the_fp16_accumulator_to_its_limit(plan, seed, dtype, options):
    worst_case.by_reference(plan, worst_case.arrays(plan, seed, dtype), options)


# ---------------------------------------------------------------------------- quantisation


@settings(max_examples=10)
@given(seq=st.integers(1, 3000), seed=st.integers(0, 99))
def test_statistics_are_those_of_the_sequence(seq, seed):
    x = np.random.default_rng(seed).standard_normal((2, seq, 8)).astype(np.float32)
    s = quantize.statistics(quantize.chunks_of(x))
    np.testing.assert_array_equal(s.minimum, x.min(axis=1))
    np.testing.assert_array_equal(s.maximum, x.max(axis=1))
    np.testing.assert_allclose(s.total, x.astype(np.float64).sum(axis=1), atol=1e-4)


@given(seq=st.integers(1, 70000))
def test_the_sample_is_spread_over_the_sequence(seq):
    chunks = quantize.sample_of(np.arange(seq)[:, None], make_plan("sm_90a", 64))
    keys = np.concatenate(chunks)[:, 0]
    assert len(chunks) <= 16 and len(set(keys)) == len(keys)
    assert np.diff(np.append(keys, seq)).max() <= max(1024, seq // 14)
    assert len(keys) == seq if seq < 1024 else seq // 16 <= len(keys) <= seq // 8
    every_key = quantize.sample_of(np.arange(seq)[:, None], make_plan("sm_89", 64))
    np.testing.assert_array_equal(np.concatenate(every_key)[:, 0], np.arange(seq))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rotation_keeps_the_scores(head_dim):
    q, k = np.random.default_rng(0).standard_normal((2, 20, head_dim)).astype(np.float32)
    rotated = quantize.rotate(q).astype(np.float64) @ quantize.rotate(k).T / quantize.ROTATION
    np.testing.assert_allclose(rotated, q.astype(np.float64) @ k.T, atol=1e-4)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rotation_signs_are_balanced(head_dim):
    assert abs(quantize.rotation_signs(head_dim).sum()) <= 4 * head_dim**0.5


def test_a_group_of_k_that_overflows_does_not_count_as_the_largest():
    """BF16, and where the sample of K does not see it: tiny numbers have large factors."""
    plan = make_plan("sm_90a", 128, "wgmma")
    _, k, v = (x[0] for x in Problem(seq_kv=1100, head_dim=128, dtype="bfloat16").arrays())
    k *= 1e-20
    channels = quantize.channels_of(k, v, plan)
    expected = quantize.quantize_k(k, channels, plan)
    k[0, 200] = 3e38 * (-1) ** np.arange(128)
    actual = quantize.quantize_k(k, channels, plan)
    tile, group = divmod(200 // (plan.block_n // 4), 4)
    assert np.isnan(actual.scale[0, tile, group]) and np.isnan(actual.scale).sum() == 1
    first = group * (plan.block_n // 4)
    assert not actual.codes[0, tile, first:first + plan.block_n // 4].any()
    expected.scale[0, tile, group] = 0
    assert actual.scale_max == expected.scale.max()


def _quantized(plan, seq_q=200, seq_kv=150):
    problem = Problem(batch=1, heads_kv=2, seq_q=seq_q, seq_kv=seq_kv, head_dim=plan.head_dim - 3)
    q, k, v = (x[0] for x in problem.arrays())
    channels = quantize.channels_of(k, v, plan)
    return (quantize.quantize_q(q, channels, 0.125, plan), quantize.quantize_k(k, channels, plan),
            quantize.quantize_v(v, channels, plan)), (q, k, v), channels


@each_kind_of_plan
def test_codes_stand_for_the_values(plan):
    (q, k, v), (raw_q, raw_k, raw_v), channels = _quantized(plan)
    assert q.codes.dtype == k.codes.dtype == np.int8
    assert np.abs(q.codes).max() == np.abs(k.codes).max() == 127
    centred = quantize.widen(raw_k, plan.head_dim) - channels.k_mean[:, None]
    scores = quantize.widen(raw_q, plan.head_dim).astype(np.float64) @ centred.swapaxes(1, 2)
    scores *= 0.125 * np.log2(np.e)
    n_tiles = k.codes.shape[1]
    steps = np.repeat(k.scale, plan.block_n // 4, axis=-1).reshape(2, 1, -1) * q.scale[..., None]
    codes = k.codes.reshape(2, n_tiles * plan.block_n, -1)
    quantized = (q.codes.astype(int) @ codes.swapaxes(1, 2).astype(int) * steps)[:, :, :150]
    assert np.abs(quantized - scores).max() < 0.15
    tiles = v.values() * v.scale[:, None, None] + channels.v_mean[:, None, None]
    error = tiles.reshape(2, -1, plan.head_dim)[:, :150] - quantize.widen(raw_v, plan.head_dim)
    assert np.abs(error).max() <= np.abs(raw_v).max() / 16
    assert not v.codes.reshape(2, -1, plan.head_dim)[:, 150:].any()


@each_kind_of_plan
def test_offset_restores_the_mean_of_v(plan):
    (_, _, v), (_, _, raw), channels = _quantized(plan)
    assert_same_bits(v.offset[:, 0], channels.v_mean)
    if plan.v_dtype == "e4m3":
        for n in range(1, v.offset.shape[1]):
            keys = min(n * plan.block_n, 150)
            codes = v.values().reshape(2, -1, plan.head_dim)[:, :keys] * v.scale[:, None]
            mean = quantize.widen(raw, plan.head_dim)[:, :keys].astype(np.float64).mean(axis=1)
            np.testing.assert_allclose(v.offset[:, n] + codes.mean(axis=1), mean, atol=1e-5)


ALL = slice(None)
LATE = slice(200, 208)  # keys that are not in the sample of 1200


@pytest.mark.parametrize("keys, channels, value, again", [
    (0, 0, 1, False),
    (LATE, ALL, 3, False),  # somewhat larger: its codes are
    (203, 5, 30, False),
    (203, 5, 300, True),  # too large for its tile
    (203, 5, 6e4, True),  # too large for a code
    (LATE, ALL, 40, True),
    (203, 5, np.nan, True),
    (3, ALL, np.inf, True),  # in the sample
    (np.arange(1200) != 203, 5, 0.7, True),  # a channel that is constant in the sample
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kernel", ["wgmma", "wgmma_fast"])
def test_v_that_does_not_fit_a_sample_is_quantised_by_all_keys(kernel, keys, channels, value, again):
    plan = make_plan("sm_90a", 64, kernel)
    without_sample = replace(plan, sample=False)
    v = np.random.default_rng(0).uniform(-1, 1, (1, 1200, 64))
    v[0, keys, channels] = value
    v = v.astype(np.float16)
    by_sample, by_all = (quantize.channels_of(v, v, p) for p in (plan, without_sample))
    assert not np.array_equal(by_sample.v_spread, by_all.v_spread)
    quantized = quantize.quantize_v(v, by_sample, plan)
    expected = quantize.quantize_v(v, by_all if again else by_sample, without_sample)
    for name in vars(quantized):
        assert_same_bits(getattr(quantized, name), getattr(expected, name))
    mean, scale = quantized.offset[:, :1], quantized.scale[:, None]
    centred = quantize.finite(v.astype(np.float32)) - mean
    error = np.abs(quantized.values().reshape(1, -1, 64)[:, :1200] * scale - centred)
    assert (error <= np.maximum(np.abs(centred) / 15, scale * 2.0**-9)).all()


@settings(max_examples=20)
@given(data=st.data())
@pytest.mark.parametrize("plan", [p for p in PLANS if p.sample], ids=strategies.plan_id)
def test_codes_that_fit_never_overflow(plan, data):
    """Magnitudes of V add up to `v_max` a key in every tile, by few large ones or many small ones; P is at its largest."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    tail = data.draw(st.sampled_from([0.1, 0.5, 1, 2, 8]))
    shape = (plan.promote_every, plan.block_n, 16)
    v = rng.exponential(size=shape) ** (1 / tail)
    limit = plan.block_n * plan.v_max
    v = np.minimum(v * (limit / v.sum(axis=1, keepdims=True)), 448).astype(np.float32)
    while quantize.exceeds(formats.from_e4m3(codes := formats.to_e4m3(v)), plan):
        v *= np.float32(0.999)
    v = formats.from_e4m3(codes)
    assert np.abs(v).sum(axis=1).max() > 0.9 * limit
    v = v.reshape(-1, 16) * np.where(np.arange(16) < 8, 1, rng.choice([-1, 1], (len(codes) * plan.block_n, 16)))
    p = np.full((1, len(v)), P_MAX[plan.v_dtype], np.float32)
    for key in tensor_core.BEHAVIOURS:
        if key[2:] == (plan.v_dtype, "f16"):
            assert np.isfinite(tensor_core.mma(p, v.astype(np.float32), np.float32(0), key)).all(), key


@each_kind_of_plan
def test_device_layout_holds_every_code(plan):
    (q, k, v), _, _ = _quantized(plan)
    device_q = layout.device_q_codes(q, plan)
    width = min(plan.head_dim, 128)
    assert device_q.shape == (2, 2, plan.head_dim // width, plan.block_m, width)
    row, channel = 133, 21
    r = row % plan.block_m
    swizzle = r & 7 if width == 128 else r >> 1 & 3
    byte = (channel // 16 ^ swizzle) * 16 + channel % 16
    assert device_q[1, row // plan.block_m, 0, r, byte] == q.codes[1, row, channel]
    device_k = layout.device_k_codes(k, plan)
    assert np.array_equal(np.sort(device_k, axis=None), np.sort(k.codes, axis=None))
    device_v = layout.device_v_codes(v, plan)
    per_chunk = 16 // v.codes.itemsize
    rows = plan.head_dim + (8 if plan.kernel == "wgmma" else 0)
    assert device_v.shape == (2, v.codes.shape[1], plan.block_n // per_chunk, rows, 16)
    key = quantize.v_order(plan)[per_chunk + 3]
    column = 22
    stored = device_v[0, 0, 1, column].view(v.codes.dtype)[3]
    assert stored == v.codes[0, 0, key, quantize.channel_order(plan)[column]]
    assert np.array_equal(np.sort(quantize.channel_order(plan)), np.arange(plan.head_dim))
