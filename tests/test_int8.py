"""Q and K to INT8 in FP16 arithmetic: section 2 of docs/numerics.md, on the reference. No GPU."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Problem

from sagepp.plan import make_plan
from sagepp.reference import exact, formats, quantize
from sagepp.reference.attention import attention

PLAN = make_plan("sm_90a", 64, "wgmma")
#: Every amax that there is: finite FP16 numbers above 0.
EVERY_AMAX = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
USUAL = EVERY_AMAX[EVERY_AMAX >= quantize.SMALL_AMAX]


def inverse_of(amax):
    """The reference's, as float32."""
    return formats.to_fp16(np.fmin(np.float32(127) / amax, quantize.FP16_MAX)).astype(np.float32)


def random(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def channels_of(k, smooth_k=True):
    return quantize.channels_of(k, np.zeros_like(k), PLAN, smooth_k)


# ---------------------------------------------------------------------------- codes


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_magnitude_has_code_127(sign):
    product = sign * USUAL.astype(np.float64) * inverse_of(USUAL)
    np.testing.assert_array_equal(np.rint(product), sign * 127)


@given(seed=st.integers(0, 2**32 - 1))
def test_a_code_is_the_low_byte_of_an_fp16_sum(seed):
    rng = np.random.default_rng(seed)
    amax = rng.choice(USUAL, 1000)
    x = (amax * rng.uniform(-1, 1, 1000)).astype(np.float16)
    inverse = inverse_of(amax).astype(np.float16)
    total = formats.fma16(x, inverse, np.float16(1536))
    codes = np.rint(x.astype(np.float64) * inverse.astype(np.float64))
    np.testing.assert_array_equal(total.view(np.uint16).astype(np.uint8).view(np.int8), codes)


@pytest.mark.parametrize("off", [-1, 0, 1], ids="{:+d} ulp".format)
def test_the_kernels_division_is_that_of_the_reference(off):
    """`int8_inverse` and `int8_scale` of kernels_src/int8_fp16.cuh, from reciprocals one ulp off."""

    def rcp(x):
        r = np.float32(1) / x
        return r + np.float32(off) * np.spacing(r)

    r = rcp(EVERY_AMAX)
    quotient = np.float32(127) * r
    quotient = formats.fma(formats.fma(-EVERY_AMAX, quotient, np.float32(127)), r, quotient)
    inverse = formats.to_fp16(np.fmin(quotient, quantize.FP16_MAX)).astype(np.float32)
    np.testing.assert_array_equal(inverse, inverse_of(EVERY_AMAX))
    inverse = np.unique(inverse)
    r = rcp(inverse)
    scale = formats.fma(formats.fma(-inverse, r, np.float32(1)), r, r)
    np.testing.assert_array_equal(scale, np.float32(1) / inverse)


# ---------------------------------------------------------------------------- rows


def exact_rows(q, channels):
    """What the codes of Q stand for, in float64."""
    return quantize.rotate(quantize.widen(q, PLAN.head_dim).astype(np.float64) * channels.q_factor.astype(np.float64))


#: Size of the rows -> what they are multiplied by before they are computed again.
SIZES = {"usual": (1, 1), "largest": (3e4, 2.0**-13), "small": (5e-5, 2.0**12), "smallest": (2e-7, 2.0**12)}


@pytest.mark.parametrize("size", SIZES)
def test_codes_of_q_are_within_half_a_step_whatever_its_size(size):
    factor, power = SIZES[size]
    q = (factor * random((300, 64)).clip(-2, 2)).astype(np.float16)
    channels = channels_of(random((400, 64), 1).astype(np.float16))
    quantized = quantize.quantize_q(q, channels, 1, PLAN)
    scale = (quantized.scale / quantize.softmax_scale(1)).astype(np.float64)[:, None]
    x = exact_rows(q, channels)
    amax = np.abs(x).max(axis=-1, keepdims=True)
    nonzero = amax[:, 0] > 0
    assert ((power == 1) == ((amax[nonzero] >= 2.0**-9) & (amax[nonzero] < 65504))).all()
    assert (np.abs(quantized.codes * scale - x) <= 0.5 * scale + amax * 2.0**-9).all()
    top = np.abs(quantized.codes).max(axis=-1)[nonzero]
    assert (top >= 126).all() if size != "smallest" else (top >= 8).all()


@pytest.mark.parametrize("size", ["usual", "largest", "smallest"])
def test_codes_of_k_are_within_half_a_step_whatever_its_size(size):
    """Keys that the sample of K does not hold, or that are all tiny."""
    k = random((2048, 64), 2)
    if size == "largest":
        k *= 0.1
        k[700:800] = 3e4 * random((100, 64), 3).clip(-2, 2)
    if size == "smallest":
        k *= 1e-6
    k = k.astype(np.float16)
    channels = channels_of(k)
    quantized = quantize.quantize_k(k, channels, PLAN)
    x = k.astype(np.float64) * channels.k_factor.astype(np.float64) + channels.k_addend.astype(np.float64)
    x = quantize.rotate(x).reshape(-1, 4, PLAN.block_n // 4, 64)
    amax = np.abs(x).max(axis=(-2, -1), keepdims=True)
    assert (size == "largest") == (amax > 65504).any() and (size == "smallest") == (amax < 2.0**-9).any()
    scale = quantized.scale.astype(np.float64)[..., None, None]
    error = np.abs(quantized.codes.reshape(x.shape) * scale - x)
    assert (error <= 0.5 * scale + amax * 2.0**-9 + 16 * 2.0**-25).all()


#: Sizes of BF16 numbers: what FP16 holds well, does not hold, loses, and what FP32 hardly holds.
BF16_SIZES = (1, 1e-4, 1e-10, 1e-30, 1e6, 1e30, 1e36)


@pytest.mark.parametrize("size", BF16_SIZES)
@pytest.mark.parametrize("which", ["q", "k"])
def test_bf16_codes_are_within_half_a_step_whatever_their_size(which, size):
    """Rows of Q of any size, and key groups of any size that the sample of K does not hold."""
    x = random((2048, 64), 2)
    place = slice(64, 512) if which == "k" else slice(None)
    x[place] *= size
    x = x.astype(ml_dtypes.bfloat16)
    wide = x.astype(np.float64)
    if which == "q":
        channels = channels_of(random((400, 64), 1).astype(ml_dtypes.bfloat16))
        quantized = quantize.quantize_q(x, channels, 1, PLAN)
        codes, scale = quantized.codes, quantized.scale[:, None] / quantize.softmax_scale(1)
        expected = quantize.rotate(wide * channels.q_factor)
        amax = np.abs(expected).max(axis=-1, keepdims=True)
    else:
        channels = channels_of(x)
        quantized = quantize.quantize_k(x, channels, PLAN)
        codes, scale = quantized.codes.reshape(-1, 64), np.repeat(quantized.scale.reshape(-1), PLAN.block_n // 4)[:, None]
        expected = quantize.rotate(wide * channels.k_factor + channels.k_addend)
        amax = np.repeat(np.abs(expected).reshape(-1, PLAN.block_n // 4 * 64).max(axis=-1), PLAN.block_n // 4)[:, None]
    scale = scale.astype(np.float64)
    assert (np.abs(codes * scale - expected) <= 0.5 * scale + amax * 2.0**-9).all()
    assert (np.abs(codes).max(axis=-1)[place] >= (126 if which == "q" else 1)).all()


def test_rows_that_are_zero_have_the_scale_zero():
    k = random((100, 64)).astype(np.float16)
    quantized = quantize.quantize_q(np.zeros((3, 64), np.float16), channels_of(k), 1, PLAN)
    assert not quantized.codes.any() and not quantized.scale.any()
    quantized = quantize.quantize_k(np.ones_like(k), channels_of(np.ones_like(k)), PLAN)
    assert not quantized.codes.any() and not quantized.scale.any()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_of_q_that_is_not_finite_has_a_nan_scale_and_no_codes(value, dtype):
    q = random((5, 64)).astype(dtype)
    q[2, 7] = value
    quantized = quantize.quantize_q(q, channels_of(q), 1, PLAN)
    np.testing.assert_array_equal(np.isnan(quantized.scale), np.arange(5) == 2)
    np.testing.assert_array_equal(quantized.codes.any(axis=-1), np.arange(5) != 2)


# ---------------------------------------------------------------------------- channels


@given(seed=st.integers(0, 2**32 - 1), smooth_k=st.booleans())
def test_factors_and_addends_are_finite_fp16_numbers(seed, smooth_k):
    """Whatever K is; and where a channel is constant but for the rounding of its mean."""
    rng = np.random.default_rng(seed)
    k = rng.integers(0, 2**16, (50, 64), dtype=np.uint16).view(np.float16)
    k = np.where(np.isfinite(k), k, np.float16(0))
    k[:, ::2] = k[:1, ::2] * (1 + rng.integers(0, 2, (50, 32)) * rng.choice([0, 2.0**-10], 32)).astype(np.float16)
    k = np.where(np.isfinite(k), k, np.float16(0))
    channels = channels_of(k, smooth_k)
    f, a, fq = (np.abs(x.astype(np.float32)) for x in (channels.k_factor, channels.k_addend, channels.q_factor))
    assert f.min() >= 2.0**-8.51 and f.max() <= 64 and fq.min() >= 2.0**-6 and fq.max() <= 363
    assert a[f != 1].max() <= 23200 and np.isfinite(channels.k_mean).all()
    assert np.abs(f * fq - 1).max() <= 2.0**-10
    k_mean, *_ = quantize._balance_fp16(np.float32([65504, 3000]), np.float32([2.0**-5, 2.0**-9]))
    np.testing.assert_allclose(k_mean, [65504, 3000], rtol=2.0**-10)


def test_without_smoothing_the_mean_is_zero():
    channels = channels_of(5 + random((100, 64)).astype(np.float16), smooth_k=False)
    assert (channels.k_mean.view(np.uint32) == 0).all() and not channels.k_addend.any()


# ---------------------------------------------------------------------------- attention


@pytest.mark.parametrize("offset", [10, 100, 1000])
def test_lse_holds_with_large_offsets_of_k(offset):
    q, k, v = Problem(seq_q=100, seq_kv=500).arrays()
    k = (k + offset * random((1, 1, 1, 64))).astype(np.float16)
    o, lse = attention(q, k, v, plan=PLAN)
    o_exact, lse_exact = exact.attention(q, k, v)
    assert np.abs(lse - lse_exact).mean() < 0.006
    assert exact.errors(o, o_exact)["relative_l1"] < 0.042


@pytest.mark.parametrize("kinds, limit", [
    (("huge rows", "normal", "normal"), 0.05),
    (("normal", "huge rows", "normal"), 0.09),
    (("tiniest", "normal", "normal"), 0.05),
    (("normal", "tiniest", "normal"), 0.05),
])  # fmt: skip
def test_rows_that_are_computed_twice_have_no_larger_error(kinds, limit):
    arrays = Problem(seq_q=128, seq_kv=1200, kinds=kinds).arrays()
    o, lse = attention(*arrays, plan=PLAN)
    o_exact, _ = exact.attention(*arrays)
    assert exact.errors(o, o_exact)["relative_l1"] < limit
    assert np.isfinite(lse).all()
