"""`ex2.approx.ftz.f32`: every fraction an H200 returned, and the range reduction around it."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from sagepp.reference import special
from sagepp.reference.ex2_table import EX2_COEFFICIENTS

# SHA-256 of the 2**23 mantissas (little-endian INT32) that an H200 returned for 1 + i / 2**23.
MEASURED_MANTISSAS = "4230b4a27ebed3eb6df3051cb604d77651b2b1e2f46d55b4f4045e7d7e48c224"

FRACTIONS = 1 << special.FRACTION_BITS
FRACTION = np.arange(FRACTIONS, dtype=np.int32)


def _ex2_bits(x):
    """In pieces that fit the cache."""
    return np.concatenate([special.ex2(part).view(np.int32) for part in np.array_split(x, 128)])


@pytest.fixture(scope="module")
def mantissas():
    one_to_two = (FRACTION + (127 << 23)).view(np.float32)
    return _ex2_bits(one_to_two) - (128 << 23)


@pytest.fixture(scope="module")
def measured():
    folder = os.environ.get("SAGEPP_HARDWARE_VECTORS")
    if not folder:
        pytest.skip("SAGEPP_HARDWARE_VECTORS is not set")
    residual = np.load(Path(folder) / "h200_ex2_residual.npz")["residual_ulp"]
    rounded = np.rint((np.exp2(FRACTION / FRACTIONS) - 1) * FRACTIONS)
    return rounded.astype(np.int64) + residual


def test_ex2_returns_the_measured_mantissa_of_every_fraction(mantissas):
    assert hashlib.sha256(mantissas.astype("<i4").tobytes()).hexdigest() == MEASURED_MANTISSAS


def test_ex2_differs_from_the_hardware_nowhere(mantissas, measured):
    assert np.flatnonzero(mantissas != measured).size == 0


@pytest.mark.parametrize("row", [0, 21, 42, 63])
def test_ex2_coefficients_are_the_only_ones_that_give_the_measured_mantissas(measured, row):
    """For each (c1, c2) nearby, the constants c0 that fit every fraction form an interval."""
    low = np.arange(1 << special.LOW_BITS)
    one = 1 << (special.SUM_BITS - special.FRACTION_BITS)
    wanted = measured[row << special.LOW_BITS : (row + 1) << special.LOW_BITS] * one
    _, c1_model, c2_model = EX2_COEFFICIENTS[row]
    fitting = []
    for c2 in range(c2_model - 6, c2_model + 7):
        for c1 in range(c1_model - 3, c1_model + 4):
            rest = wanted - c1 * low - c2 * special.SQUARES
            first, last = rest.max(), rest.min() + one - 1
            if first <= last:
                fitting.append((c1, c2, range(first, last + 1)))
    (c1, c2, c0), *others = fitting
    assert not others and (c1, c2) == (c1_model, c2_model)
    assert special.C0[row] - (1 << special.SUM_BITS) in c0


def test_ex2_result_depends_on_the_fraction_alone(mantissas):
    """Every whole part from -126 to 127 shifts the exponent; fractions that FP32 can hold there."""
    for whole in range(-126, 128):
        step = 1 << max(0, int(np.log2(max(abs(whole), 1))) + 1)
        fraction = FRACTION[:: step * 64]
        x = (whole + fraction / FRACTIONS).astype(np.float32)
        if whole >= 0:
            expected = mantissas[fraction]
        else:  # the ones' complement of the magnitude's fraction, unless that is zero
            expected = mantissas[np.where(fraction == 0, 0, fraction - 1)]
        np.testing.assert_array_equal(special.ex2(x).view(np.int32), expected + ((whole + 127) << 23))


def test_ex2_cuts_arguments_to_23_fraction_bits():
    x = np.float32(0.3).view(np.int32) + np.arange(-2000, 2000, dtype=np.int32)
    x = x.view(np.float32)
    cut = np.float32(np.trunc(x.astype(np.float64) * FRACTIONS) / FRACTIONS)
    np.testing.assert_array_equal(special.ex2(x), special.ex2(cut))
    np.testing.assert_array_equal(special.ex2(-x), special.ex2(-cut))


def test_ex2_special_values():
    x = [0.0, -0.0, 1e-40, -1e-40, 2.0**-24, -(2.0**-24), 1, -1, 127, -126, 128, 1e38, np.inf]
    y = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2, 0.5, 2.0**127, 2.0**-126, np.inf, np.inf, np.inf]
    np.testing.assert_array_equal(special.ex2(np.array(x, np.float32)), np.array(y, np.float32))
    below = [np.nextafter(np.float32(-126), np.float32(-127)), -127, -149, -1e38, -np.inf]
    assert (special.ex2(np.array(below, np.float32)).view(np.int32) == 0).all()  # +0
    nan = np.array([0x7FC00000, 0xFFC00000, 0x7F800001], np.uint32).view(np.float32)
    assert (special.ex2(nan).view(np.int32) == 0x7FFFFFFF).all()


def test_ex2_error_is_below_1_5_ulp(mantissas):
    exact = (np.exp2(FRACTION / FRACTIONS) - 1) * FRACTIONS
    assert np.abs(mantissas - exact).max() < 1.5


def test_ex2_keeps_shapes():
    assert special.ex2(np.float32(3)) == 8 and np.shape(special.ex2(np.float32(3))) == ()
    assert special.ex2(np.zeros((2, 0, 3), np.float32)).shape == (2, 0, 3)
