"""Comparing arrays bit by bit, with a failure that can be worked with."""

import numpy as np


def assert_same_bits(actual, expected, plan=None, note=""):
    """Assert that two NumPy arrays of one dtype and shape hold the same bits.

    All NaNs count as one value; +0 and -0 are different. A failure names the first coordinate that
    differs, both values (as floats and in hex), how many differ, the plan and the note.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}; {note}"
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}; {note}"
    differs = (bits_of(actual) != bits_of(expected)) & ~(is_nan(actual) & is_nan(expected))
    if not differs.any():
        return
    first = tuple(int(i) for i in np.argwhere(differs)[0])
    lines = [f"{np.count_nonzero(differs)} of {differs.size} values differ, the first at {first}",
             f"  actual    {_describe(actual[first])}",
             f"  expected  {_describe(expected[first])}"]
    lines += [f"  plan      {plan}"] if plan is not None else []
    lines += [f"  note      {note}"] if note else []
    raise AssertionError("\n".join(lines))


def bits_of(array):
    """The values of an array as unsigned integers of the same size."""
    array = np.ascontiguousarray(array)
    return array.view(f"u{array.dtype.itemsize}")


def is_nan(array):
    """Elementwise; False for integers."""
    return array != array


def _describe(value):
    digits = 2 * value.dtype.itemsize
    bits = int(bits_of(value).reshape(-1)[0])
    return f"{float(value)!r} (0x{bits:0{digits}x})"
