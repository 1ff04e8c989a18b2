"""The tensor-core model: against what GPUs returned, and against sums of rational numbers."""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagepp.reference import formats, tensor_core
from sagepp.reference.tensor_core import BEHAVIOURS, mma

INF, NAN = np.float32(np.inf), np.float32(np.nan)
ALL = sorted(BEHAVIOURS)


def _id(key):
    return "-".join(key)


def _bits(x, accumulator):
    return formats.to_fp16(x).view(np.uint16) if accumulator == "f16" else np.asarray(x).view(np.uint32)


def _dots(a, b, c, key):
    """One dot product a row."""
    return mma(a[:, None, :], b[:, :, None], c[:, None, None], key)[:, 0, 0]


# ---------------------------------------------------------------------------- measured results

# file, instruction it was measured with, and whether that got C (see the README of the vectors).
MEASURED = [
    ("ada_e4m3", ("sm_89", "mma.sync", "e4m3", "f16"), True),
    ("ada_e4m3", ("sm_89", "mma.sync", "e4m3", "f32"), True),
    ("h100_e4m3", ("sm_90", "mma.sync", "e4m3", "f16"), True),
    ("h100_e4m3", ("sm_90", "wgmma", "e4m3", "f32"), False),
    ("b200_e4m3", ("sm_100", "mma.sync", "e4m3", "f16"), True),
    ("b200_e4m3", ("sm_100", "mma.sync", "e4m3", "f32"), True),
    ("a100_fp16", ("sm_80", "mma.sync", "f16", "f16"), True),
    ("a100_fp16", ("sm_80", "mma.sync", "f16", "f32"), True),
    ("ada_fp16", ("sm_89", "mma.sync", "f16", "f16"), True),
    ("ada_fp16", ("sm_89", "mma.sync", "f16", "f32"), True),
    ("h100_fp16", ("sm_90", "mma.sync", "f16", "f16"), True),
    ("h100_fp16", ("sm_90", "mma.sync", "f16", "f32"), True),
]


@pytest.mark.parametrize("file, key, with_c", MEASURED, ids=lambda x: x if isinstance(x, str) else None)
def test_model_returns_what_the_gpu_returned(file, key, with_c):
    folder = os.environ.get("SAGEPP_HARDWARE_VECTORS")
    if not folder:
        pytest.skip("SAGEPP_HARDWARE_VECTORS is not set")
    vectors = np.load(Path(folder) / f"{file}.npz")
    c = vectors["c_float32"] * np.float32(with_c)
    if key[3] == "f16":
        c = formats.to_fp16(c).astype(np.float32)
    expected = vectors[{"f16": "d_float16_accumulate", "f32": "d_float32_accumulate"}[key[3]]]
    result = _dots(vectors["a"], vectors["b"], c, key)
    assert np.flatnonzero(_bits(result, key[3]) != _bits(expected, key[3])).size == 0


GOLDENS = sorted((Path(__file__).parent / "data").glob("mma_*.npz"))
NO_GOLDENS = pytest.param(Path("none"), marks=pytest.mark.skip("no goldens in tests/data"))


@pytest.mark.parametrize("file", GOLDENS or [NO_GOLDENS], ids=lambda path: path.stem)
def test_model_returns_the_goldens(file):
    """Written by ``python -m tests.hardware.validate --goldens``: a and b as codes, c and d as bits."""
    goldens = np.load(file)
    key = tuple(str(part) for part in goldens["key"])
    operand = {"e4m3": formats.from_e4m3, "f16": lambda x: x.view(np.float16).astype(np.float32)}[key[2]]
    accumulator = {"f16": np.float16, "f32": np.float32}[key[3]]
    c = goldens["c"].view(accumulator).astype(np.float32)
    result = mma(operand(goldens["a"]), operand(goldens["b"]), c, key)
    np.testing.assert_array_equal(_bits(result, key[3]), goldens["d"])


# ---------------------------------------------------------------------------- a rational model


