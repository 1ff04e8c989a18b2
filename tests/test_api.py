"""The public call: what it refuses, in which words, and what it hands to the layers below."""

import ctypes
import sys
import timeit
import types

import ml_dtypes
import numpy as np
import pytest

import sagepp

BF16 = ml_dtypes.bfloat16


def arrays(batch=2, heads=4, kv_heads=2, q_len=5, kv_len=7, head_dim=16, dtype=np.float16):
    """q, k, v of zeros in the layout HND."""
    return (np.zeros((batch, heads, q_len, head_dim), dtype),
            np.zeros((batch, kv_heads, kv_len, head_dim), dtype),
            np.zeros((batch, kv_heads, kv_len, head_dim), dtype))


@pytest.fixture
def reference(monkeypatch):
    """Stands in for the reference and the plan; its `calls` are what the API handed over."""
    calls = []

    def attention(q, k, v, *, is_causal, causal_alignment, sm_scale, smooth_k, plan):
        calls.append(types.SimpleNamespace(**locals()))
        # A value that tells heads and rows apart, in the dtype of q.
        o = np.zeros(q.shape, q.dtype)
        o[:] = (np.arange(q.shape[1])[:, None, None] * 100 + np.arange(q.shape[2])[:, None])
        return o, np.zeros(q.shape[:3], np.float32)

    monkeypatch.setitem(sys.modules, "sagepp.reference.attention",
                        types.SimpleNamespace(attention=attention))
    monkeypatch.setattr("sagepp.plan.default_cpu_plan",
                        lambda head_dim, kernel: ("plan", head_dim, kernel))
    attention.calls = calls
    return attention


def replaced(index, array):
    return lambda qkv: [array(x) if i == index else x for i, x in enumerate(qkv)]


def keywords(**kwargs):
    return lambda qkv: (list(qkv), kwargs)


SHAPE_ERRORS = {
    "rank of q": (replaced(0, lambda q: q[0]), ValueError, "q has shape .*4 dimensions"),
    "rank of k": (replaced(1, lambda k: k[0]), ValueError, "k has shape .*4 dimensions"),
    "rank of v": (replaced(2, lambda v: v[None]), ValueError, "v has shape .*4 dimensions"),
    "empty batch": (lambda qkv: [x[:0] for x in qkv], ValueError, "q has shape .*at least 1"),
    "empty heads": (replaced(1, lambda k: k[:, :0]), ValueError, "k has shape .*at least 1"),
    "no query": (replaced(0, lambda q: q[:, :, :0]), ValueError, "q has shape .*at least 1"),
    "no key": (replaced(2, lambda v: v[:, :, :0]), ValueError, "v has shape .*at least 1"),
    "head_dim 0": (lambda qkv: [x[..., :0] for x in qkv], ValueError, "q has shape .*at least 1"),
    "head_dim 257": (lambda qkv: arrays(head_dim=257), ValueError, "q has head_dim 257.*1 to 256"),
    "batch of k": (replaced(1, lambda k: k[:1]), ValueError, "k has batch 1.* q has 2"),
    "batch of v": (replaced(2, lambda v: v[:1]), ValueError, "v has batch 1.* q has 2"),
    "head_dim of k": (replaced(1, lambda k: k[..., :8]), ValueError, "k has head_dim 8.* q has 16"),
    "head_dim of v": (replaced(2, lambda v: v[..., :8]), ValueError, "v has head_dim 8.* q has 16"),
    "heads of v": (replaced(2, lambda v: v[:, :1]), ValueError, "v has num_heads 1.* k has 2"),
    "length of v": (replaced(2, lambda v: v[:, :, :6]), ValueError, "v has seq_len 6.* k has 7"),
    "heads of q": (replaced(0, lambda q: q[:, :3]), ValueError, "q has num_heads 3.*multiple of k's"),
    "dtype of q": (lambda qkv: [x.astype(np.float64) for x in qkv], TypeError,
                   "q has dtype float64; allowed: float16, bfloat16, and float32"),
    "integers": (lambda qkv: [x.astype(np.int8) for x in qkv], TypeError, "q has dtype int8"),
    "big-endian": (lambda qkv: [x.astype(">f2") for x in qkv], TypeError, "q has dtype >f2"),
    "dtype of k": (replaced(1, lambda k: k.astype(BF16)), TypeError,
                   "k has dtype bfloat16, but q has float16"),
    "dtype of v": (replaced(2, lambda v: v.astype(np.float32)), TypeError,
                   "v has dtype float32, but q has float16"),
    "stride of q": (replaced(0, lambda q: np.zeros(q.shape[:3] + (32,), q.dtype)[..., ::2]), ValueError,
                    "q has a stride of 4 bytes in its last dimension; allowed: 2.*ascontiguousarray"),
    "stride of k": (replaced(1, lambda k: k[..., ::-1]), ValueError, "k has a stride of -2 bytes"),
    "stride of v": (replaced(2, lambda v: np.broadcast_to(v[..., :1], v.shape)), ValueError,
                    "v has a stride of 0 bytes"),
    "broken strides": (replaced(1, lambda k: np.lib.stride_tricks.as_strided(
        np.zeros(2000, np.float16), k.shape, (901, 301, 40, 2))), ValueError, "k has strides .*multiples"),
    "a list": (replaced(0, lambda q: q.tolist()), TypeError, "q is a list; allowed: a CuPy, NumPy"),
    "None": (replaced(1, lambda k: None), TypeError, "k is a NoneType; allowed: a CuPy, NumPy"),
    "a scalar": (replaced(2, lambda v: np.float16(1)), TypeError, "v is a numpy.float16; allowed"),
}

