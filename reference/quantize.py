"""Q, K and V to INT8, INT8 and E4M3 or FP16: sections 1 to 3 of docs/numerics.md.

Arrays are (..., seq_len, head_dim) with any leading dimensions, one (batch, head) each. Inputs are
FP16 or BF16; inside, the head dimension is padded with zeros to `plan.head_dim`. Keys are kept in
their natural order, cut into tiles of `plan.block_n` and padded with zeros: (..., n_tiles, block_n,
head_dim). `k_order` and `v_order` give the order in which the kernels store them (`layout.py`).

Section 2 is computed in FP16, `numpy.float16`, but that BF16 inputs are multiplied by their factors in FP32,
`numpy.float32`, before.
"""

from dataclasses import dataclass, replace

import numpy as np

from . import formats

INT8_MAX = np.float32(127)
SUM_CHUNKS, SUM_LANES, MIN_CHUNK_KEYS = 16, 16, 256
SAMPLED_FROM, SAMPLE_OF, SAMPLE = 1024, 512, 64  # 64 keys of every 512 stand for all keys
KEY_GROUPS = 4  # scales of K a tile: one for each thread of a quad
ROTATION = 16  # channels of Q and K that are rotated together
LOST_UNIT = np.float32(65536)
FP32_MAX = np.finfo(np.float32).max

FP16_MAX = np.float32(65504)
SMALL_AMAX = np.float32(2.0**-9)  # an `amax` below it, or one that overflowed: the numbers are scaled, and computed again

# FP16 inputs.
MIN_SPREAD = np.float32(2.0**-12)  # smaller spreads count as this,
MIN_RELATIVE_SPREAD = np.float32(2.0**-13)  # or as this part of the mean
SCALE_UP, SCALE_DOWN = np.float32(2.0**12), np.float32(2.0**-13)


@dataclass(frozen=True)
class Statistics:
    """Of one tensor, per channel (..., head_dim): FP32 extremes and sum over `count` keys."""

    minimum: np.ndarray
    maximum: np.ndarray
    total: np.ndarray
    count: int


@dataclass(frozen=True)
class Channels:
    """What quantisation needs to know of each channel, (..., head_dim): FP32, but for factors and addend of FP16 inputs.

    K's channels are multiplied by a factor that makes their spreads comparable, Q's by its reciprocal; both have the
    sign of the rotation.
    """

    k_mean: np.ndarray  #: what is subtracted from K
    k_factor: np.ndarray  #: float16 or float32, as the next two
    k_addend: np.ndarray  #: minus the mean, times the factor
    q_factor: np.ndarray
    v_mean: np.ndarray
    v_spread: np.ndarray


@dataclass(frozen=True)
class QuantizedQ:
    codes: np.ndarray  #: (..., seq_q, head_dim) int8
    scale: np.ndarray  #: (..., seq_q), softmax scale included
    mean_dot: np.ndarray  #: (..., seq_q): q . k_mean, for the LSE


@dataclass(frozen=True)
class QuantizedK:
    codes: np.ndarray  #: (..., n_tiles, block_n, head_dim) int8
    scale: np.ndarray  #: (..., n_tiles, 4), one for each quarter of the tile's keys
    scale_max: np.ndarray  #: (...)


@dataclass(frozen=True)
class QuantizedV:
    codes: np.ndarray  #: (..., n_tiles, block_n, head_dim), uint8 E4M3 codes or float16
    scale: np.ndarray  #: (..., head_dim)
    offset: np.ndarray  #: (..., n_tiles + 1, head_dim)

    def values(self):
        """The codes as float32."""
        return formats.from_e4m3(self.codes) if self.codes.dtype == np.uint8 else self.codes.astype(np.float32)


def k_order(plan):
    """Key (its place in the tile) of every column of K: key group t lands in thread t of a quad."""
    column = np.arange(plan.block_n)
    return column % 8 // 2 * (plan.block_n // KEY_GROUPS) + column // 8 * 2 + column % 2