def _exponent(x, lowest):
    numerator, denominator = abs(x).as_integer_ratio()  # the denominator is a power of two
    return max(numerator.bit_length() - denominator.bit_length(), lowest)


def _cut(x, unit):
    return int(x / unit) * unit  # int() truncates


def _rational_fused_sum(a, b, c, rule):
    lowest = tensor_core.MIN_EXPONENT[rule.multiplier]
    products = [(x * y, _exponent(x, lowest) + _exponent(y, lowest)) for x, y in zip(a, b) if x * y]
    terms = products + ([(c, _exponent(c, tensor_core.MIN_EXPONENT[rule.accumulator]))] if c else [])
    if not terms:
        return Fraction(0)
    unit = Fraction(2) ** (max(exponent for _, exponent in terms) - rule.fraction_bits)
    total = sum(_cut(value, unit) for value, _ in terms)
    return _rational_round(total, rule)


def _rational_round(x, rule):
    if rule.accumulator == "f16":
        return Fraction(float(np.float16(float(x))))
    return _cut(x, Fraction(2) ** (_exponent(x, -126) - rule.result_bits))


def _rational_mma(a, b, c, rule):
    a, b, c = [Fraction(float(x)) for x in a], [Fraction(float(x)) for x in b], Fraction(float(c))
    if not rule.split:
        for i in range(0, len(a), rule.terms):
            c = _rational_fused_sum(a[i : i + rule.terms], b[i : i + rule.terms], c, rule)
        return c
    for i in range(0, len(a), 32):
        partial = Fraction(0)
        for phases in ((0, 1), (2, 3)):
            keys = [k for k in range(i, i + 32) if k % 4 in phases]
            partial = _rational_fused_sum([a[k] for k in keys], [b[k] for k in keys], partial, rule)
        total = float(partial + c)  # exact, then one addition of the accumulator's format
        c = Fraction(float(np.float16(total) if rule.accumulator == "f16" else np.float32(total)))
    return c


E4M3 = formats.E4M3_VALUES[~np.isnan(formats.E4M3_VALUES)]
FP16 = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
FP16 = FP16[np.abs(FP16) < 128]  # no overflow in 64 products; that is tested apart


def _operands(rng, operand, shape):
    """Wide exponents, repeated magnitudes that cancel, zeros of both signs and subnormals."""
    values = {"e4m3": E4M3, "f16": FP16}[operand]
    x = rng.choice(values, shape)
    few = rng.choice(values[np.abs(values) < 4], 4)
    x = np.where(rng.random(shape) < rng.choice([0, 0.5, 1]), rng.choice(few, shape), x)
    x = np.where(np.abs(x) > 2.0 ** rng.integers(-10, 8), np.float32(0), x)
    x = np.where(rng.random((*shape[:-1], 1)) < 0.1, np.float32(0), x)
    return x * rng.choice(np.float32([-1, 1]), shape)


def _accumulators(rng, accumulator, shape):
    lowest, highest = {"f16": (-24, 12), "f32": rng.choice([(-24, 12), (-149, 100)])}[accumulator]
    c = rng.normal(size=shape) * 2.0 ** rng.integers(lowest, highest, shape)
    c = np.where(rng.random(shape) < 0.2, 0, c).astype(np.float32)
    return formats.to_fp16(c).astype(np.float32) if accumulator == "f16" else c


@pytest.mark.parametrize("key", ALL, ids=_id)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_model_is_a_chain_of_truncated_sums(key, seed):
    rng = np.random.default_rng(seed)
    a, b = _operands(rng, key[2], (4, 64)), _operands(rng, key[2], (64, 4))
    c = _accumulators(rng, key[3], (4, 4))
    result = mma(a, b, c, key)
    for i in range(4):
        for j in range(4):
            expected = _rational_mma(a[i], b[:, j], c[i, j], BEHAVIOURS[key])
            assert Fraction(float(result[i, j])) == expected, (i, j)


