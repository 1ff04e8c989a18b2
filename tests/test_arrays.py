"""Arrays of other libraries: the same library out, bits untouched, no copy, the caller's stream."""

import contextlib
import sys
import types

import ml_dtypes
import numpy as np
import pytest

import sagepp
from sagepp import arrays
from test_api import arrays as numpy_arrays
from test_api import reference  # noqa: F401

BF16 = np.dtype(ml_dtypes.bfloat16)


class CudaArray:
    """An array of no library, with the CUDA array interface alone."""

    def __init__(self, shape, stream=None):
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "<f2", "version": 3,
                                         "data": (0x7F0000000000, False), "stream": stream}


def test_libraries_are_told_apart_by_their_class():
    class Mine(np.ndarray):
        pass

    assert arrays.library_of("q", np.zeros(1)) == "NumPy"
    assert arrays.library_of("q", np.zeros(1).view(Mine)) == "NumPy"
    assert arrays.library_of("q", CudaArray((1,))) == "CUDA"


@pytest.mark.parametrize("value", [None, 1.0, "q", [1.0], np.float32(1), np.dtype("f4"), np])
def test_what_is_not_an_array_is_named(value):
    with pytest.raises(TypeError, match="^k is a .*; allowed: a CuPy, NumPy, JAX, PyTorch or Numba"):
        arrays.library_of("k", value)


def test_libraries_do_not_mix():
    with pytest.raises(TypeError, match="k is a test_arrays.CudaArray, but q is a numpy.ndarray"):
        arrays.common_library(np.zeros(1), CudaArray((1,)), np.zeros(1))


def test_numba_is_recognised_and_gets_its_own_arrays_back(monkeypatch):
    base = type("DeviceNDArrayBase", (), {"__module__": "numba.cuda.cudadrv.devicearray"})
    derived = type("DeviceNDArray", (base,), {"__module__": "numba.cuda.cudadrv.devicearray"})
    assert arrays.library_of("q", derived()) == "Numba"
    cuda = types.SimpleNamespace(as_cuda_array=lambda array: ("numba", array))
    monkeypatch.setitem(sys.modules, "numba", types.SimpleNamespace(cuda=cuda))
    assert arrays.from_native("o", None, "Numba") == ("numba", "o")


def test_without_cupy_a_gpu_array_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    q = CudaArray((1, 1, 1, 16))
    with pytest.raises(ImportError, match=r"pip install 'sagepp\[cuda12\]'"):
        sagepp.attention(q, q, q)


def test_the_stream_of_a_cuda_array_is_waited_for_not_synchronised_with(monkeypatch):
    cupy = pytest.importorskip("cupy")
    done = []
    event = types.SimpleNamespace(record=lambda stream: done.append(("record", stream)))
    current = types.SimpleNamespace(wait_event=lambda event: done.append("wait"))
    monkeypatch.setattr(cupy.cuda, "Event", lambda disable_timing: event)
    monkeypatch.setattr(cupy.cuda, "ExternalStream", lambda pointer: pointer)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda: current)
    monkeypatch.setattr(cupy.cuda, "Device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cupy.cuda.runtime, "pointerGetAttributes",
                        lambda pointer: types.SimpleNamespace(device=0))
    monkeypatch.setattr(cupy, "asarray", lambda array: array)
    given = CudaArray((2, 3), stream=7)
    view = arrays.to_native("q", given, "CUDA")
    assert done == [("record", 7), "wait"]
    assert view.__cuda_array_interface__["stream"] is None and view.owner is given
    assert view.__cuda_array_interface__["data"] == given.__cuda_array_interface__["data"]


def test_what_a_library_cannot_export_is_named(monkeypatch):
    cupy = pytest.importorskip("cupy")

    def asarray(array):
        raise ValueError("Unsupported dtype")

    monkeypatch.setattr(cupy, "asarray", asarray)
    with pytest.raises(TypeError, match="k, a test_arrays.CudaArray, cannot be read: Unsupported dtype"):
        arrays.to_native("k", CudaArray((1,)), "CUDA")


# --- PyTorch and JAX on the CPU --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_torch_on_the_cpu_is_viewed_and_comes_back(reference, dtype):  # noqa: F811
    torch = pytest.importorskip("torch")
    tensors = [torch.zeros(x.shape, dtype=getattr(torch, dtype)) for x in numpy_arrays()]
    tensors[0].requires_grad_()
    o, lse = sagepp.attention(*tensors, return_lse=True)
    assert isinstance(o, torch.Tensor) and o.dtype == tensors[0].dtype and o.shape == tensors[0].shape
    assert isinstance(lse, torch.Tensor) and lse.dtype == torch.float32
    assert o[0, 3, 2, 0].item() == 302
    k = reference.calls[0].k
    assert k.dtype == (BF16 if dtype == "bfloat16" else np.float16)
    if dtype != "float32":
        assert k.ctypes.data == tensors[1].data_ptr()