def v_order(plan):
    """Key (its place in the tile) of every position of V along the products: P's fragment order."""
    if plan.v_dtype == "f16":
        return k_order(plan)
    position = np.arange(plan.block_n)
    return position % 16 // 4 * (plan.block_n // KEY_GROUPS) + position // 16 * 4 + position % 4


def channel_order(plan):
    """Channel of every column of P V. For `wgmma` a thread, which has columns 2t and 2t + 1 of every 8 (PTX
    ISA, "Register Fragments for wgmma.mma_async"), has 8 neighbouring channels of every 32.
    """
    column = np.arange(plan.head_dim)
    if plan.kernel == "mma":
        return column
    return column // 32 * 32 + column % 8 // 2 * 8 + column % 32 // 8 * 2 + column % 2


def padded(x, head_dim):
    """FP16 as it is, float32 of BF16; the last dimension padded with zeros to `head_dim`."""
    x = np.asarray(x)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, head_dim - x.shape[-1])]
    return np.pad(x if x.dtype == np.float16 else x.astype(np.float32), padding)


def widen(x, head_dim):
    """Float32 of FP16 or BF16, the last dimension padded with zeros to `head_dim`."""
    return padded(x, head_dim).astype(np.float32)


def finite(x):
    """K and V as everything below sees them: an element that is NaN or infinite counts as 0."""
    return np.where(np.isfinite(x), x, x.dtype.type(0))