# ---------------------------------------------------------------------------- special values


def _one(key, pairs, c=0.0):
    """One instruction's worth of products: the given ones, and zeros."""
    a, b = np.zeros((2, 32), np.float32)
    for k, (x, y) in enumerate(pairs):
        a[k], b[k] = x, y
    return _dots(a[None], b[None], np.float32([c]), key)[0]


@pytest.mark.parametrize("key", ALL, ids=_id)
def test_nan_is_canonical_and_comes_from_nan_alone(key):
    canonical = 0x7FFF if key[3] == "f16" else 0x7FFFFFFF
    assert _bits(_one(key, [(-NAN, 1)]), key[3]) == canonical
    assert _bits(_one(key, [(1, NAN)]), key[3]) == canonical
    assert _bits(_one(key, [(1, 1)], c=-NAN), key[3]) == canonical
    assert not np.isnan(_one(key, [(1, 1)], c=1))


@pytest.mark.parametrize("key", [k for k in ALL if k[2] == "f16"], ids=_id)
def test_infinities_follow_ieee_754(key):
    assert _one(key, [(INF, 1)]) == INF
    assert _one(key, [(INF, -1)], c=5) == -INF
    assert np.isnan(_one(key, [(INF, 0)]))
    assert np.isnan(_one(key, [(INF, 1), (-INF, 1)]))
    assert np.isnan(_one(key, [(INF, 1)], c=-INF))
    assert _one(key, [(INF, 1)], c=INF) == INF


@pytest.mark.parametrize("key", ALL, ids=_id)
def test_infinite_accumulator_stays(key):
    assert _one(key, [(-8, 8)], c=INF) == INF
    assert _one(key, [(8, 8)], c=-INF) == -INF


@pytest.mark.parametrize("key", [k for k in ALL if k[3] == "f16"], ids=_id)
def test_fp16_accumulator_overflows_to_infinity(key):
    assert _one(key, [(448, 448)]) == INF
    assert _one(key, [(-448, 448)]) == -INF
    assert _one(key, [(16, 1)], c=65504) == INF  # 65520 is the tie, and rounds away
    assert _one(key, [(8, 1)], c=65504) == 65504
    spread = [(448, 448)] + [(0, 0)] * 30 + [(-448, 448)]
    assert np.isfinite(_one(key, spread)) == (BEHAVIOURS[key].terms == 32)


@pytest.mark.parametrize("key", ALL, ids=_id)
def test_exact_zero_is_positive(key):
    assert _bits(_one(key, [(-0.0, 1)] * 32, c=-0.0), key[3]) == 0
    assert _bits(_one(key, [(2, 3), (-2, 3)]), key[3]) == 0
    assert _bits(_one(key, [(2, 3)], c=-6), key[3]) == 0


@pytest.mark.parametrize("key", ALL, ids=_id)
def test_negative_terms_cut_to_zero_leave_a_positive_zero(key):
    large = [(448, 448), (-448, 448), (0, 0), (0, 0)]  # then k % 4 is 0 again: the same sum where it splits
    assert _bits(_one(key, [*large, (-(2.0**-9), 2.0**-9)]), key[3]) == 0
    if not BEHAVIOURS[key].split:  # there C is added afterwards
        assert _bits(_one(key, large, c=-(2.0**-24)), key[3]) == 0


@pytest.mark.parametrize("key", [k for k in ALL if k[2:] == ("f16", "f16")], ids=_id)
def test_a_negative_sum_that_rounds_to_zero_is_positive(key):
    for c in (0.0, -0.0):
        assert _bits(_one(key, [(-(2.0**-20), 2.0**-6)], c), "f16") == 0
        assert _bits(_one(key, [(-(2.0**-20), 2.0**-5)], c), "f16") == 0, "a tie, to even"
        assert _bits(_one(key, [(-1.5 * 2.0**-20, 2.0**-5)], c), "f16") == 0x8001
    assert _bits(_one(key, [(2.0**-20, 1.5 * 2.0**-5)], c=-(2.0**-24)), "f16") == 0


