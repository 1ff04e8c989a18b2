"""The GPU side of `attention`: two or three launches on the current stream, in one workspace.

``quantize`` (`kernels_src/quantize.cu`) and ``attention`` (`kernels_src/attention_*.cu`), which on Hopper starts
while the last CTAs of the other are running. In long calls there, ``quantize`` makes the codes of Q and K of the first
heads alone, and ``late_codes`` (`kernels_src/late_codes.cu`) those of the others, beside ``attention``. Nothing is
checked here (`api.py` has done it) and nothing synchronises.

What the kernels count is 0 before a call, and again after it: ``attention`` clears the counters of ``quantize``, and
its own. So a stream keeps them from call to call.

The host must not be slower than the GPU, so what depends on the shapes is worked out once: a `Launch`
holds kernels, grids and one array of all kernel arguments, which every launch points into. A call then
writes a handful of addresses and calls the driver, without CuPy's argument conversion.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
import threading
import weakref
from typing import Iterator

import ml_dtypes
import numpy as np

from . import driver, jit, schedule
from .plan import Plan, head_dims, kernels, make_plan
from .schedule import SUM_CHUNKS, Geometry, align, q_tiles

# As in `kernels_src/quantize.cu` and `statistics.cuh`.
KEY_GROUPS = 4  #: scales of K a tile
QUANTIZE_WARPS = 4  #: of a CTA of `quantize`

#: Kernel -> its parameters, in order. Arrays have the names of `_counters` and `_workspace`.
_PARAMETERS = {
    "quantize": """q k v q_stride_b q_stride_h q_stride_s k_stride_b k_stride_h k_stride_s v_stride_b
        v_stride_h v_stride_s progress chunks k_mean k_factor k_addend q_factor v_mean v_inverse v_scale
        q_codes q_scale largest_q_scales q_mean_dot k_codes k_scale k_scale_max v_codes lost v_offset num_heads_q
        num_heads_kv group seq_q seq_kv head_dim softmax_scale heads_kv early_heads late_tiles lead cta_tiles
        kv_tile_ctas q_head_ctas by_statistics_ctas by_code_ctas by_round_ctas by_q_head_ctas by_num_heads_kv
        by_num_heads_q by_group""",
    "late_codes": """q k q_stride_b q_stride_h q_stride_s k_stride_b k_stride_h k_stride_s k_factor k_addend q_factor
        k_mean q_codes k_codes q_scale largest_q_scales q_mean_dot k_scale k_scale_max num_heads_q num_heads_kv group
        seq_q seq_kv head_dim softmax_scale early_heads head_tiles by_head_tiles by_q_tiles by_num_heads_kv
        by_num_heads_q num_late_tiles late_tiles late_begun""",
    "attention_mma": """q_codes q_scale largest_q_scales q_mean_dot k_codes k_scale k_scale_max v_codes v_scale v_offset
        o lse o_stride_b o_stride_h o_stride_s batch num_heads_q num_heads_kv seq_q seq_kv head_dim
        causal_offset sm_scale progress""",
}
_PARAMETERS["attention_wgmma"] = _PARAMETERS["attention_mma"] + """ ticket handovers arrivals
    shared_items late_tiles late_begun early_heads head_tiles"""
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


def late_defines(plan: Plan, *, bfloat16=False, return_lse=False):
    """Of `late_codes.cu`."""
    return (
        ("HEAD_DIM", plan.head_dim), ("BLOCK_M", plan.block_m), ("BLOCK_N", plan.block_n), ("IN_BF16", int(bfloat16)),
        ("WITH_MEAN_DOT", int(return_lse)), ("ALIGNED", 1), ("LATE_THREADS", _late_threads(plan)),
        ("LATE_SHARED_BYTES", _late_shared_bytes(plan)))


def _late_threads(plan: Plan) -> int:
    """Of a CTA of `late_codes`: as many as the registers are enough for."""
    return 384 if plan.head_dim <= 128 else 256


def _late_shared_bytes(plan: Plan) -> int:
    """Dynamic shared memory of `late_codes`: for a warp the rows of two key groups."""
    return _late_threads(plan) // 32 * 2 * (plan.block_n // KEY_GROUPS) * plan.head_dim * 2


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
    stage_bytes = align(k_bytes + v_bytes, 1024)
    item_bytes = 4 * (2 * plan.block_m + 2 * d + 12)
    q_buffers = 2 if d <= 128 else 1
    o_bytes = 4 * plan.block_m * (plan.channels - 160) if plan.channels > 192 else 0  # what registers cannot hold
    ones_bytes = 32 * plan.block_n if d <= 128 else 0
    return q_buffers * (q_bytes + item_bytes + 16) + plan.stages * (stage_bytes + 16 + 16) + o_bytes + ones_bytes + 16


def kernel_variants(arch: str) -> Iterator[tuple[str, str, tuple]]:
    """(source, function, defines) of what `attention` may ask for on an architecture of `plan`."""
    plans = [make_plan(arch, head_dim, kernel) for kernel in kernels(arch) for head_dim in head_dims(kernel)]
    for plan in plans:
        yield "quantize.cu", "quantize", quantize_defines(plan)
        yield "quantize.cu", "quantize", quantize_defines(plan, bfloat16=True, return_lse=True, aligned=False)
        if plan.kernel == "wgmma":
            yield "late_codes.cu", "late_codes", late_defines(plan)
            yield "late_codes.cu", "late_codes", late_defines(plan, bfloat16=True, return_lse=True)
        for bfloat16, is_causal, return_lse in itertools.product((False, True), repeat=3):
            yield attention_source(plan), "attention", attention_defines(
                plan, bfloat16=bfloat16, is_causal=is_causal, return_lse=return_lse)


# --- one geometry ------------------------------------------------------------------------------


_Arrays = dict[str, tuple[tuple[int, ...], type]]  # name -> shape and dtype


def _counters(geometry: Geometry, handovers: int) -> _Arrays:
    """What the kernels count. `handovers`: CTAs of the attention kernel that may pass sums to the next one."""
    return {
        "progress": ((geometry.heads_kv, 4), np.uint32),  # struct Progress
        "ticket": ((1,), np.uint32),  # the next work item of the attention kernel
        "arrivals": ((handovers,), np.uint32),
        "late_begun": ((1,), np.uint32),
    }


def _workspace(geometry: Geometry, plan: Plan, handovers: int) -> _Arrays:
    """Every intermediate array. Channels and rows of queries are the padded ones; `handovers` as above."""
    heads_q, heads_kv = geometry.batch * geometry.num_heads_q, geometry.heads_kv
    d, n = plan.head_dim, plan.block_n
    width = min(d, 128)  # channels of a panel of codes
    row_blocks, kv_tiles = -(-geometry.seq_q // plan.block_m), -(-geometry.seq_kv // n)
    chunk_keys = 8 if plan.v_dtype == "f16" else 16  # in 16 bytes of V
    channels = ((heads_kv, d), np.float32)
    factors = ((heads_kv, d), np.float32 if geometry.bfloat16 else np.float16)
    rows = ((heads_q, row_blocks * plan.block_m), np.float32)
    return {
        "chunks": ((heads_kv, 2, SUM_CHUNKS, 2 * d), np.float32),  # K, V; struct ChunkStatistics
        "k_mean": channels, "k_factor": factors, "k_addend": factors, "q_factor": factors,
        "v_mean": channels, "v_inverse": channels, "v_scale": channels,
        "k_scale_max": ((heads_kv,), np.float32),
        "q_codes": ((heads_q, row_blocks, d // width, plan.block_m, width), np.int8),
        "q_scale": rows,
        "largest_q_scales": ((heads_q, q_tiles(geometry, plan)), np.float32),
        "q_mean_dot": rows if geometry.return_lse else ((0,), np.float32),
        "k_codes": ((heads_kv, kv_tiles, d // width, n, width), np.int8),
        "k_scale": ((heads_kv, kv_tiles, KEY_GROUPS), np.float32),
        "v_codes": ((heads_kv, kv_tiles, n // chunk_keys, plan.channels + _row_sum_rows(plan), 16), np.uint8),
        "lost": ((heads_kv, kv_tiles, d), np.uint32),
        "late_tiles": ((heads_kv,), np.uint32),
        "v_offset": ((heads_kv, kv_tiles + 1, d), np.float32),
        "handovers": ((handovers, plan.channels // 2 + 4 + (plan.channels + _row_sum_rows(plan)) // 4, 2 * plan.block_m),
                      np.float32),  # struct Handover
    }


class _Region:
    """Arrays behind each other in memory, and the kernel arguments that are their addresses."""

    def __init__(self, arrays: _Arrays, arguments: np.ndarray):
        sizes = [align(math.prod(shape) * np.dtype(dtype).itemsize) for shape, dtype in arrays.values()]
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
        grid, threads = schedule.attention_grid(plan, geometry.batch, geometry.num_heads_q, geometry.seq_q, num_sms)
        late = schedule.late_heads(geometry, plan, grid[0]) if early else schedule.Late(geometry.heads_kv)
        self.shared_items = 0 if late.ctas else schedule.count_shared_items(geometry, plan, grid[0])
        handovers = grid[0] if self.shared_items else 0
        counters, workspace = _counters(geometry, handovers), _workspace(geometry, plan, handovers)
        quantize_ctas, quantize_scalars = schedule.quantize_grid(geometry, plan, num_sms, late.early_heads)
        scalars = {**geometry.scalars(plan), **quantize_scalars, **late.arguments(geometry, plan),
                   "shared_items": self.shared_items}

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
            for kernel in ("quantize", "late_codes", f"attention_{plan.kernel}")]
        of_quantize, of_late_codes, of_attention = (pointers.ctypes.data for pointers in self._pointers)
        quantize, late_codes, attention = self._get_kernels(arch, late.ctas > 0)
        self.quantize = driver.KernelLaunch(
            quantize, (quantize_ctas, 1, 1), 32 * QUANTIZE_WARPS, 0, of_quantize, early=False)
        self.make_late_codes = late_codes and driver.KernelLaunch(
            late_codes, (late.ctas, 1, 1), _late_threads(plan), _late_shared_bytes(plan), of_late_codes, early=True)
        self.attend = driver.KernelLaunch(
            attention, grid, threads, attention_shared_bytes(plan), of_attention,
            early=early and plan.kernel == "wgmma")

    def _get_kernels(self, arch: str, with_late_codes: bool) -> tuple[int, int | None, int]:
        """CUfunctions of the kernels."""
        g, plan = self.geometry, self.plan
        quantize = jit.get_kernel("quantize.cu", "quantize", arch, quantize_defines(
            plan, bfloat16=g.bfloat16, return_lse=g.return_lse, smooth_k=g.smooth_k, aligned=g.aligned))
        late_codes = with_late_codes and jit.get_kernel(
            "late_codes.cu", "late_codes", arch, late_defines(plan, bfloat16=g.bfloat16, return_lse=g.return_lse),
            dynamic_shared=_late_shared_bytes(plan))
        attention = jit.get_kernel(
            attention_source(plan), "attention", arch,
            attention_defines(plan, bfloat16=g.bfloat16, is_causal=g.is_causal, return_lse=g.return_lse),
            requires_nvrtc=(12, 8) if plan.v_dtype == "e4m3" else (12, 0), dynamic_shared=attention_shared_bytes(plan))
        return quantize.kernel.ptr, late_codes.kernel.ptr if late_codes else None, attention.kernel.ptr

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
            if launch.make_late_codes:
                launch.make_late_codes(address)
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