OPTION_ERRORS = {
    "layout": (dict(tensor_layout="BHSD"), ValueError, "tensor_layout is 'BHSD'; allowed: 'HND', 'NHD'"),
    "layout case": (dict(tensor_layout="hnd"), ValueError, "tensor_layout is 'hnd'"),
    "layout None": (dict(tensor_layout=None), ValueError, "tensor_layout is None"),
    "layout type": (dict(tensor_layout=["HND"]), TypeError, "tensor_layout is a list; allowed: 'HND'"),
    "causal int": (dict(is_causal=1), TypeError, "is_causal is 1, a int; allowed: True, False"),
    "causal None": (dict(is_causal=None), TypeError, "is_causal is None"),
    "lse": (dict(return_lse="yes"), TypeError, "return_lse is 'yes'"),
    "smooth_k": (dict(smooth_k=0.0), TypeError, "smooth_k is 0.0"),
    "alignment": (dict(causal_alignment="left"), ValueError,
                  "causal_alignment is 'left'; allowed: 'bottom-right', 'top-left'"),
    "alignment type": (dict(causal_alignment=0), TypeError, "causal_alignment is a int"),
    "kernel": (dict(kernel="fa3"), ValueError,
               "kernel is 'fa3'; allowed: None, 'mma', 'mma_fp16', 'wgmma', 'wgmma_fast'"),
    "kernel type": (dict(kernel=90), TypeError, "kernel is a int"),
    "scale 0": (dict(sm_scale=0.0), ValueError, "sm_scale is 0.0; allowed: None, or a positive"),
    "scale negative": (dict(sm_scale=-0.1), ValueError, "sm_scale is -0.1"),
    "scale NaN": (dict(sm_scale=float("nan")), ValueError, "sm_scale is nan"),
    "scale infinite": (dict(sm_scale=float("inf")), ValueError, "sm_scale is inf"),
    "scale too small": (dict(sm_scale=1e-60), ValueError, "sm_scale is 1e-60"),
    "scale too large": (dict(sm_scale=1e39), ValueError, "sm_scale is 1e.39"),
    "scale beyond float64": (dict(sm_scale=10 ** 400), ValueError, "sm_scale is inf"),
    "scale bool": (dict(sm_scale=True), TypeError, "sm_scale is a bool"),
    "scale text": (dict(sm_scale="0.1"), TypeError, "sm_scale is a str"),
    "scale array": (dict(sm_scale=np.ones(1)), TypeError, "sm_scale is a numpy.ndarray"),
    "scale complex": (dict(sm_scale=1j), TypeError, "sm_scale is a complex"),
}


