"""What a tensor core returns, bit for bit, for the MMA instructions that the kernels issue and their kin.

One instruction adds `terms` products and the accumulator C in a single fused sum:

1. every product is exact, and its exponent is the sum of its factors' exponents, not renormalised
   (so its significand is in [1, 4)); a subnormal factor has the exponent of the smallest normal;
2. the largest exponent E among the products and C is found; zeros do not take part;
3. every product and C lose (truncation towards zero) what lies below ``2**(E - fraction_bits)``;
4. the sum of what is left is exact, and is rounded once, to the accumulator's format; a zero is +0,
   also where the sum was below it.

Infinities and NaN follow IEEE 754 (``inf * 0`` and ``inf - inf`` are NaN). `docs/hardware.md` says
which row of the table was validated on which GPU.

Sources: PTX ISA, "Warp Level Matrix Instructions: mma" and "Asynchronous Warpgroup Level Matrix
Instructions: wgmma"; Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores"
(PeerJ Computer Science, 2021); Khattak and Mikaitis, "Accurate models of NVIDIA tensor cores" (2025).
"""

from dataclasses import dataclass

import numpy as np

from . import formats

# ---------------------------------------------------------------------------- the table

# Exponent of the smallest normal number, which subnormal numbers share.
MIN_EXPONENT = {"e4m3": -6, "f16": -14, "f32": -126}


@dataclass(frozen=True)
class Behaviour:
    """How one instruction adds. `terms` and `fraction_bits`: see the module's docstring.

    result_bits: fraction bits that an FP32 accumulator keeps, the rest truncated (23, or 13 on the
        8-bit multipliers of Ada and Hopper); FP16 accumulators round to nearest even.
    multiplier: format in which the factors are multiplied: where E4M3 is converted to FP16 first,
        E4M3's subnormals are normal.
    split: the instruction is not native: the compiler makes two FP16 instructions of it. Of every 32
        keys, the first adds those with ``k % 4`` in {0, 1} to zero, the second adds the others to
        that; then C is added by an ordinary addition in the accumulator's format (HADD2, FADD).
    """

    terms: int
    fraction_bits: int
    accumulator: str
    multiplier: str
    result_bits: int = 23
    split: bool = False


def _rows(archs, instructions, operand, **rule):
    rule = {"multiplier": operand, **rule}
    result_bits = rule.pop("result_bits", 23)
    for arch in archs.split():
        for instruction in instructions.split():
            yield (arch, instruction, operand, "f16"), Behaviour(accumulator="f16", **rule)
            yield (
                (arch, instruction, operand, "f32"),
                Behaviour(accumulator="f32", result_bits=result_bits, **rule),
            )


# (architecture, instruction, operand format, accumulator format) -> how it adds.
BEHAVIOURS = {
    **dict(_rows("sm_80 sm_86 sm_89", "mma.sync", "f16", terms=8, fraction_bits=24)),
    **dict(_rows("sm_90", "mma.sync wgmma", "f16", terms=16, fraction_bits=25)),
    **dict(_rows("sm_100 sm_120", "mma.sync", "f16", terms=16, fraction_bits=25)),
    **dict(_rows("sm_89", "mma.sync", "e4m3", terms=16, fraction_bits=13, result_bits=13)),
    **dict(_rows("sm_90", "wgmma", "e4m3", terms=32, fraction_bits=13, result_bits=13)),
    **dict(
        _rows(
            "sm_90 sm_100", "mma.sync", "e4m3",
            terms=16, fraction_bits=25, multiplier="f16", split=True,
        )
    ),
    **dict(_rows("sm_120", "mma.sync", "e4m3", terms=32, fraction_bits=25)),
}  # fmt: skip


def behaviour(arch, instruction, operand, accumulator):
    """The row of `BEHAVIOURS` for an architecture such as "sm_90" or "sm_90a".

    Raises KeyError, naming the rows there are, for a combination that no kernel uses.
    """
    key = (arch.rstrip("af"), instruction, operand, accumulator)
    if key not in BEHAVIOURS:
        known = "\n  ".join(map(str, BEHAVIOURS))
        raise KeyError(f"no known tensor-core behaviour {key}; known are\n  {known}")
    return BEHAVIOURS[key]


