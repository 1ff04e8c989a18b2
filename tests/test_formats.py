"""The formats and the rounded FP32 operations, against rational arithmetic and ml_dtypes."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sagepp.reference import formats

FP32_MAX = np.finfo(np.float32).max
TINY = np.float32(2.0**-149)
ABOVE_1, BELOW_1 = np.float32(1 + 2.0**-23), np.float32(1 - 2.0**-23)

bit_patterns = st.integers(0, 2**32 - 1).map(lambda b: np.uint32(b).view(np.float32))
finite = st.one_of(
    bit_patterns.filter(np.isfinite),
    st.floats(-8, 8, width=32).map(np.float32),
    st.sampled_from([0, 1, 2.0**-126, 2.0**-149, 1 + 2.0**-23, 1 - 2.0**-24, FP32_MAX]).map(np.float32),
)


def _units(x):
    """x as a rational multiple of the FP32 spacing just below it, and that spacing."""
    n, d = abs(x).as_integer_ratio()
    exponent = n.bit_length() - d.bit_length()
    exponent -= Fraction(n, d) < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    return x / unit, unit


def _round(x, direction):
    """A rational rounded to FP32: `round` is nearest even, `math.ceil` and `math.floor` are directed."""
    if x == 0:
        return np.float32(0)
    multiple, unit = _units(x)
    magnitude = abs(direction(multiple)) * unit
    overflows = magnitude > Fraction(float(FP32_MAX))
    return np.float32(math.copysign(math.inf if overflows else float(magnitude), x))


def _bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


def _rational(*values):
    return [Fraction(float(v)) for v in values]


@settings(max_examples=400, deadline=None)
@given(finite, finite, finite)
@example(np.float32(1 + 2.0**-12), np.float32(1 + 2.0**-12), TINY)  # half an ulp and a little: up
@example(np.float32(1 + 2.0**-12), np.float32(1 + 2.0**-12), -TINY)  # half an ulp less a little: down
@example(np.float32(2.0**-75), np.float32(2.0**-75), TINY)  # a tie between subnormals
@example(2.0**-75 * ABOVE_1, 2.0**-75 * BELOW_1, np.float32(2.0**-127 + 2.0**-149))  # just below one
@example(2.0**-75 * ABOVE_1, 2.0**-75 * ABOVE_1, np.float32(2.0**-127))  # just above one
@example(np.float32(2.0**-100), np.float32(2.0**-50 * (1 + 2.0**-23)), np.float32(2.0**-126))
@example(FP32_MAX, np.float32(1), np.float32(2.0**103))  # a tie at the overflow threshold
@example(FP32_MAX, np.float32(1), np.nextafter(np.float32(2.0**103), np.float32(0)))
@example(FP32_MAX, FP32_MAX, -FP32_MAX)
def test_fma_rounds_once(a, b, c):
    fa, fb, fc = _rational(a, b, c)
    exact = fa * fb + fc
    result = formats.fma(a, b, c)
    if exact:
        assert _bits(result) == _bits(_round(exact, round))
    else:
        negative_zeros = c == 0 and np.signbit(c) and np.signbit(a) != np.signbit(b)
        assert _bits(result) == (0x80000000 if negative_zeros else 0)


@settings(max_examples=300, deadline=None)
@given(finite, finite, st.integers(-30, 30), st.sampled_from([-1, 1]))
def test_fma_rounds_once_next_to_a_tie(a, b, distance, sign):
    """c is chosen so that the sum lies a tiny distance beside the middle of two FP32 numbers."""
    a, b = (np.float32(np.frexp(x)[0]) for x in (a, b))
    middle = np.float32(np.float64(a) * b) * np.float64(1 + 2.0**-24)
    c = np.float32(sign * (middle - np.float64(a) * b) + distance * 2.0**-60)
    fa, fb, fc = _rational(a, b, c)
    exact = fa * fb + fc
    if exact:
        assert _bits(formats.fma(a, b, c)) == _bits(_round(exact, round))


half = st.integers(0, 2**16 - 1).map(lambda b: np.uint16(b).view(np.float16)).filter(np.isfinite)


def _round16(x):
    """A rational rounded to FP16, nearest even."""
    if x == 0:
        return np.float16(0)
    n, d = abs(x).as_integer_ratio()
    exponent = n.bit_length() - d.bit_length()
    exponent -= Fraction(n, d) < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, -14) - 10)
    magnitude = round(abs(x) / unit) * unit
    return np.float16(math.copysign(math.inf if magnitude > 65504 else float(magnitude), x))


@settings(max_examples=1000, deadline=None)
@given(half, half, half)
@example(np.float16(2.0**-24), np.float16(2.0**-24), np.float16(2.0**-14))  # below half a step of FP16, and of FP32
@example(np.float16(2.0**-24), np.float16(1023 * 2.0**-24), np.float16(65504))  # not exact in float64
@example(np.float16(2.0**-24), np.float16(-(2.0**-24)), np.float16(1 + 2.0**-10))
@example(np.float16(32.03125), np.float16(0.5 + 2.0**-11), np.float16(32768))  # near a tie
@example(np.float16(2.0**-12), np.float16(2.0**-13), np.float16(2.0**-24))  # a tie of subnormals
@example(np.float16(2.0**-12), np.float16(2.0**-13), np.float16(0))  # half of the smallest number
@example(np.float16(256), np.float16(256), np.float16(-48))  # at the overflow threshold
def test_fma16_rounds_once(a, b, c):
    fa, fb, fc = _rational(a, b, c)
    assert formats.fma16(a, b, c) == _round16(fa * fb + fc)


def test_fma16_rounds_once_beside_the_middle_of_two_numbers():
    """A product that float64 cannot add to c exactly decides where c alone would be in the middle."""
    rng = np.random.default_rng(0)
    c = rng.integers(0x5000, 0x7800, 1000).astype(np.uint16).view(np.float16)  # 32 to 32768
    half_step = np.spacing(c).astype(np.float64) / 2
    a = np.float16(2.0**-12) * np.ones(1000, np.float16)
    b = (half_step * 2.0**12 * (1 + 2.0**-10 * rng.integers(-3, 4, 1000))).astype(np.float16)
    expected = [_round16(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))) for x, y, z in zip(a, b, c)]
    np.testing.assert_array_equal(formats.fma16(a, b, c), expected)


def test_numpy_rounds_fp16_sums_and_products_once():
    """float64 holds them exactly."""
    a = np.arange(2**16, dtype=np.uint16).view(np.float16)
    a = a[np.isfinite(a)]
    rng = np.random.default_rng(0)
    near = (a.view(np.uint16) ^ rng.integers(0, 2**13, a.size).astype(np.uint16)).view(np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        for b in (rng.permutation(a), rng.permutation(a), np.where(np.isfinite(near), near, a), -a[::-1]):
            wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
            for result, expected in ((a + b, wide_a + wide_b), (a - b, wide_a - wide_b), (a * b, wide_a * wide_b)):
                np.testing.assert_array_equal(result, expected.astype(np.float16))


@settings(max_examples=300, deadline=None)
@given(finite, finite)
@example(FP32_MAX, np.float32(-2))
@example(TINY, TINY)
@example(TINY, -TINY)
def test_mul_ru_is_the_smallest_fp32_not_below_the_product(a, b):
    fa, fb = _rational(a, b)
    expected = _round(fa * fb, math.ceil)
    if fa * fb < -Fraction(float(FP32_MAX)):
        expected = -FP32_MAX
    assert formats.mul_ru(a, b) == expected


@settings(max_examples=300, deadline=None)
@given(finite, finite)
@example(FP32_MAX, FP32_MAX)
@example(np.float32(1), -TINY)
@example(np.float32(1), np.float32(-1))
def test_add_rd_is_the_largest_fp32_not_above_the_sum(a, b):
    fa, fb = _rational(a, b)
    expected = _round(fa + fb, math.floor)
    if fa + fb > Fraction(float(FP32_MAX)):
        expected = FP32_MAX
    result = formats.add_rd(a, b)
    assert result == expected
    if fa + fb == 0:
        assert np.signbit(result) == (np.signbit(a) or np.signbit(b))


def test_fma16_broadcasts_and_keeps_scalars():
    a, b = np.ones((3, 1), np.float16), np.ones(4, np.float16)
    assert formats.fma16(a, b, np.float16(2)).shape == (3, 4)
    assert formats.fma16(a, b, np.float16(2)).dtype == np.float16
    assert np.ndim(formats.fma16(*np.ones(3, np.float16))) == 0


@pytest.mark.parametrize("operation", [formats.fma, formats.mul_ru, formats.add_rd, formats.div])
def test_operations_broadcast_and_keep_scalars(operation):
    a, b = np.ones((3, 1), np.float32), np.ones(4, np.float32)
    operands = (a, b, np.float32(2))[: 3 if operation is formats.fma else 2]
    assert operation(*operands).shape == (3, 4)
    assert operation(*operands).dtype == np.float32
    assert np.ndim(operation(*(np.float32(1) for _ in operands))) == 0


def test_fma_of_infinities_and_nan():
    inf = np.float32(np.inf)
    a = np.array([inf, inf, 1, 0, inf, np.nan], np.float32)
    b = np.array([1, -1, 1, inf, 1, 0], np.float32)
    c = np.array([1, 1, -inf, 1, -inf, 0], np.float32)
    np.testing.assert_array_equal(formats.fma(a, b, c), np.array([inf, -inf, -inf, np.nan, np.nan, np.nan]))


# ---------------------------------------------------------------------------- conversions


def _inputs_around_every_e4m3_boundary():
    values = np.unique(np.abs(formats.E4M3_VALUES[~np.isnan(formats.E4M3_VALUES)]))
    ends = np.concatenate([values, (values[1:] + values[:-1]) / 2, [448, 464, 480, 2.0**-10, 1e30]])
    ends = ends.astype(np.float32)
    up, down = np.nextafter(ends, np.float32(np.inf)), np.nextafter(ends, np.float32(-np.inf))
    return np.concatenate([ends, up, down])


def _conversion_inputs():
    every_code = np.arange(2**16, dtype=np.uint16)
    rng = np.random.default_rng(0)
    positive = np.concatenate(
        [
            _inputs_around_every_e4m3_boundary(),
            rng.integers(0, 2**31, 10**6).astype(np.uint32).view(np.float32),
            every_code.view(np.float16).astype(np.float32),
            every_code.view(ml_dtypes.bfloat16).astype(np.float32),
        ]
    )
    return np.concatenate([positive, -positive])


INPUTS = _conversion_inputs()


def test_to_e4m3_rounds_as_ml_dtypes_and_saturates():
    ordinary = np.abs(INPUTS) <= 448
    expected = INPUTS[ordinary].astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(formats.to_e4m3(INPUTS[ordinary]), expected)
    large = np.abs(INPUTS) > 448  # infinities included, NaN not
    expected = np.where(np.signbit(INPUTS[large]), 0xFE, 0x7E)
    np.testing.assert_array_equal(formats.to_e4m3(INPUTS[large]), expected)
    np.testing.assert_array_equal(formats.to_e4m3(INPUTS[np.isnan(INPUTS)]), 0x7F)


def test_every_e4m3_code_has_its_value():
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(formats.from_e4m3(codes), expected)
    numbers = codes[(codes & 0x7F) != 0x7F]
    np.testing.assert_array_equal(formats.to_e4m3(formats.from_e4m3(numbers)), numbers)


@pytest.mark.parametrize(
    "to_format, dtype", [(formats.to_fp16, np.float16), (formats.to_bf16, ml_dtypes.bfloat16)]
)
def test_half_formats_round_to_nearest_even(to_format, dtype):
    result = to_format(INPUTS)
    assert result.dtype == dtype
    number = ~np.isnan(INPUTS)
    with np.errstate(over="ignore"):
        expected = INPUTS[number].astype(dtype)
    np.testing.assert_array_equal(result[number].view(np.uint16), expected.view(np.uint16))
    assert (result[~number].view(np.uint16) == 0x7FFF).all()


@pytest.mark.parametrize("convert", [formats.to_e4m3, formats.to_fp16, formats.to_bf16, formats.to_int_rn])
def test_conversions_keep_shapes(convert):
    assert np.shape(convert(np.float32(1.5))) == ()
    assert convert(np.zeros((2, 0, 3), np.float32)).shape == (2, 0, 3)


def test_to_int_rn_saturates():
    x = [0.5, 1.5, 2.5, -0.5, -1.5, 2.0**31, -(2.0**31), 1e30, -np.inf, np.nan, 2.0**31 - 128]
    expected = [0, 2, 2, 0, -2, 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 0, 2**31 - 128]
    np.testing.assert_array_equal(formats.to_int_rn(np.array(x, np.float32)), expected)


# ---------------------------------------------------------------------------- log2


def test_log2_is_exact_for_powers_of_two():
    exponents = np.arange(-126, 128)
    np.testing.assert_array_equal(formats.log2((2.0**exponents).astype(np.float32)), exponents)


@pytest.mark.parametrize("exponent", [-126, -1, 0, 40, 127])
def test_log2_error_is_below_1_7_ulp(exponent):
    every_fourth_mantissa = np.arange(0, 2**23, 4, dtype=np.int32)
    x = (every_fourth_mantissa + ((exponent + 127) << 23)).view(np.float32)
    exact = np.log2(x.astype(np.longdouble))
    nonzero = exact != 0
    error = np.abs(formats.log2(x) - exact)[nonzero]
    assert (error / np.spacing(np.abs(exact[nonzero].astype(np.float32)))).max() < 1.7