@pytest.mark.parametrize("case", SHAPE_ERRORS)
def test_wrong_arrays_are_named(case, reference):
    change, error, message = SHAPE_ERRORS[case]
    with pytest.raises(error, match=message):
        sagepp.attention(*change(arrays()))
    assert not reference.calls


@pytest.mark.parametrize("case", OPTION_ERRORS)
def test_wrong_options_are_named(case, reference):
    options, error, message = OPTION_ERRORS[case]
    sagepp.attention(*arrays())  # what is remembered of a good call excuses no bad one
    with pytest.raises(error, match=message):
        sagepp.attention(*arrays(), **options)
    assert len(reference.calls) == 1


def test_options_are_keyword_only_where_sageattention_has_none():
    with pytest.raises(TypeError, match="positional"):
        sagepp.attention(*arrays(), "HND", False, None, False, "top-left")


def test_the_reference_gets_hnd_views_and_every_option(reference):
    q, k, v = arrays()
    sagepp.attention(q, k, v, "HND", True, np.float32(0.5), causal_alignment="top-left",
                     smooth_k=np.False_, kernel="mma_fp16")
    call = reference.calls[0]
    assert call.q is q and call.k is k and call.v is v
    assert (call.is_causal, call.causal_alignment, call.sm_scale, call.smooth_k, call.plan) == (
        True, "top-left", 0.5, False, ("plan", 16, "mma_fp16"))
    assert type(call.sm_scale) is float and type(call.smooth_k) is bool


def test_defaults(reference):
    sagepp.attention(*arrays())
    call = reference.calls[0]
    assert (call.is_causal, call.causal_alignment, call.sm_scale, call.smooth_k, call.plan) == (
        False, "bottom-right", 16 ** -0.5, True, ("plan", 16, None))


@pytest.mark.parametrize("dtype", [np.float16, BF16])
def test_nhd_is_a_view_in_and_contiguous_out(reference, dtype):
    q, k, v = (np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in arrays(dtype=dtype))
    o, lse = sagepp.attention(q, k, v, tensor_layout="NHD", return_lse=True)
    call = reference.calls[0]
    assert call.q.shape == (2, 4, 5, 16) and call.k.shape == call.v.shape == (2, 2, 7, 16)
    assert np.shares_memory(call.q, q) and np.shares_memory(call.k, k) and np.shares_memory(call.v, v)
    assert o.shape == q.shape and o.dtype == dtype and o.flags.c_contiguous
    assert lse.shape == (2, 4, 5) and lse.dtype == np.float32
    assert (o[:, 3, 2, :].astype(float) == 203).all()  # row 3 of head 2


def test_without_lse_only_the_output_returns(reference):
    assert isinstance(sagepp.attention(*arrays()), np.ndarray)


def test_float32_is_rounded_to_float16_and_comes_back_as_float32(reference):
    o = sagepp.attention(*(x + np.float32(0.1) for x in arrays(dtype=np.float32)))
    assert reference.calls[0].q.dtype == np.float16 and o.dtype == np.float32
    assert (reference.calls[0].v == np.float16(0.1)).all()


def test_strides_of_other_dimensions_are_free(reference):
    q, k, v = arrays()
    packed = np.zeros((2, 7, 3, 2, 16), np.float16)  # (batch, seq, {q, k, v}, heads, head_dim)
    q, k, v = (packed[:, :, i] for i in range(3))
    sagepp.attention(q, k, v, "NHD")
    assert np.shares_memory(reference.calls[0].k, packed)
    sagepp.attention(*(x[:, ::-1] for x in arrays()))
    sagepp.attention(*(np.broadcast_to(x[:1], x.shape) for x in arrays()))