def test_fp8_accumulation_on_hopper_keeps_13_bits_of_an_fp32_accumulator():
    key = ("sm_90a", "wgmma", "e4m3", "f32")
    assert _one(key, [], c=1 + 2.0**-13 + 2.0**-14) == np.float32(1 + 2.0**-13)
    assert _one(key, [(2.0**-7, 2.0**-6)], c=1) == np.float32(1 + 2.0**-13)
    assert _one(key, [(2.0**-7, 2.0**-7)] * 2, c=1) == 1, "each is truncated before the sum"


def test_product_exponent_is_not_renormalised():
    key = ("sm_89", "mma.sync", "e4m3", "f32")
    # 1.875 * 1.875 = 3.515625 counts as exponent 0: 2**-13 beside it is kept, half of that is not.
    large = [(1.875, 1.875), (-1.5, 1.5)]
    assert _one(key, [*large, (2.0**-7, 2.0**-6)]) == np.float32(1.265625 + 2.0**-13)
    assert _one(key, [*large, (2.0**-7, 2.0**-7)]) == np.float32(1.265625)
    # 2**-9 is subnormal: its exponent counts as -6.
    assert _one(key, [(2.0**-9, 2.0**-9), (2.0**-9, 2.0**-9)]) == 2.0**-17


# ---------------------------------------------------------------------------- the array function


@pytest.mark.parametrize("key", ALL, ids=_id)
def test_result_does_not_depend_on_blocks_or_batches(key, monkeypatch):
    rng = np.random.default_rng(1)
    a, b = _operands(rng, key[2], (3, 7, 64)), _operands(rng, key[2], (3, 64, 5))
    a[1, 2, 3] = NAN
    c = _accumulators(rng, key[3], (3, 7, 5))
    whole = mma(a, b, c, key)
    monkeypatch.setattr(tensor_core, "BLOCK_ELEMENTS", 32 * 5 * 2)
    np.testing.assert_array_equal(mma(a, b, c, key), whole)
    for i in range(3):
        np.testing.assert_array_equal(mma(a[i], b[i], c[i], key), whole[i])
    assert np.isnan(whole[1, 2]).all() and np.isnan(whole).sum() == 5


def test_leading_dimensions_broadcast():
    key = ("sm_90a", "wgmma", "e4m3", "f16")
    a, b = np.ones((2, 1, 3, 32), np.float32), np.ones((4, 32, 5), np.float32)
    assert mma(a, b, 0.0, key).shape == (2, 4, 3, 5)
    assert (mma(a, b, np.arange(5, dtype=np.float32), key) == 32 + np.arange(5)).all()


def test_inputs_are_not_written_to():
    a, b, c = np.ones((2, 32), np.float32), np.ones((32, 2), np.float32), np.zeros((2, 2), np.float32)
    a[0, 0] = INF
    copies = a.copy(), b.copy(), c.copy()
    mma(a, b, c, ("sm_90", "mma.sync", "f16", "f16"))
    for array, copy in zip((a, b, c), copies):
        np.testing.assert_array_equal(array, copy)


def test_unknown_instruction_and_bad_shapes_are_named():
    with pytest.raises(KeyError, match="wgmma"):
        tensor_core.behaviour("sm_89", "wgmma", "e4m3", "f16")
    with pytest.raises(ValueError, match="multiple of 32"):
        mma(np.ones((2, 48)), np.ones((48, 2)), 0.0, ("sm_90a", "wgmma", "e4m3", "f16"))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 64, 256, 1024]))
def test_int8_dot_is_exact(seed, k):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-128, 128, (2, 9, k), np.int8), rng.integers(-128, 128, (k, 11), np.int8)
    if seed % 2:
        a[:], b[:] = -128, -128
    result = tensor_core.int8_dot(a, b)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, a.astype(np.int64) @ b.astype(np.int64))