# ---------------------------------------------------------------------------- the products

KEYS_PER_SPLIT = 32
SPLIT_ORDER = [k for k in range(32) if k % 4 < 2] + [k for k in range(32) if k % 4 >= 2]

# Elements of one block of products: what is computed of a block stays in the L2 cache.
BLOCK_ELEMENTS = 1 << 17

# Exponent of a zero factor. A product with one is then below all others, and INT8 holds it.
ZERO_FACTOR = -60
NO_EXPONENT = -1000


def mma(a, b, c, rule):
    """``a @ b + c`` as a chain of tensor-core instructions along K.

    a: (..., M, K) and b: (..., K, N), float32 holding exact E4M3 or FP16 values, leading dimensions
        broadcast; c: (..., M, N) or anything that broadcasts to it, float32 holding exact values of
        the accumulator's format.
    rule: a `Behaviour`, or the arguments of `behaviour` as a tuple.

    K is a multiple of what one instruction fuses (32 where it splits). Each instruction's result is
    the C of the next. Returns float32 (..., M, N) with exact values of the accumulator's format;
    every NaN is 0x7FFFFFFF, which `formats.to_fp16` narrows to the 0x7FFF of the hardware.
    """
    rule = rule if isinstance(rule, Behaviour) else behaviour(*rule)
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    (m, k), (k_b, n) = a.shape[-2:], b.shape[-2:]
    step = KEYS_PER_SPLIT if rule.split else rule.terms
    if k != k_b or k % step:
        raise ValueError(f"a is {a.shape} and b is {b.shape}: K must agree and be a multiple of {step}")

    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2], np.shape(c)[:-2])
    out = np.empty((*batch, m, n), np.float32)
    out[...] = c
    d = out.reshape(-1, m, n)
    left = _Factor(np.broadcast_to(a, (*batch, m, k)).reshape(-1, m, k), rule.multiplier, "bmk->kbm")
    right = _Factor(np.broadcast_to(b, (*batch, k, n)).reshape(-1, k, n), rule.multiplier, "bkn->kbn")

    rows = max(1, min(m, BLOCK_ELEMENTS // (rule.terms * n)))
    batches = max(1, BLOCK_ELEMENTS // (rule.terms * rows * n)) if rows == m else 1
    with np.errstate(over="ignore", invalid="ignore"):
        for i in range(0, d.shape[0], batches):
            for j in range(0, m, rows):
                block = (slice(i, i + batches), slice(j, j + rows))
                d[block] = _chain(left.rows(*block), right.columns(block[0]), d[block], rule)
    out[np.isnan(out)] = np.uint32(formats.FP32_NAN).view(np.float32)
    return out


class _Factor:
    """One operand with K leading: its finite values, their exponents, and the values that are not."""

    def __init__(self, values, multiplier, layout):
        values = np.ascontiguousarray(np.einsum(layout, values))
        finite = np.isfinite(values)
        self.special = None if finite.all() else values
        self.values = values if finite.all() else np.where(finite, values, np.float32(0))
        self.exponents = _exponent(self.values, MIN_EXPONENT[multiplier], ZERO_FACTOR).astype(np.int8)

    def _map(self, function):
        view = object.__new__(_Factor)
        view.special = None if self.special is None else function(self.special)
        view.values, view.exponents = function(self.values), function(self.exponents)
        return view

    def rows(self, batches, rows):
        return self._map(lambda x: x[:, batches, rows, None])

    def columns(self, batches):
        return self._map(lambda x: x[:, batches, None, :])

    def keys(self, keys):
        return self._map(lambda x: x[keys])


def _exponent(x, min_exponent, of_zero):
    """floor(log2(|x|)) of float32, at least `min_exponent`; `of_zero` for zeros."""
    exponent = ((x.view(np.int32) >> 23) & 0xFF) - 127
    return np.where(x == 0, of_zero, np.maximum(exponent, min_exponent))


def _power_of_two(exponent):
    """2.0**exponent in float64, for int arrays within its normal range."""
    return ((exponent.astype(np.int64) + 1023) << 52).view(np.float64)


# ---------------------------------------------------------------------------- the sums


def _chain(a, b, c, rule):
    k = a.values.shape[0]
    if not rule.split:
        for first in range(0, k, rule.terms):
            keys = slice(first, first + rule.terms)
            c = _fused_sum(a.keys(keys), b.keys(keys), c, rule)
        return c
    for first in range(0, k, KEYS_PER_SPLIT):
        order = first + np.array(SPLIT_ORDER)
        partial = np.zeros_like(c)
        for keys in np.split(order, KEYS_PER_SPLIT // rule.terms):
            partial = _fused_sum(a.keys(keys), b.keys(keys), partial, rule)
        c = _round(c.astype(np.float64) + partial, rule.accumulator)
    return c


def _fused_sum(a, b, c, rule):
    """One fused sum: a.values (terms, batch, M, 1), b.values (terms, batch, 1, N), c (batch, M, N)."""
    finite_c = np.where(np.isfinite(c), c, np.float32(0))
    largest = (a.exponents + b.exponents).max(axis=0).astype(np.int32)
    largest[largest < 2 * MIN_EXPONENT[rule.multiplier]] = NO_EXPONENT
    largest = np.maximum(largest, _exponent(finite_c, MIN_EXPONENT[rule.accumulator], NO_EXPONENT))
    unit = np.maximum(largest, MIN_EXPONENT["f32"]) - rule.fraction_bits  # exponent of what is kept

    # FP32 scaling by a power of two is exact here, or falls below 1 and is truncated anyway.
    scale = _power_of_two(-np.maximum(unit, -100)).astype(np.float32)
    kept = a.values * b.values
    kept *= scale
    total = _sum_of_truncated(kept) + np.trunc(finite_c * _power_of_two(-unit))
    total *= _power_of_two(unit)
    if rule.accumulator == "f32":
        total = _truncate(total, rule.result_bits)
    result = _round(total, rule.accumulator) + np.float32(0)  # what rounds to -0 is +0
    return _with_specials(result, a, b, c)


# Significands are below 4, so this many terms of `fraction_bits` <= 25 cannot overflow INT32.
TERMS_PER_INT32 = 16


def _sum_of_truncated(x):
    """Sum over axis 0 of float32 values truncated to integers, exactly, as float64."""
    integers = x.astype(np.int32)
    parts = [
        np.add.reduce(integers[i : i + TERMS_PER_INT32], axis=0, dtype=np.int32)
        for i in range(0, len(integers), TERMS_PER_INT32)
    ]
    return sum(part.astype(np.float64) for part in parts)


def _truncate(x, fraction_bits):
    """float64 cut to `fraction_bits` below its leading bit, as FP32 with that many would hold it."""
    exponent = ((x.view(np.int64) >> 52) & 0x7FF) - 1023
    unit = np.maximum(exponent, MIN_EXPONENT["f32"]) - fraction_bits
    return np.trunc(x * _power_of_two(-unit)) * _power_of_two(unit)


def _round(x, accumulator):
    """float64 to the accumulator's format, nearest even, as float32."""
    rounded = x.astype(np.float16) if accumulator == "f16" else x
    return rounded.astype(np.float32)


def _with_specials(result, a, b, c):
    """IEEE 754's infinities and NaN, where a factor or C is one, in place of the finite sum."""
    value = c
    if a.special is not None or b.special is not None:
        a, b = (x.values if x.special is None else x.special for x in (a, b))
        value = (a * b).sum(axis=0, dtype=np.float64) + c
    return np.where(np.isfinite(value), result, value.astype(np.float32))


# ---------------------------------------------------------------------------- integers


def int8_dot(a, b):
    """The exact INT32 product of INT8 matrices: (..., M, K) @ (..., K, N), K at most 1024.

    |a b| <= 2**14, so 1024 terms stay exact in float32, whatever order BLAS adds them in.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape[-1] > 1024:
        raise ValueError(f"K is {a.shape[-1]}: at most 1024 products are exact in float32")
    return np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(np.int32)