def test_head_dim_1_may_have_any_last_stride(reference):
    sagepp.attention(*(np.zeros((1, 1, 4, 8), np.float16)[..., ::8] for _ in range(3)))


@pytest.mark.parametrize("head_dim", [1, 3, 128, 256])
def test_every_head_dim_up_to_256_passes_the_checks(reference, head_dim):
    sagepp.attention(*arrays(head_dim=head_dim))
    assert reference.calls[0].plan == ("plan", head_dim, None)


def test_subclasses_of_ndarray_are_numpy_arrays(reference):
    q, k, v = arrays()
    sagepp.attention(q, k.view(np.memmap), v)
    assert len(reference.calls) == 1


# --- the GPU side, without a GPU: CuPy arrays over addresses that are never read -------------------


@pytest.fixture
def launch(monkeypatch):
    """Stands in for the calls of `sagepp.launch` and for what of CuPy needs a driver.

    `calls`: arguments of those that were made, and devices that became current. `made`: the options of each new call.
    """
    cupy = pytest.importorskip("cupy")
    recorded = types.SimpleNamespace(calls=[], made=[])
    of_key, current = {}, [0]

    def new_call(key, q, k, v, **options):
        recorded.made.append(types.SimpleNamespace(**options))

        def call(q, k, v):
            recorded.calls.append((q, k, v))
            return "o", "lse" if options["return_lse"] else None

        return of_key.setdefault(key, call)

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            recorded.calls.append(f"device {self.device}")
            self.before, current[0] = current[0], self.device

        def __exit__(self, *args):
            current[0] = self.before

    monkeypatch.setattr("sagepp.launch.find_call", of_key.get)
    monkeypatch.setattr("sagepp.launch.new_call", new_call)
    monkeypatch.setattr(cupy.cuda, "Device", Device)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: current[0])
    return recorded


def on_gpu(shape, dtype, device=0, address=0x7F0000000000):
    """A `cupy.ndarray` that owns nothing."""
    import cupy

    memory = cupy.cuda.UnownedMemory(address, 1 << 40, None, device)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


def gpu_arrays(devices=(0, 0, 0), dtype=np.float16):
    return [on_gpu(x.shape, dtype, device) for x, device in zip(arrays(), devices)]


@pytest.mark.parametrize("dtype", [np.float16, BF16])
def test_a_call_gets_the_arrays_and_is_made_of_the_options(launch, dtype):
    q, k, v = gpu_arrays(dtype=dtype)
    assert sagepp.attention(q, k, v, return_lse=True, kernel="mma", is_causal=True) == ("o", "lse")
    assert launch.calls[0][0] is q and launch.calls[0][1] is k and launch.calls[0][2] is v
    assert vars(launch.made[0]) == dict(
        tensor_layout="HND", is_causal=True, sm_scale=0.25, return_lse=True, causal_alignment="bottom-right",
        smooth_k=True, kernel="mma")


def test_a_call_is_made_once_for_each_geometry_and_choice_of_options(launch):
    q, k, v = gpu_arrays()
    nhd = [x.transpose(0, 2, 1, 3) for x in (q, k, v)]
    odd = on_gpu(q.shape, q.dtype, address=0x7F0000000002)  # not aligned to 16 bytes
    different = [
        lambda: sagepp.attention(q, k, v),
        lambda: sagepp.attention(*nhd, "NHD"),
        lambda: sagepp.attention(odd, k, v),
        lambda: sagepp.attention(q[:, :, :2], k, v),
        lambda: sagepp.attention(q, k[:, :, :2], v[:, :, :2]),
        lambda: sagepp.attention(*gpu_arrays(dtype=BF16)),
        lambda: sagepp.attention(*gpu_arrays(devices=(1, 1, 1))),
        lambda: sagepp.attention(q, k, v, return_lse=True),
        lambda: sagepp.attention(q, k, v, is_causal=True),
        lambda: sagepp.attention(q, k, v, is_causal=True, causal_alignment="top-left"),
        lambda: sagepp.attention(q, k, v, sm_scale=0.5),
        lambda: sagepp.attention(q, k, v, smooth_k=False),
        lambda: sagepp.attention(q, k, v, kernel="wgmma_fast"),
    ]
    for _ in range(2):
        for call in different:
            call()
    assert len(launch.made) == len(different)


