"""The GPU side of `attention`: two launches on the current stream, in one workspace.

``quantize`` (`kernels_src/quantize.cu`) and ``attention`` (`kernels_src/attention_*.cu`), which on Hopper starts
while the last CTAs of the other are running. Nothing is checked here (`api.py` has done it) and nothing synchronises.

What the kernels count is 0 before a call, and again after it: ``attention`` clears the counters of ``quantize``, and
its own. So a stream keeps them from call to call.

The host must not be slower than the GPU, so what depends on the shapes is worked out once: a `Launch`
holds kernels, grids and one array of all kernel arguments, which every launch points into. A call then
writes a handful of addresses and calls the driver twice, without CuPy's argument conversion.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
import threading
import weakref
from dataclasses import dataclass
from typing import Iterator

import ml_dtypes
import numpy as np

from . import driver, jit
from .plan import Plan, head_dims, kernels, make_plan

# As in `kernels_src/quantize.cu` and `statistics.cuh`.
SUM_CHUNKS = 16  #: partial sums of K and V a head, at most (docs/numerics.md, section 1)
KEY_GROUPS = 4  #: scales of K a tile
ROTATION = 16  #: channels of Q and K that are rotated together
MAX_GRID_YZ = 65535  #: of CUDA, CTAs along y and z
QUANTIZE_WARPS = 4  #: of a CTA of `quantize`

#: Kernel -> its parameters, in order. Arrays have the names of `_counters` and `_workspace`.
_PARAMETERS = {
    "quantize": """q k v q_stride_b q_stride_h q_stride_s k_stride_b k_stride_h k_stride_s v_stride_b
        v_stride_h v_stride_s progress chunks k_mean k_factor k_addend q_factor v_mean v_inverse v_scale
        q_codes q_scale largest_q_scales q_mean_dot k_codes k_scale k_scale_max v_codes lost v_offset num_heads_q
        num_heads_kv group seq_q seq_kv head_dim softmax_scale heads_kv lead cta_tiles kv_tile_ctas q_head_ctas
        by_statistics_ctas by_code_ctas by_round_ctas by_q_head_ctas by_num_heads_kv by_num_heads_q by_group""",
    "attention_mma": """q_codes q_scale largest_q_scales q_mean_dot k_codes k_scale k_scale_max v_codes v_scale v_offset
        o lse o_stride_b o_stride_h o_stride_s batch num_heads_q num_heads_kv seq_q seq_kv head_dim
        causal_offset sm_scale progress""",
}
_PARAMETERS["attention_wgmma"] = _PARAMETERS["attention_mma"] + " ticket handovers arrivals shared_items"
_PARAMETERS = {kernel: tuple(names.split()) for kernel, names in _PARAMETERS.items()}

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_ARRAYS = ("q", "k", "v", "o", "lse")  # their addresses are the first arguments, new on every call
_pack_addresses = struct.Struct("5Q").pack_into


# --- what is compiled --------------------------------------------------------------------------


def _row_sum_rows(plan: Plan) -> int:
    """Rows of V (transposed) that hold `row_sum_unit`."""
    return 8 if plan.kernel == "wgmma" else 0


P_FORMS = ("ex2", "code", "chord")  #: by the number that `softmax.cuh` gives them


def _float_literal(x: float) -> str:
    return f"{float(x)!r}f"


def quantize_defines(plan: Plan, *, bfloat16=False, return_lse=False, smooth_k=True, aligned=True):
    """Of `quantize.cu`. `aligned`: rows of head_dim, strides and addresses are multiples of 16 bytes."""
    return (
        ("HEAD_DIM", plan.head_dim), ("CHANNELS", plan.channels), ("BLOCK_M", plan.block_m), ("BLOCK_N", plan.block_n),
        ("V_F16", int(plan.v_dtype == "f16")), ("V_MAX", _float_literal(plan.v_max)),
        ("ROW_SUM_ROWS", _row_sum_rows(plan)), ("ROW_SUM_UNIT", _float_literal(plan.row_sum_unit)),
        ("SAMPLE_KEYS", int(plan.sample)), ("IN_BF16", int(bfloat16)), ("WITH_MEAN_DOT", int(return_lse)),
        ("SMOOTH_K", int(smooth_k)), ("ALIGNED", int(aligned)))


def attention_defines(plan: Plan, *, bfloat16=False, is_causal=False, return_lse=False):
    """Of `attention_mma.cu` and `attention_wgmma.cu`."""
    return (
        ("HEAD_DIM", plan.head_dim), ("CHANNELS", plan.channels), ("BLOCK_M", plan.block_m), ("BLOCK_N", plan.block_n),
        ("V_F16", int(plan.v_dtype == "f16")), ("P_FORM", P_FORMS.index(plan.p_form)),
        ("AIM", plan.aim), ("PROMOTE_EVERY", plan.promote_every), ("ROW_SUM_ROWS", _row_sum_rows(plan)),
        ("ROW_SUM_UNIT", _float_literal(plan.row_sum_unit)), ("OUT_BF16", int(bfloat16)),
        ("CAUSAL", int(is_causal)), ("RETURN_LSE", int(return_lse)), ("NUM_WARPS", plan.num_warps),
        ("STAGES", plan.stages), ("DYNAMIC_SHARED_BYTES", attention_shared_bytes(plan)))


def attention_source(plan: Plan) -> str:
    """The file of the attention kernel."""
    return f"attention_{plan.kernel}.cu"


def attention_shared_bytes(plan: Plan) -> int:
    """Dynamic shared memory of the attention kernel: `SHARED_BYTES` of its source."""
    d = plan.head_dim
    q_bytes, k_bytes = plan.block_m * d, plan.block_n * d
    v_bytes = plan.block_n * (plan.channels + _row_sum_rows(plan)) * (2 if plan.v_dtype == "f16" else 1)
    if plan.kernel == "mma":
        return q_bytes + plan.stages * (k_bytes + v_bytes) + 8 * plan.block_m
    stage_bytes = _align(k_bytes + v_bytes, 1024)
    item_bytes = 4 * (2 * plan.block_m + 2 * d + 12)
    q_buffers = 2 if d <= 128 else 1
    o_bytes = 4 * plan.block_m * (plan.channels - 160) if plan.channels > 192 else 0  # what registers cannot hold
    ones_bytes = 32 * plan.block_n if d <= 128 else 0
    return q_buffers * (q_bytes + item_bytes + 16) + plan.stages * (stage_bytes + 16 + 16) + o_bytes + ones_bytes


def attention_grid(plan: Plan, batch: int, num_heads: int, seq_q: int, num_sms: int):
    """Grid and block size of the attention kernel: (x, y, z), threads."""
    row_blocks = -(-seq_q // plan.block_m)
    if plan.kernel == "mma":
        if max(num_heads, batch) > MAX_GRID_YZ:
            raise ValueError(f"q has batch {batch} and {num_heads} heads; this kernel takes {MAX_GRID_YZ} of each")
        return (row_blocks, num_heads, batch), 32 * plan.num_warps
    return (min(num_sms, row_blocks * num_heads * batch), 1, 1), 32 * plan.num_warps  # persistent


def kernel_variants(arch: str) -> Iterator[tuple[str, str, tuple]]:
    """(source, function, defines) of what `attention` may ask for on an architecture of `plan`."""
    plans = [make_plan(arch, head_dim, kernel) for kernel in kernels(arch) for head_dim in head_dims(kernel)]
    for plan in plans:
        yield "quantize.cu", "quantize", quantize_defines(plan)
        yield "quantize.cu", "quantize", quantize_defines(plan, bfloat16=True, return_lse=True, aligned=False)
        for bfloat16, is_causal, return_lse in itertools.product((False, True), repeat=3):
            yield attention_source(plan), "attention", attention_defines(
                plan, bfloat16=bfloat16, is_causal=is_causal, return_lse=return_lse)


# --- one geometry ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """Everything about a call except the data: shapes, strides in elements, options."""

    batch: int
    num_heads_q: int
    num_heads_kv: int
    seq_q: int
    seq_kv: int
    head_dim: int
    strides: tuple[tuple[int, int, int], ...]  #: (b, h, s) of q, k, v, o
    bfloat16: bool
    aligned: bool
    is_causal: bool
    causal_alignment: str
    sm_scale: float
    return_lse: bool
    smooth_k: bool

    def scalars(self, plan: Plan) -> dict[str, int | np.float32]:
        """Kernel arguments that are not arrays."""
        scalars = {name: getattr(self, name) for name in (
            "batch", "num_heads_q", "num_heads_kv", "seq_q", "seq_kv", "head_dim")}
        for name, strides in zip("qkvo", self.strides):
            for axis, stride in zip("bhs", strides):
                scalars[f"{name}_stride_{axis}"] = stride
        bottom_right = self.causal_alignment == "bottom-right"
        scalars["causal_offset"] = self.seq_kv - self.seq_q if self.is_causal and bottom_right else 0
        scalars["group"] = self.num_heads_q // self.num_heads_kv
        scalars["sm_scale"] = np.float32(self.sm_scale)
        # the rotation of Q and K leaves out a factor of 1/4 each
        scalars["softmax_scale"] = np.float32(self.sm_scale * np.log2(np.e) / ROTATION)
        return scalars


_Arrays = dict[str, tuple[tuple[int, ...], type]]  # name -> shape and dtype


def _counters(geometry: Geometry, handovers: int) -> _Arrays:
    """What the kernels count. `handovers`: CTAs of the attention kernel that may pass sums to the next one."""
    return {
        "progress": ((geometry.batch * geometry.num_heads_kv, 4), np.uint32),  # struct Progress
        "ticket": ((1,), np.uint32),  # the next work item of the attention kernel
        "arrivals": ((handovers,), np.uint32),
    }


def _workspace(geometry: Geometry, plan: Plan, handovers: int) -> _Arrays:
    """Every intermediate array. Channels and rows of queries are the padded ones; `handovers` as above."""
    heads_q, heads_kv = geometry.batch * geometry.num_heads_q, geometry.batch * geometry.num_heads_kv
    d, n = plan.head_dim, plan.block_n
    width = min(d, 128)  # channels of a panel of codes
    q_tiles, kv_tiles = -(-geometry.seq_q // plan.block_m), -(-geometry.seq_kv // n)
    chunk_keys = 8 if plan.v_dtype == "f16" else 16  # in 16 bytes of V
    channels = ((heads_kv, d), np.float32)
    factors = ((heads_kv, d), np.float32 if geometry.bfloat16 else np.float16)
    rows = ((heads_q, q_tiles * plan.block_m), np.float32)
    return {
        "chunks": ((heads_kv, 2, SUM_CHUNKS, 2 * d), np.float32),  # K, V; struct ChunkStatistics
        "k_mean": channels, "k_factor": factors, "k_addend": factors, "q_factor": factors,
        "v_mean": channels, "v_inverse": channels, "v_scale": channels,
        "k_scale_max": ((heads_kv,), np.float32),
        "q_codes": ((heads_q, q_tiles, d // width, plan.block_m, width), np.int8),
        "q_scale": rows,
        "largest_q_scales": ((heads_q, _q_tiles(geometry, plan)), np.float32),
        "q_mean_dot": rows if geometry.return_lse else ((0,), np.float32),
        "k_codes": ((heads_kv, kv_tiles, d // width, n, width), np.int8),
        "k_scale": ((heads_kv, kv_tiles, KEY_GROUPS), np.float32),
        "v_codes": ((heads_kv, kv_tiles, n // chunk_keys, plan.channels + _row_sum_rows(plan), 16), np.uint8),
        "lost": ((heads_kv, kv_tiles, d), np.uint32),
        "v_offset": ((heads_kv, kv_tiles + 1, d), np.float32),
        "handovers": ((handovers, plan.channels // 2 + 4 + (plan.channels + _row_sum_rows(plan)) // 4, 2 * plan.block_m),
                      np.float32),  # struct Handover
    }


def _q_tiles(geometry: Geometry, plan: Plan) -> int:
    """Tiles of a head of Q in `quantize`: `q_tiles` of q_scales.cuh."""
    return -(-_align(geometry.seq_q, plan.block_m) // (128 if plan.head_dim <= 128 else 64))


def _ctas_an_sm(plan: Plan) -> int:
    """CTAs of `quantize` that an SM holds at least: its launch bounds."""
    return 6 if plan.head_dim <= 128 else 5


def divisor(d: int) -> int:
    """struct Divisor (divisor.cuh), of a number below 2**31, as one integer of 8 bytes."""
    shift = (d - 1).bit_length()
    return -((-1 << 32 + shift) // d) - (1 << 32) | shift << 32


def _cta_tiles(code_tiles: int, resident: int) -> int:
    """Tiles that a CTA of `quantize` makes codes of, where there are `code_tiles` and the GPU holds `resident` CTAs."""
    return 2 if code_tiles >= 4 * resident else 1


def _quantize_grid(geometry: Geometry, plan: Plan, num_sms: int) -> tuple[int, dict[str, int]]:
    """CTAs of `quantize`, and its arguments that say what they do.

    `lead`, by how many KV heads statistics are ahead of codes: far enough for them to be ready when the codes start,
    and, where they are those of all keys, not so far that V has left L2 by then.
    """
    g = geometry
    heads_kv, heads_q = g.batch * g.num_heads_kv, g.batch * g.num_heads_q
    resident = _ctas_an_sm(plan) * num_sms
    v_ctas = max(1, plan.head_dim // 128)  # `V_CTAS` of quantize_v.cuh
    kv_tiles, q_tiles = -(-g.seq_kv // plan.block_n), _q_tiles(g, plan)
    cta_tiles = _cta_tiles(heads_kv * kv_tiles * (1 + v_ctas) + heads_q * q_tiles, resident)
    kv_tile_ctas, q_head_ctas = -(-kv_tiles // cta_tiles), -(-q_tiles // cta_tiles)
    statistics_ctas, code_ctas = _statistics_ctas(plan, g.seq_kv), kv_tile_ctas * (1 + v_ctas)
    ahead = 0.9 * 128 / plan.head_dim  # of the CTAs that the GPU holds
    at_least = 16 if _is_sampled(plan, g.seq_kv) else 4
    head_ctas = statistics_ctas + kv_tiles * (1 + v_ctas)  # if they had one tile each
    lead = min(heads_kv, max(at_least, math.ceil(ahead * resident / head_ctas)))
    return heads_kv * (statistics_ctas + code_ctas) + heads_q * q_head_ctas, {
        "heads_kv": heads_kv, "lead": lead, "cta_tiles": cta_tiles, "kv_tile_ctas": kv_tile_ctas,
        "q_head_ctas": q_head_ctas, "by_statistics_ctas": divisor(statistics_ctas), "by_code_ctas": divisor(code_ctas),
        "by_round_ctas": divisor(statistics_ctas + code_ctas), "by_q_head_ctas": divisor(q_head_ctas),
        "by_num_heads_kv": divisor(g.num_heads_kv), "by_num_heads_q": divisor(g.num_heads_q),
        "by_group": divisor(g.num_heads_q // g.num_heads_kv)}


#: Tiles that cutting an item in two costs, about: another start of the pipeline, and the sums that are passed on.
_CUT_TILES = 12


def _shared_items(geometry: Geometry, plan: Plan, ctas: int) -> int:
    """Items that the CTAs of `attention_wgmma.cu` share in equal parts (`Schedule` there): 0 where it does not pay."""
    g = geometry
    items, tiles = -(-g.seq_q // plan.block_m) * g.num_heads_q * g.batch, -(-g.seq_kv // plan.block_n)
    shared = items % ctas + ctas
    pays = items >= shared > ctas and (2 * ctas - shared) * tiles >= _CUT_TILES * ctas
    return shared if plan.kernel == "wgmma" and not g.is_causal and pays else 0


def _is_sampled(plan: Plan, seq_kv: int) -> bool:
    """Whether a sample stands for all keys in the statistics: `Keys` of statistics.cuh."""
    return plan.sample and seq_kv >= 1024


def _statistics_ctas(plan: Plan, seq_kv: int) -> int:
    """Chunks of the statistics of K and V: `Keys` of statistics.cuh."""
    if _is_sampled(plan, seq_kv):
        return 2 * min(SUM_CHUNKS, seq_kv // 512)
    return 2 * -(-seq_kv // max(256, 16 * -(-seq_kv // (16 * SUM_CHUNKS))))


def _align(n: int, to: int = 256) -> int:
    """`n` rounded up to a multiple of `to`. The default is the alignment, in bytes, of arrays in a `_Region`."""
    return -(-n // to) * to


class _Region:
    """Arrays behind each other in memory, and the kernel arguments that are their addresses."""

    def __init__(self, arrays: _Arrays, arguments: np.ndarray):
        sizes = [_align(math.prod(shape) * np.dtype(dtype).itemsize) for shape, dtype in arrays.values()]
        *offsets, self.bytes = itertools.accumulate(sizes, initial=0)
        self.arrays, self.offsets = arrays, dict(zip(arrays, offsets))
        self._arguments, self._offsets, self._address = arguments, np.array(offsets, np.int64), None

    def bind(self, address: int) -> None:
        """Set where the arrays are."""
        if address != self._address:
            np.add(self._offsets, address, out=self._arguments)
            self._address = address


class Launch:
    """The launches of one geometry. One thread at a time may use it: it holds the kernel arguments.

    `quantize` and `attend` launch their kernel on a stream. With `early`, `attend` follows directly on `quantize`: some
    of its CTAs start sooner, and count before they wait for it.
    """

    def __init__(self, geometry: Geometry, plan: Plan, arch: str, num_sms: int, early: bool):
        self.geometry, self.plan = geometry, plan
        grid, threads = attention_grid(plan, geometry.batch, geometry.num_heads_q, geometry.seq_q, num_sms)
        self.shared_items = _shared_items(geometry, plan, grid[0])
        handovers = grid[0] if self.shared_items else 0
        counters, workspace = _counters(geometry, handovers), _workspace(geometry, plan, handovers)
        quantize_ctas, quantize_scalars = _quantize_grid(geometry, plan, num_sms)
        scalars = {**geometry.scalars(plan), **quantize_scalars, "shared_items": self.shared_items}

        names = [*_ARRAYS, *counters, *workspace, *scalars]
        self._arguments = np.zeros(len(names), np.int64)  # of all kernels, 8 bytes each (CUDA is little-endian)
        self._buffer = memoryview(self._arguments).cast("B")
        _, of_counters, of_workspace, of_scalars = np.split(
            self._arguments, np.cumsum([len(_ARRAYS), len(counters), len(workspace)]))
        self.counters, self.workspace = _Region(counters, of_counters), _Region(workspace, of_workspace)
        of_scalars[:] = [int(x.view(np.int32)) if isinstance(x, np.float32) else x for x in scalars.values()]

        address = {name: self._arguments.ctypes.data + 8 * i for i, name in enumerate(names)}
        self._pointers = [  # to those of each kernel
            np.array([address[name] for name in _PARAMETERS[kernel]], np.uint64)
            for kernel in ("quantize", f"attention_{plan.kernel}")]
        of_quantize, of_attention = (pointers.ctypes.data for pointers in self._pointers)
        quantize, attention = self._get_kernels(arch)
        self.quantize = driver.KernelLaunch(
            quantize, (quantize_ctas, 1, 1), 32 * QUANTIZE_WARPS, 0, of_quantize, early=False)
        self.attend = driver.KernelLaunch(
            attention, grid, threads, attention_shared_bytes(plan), of_attention,
            early=early and plan.kernel == "wgmma")

    def _get_kernels(self, arch: str) -> tuple[int, int]:
        """CUfunctions of the two kernels."""
        g, plan = self.geometry, self.plan
        quantize = jit.get_kernel("quantize.cu", "quantize", arch, quantize_defines(
            plan, bfloat16=g.bfloat16, return_lse=g.return_lse, smooth_k=g.smooth_k, aligned=g.aligned))
        attention = jit.get_kernel(
            attention_source(plan), "attention", arch,
            attention_defines(plan, bfloat16=g.bfloat16, is_causal=g.is_causal, return_lse=g.return_lse),
            requires_nvrtc=(12, 8) if plan.v_dtype == "e4m3" else (12, 0), dynamic_shared=attention_shared_bytes(plan))
        return quantize.kernel.ptr, attention.kernel.ptr

    def bind(self, q: int, k: int, v: int, o: int, lse: int, workspace: int, counters: int) -> None:
        """Set the addresses of the arrays."""
        _pack_addresses(self._buffer, 0, q, k, v, o, lse)
        self.workspace.bind(workspace)
        self.counters.bind(counters)

    def new_counters(self):
        """Memory for the counters, cleared on the current stream."""
        from cupy import cuda

        counters = cuda.alloc(self.counters.bytes)
        counters.memset_async(0, self.counters.bytes)
        return counters


# --- the calls ---------------------------------------------------------------------------------


class Call:
    """`sagepp.attention` of one geometry: a function of checked `cupy.ndarray`s on the current device, whose shapes,
    strides and alignment, and the options, are those that it was made for.

    One thread at a time may use it. In a CUDA graph, what a captured call needs lives as long as the result does.
    """

    def __init__(self, q, k, v, *, tensor_layout, is_causal, sm_scale, return_lse, causal_alignment, smooth_k, kernel):
        import cupy

        o = cupy.empty(q.shape, q.dtype)
        self._shape, self._dtype = q.shape, q.dtype
        if tensor_layout == "NHD":
            q, k, v, o = (x.transpose(0, 2, 1, 3) for x in (q, k, v, o))
        self._lse_shape = q.shape[:3] if return_lse else None
        self._launch = _new_launch(q, k, v, o, is_causal, causal_alignment, sm_scale, return_lse, smooth_k, kernel,
                                   early=True)
        self._ndarray, self._cuda = cupy.ndarray, cupy.cuda
        self._counters = {}  # of each stream

    def __call__(self, q, k, v):
        """`(o, lse)`: shape and layout of `q`, contiguous; `lse` is None unless asked for."""
        launch, cuda = self._launch, self._cuda
        o = self._ndarray(self._shape, self._dtype)
        lse = self._lse_shape and self._ndarray(self._lse_shape, np.float32)
        workspace = cuda.alloc(launch.workspace.bytes)
        stream = cuda.get_current_stream()
        address = stream.ptr
        if address and stream.is_capturing():
            counters = self._counters_of_capture()
            weakref.finalize(o, _release, workspace, counters).atexit = False
        else:
            counters = self._counters.get(address) or self._new_counters(address)
        launch.bind(q.data.ptr, k.data.ptr, v.data.ptr, o.data.ptr, 0 if lse is None else lse.data.ptr, workspace.ptr,
                    counters.ptr)
        try:
            launch.quantize(address)
            launch.attend(address)
        except BaseException:
            self._counters.pop(address, None)  # between the two they are not 0
            raise
        return o, lse

    def _new_counters(self, stream: int):
        if len(self._counters) >= _MAX_STREAMS:
            self._counters.clear()
        counters = self._counters[stream] = self._launch.new_counters()
        return counters

    def _counters_of_capture(self):
        """Of a captured call: cleared now, by another stream, and not by a node of the graph."""
        stream = _stream_of_clearing(self._cuda.runtime.getDevice())
        with driver.relaxed_capture():
            with stream:
                counters = self._launch.new_counters()
            stream.synchronize()
        return counters


@functools.lru_cache(maxsize=None)
def _stream_of_clearing(device: int):
    """A stream of the device, which is the current one, for `Call._counters_of_capture`."""
    import cupy

    return cupy.cuda.Stream(non_blocking=True)


def _release(*memory) -> None:
    """Does nothing: what matters is that `memory` is referred to until this is called."""


class _Calls(threading.local):
    """Calls of the thread, by everything that they depend on."""

    def __init__(self):
        self.of_key = {}


_calls = _Calls()
_MAX_CALLS = 512  # a growing KV cache is a new geometry on every call
_MAX_STREAMS = 16  # of a call


def find_call(key) -> Call | None:
    """The call of this thread that was made for `key`."""
    return _calls.of_key.get(key)


def new_call(key, q, k, v, **options) -> Call:
    """A new one; `options` as of :class:`Call`."""
    calls = _calls.of_key
    if len(calls) >= _MAX_CALLS:
        calls.clear()
    call = calls[key] = Call(q, k, v, **options)
    return call


def _new_launch(q, k, v, out, is_causal, causal_alignment, sm_scale, return_lse, smooth_k, kernel, *, early) -> Launch:
    import cupy

    device = q.data.device_id
    cupy.cuda.runtime.setDevice(device)  # gives this thread a context, if it has none yet
    arch = jit.arch_of(device)
    batch, num_heads_q, seq_q, head_dim = q.shape
    strides = tuple(tuple(stride // 2 for stride in x.strides[:3]) for x in (q, k, v, out))
    aligned = not any(
        x.data.ptr & 15 or any(x.strides[axis] & 15 for axis in range(3) if x.shape[axis] > 1 or axis == 2)
        for x in (q, k, v))  # rows beyond the last are addressed, though not read
    geometry = Geometry(
        batch=batch, num_heads_q=num_heads_q, num_heads_kv=k.shape[1], seq_q=seq_q, seq_kv=k.shape[2],
        head_dim=head_dim, strides=strides, bfloat16=q.dtype == _BFLOAT16,
        aligned=aligned and head_dim % 8 == 0, is_causal=is_causal, causal_alignment=causal_alignment,
        sm_scale=head_dim ** -0.5 if sm_scale is None else sm_scale, return_lse=return_lse, smooth_k=smooth_k)
    return Launch(geometry, make_plan(jit.family_of(arch), head_dim, kernel), arch, _num_sms(device), early)


def _current_stream() -> int:
    import cupy

    return cupy.cuda.get_current_stream().ptr


def _num_sms(device: int) -> int:
    from cupy.cuda import runtime

    return runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, device)


class Prepared:
    """A call in two halves, for measurements: both may be repeated, on the current stream.

    `o` and `lse` are the results, `plan` what was compiled.
    """

    def __init__(self, q, k, v, *, is_causal=False, causal_alignment="bottom-right", sm_scale=None,
                 return_lse=False, smooth_k=True, kernel=None, out=None):
        import cupy

        self.o = cupy.empty(q.shape, q.dtype) if out is None else out
        self.lse = cupy.empty(q.shape[:3], np.float32) if return_lse else None
        self._inputs = q, k, v
        self._launch = _new_launch(q, k, v, self.o, is_causal, causal_alignment, sm_scale, return_lse,
                                   smooth_k, kernel, early=False)
        self.plan = self._launch.plan
        self._workspace = cupy.cuda.alloc(self._launch.workspace.bytes)
        self._counters = self._launch.new_counters()
        self._launch.bind(q.data.ptr, k.data.ptr, v.data.ptr, self.o.data.ptr,
                          self.lse.data.ptr if return_lse else 0, self._workspace.ptr, self._counters.ptr)

    def quantize(self) -> None:
        """The `quantize` kernel, and a memset before it: it may be called twice without `attend`."""
        self._counters.memset_async(0, self._launch.counters.bytes)
        self._launch.quantize(_current_stream())

    def attend(self) -> None:
        """The attention kernel alone; `quantize` was called before."""
        self._launch.attend(_current_stream())

    def intermediate(self, name: str):
        """An array of the workspace, `cupy.ndarray`, in the layout that the kernels use."""
        import cupy

        workspace = self._launch.workspace
        shape, dtype = workspace.arrays[name]
        return cupy.ndarray(shape, dtype, self._workspace + workspace.offsets[name])


def prepare(q, k, v, **options) -> Prepared:
    """A call in two halves; arguments of :func:`attention`."""
    return Prepared(q, k, v, **options)


def quantize(q, k, v, **options) -> dict:
    """Run everything before the attention kernel: name -> `cupy.ndarray` of each intermediate array."""
    prepared = Prepared(q, k, v, **options)
    prepared.quantize()
    return {name: prepared.intermediate(name) for name in prepared._launch.workspace.arrays}