def in_tiles(x, block_n):
    """(..., seq_kv, head_dim) -> (..., n_tiles, block_n, head_dim), padded with zeros."""
    *lead, seq_kv, head_dim = x.shape
    n_tiles = -(-seq_kv // block_n)
    padding = [(0, 0)] * len(lead) + [(0, n_tiles * block_n - seq_kv), (0, 0)]
    return np.pad(x, padding).reshape(*lead, n_tiles, block_n, head_dim)


# ---------------------------------------------------------------------------- 1. statistics


def chunks_of(x):
    """A sequence, (..., seq_kv, head_dim), in chunks: a list."""
    seq_kv = x.shape[-2]
    length = max(MIN_CHUNK_KEYS, SUM_LANES * -(-seq_kv // (SUM_CHUNKS * SUM_LANES)))
    return [x[..., begin:begin + length, :] for begin in range(0, seq_kv, length)]


def sample_of(x, plan):
    """The same; of a long sequence a sample, if the plan says so."""
    seq_kv = x.shape[-2]
    if not plan.sample or seq_kv < SAMPLED_FROM:
        return chunks_of(x)
    chunks = min(SUM_CHUNKS, seq_kv // SAMPLE_OF)
    distance = seq_kv // chunks
    length = distance // SAMPLE_OF * SAMPLE
    return [x[..., chunk * distance:chunk * distance + length, :] for chunk in range(chunks)]


def statistics(chunks):
    """Extremes and ordered sum over all chunks, finite float32 (..., keys, head_dim) each."""
    total = np.float32(0)
    with np.errstate(over="ignore", invalid="ignore"):
        for chunk in chunks:
            *lead, keys, head_dim = chunk.shape
            padding = [(0, 0)] * len(lead) + [(0, -keys % SUM_LANES), (0, 0)]
            lanes = np.pad(chunk, padding).reshape(*lead, -1, SUM_LANES, head_dim)
            partial = np.zeros((*lead, SUM_LANES, head_dim), np.float32)
            for step in range(lanes.shape[-3]):
                partial = partial + lanes[..., step, :, :]
            total = total + _add_halves(partial)
    return Statistics(np.min([chunk.min(axis=-2) for chunk in chunks], axis=0),
                      np.max([chunk.max(axis=-2) for chunk in chunks], axis=0),
                      total, sum(chunk.shape[-2] for chunk in chunks))


def _add_halves(x):
    """(..., n, head_dim) -> (..., head_dim): the second half is added to the first until one is left."""
    while (half := x.shape[-2] // 2) > 0:
        x = x[..., :half, :] + x[..., half:, :]
    return x[..., 0, :]


def channels_of(k, v, plan, smooth_k=True):
    """`Channels` of K and V (..., seq_kv, head_dim), FP16 or BF16."""
    wide_k, wide_v = (finite(widen(x, plan.head_dim)) for x in (k, v))
    k_mean, k_spread = _mean_and_spread(statistics(sample_of(wide_k, plan)), smooth_k)
    balance = _balance_fp16 if k.dtype == np.float16 else _balance_fp32
    return Channels(*balance(k_mean, k_spread), *_mean_and_spread(statistics(sample_of(wide_v, plan)), True))


def _balance_fp32(k_mean, k_spread):
    """`Channels.k_mean` to `q_factor`, of BF16 inputs."""
    signs = rotation_signs(k_mean.shape[-1])
    balance = np.sqrt(np.where(k_spread > 0, k_spread, np.float32(1)))
    k_factor = signs * (np.float32(1) / balance)
    return k_mean, k_factor, -(k_mean * k_factor), signs * balance


def _balance_fp16(k_mean, k_spread):
    """The same of FP16 inputs. The mean is the one that addend and factor, once they are rounded, stand for."""
    least = np.maximum(MIN_SPREAD, np.abs(k_mean) * MIN_RELATIVE_SPREAD)
    balance = np.sqrt(np.where(k_spread > 0, np.maximum(k_spread, least), np.float32(1)))
    k_factor = formats.to_fp16(rotation_signs(k_mean.shape[-1]) * (np.float32(1) / balance))
    factor = k_factor.astype(np.float32)
    k_addend = formats.to_fp16(-(k_mean * factor))
    return -k_addend.astype(np.float32) / factor, k_factor, k_addend, formats.to_fp16(np.float32(1) / factor)


def _mean_and_spread(x, subtract_mean):
    with np.errstate(over="ignore", invalid="ignore"):
        mean = x.total / np.float32(x.count) if subtract_mean else np.zeros_like(x.total)
        spread = np.maximum(x.maximum - mean, mean - x.minimum)
    overflowed = ~np.isfinite(spread)
    mean = np.where(overflowed, np.float32(0), mean)
    return mean, np.where(overflowed, np.maximum(x.maximum, -x.minimum), spread)


# ---------------------------------------------------------------------------- 2. Q and K


def rotation_signs(head_dim):
    """+1 or -1 a channel: the fixed signs in front of the Walsh-Hadamard transform."""
    h = np.arange(head_dim, dtype=np.uint32) * np.uint32(0x9E3779B1)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x85EBCA6B)
    return np.where(h >> np.uint32(31), np.float32(-1), np.float32(1))


def rotate(x):
    """Walsh-Hadamard butterflies within blocks of `ROTATION` channels, without the factor 1/4."""
    *lead, head_dim = x.shape
    h = 1
    with np.errstate(over="ignore", invalid="ignore"):
        while h < ROTATION:
            x = x.reshape(*lead, head_dim // (2 * h), 2, h)
            low, high = x[..., 0, :], x[..., 1, :]
            x = np.stack([low + high, low - high], axis=-2).reshape(*lead, head_dim)
            h *= 2
    return x


def _to_int8(x, axes, power_of):
    """INT8 codes of rotated numbers, and scales: one for all numbers along `axes`, which are kept with length 1.

    `x(power)`: the numbers, FP16, times a power of two (float32), an array that broadcasts against them; `power_of(amax)`:
    those powers. A scale is NaN where one of its numbers is not finite; the codes are 0 there.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        values = x(np.float32(1))
        amax = np.abs(values).max(axes, keepdims=True)
        power = power_of(amax)
        if (power != 1).any():
            values = x(power)
            amax = np.abs(values).max(axes, keepdims=True)
        is_finite, amax = np.isfinite(amax), amax.astype(np.float32)
        inverse = formats.to_fp16(np.fmin(INT8_MAX / amax, FP16_MAX)).astype(np.float32)
        scale = np.where(amax > 0, np.float32(1) / inverse, np.float32(0)) * (np.float32(1) / power)
        codes = np.where(is_finite, values, np.float16(0)) * np.where(is_finite, inverse, np.float32(0))  # exact
        return np.rint(codes).astype(np.int8), np.where(is_finite, scale, np.float32(np.nan))


def _power_of_amax(amax):
    """For `_to_int8`, of FP16 inputs."""
    small = (amax > 0) & (amax < SMALL_AMAX)
    return np.where(np.isfinite(amax), np.where(small, SCALE_UP, np.float32(1)), SCALE_DOWN)


def _power_of_largest(largest):
    """For `_to_int8`, of BF16 inputs: `largest` is the largest magnitude before it was rounded to FP16."""
    exponent = np.ascontiguousarray(largest).view(np.uint32) >> np.uint32(23)
    power = ((np.uint32(253) - np.minimum(exponent, np.uint32(252))) << np.uint32(23)).view(np.float32)
    return lambda amax: np.where(np.isfinite(amax) & (amax >= SMALL_AMAX), np.float32(1), power)


def _unrounded(x, axes):
    """The same of numbers in FP32, with codes that are not rounded."""
    amax = np.abs(x).max(axes, keepdims=True)
    inverse = np.where(amax > 0, INT8_MAX / np.where(amax > 0, amax, np.float32(1)), np.float32(0))
    return x * inverse, amax / INT8_MAX


def softmax_scale(sm_scale):
    """`sm_scale` for base 2, with the factor that the rotation left out."""
    return np.float32(sm_scale * np.log2(np.e) / ROTATION)


def quantize_q(q, channels, sm_scale, plan, rounded=True):
    """INT8 codes with one scale a row. `channels`: those of the KV head. Unrounded codes for `rounded=False`."""
    q, factor = padded(q, plan.head_dim), channels.q_factor[..., None, :]
    wide = q.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if not rounded:
            codes, scale = _unrounded(rotate(wide * factor), -1)
        elif q.dtype == np.float16:
            codes, scale = _to_int8(lambda power: rotate(q * power.astype(np.float16) * factor), -1, _power_of_amax)
        else:
            x = q * factor
            power_of = _power_of_largest(np.abs(x).max(axis=-1, keepdims=True))
            codes, scale = _to_int8(lambda power: rotate(formats.to_fp16(x * power)), -1, power_of)
        return QuantizedQ(codes, scale[..., 0] * softmax_scale(sm_scale), dot_with_mean(wide, channels.k_mean))


def dot_with_mean(q, k_mean):
    """q . k_mean: a chain for each block of `ROTATION` channels; the second half of them is added to the first, ..."""
    blocks = (*q.shape[:-1], -1, ROTATION)
    q, mean = q.reshape(blocks), np.broadcast_to(k_mean[..., None, :], q.shape).reshape(blocks)
    partial = np.zeros(q.shape[:-1], np.float32)
    for i in range(ROTATION):
        partial = formats.fma(q[..., i], mean[..., i], partial)
    return _add_halves(partial[..., None])[..., 0]


def quantize_k(k, channels, plan, rounded=True):
    """INT8 codes with one scale for every key group, a quarter of a tile. Unrounded codes for `rounded=False`."""
    k = finite(padded(k, plan.head_dim))
    seq_kv = k.shape[-2]
    groups = (*k.shape[:-2], -1, KEY_GROUPS, plan.block_n // KEY_GROUPS, plan.head_dim)
    k = in_tiles(k, plan.block_n).reshape(groups)
    exists = in_tiles(np.ones((seq_kv, 1), bool), plan.block_n).reshape(-1, *groups[-3:-1], 1)
    factor, addend = (x[..., None, None, None, :] for x in (channels.k_factor, channels.k_addend))
    axes = (-2, -1)

    def of_existing(x):
        return rotate(np.where(exists, x, x.dtype.type(0)))

    def scaled(power):
        down, up = (limit(power, np.float32(1)).astype(np.float16) for limit in (np.minimum, np.maximum))
        return of_existing(formats.fma16(k * down, factor, addend * down) * up)

    if rounded and k.dtype == np.float16:
        codes, scale = _to_int8(scaled, axes, _power_of_amax)
    else:
        x = formats.fma(*(y.astype(np.float32) for y in (k, factor, addend)))
        if not rounded:
            codes, scale = _unrounded(of_existing(x), axes)
        else:
            power_of = _power_of_largest(np.where(exists, np.abs(x), np.float32(0)).max(axes, keepdims=True))
            with np.errstate(over="ignore", invalid="ignore"):
                codes, scale = _to_int8(lambda power: of_existing(formats.to_fp16(x * power)), axes, power_of)
    codes, scale = codes.reshape(*codes.shape[:-3], plan.block_n, plan.head_dim), scale[..., 0, 0]
    return QuantizedK(codes, scale, np.fmax.reduce(scale, axis=(-2, -1), initial=0))  # of those that are not NaN


# ---------------------------------------------------------------------------- 3. V


def quantize_v(v, channels, plan, rounded=True):
    """E4M3 or FP16 codes with one scale a channel, and what the epilogue adds to the output."""
    special = ~np.isfinite(v.astype(np.float32)).all(axis=(-2, -1))
    v = finite(widen(v, plan.head_dim))
    mean, spread = channels.v_mean, channels.v_spread
    y, quantized = _with_scale(v, mean, spread, plan, rounded)
    if rounded and plan.sample and v.shape[-2] >= SAMPLED_FROM:
        again = (special | exceeds(quantized.values(), plan))[..., None]
        if again.any():
            of_all = _mean_and_spread(statistics(chunks_of(v)), True)
            mean, spread = (np.where(again, *x) for x in zip(of_all, (mean, spread)))
            y, quantized = _with_scale(v, mean, spread, plan, rounded)
    return replace(quantized, offset=v_offset(y, quantized, mean, v.shape[-2], plan))


def _with_scale(v, mean, spread, plan, rounded):
    """V in units of its scale, in tiles, before and after rounding to codes."""
    v_max = np.float32(plan.v_max)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        inverse = np.fmin(v_max / spread, FP32_MAX)  # the maximum where the spread is 0
        y = in_tiles((v - mean[..., None, :]) * inverse[..., None, :], plan.block_n)
    codes = y if not rounded else formats.to_fp16(y) if plan.v_dtype == "f16" else formats.to_e4m3(y)
    return y, QuantizedV(codes, spread / v_max, None)


def exceeds(values, plan):
    """(...): whether the magnitudes of a tile's codes add up to more than `v_max` a key, in any channel."""
    return (np.abs(values).sum(axis=-2) > plan.block_n * plan.v_max).any(axis=(-2, -1))


def v_offset(y, quantized, v_mean, seq_kv, plan):
    """Mean of V, plus the mean of what its codes lost, over the first n tiles, for every n."""
    n_tiles = y.shape[-3]
    offset = np.repeat(v_mean[..., None, :], n_tiles + 1, axis=-2)
    if quantized.codes.dtype != np.uint8:
        return offset
    lost = formats.to_int_rn((y - quantized.values()) * LOST_UNIT)
    lost = np.cumsum(lost.sum(axis=-2, dtype=np.int32), axis=-2, dtype=np.int32)
    keys = np.minimum(np.arange(1, n_tiles + 1) * plan.block_n, seq_kv).astype(np.float32)
    share = quantized.scale[..., None, :] * (np.float32(1) / (LOST_UNIT * keys[:, None]))
    offset[..., 1:, :] = formats.fma(share, lost.astype(np.float32), v_mean[..., None, :])
    return offset