def test_gpu_arrays_are_computed_on_their_own_device(launch):
    q, k, v = gpu_arrays(devices=(1, 1, 1))
    sagepp.attention(q, k, v)
    assert launch.calls[0] == "device 1" and launch.calls[1][0] is q


@pytest.mark.parametrize("devices, name", [((0, 1, 0), "k"), ((0, 0, 1), "v")])
def test_two_devices_are_named(launch, devices, name):
    with pytest.raises(ValueError, match=f"{name} is on GPU 1, but q is on GPU 0"):
        sagepp.attention(*gpu_arrays(devices))
    assert not launch.calls


def test_odd_addresses_are_refused(launch):
    q, k, v = gpu_arrays()
    with pytest.raises(ValueError, match="odd address"):
        sagepp.attention(q, on_gpu(k.shape, k.dtype, address=0x7F0000000001), v)


def test_numpy_and_cupy_do_not_mix(launch):
    q, k, v = arrays()
    with pytest.raises(TypeError, match="v is a cupy.ndarray, but q is a numpy.ndarray"):
        sagepp.attention(q, k, on_gpu(v.shape, v.dtype))


def test_shapes_of_gpu_arrays_are_checked(launch):
    q, k, v = gpu_arrays()
    with pytest.raises(ValueError, match="v has seq_len 6"):
        sagepp.attention(q, k, v[:, :, :6])
    assert not launch.calls


@pytest.fixture
def gpu(monkeypatch):
    """Stands in for the driver and what of CuPy needs one.

    `stream`: the current one. `launches`: for each the configuration. `status`: what they return, in turn, then
    success. `counters`: memory for counters that has been made. `capture_mode`: of the thread. `clearing`: what happens
    to the stream that clears counters of captured calls.
    """
    cupy = pytest.importorskip("cupy")
    from cupy_backends.cuda.api import driver as cupy_driver

    from sagepp import driver, jit, launch

    stream = types.SimpleNamespace(ptr=0, is_capturing=lambda: False)
    stand_in = types.SimpleNamespace(stream=stream, launches=[], status=[], counters=[], capture_mode=0, clearing=[])
    next_address = iter(range(0x100000000, 0x200000000, 0x1000000))

    def launch_kernel_ex(config, function, arguments, extra):
        config = driver._Config.from_buffer_copy(driver._Config.from_address(config))
        stand_in.launches.append(config)
        return stand_in.status.pop(0) if stand_in.status else 0

    def exchange_capture_mode(address):
        mode = ctypes.c_int.from_address(address)
        mode.value, stand_in.capture_mode = stand_in.capture_mode, mode.value
        return 0

    class Clearing:
        def __enter__(self):
            stand_in.clearing.append(("begin", stand_in.capture_mode, len(stand_in.counters)))

        def __exit__(self, *exception):
            stand_in.clearing.append(("end", stand_in.capture_mode, len(stand_in.counters)))

        def synchronize(self):
            stand_in.clearing.append(("synchronize", stand_in.capture_mode, len(stand_in.counters)))

    def check_status(status):
        raise RuntimeError(f"status {status}")

    def new_counters(self):
        stand_in.counters.append(cupy.cuda.alloc(self.counters.bytes))
        return stand_in.counters[-1]

    kernel = types.SimpleNamespace(kernel=types.SimpleNamespace(ptr=1))
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda: stand_in.stream)
    monkeypatch.setattr(cupy.cuda, "alloc", lambda size: on_gpu(size, np.uint8, address=next(next_address)).data)
    monkeypatch.setattr(cupy.cuda.runtime, "setDevice", lambda device: None)
    monkeypatch.setattr(cupy_driver, "check_status", check_status)
    functions = {("cuLaunchKernelEx", 4): launch_kernel_ex,
                 ("cuThreadExchangeStreamCaptureMode", 1): exchange_capture_mode}
    monkeypatch.setattr(driver, "_function", lambda *key: functions[key])
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    monkeypatch.setattr(launch, "_stream_of_clearing", lambda device: Clearing())
    monkeypatch.setattr(launch, "_num_sms", lambda device: 132)
    monkeypatch.setattr(launch.Launch, "new_counters", new_counters)
    monkeypatch.setattr(jit, "arch_of", lambda device: "sm_90a")
    monkeypatch.setattr(jit, "get_kernel", lambda *args, **options: kernel)
    with cupy.cuda.using_allocator(cupy.cuda.alloc):
        yield stand_in


