"""Number formats and rounded FP32 and FP16 operations, as the CUDA kernels compute them.

Everything takes and returns arrays (or scalars) that NumPy broadcasts; FP32 is `numpy.float32`, FP16 `numpy.float16`.
Plain ``+``, ``-`` and ``*`` on `numpy.float32` already are `__fadd_rn`, `__fsub_rn` and `__fmul_rn`:
IEEE 754, round to nearest even, subnormals kept; on `numpy.float16`, `add.rn.f16` and so on: NumPy rounds the FP32
result, whose 24 bits are enough for the same (2 * 11 + 2). This module adds what NumPy lacks.

No operation here flushes subnormals. Which NaN an FP32 operation returns is not specified.

Sources: PTX ISA, "Floating Point Instructions" (`fma`, `mul`, `add`) and "Data Movement and
Conversion Instructions: cvt"; OCP 8-bit Floating Point Specification (OFP8) for E4M3; round to odd:
Boldo and Melquiond, "Emulation of FMA and correctly rounded sums" (IEEE Trans. Computers, 2008).
"""

import numpy as np
from ml_dtypes import bfloat16

FP32_MIN_NORMAL = np.float32(2.0**-126)
E4M3_NAN = 0x7F
FP16_NAN = 0x7FFF
BF16_NAN = 0x7FFF
FP32_NAN = 0x7FFFFFFF


def _float32(x):
    return np.asarray(x, dtype=np.float32)


def _add_to_odd(a, b):
    """a + b of float64 arrays, rounded to odd: a later rounding to FP32 or FP16 is as if from the exact sum."""
    s = a + b
    bb = s - a
    error = (a - (s - bb)) + (b - bb)  # TwoSum (Knuth): s + error == a + b exactly
    bits = s.view(np.int64)
    inexact_and_even = np.isfinite(s) & (error != 0) & (bits & 1 == 0)
    towards_exact = np.where((error > 0) == (s > 0), 1, -1)
    return np.where(inexact_and_even, bits + towards_exact, bits).view(np.float64)


def _exact(*operands):
    """The operands, FP16 or FP32, in float64, broadcast against each other, at least one-dimensional."""
    return np.broadcast_arrays(*(np.atleast_1d(_float32(x)).astype(np.float64) for x in operands))


def _shaped(result, *operands):
    return result.reshape(np.broadcast_shapes(*(np.shape(x) for x in operands)))[()]


def fma(a, b, c):
    """FP32 ``a * b + c`` with one rounding, to nearest even (`__fmaf_rn`).

    The product of two FP32 numbers is exact in float64. The float64 sum, rounded to nearest, then
    rounds to the right FP32 number unless it is midway between two of them (which the exact sum
    perhaps is not): there, the float64 sum is rounded to odd instead.
    """
    with np.errstate(all="ignore"):
        a64, b64, c64 = _exact(a, b, c)
        product = a64 * b64
        total = product + c64
        midway = total.view(np.int64) & 0x1FFFFFFF == 0x10000000
        subnormal = np.abs(total) < FP32_MIN_NORMAL
        if subnormal.any():
            steps = total * 2.0**149
            midway |= subnormal & (steps - np.floor(steps) == 0.5)
        midway = np.nonzero(midway)
        total[midway] = _add_to_odd(product[midway], c64[midway])
        result = total.astype(np.float32)
    return _shaped(result, a, b, c)


def fma16(a, b, c):
    """FP16 ``a * b + c`` with one rounding, to nearest even (`fma.rn.f16`).

    The product of two FP16 numbers is exact in float64, and but for terms of very different size so is the sum.
    """
    with np.errstate(all="ignore"):
        a64, b64, c64 = _exact(a, b, c)
        product = a64 * b64
        total = product + c64
        inexact = np.nonzero(total - c64 != product)
        total[inexact] = _add_to_odd(product[inexact], c64[inexact])
        result = total.astype(np.float16)
    return _shaped(result, a, b, c)


def mul_ru(a, b):
    """FP32 ``a * b`` rounded towards +infinity (`__fmul_ru`)."""
    with np.errstate(all="ignore"):
        exact = np.multiply(*_exact(a, b))
        nearest = exact.astype(np.float32)
        result = np.where(nearest < exact, np.nextafter(nearest, np.float32(np.inf)), nearest)
    return _shaped(result, a, b)


def add_rd(a, b):
    """FP32 ``a + b`` rounded towards -infinity (`__fadd_rd`); an exact zero is -0 unless both are +0."""
    with np.errstate(all="ignore"):
        a64, b64 = _exact(a, b)
        exact = _add_to_odd(a64, b64)
        nearest = exact.astype(np.float32)
        result = np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)
        negative_zero = (exact == 0) & (np.signbit(a64) | np.signbit(b64))
        result = np.where(negative_zero, np.float32(-0.0), result)
    return _shaped(result, a, b)


