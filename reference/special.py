"""What the special-function unit returns, bit for bit, for the instructions that the kernels issue.

Sources: PTX ISA, "Floating Point Instructions: ex2"; Oberman and Siu, "A high-performance
area-efficient multifunction interpolator" (IEEE ARITH-17, 2005) for the structure: a table of
quadratics whose square is computed by a multiplier with its low columns left out.
"""

import numpy as np

from . import formats
from .ex2_table import EX2_COEFFICIENTS

FRACTION_BITS = 23  # of the argument, cut in fixed point, and of the result
LOW_BITS = 17  # of the fraction, below the 6 that choose the row of the table
SQUARE_COLUMNS_DROPPED = 19
# The sum is kept in units of 2**-38; this is what the unit adds before it cuts the sum to 23 bits.
SUM_BITS = 38
ROUNDING = 6114


def _truncated_squares():
    """Squares of every low part, as the unit's multiplier computes them, in units of 2**19.

    x**2 is the sum of bit i at column 2 i and bits i < j at column i + j + 1; the columns below 19
    are never added, nor are their carries.
    """
    x = np.arange(1 << LOW_BITS, dtype=np.int64)
    total = np.zeros_like(x)
    for i in range(LOW_BITS):
        row = (x >> (i + 1) << (2 * i + 2)) | (1 << (2 * i))
        total += np.where((x >> i) & 1, row >> SQUARE_COLUMNS_DROPPED, 0)
    return total


SQUARES = _truncated_squares()
C0, C1, C2 = (EX2_COEFFICIENTS << (SUM_BITS - 25, 0, 0)).T.copy()
C0 += ROUNDING


def ex2(x):
    """2**x as `ex2.approx.ftz.f32` computes it, for every FP32 input, special values included.

    A subnormal input counts as zero, a result below 2**-126 is +0, from 128 on it is infinity, and
    NaN gives 0x7FFFFFFF.
    """
    x = np.asarray(x, dtype=np.float32)
    # 2**23 |x| as an integer cuts what is below 2**-23; beyond +-160 all results are 0 or infinity.
    with np.errstate(invalid="ignore"):
        magnitude = np.minimum(np.abs(x), np.float32(160)) * np.float32(1 << FRACTION_BITS)
        magnitude = np.where(np.isnan(x), 0, magnitude).astype(np.int32)
    # A negative argument: the ones' complement of the fraction, and one less in front of it.
    fraction_mask = (1 << FRACTION_BITS) - 1
    complement = (x < 0) & (magnitude & fraction_mask != 0)
    whole = magnitude >> FRACTION_BITS
    whole = np.where(x < 0, -whole, whole) - complement
    fraction = np.where(complement, ~magnitude, magnitude) & fraction_mask

    row, low = fraction >> LOW_BITS, fraction & ((1 << LOW_BITS) - 1)
    total = C0[row] + C1[row] * low + C2[row] * SQUARES[low]
    mantissa = (total >> (SUM_BITS - FRACTION_BITS)).astype(np.int32) & fraction_mask

    exponent = np.clip(whole, -127, 128) + 127
    bits = (exponent << 23) | np.where((exponent == 0) | (exponent == 255), 0, mantissa)
    bits = np.where(np.isnan(x), formats.FP32_NAN, bits)
    return bits.astype(np.int32).view(np.float32)[()]
