"""Quantised tensors as the kernels store them: bytes in device order, for tests of the quantiser.

Arrays here have one leading dimension, the flattened (batch, head).
"""

import numpy as np

from . import formats
from .quantize import channel_order, in_tiles, k_order, v_order

CHUNK_BYTES = 16
WGMMA_ROW_SUM_ROWS = 8


def device_q_codes(q, plan):
    """`QuantizedQ` -> int8 (heads, n_qtiles, panels, block_m, panel bytes), swizzled; absent rows are 0."""
    return _swizzled_panels(in_tiles(q.codes, plan.block_m))


def device_k_codes(k, plan):
    """`QuantizedK` -> int8 (heads, n_tiles, panels, block_n, panel bytes), columns in order, swizzled."""
    return _swizzled_panels(k.codes[..., k_order(plan), :])


def device_v_codes(v, plan):
    """`QuantizedV` -> uint8 (heads, n_tiles, chunks, channels and row-sum rows, 16): V transposed.

    A chunk holds consecutive positions of one channel: 16 of E4M3, 8 of FP16.
    """
    codes = v.codes[..., v_order(plan), :][..., channel_order(plan)]
    if plan.kernel == "wgmma":
        unit = formats.to_e4m3(np.float32(plan.row_sum_unit))
        unit = np.full((*codes.shape[:-1], WGMMA_ROW_SUM_ROWS), unit, codes.dtype)
        codes = np.concatenate([codes, unit], axis=-1)
    *lead, positions, channels = codes.shape
    per_chunk = CHUNK_BYTES // codes.itemsize
    chunks = codes.reshape(*lead, positions // per_chunk, per_chunk, channels)
    return np.ascontiguousarray(np.swapaxes(chunks, -1, -2)).view(np.uint8)


def _swizzled_panels(codes):
    """(heads, tiles, rows, head_dim) -> (heads, tiles, panels, rows, W), chunks permuted within rows.

    W is 128 or 64 bytes. These are the shared-memory swizzles of that width (PTX ISA, "Asynchronous
    Warpgroup Level Matrix Instructions: matrix-descriptor"), which also suit `ldmatrix`.
    """
    heads, tiles, rows, head_dim = codes.shape
    width = min(head_dim, 128)
    chunks = codes.reshape(heads, tiles, rows, head_dim // width, width // CHUNK_BYTES, CHUNK_BYTES)
    row = np.arange(rows)[:, None]
    source = np.arange(width // CHUNK_BYTES) ^ (row & 7 if width == 128 else (row >> 1) & 3)
    chunks = np.moveaxis(chunks, 3, 2)[..., row, source, :]
    return np.ascontiguousarray(chunks).reshape(heads, tiles, head_dim // width, rows, width)
