"""The comparison that the bit-exact tests stand on."""

import ml_dtypes
import numpy as np
import pytest

from bits import assert_same_bits


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, ml_dtypes.float8_e4m3fn, np.int8])
def test_equal_arrays_pass(dtype):
    x = np.arange(12).astype(dtype).reshape(3, 4)
    assert_same_bits(x, x.copy())
    assert_same_bits(x.T, x.T.copy())


def test_all_nans_are_one_value():
    nans = np.array([0x7FC00000, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert_same_bits(nans, nans[::-1])


def test_a_failure_names_coordinate_values_count_plan_and_note():
    x = np.zeros((2, 3), np.float16)
    y = x.copy()
    y[1, 0], y[1, 2] = -0.0, 1
    with pytest.raises(AssertionError) as failure:
        assert_same_bits(y, x, plan="a plan", note="a note")
    assert str(failure.value) == (
        "2 of 6 values differ, the first at (1, 0)\n"
        "  actual    -0.0 (0x8000)\n  expected  0.0 (0x0000)\n  plan      a plan\n  note      a note")


def test_dtype_and_shape_are_compared():
    with pytest.raises(AssertionError, match="dtype float16, expected float32"):
        assert_same_bits(np.zeros(2, np.float16), np.zeros(2, np.float32))
    with pytest.raises(AssertionError, match=r"shape \(2,\), expected \(3,\)"):
        assert_same_bits(np.zeros(2), np.zeros(3))