def test_torch_strides_arrive(reference):  # noqa: F811
    torch = pytest.importorskip("torch")
    packed = torch.zeros((2, 7, 3, 2, 16), dtype=torch.bfloat16)
    sagepp.attention(*(packed[:, :, i] for i in range(3)), tensor_layout="NHD")
    assert reference.calls[0].v.strides == (1344, 32, 192, 2)
    with pytest.raises(ValueError, match="q has a stride"):
        sagepp.attention(*[torch.zeros((1, 1, 8, 8), dtype=torch.float16).mT] * 3)


def test_torch_dtypes_and_devices_are_named(reference):  # noqa: F811
    torch = pytest.importorskip("torch")
    q, k, v = (torch.zeros(x.shape, dtype=torch.float16) for x in numpy_arrays())
    with pytest.raises(TypeError, match="q has dtype float64"):
        sagepp.attention(q.double(), k.double(), v.double())
    with pytest.raises(TypeError, match="k, a torch.Tensor, cannot be read.*meta"):
        sagepp.attention(q, k.to("meta"), v)
    with pytest.raises(TypeError, match="v, a torch.Tensor, cannot be read"):
        sagepp.attention(q, k, v.to_sparse())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_jax_on_the_cpu_is_viewed_and_comes_back(reference, dtype):  # noqa: F811
    jax = pytest.importorskip("jax")
    cpu = jax.devices("cpu")[0]
    inputs = [jax.device_put(jax.numpy.zeros(x.shape, dtype), cpu) for x in numpy_arrays()]
    o, lse = sagepp.attention(*inputs, return_lse=True)
    assert isinstance(o, jax.Array) and o.dtype == dtype and o.devices() == {cpu}
    assert isinstance(lse, jax.Array) and lse.dtype == "float32"
    assert reference.calls[0].q.dtype == (BF16 if dtype == "bfloat16" else np.float16)


def test_jax_tracers_are_refused(reference):  # noqa: F811
    jax = pytest.importorskip("jax")
    with pytest.raises(TypeError, match="q is a JAX tracer.*outside jax.jit"):
        jax.jit(sagepp.attention)(*(jax.numpy.zeros(x.shape, "float16") for x in numpy_arrays()))


# --- on a GPU --------------------------------------------------------------------------------------


@pytest.fixture
def gpu_inputs():
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(1)
    return [cupy.asarray(rng.standard_normal(x.shape).astype(np.float16)) for x in numpy_arrays()]


def expected_of(inputs, dtype):
    """Output and LSE of the same call on CuPy arrays."""
    o, lse = sagepp.attention(*(x.astype(dtype) for x in inputs), is_causal=True, return_lse=True)
    return o.astype(np.float32).get(), lse.get()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_on_a_gpu(gpu_inputs, dtype):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch without CUDA")
    tensors = [torch.from_dlpack(x).to(getattr(torch, dtype)) for x in gpu_inputs]
    expected = expected_of(gpu_inputs, BF16 if dtype == "bfloat16" else np.float16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        o, lse = sagepp.attention(*tensors, is_causal=True, return_lse=True)
    stream.synchronize()
    assert o.dtype == tensors[0].dtype and o.device == tensors[0].device
    assert (o.float().cpu().numpy() == expected[0]).all() and (lse.cpu().numpy() == expected[1]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_jax_on_a_gpu(gpu_inputs, dtype):
    jax = pytest.importorskip("jax")
    if not any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("JAX without CUDA")
    inputs = [jax.dlpack.from_dlpack(x).astype(dtype) for x in gpu_inputs]
    expected = expected_of(gpu_inputs, BF16 if dtype == "bfloat16" else np.float16)
    o, lse = sagepp.attention(*inputs, is_causal=True, return_lse=True)
    assert o.dtype == dtype and o.devices() == inputs[0].devices()
    assert (np.asarray(o, np.float32) == expected[0]).all() and (np.asarray(lse) == expected[1]).all()


@pytest.mark.gpu
def test_a_cuda_array_interface_on_a_gpu(gpu_inputs):
    class Wrapped:
        def __init__(self, array):
            self.array = array
            self.__cuda_array_interface__ = {**array.__cuda_array_interface__, "stream": 1}

    o, lse = sagepp.attention(*map(Wrapped, gpu_inputs), is_causal=True, return_lse=True)
    expected = expected_of(gpu_inputs, np.float16)
    assert (o.get() == expected[0]).all() and (lse.get() == expected[1]).all()


@pytest.mark.gpu
def test_numba_on_a_gpu(gpu_inputs):
    cuda = pytest.importorskip("numba.cuda")
    try:
        inputs = [cuda.as_cuda_array(x) for x in gpu_inputs]
    except Exception as error:
        pytest.skip(f"Numba cannot use this GPU: {error}")
    o = sagepp.attention(*inputs, is_causal=True)
    assert (o.copy_to_host() == expected_of(gpu_inputs, np.float16)[0]).all()