def call_of(q, k, v, tensor_layout="HND", kernel=None):
    from sagepp import launch

    return launch.Call(q, k, v, tensor_layout=tensor_layout, is_causal=True, sm_scale=0.25, return_lse=True,
                       causal_alignment="bottom-right", smooth_k=True, kernel=kernel)


@pytest.mark.parametrize("tensor_layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", [np.float16, BF16])
def test_a_call_returns_a_contiguous_output_in_the_callers_layout(gpu, tensor_layout, dtype):
    """What it hands to the driver: the addresses of the arrays, and strides as (b, h, s)."""
    q, k, v = gpu_arrays(dtype=dtype)  # (2, 4, 5, 16) and (2, 2, 7, 16)
    if tensor_layout == "NHD":  # not contiguous
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    call = call_of(q, k, v, tensor_layout)
    o, lse = call(q, k, v)
    assert o.shape == q.shape and o.dtype == dtype and o.flags.c_contiguous
    assert lse.shape == (2, 4, 5) and lse.dtype == np.float32
    assert len(gpu.launches) == 2
    geometry, arguments = call._launch.geometry, call._launch._arguments
    assert list(arguments[:5]) == [x.data.ptr for x in (q, k, v, o, lse)]
    assert (geometry.batch, geometry.num_heads_q, geometry.num_heads_kv) == (2, 4, 2)
    assert (geometry.seq_q, geometry.seq_kv, geometry.head_dim) == (5, 7, 16)
    contiguous = [(320, 80, 16), (224, 112, 16), (224, 112, 16)]
    assert geometry.strides == (*contiguous, contiguous[0] if tensor_layout == "HND" else (320, 16, 64))


@pytest.mark.parametrize("kernel, early", [("wgmma", 1), ("mma", 0)])
def test_what_the_driver_gets(gpu, kernel, early):
    """CUlaunchConfig and CUlaunchAttribute of cuda.h, 56 and 72 bytes; attribute 6 is programmatic serialization."""
    from sagepp import driver, launch

    assert ctypes.sizeof(driver._Config) == 56 and driver._Config.stream.offset == 32
    assert ctypes.sizeof(driver._Attribute) == 72 and driver._Attribute.value.offset == 8
    gpu.stream.ptr = 0x1234
    call = call_of(*gpu_arrays(), kernel=kernel)
    call(*gpu_arrays())
    quantize, attention = gpu.launches
    assert quantize.stream == attention.stream == 0x1234
    assert tuple(quantize.block) == (128, 1, 1) and tuple(attention.block) == (call._launch.plan.num_warps * 32, 1, 1)
    assert tuple(attention.grid) == ((8, 1, 1) if kernel == "wgmma" else (1, 4, 2))
    assert (quantize.shared_bytes, attention.shared_bytes) == (0, launch.attention_shared_bytes(call._launch.plan))
    assert (quantize.num_attributes, attention.num_attributes) == (0, early)
    assert attention.attributes[0].id == 6 and attention.attributes[0].value == 1