def div(a, b):
    """FP32 ``a / b`` rounded to nearest even (`__fdiv_rn`)."""
    with np.errstate(all="ignore"):
        return np.divide(_float32(a), _float32(b))


def to_e4m3(x):
    """FP32 -> E4M3 codes (uint8), as `cvt.rn.satfinite.e4m3x2.f32`.

    Nearest even; beyond 448, infinities included, becomes +-448; NaN of either sign becomes 0x7F.
    """
    x = _float32(x)
    magnitude = np.abs(x)
    bits = magnitude.view(np.int32)
    # Normal: drop 20 of the 23 mantissa bits, and move the exponent's bias from 127 to 7.
    normal = ((bits + (0x7FFFF + ((bits >> 20) & 1))) >> 20) - ((127 - 7) << 3)
    # Subnormal (below 2**-6): adding 2**14, whose ulp is E4M3's smallest step 2**-9, rounds.
    shifter = np.float32(2.0**14)
    with np.errstate(invalid="ignore"):
        subnormal = (magnitude + shifter).view(np.int32) - shifter.view(np.int32)
    code = np.where(bits < 0x3C800000, subnormal, np.minimum(normal, 0x7E))
    code |= (x.view(np.int32) >> 24) & 0x80
    return np.where(bits > 0x7F800000, E4M3_NAN, code).astype(np.uint8)[()]


def _e4m3_values():
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa, mantissa + 8) * 2.0 ** (np.maximum(exponent, 1) - 10)
    magnitude[(code & 0x7F) == E4M3_NAN] = np.nan
    return np.where(code & 0x80, -magnitude, magnitude).astype(np.float32)


E4M3_VALUES = _e4m3_values()


def from_e4m3(code):
    """E4M3 codes (uint8) -> FP32, exactly."""
    return E4M3_VALUES[np.asarray(code, dtype=np.uint8)]


def to_fp16(x):
    """FP32 or float64 -> FP16 (numpy.float16), as `cvt.rn.f16.f32`: nearest even, overflow to infinity.

    Every NaN becomes 0x7FFF. Widening back with ``.astype(numpy.float32)`` is exact.
    """
    x = np.asarray(x)
    with np.errstate(over="ignore", invalid="ignore"):
        code = x.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), np.uint16(FP16_NAN), code).view(np.float16)[()]


def to_bf16(x):
    """FP32 -> BF16 (ml_dtypes.bfloat16), as `cvt.rn.bf16.f32`: nearest even, every NaN becomes 0x7FFF.

    Widening back with ``.astype(numpy.float32)`` is exact.
    """
    x = _float32(x)
    bits = x.view(np.uint32)
    code = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), BF16_NAN, code).astype(np.uint16).view(bfloat16)[()]


def to_int_rn(x):
    """FP32 -> INT32, as `cvt.rni.s32.f32`: nearest even, saturating, NaN to 0."""
    nearest = np.clip(np.rint(_float32(x).astype(np.float64)), -(2.0**31), 2.0**31 - 1)
    return np.where(np.isnan(nearest), 0, nearest).astype(np.int32)[()]


# log2(1 + f) / f on [sqrt(1/2) - 1, sqrt(2) - 1], lowest degree first: minimax in relative error
# (1.4e-8), each coefficient rounded to FP32 before the next ones were fitted.
LOG2_COEFFICIENTS = tuple(
    np.float32(float.fromhex(h))
    for h in (
        "0x1.715476p+0", "-0x1.715476p-1", "0x1.ec7208p-2", "-0x1.7156c8p-2", "0x1.273996p-2",
        "-0x1.eb171ep-3", "0x1.abb9a4p-3", "-0x1.8bd97cp-3", "0x1.4ee6a6p-3", "-0x1.479160p-4",
    )
)  # fmt: skip
SQRT_HALF_BITS = 0x3F3504F3


def log2(x):
    """Base-2 logarithm of positive, normal, finite FP32 by integer and `fma` steps alone.

    Twin of `log2_rn` in `kernels_src/log2.cuh`, step by step, so a GPU returns the same bits. Over
    all such inputs the error is below 1.7 ulp of the result; powers of two are exact. Zero,
    subnormals, negative numbers, infinity and NaN give a number without meaning.
    """
    bits = _float32(x).view(np.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23  # so that the mantissa is in [sqrt(1/2), sqrt(2))
    f = (bits - (exponent << 23)).view(np.float32) - np.float32(1)  # exact
    p = LOG2_COEFFICIENTS[-1]
    for coefficient in LOG2_COEFFICIENTS[-2::-1]:
        p = fma(p, f, coefficient)
    return fma(f, p, exponent.astype(np.float32))