def test_what_the_driver_gets_where_heads_are_late(gpu, monkeypatch):
    """Late codes between the two, on three SMs; both that follow start early."""
    from sagepp import launch, schedule

    monkeypatch.setattr(schedule, "late_heads", lambda geometry, plan, ctas: schedule.Late(1, 3))
    call = call_of(*gpu_arrays(), kernel="wgmma")
    call(*gpu_arrays())
    quantize, late_codes, attention = gpu.launches
    defines = dict(launch.late_defines(call._launch.plan))
    assert tuple(late_codes.grid) == (3, 1, 1) and tuple(late_codes.block) == (defines["LATE_THREADS"], 1, 1)
    assert late_codes.shared_bytes == defines["LATE_SHARED_BYTES"]
    assert (quantize.num_attributes, late_codes.num_attributes, attention.num_attributes) == (0, 1, 1)
    gpu.status[:] = [0, 1]
    with pytest.raises(RuntimeError, match="status 1"):
        call(*gpu_arrays())
    assert len(gpu.launches) == 5 and not call._counters


def test_a_stream_keeps_its_counters(gpu):
    arrays = gpu_arrays()
    call = call_of(*arrays)
    arguments = call._launch._arguments

    def made_by(ptr, capturing=False):
        """Counters that a call makes, and the address of those that it uses."""
        gpu.stream.ptr, gpu.stream.is_capturing = ptr, lambda: capturing
        before = len(gpu.counters)
        result = call(*arrays)
        return len(gpu.counters) - before, int(arguments[5]), result

    new, of_default, _ = made_by(0)
    assert new == 1 and of_default == gpu.counters[0].ptr
    assert made_by(0)[:2] == (0, of_default)
    new, of_stream, _ = made_by(8)
    assert new == 1 and of_stream != of_default
    captured = [made_by(8, capturing=True) for _ in range(2)]
    assert [new for new, _, _ in captured] == [1, 1]
    assert len({of_default, of_stream, *(address for _, address, _ in captured)}) == 4
    assert made_by(8)[:2] == (0, of_stream) and made_by(0)[:2] == (0, of_default)


def test_counters_of_a_captured_call_are_cleared_by_a_stream_that_is_not_captured(gpu):
    """While the thread may get memory, and before the launches."""
    arrays = gpu_arrays()
    call = call_of(*arrays)
    gpu.stream.ptr, gpu.stream.is_capturing = 8, lambda: True
    call(*arrays)
    assert gpu.clearing == [("begin", 2, 0), ("end", 2, 1), ("synchronize", 2, 1)] and gpu.capture_mode == 0
    assert len(gpu.launches) == 2 and call._launch._arguments[5] == gpu.counters[0].ptr
    gpu.stream.is_capturing = lambda: False
    call(*arrays)
    assert len(gpu.clearing) == 3


@pytest.mark.parametrize("status", [[1], [0, 1]], ids=["quantize", "attention"])
def test_counters_of_a_failed_launch_are_not_used_again(gpu, status):
    arrays = gpu_arrays()
    call = call_of(*arrays)
    call(*arrays)
    gpu.status[:] = status
    with pytest.raises(RuntimeError, match="status 1"):
        call(*arrays)
    assert len(gpu.counters) == 1
    call(*arrays)
    assert len(gpu.counters) == 2


def test_a_repeated_call_costs_microseconds_of_checks(launch, monkeypatch):
    """The fastest of many, so that a busy machine does not fail it."""
    monkeypatch.setattr("sagepp.launch.new_call", None)
    monkeypatch.setattr("sagepp.launch.find_call", lambda key: lambda q, k, v: (q, None) if hash(key) else None)
    q, k, v = gpu_arrays()
    best = min(timeit.repeat(lambda: sagepp.attention(q, k, v, is_causal=True), number=100, repeat=30))
    assert best / 100 < 30e-6
