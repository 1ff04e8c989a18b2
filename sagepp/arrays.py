"""Arrays of any library in, the same library out, without a copy and on the caller's stream.

Two libraries are native: what arrives as NumPy is computed on the CPU, what arrives as CuPy on its
GPU. The others are viewed as one of the two and the result is handed back to them:

=========================================  ================================  =====================
given                                      read through                      returned through
=========================================  ================================  =====================
PyTorch, JAX on a GPU                      DLPack                            DLPack
PyTorch, JAX on the CPU                    a NumPy view                      `from_numpy`, `device_put`
Numba                                      ``__cuda_array_interface__``      the same
anything with that interface               the same                          CuPy
=========================================  ================================  =====================

No library is imported that the caller has not imported already, but for CuPy when a GPU array of
another library is given. Sources: the Python specification of DLPack; the CUDA Array Interface,
version 3, chapter "Synchronization".
"""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any

import ml_dtypes
import numpy as np

NUMPY, CUPY, TORCH, JAX, NUMBA, CUDA = "NumPy", "CuPy", "PyTorch", "JAX", "Numba", "CUDA"

ACCEPTED = "a CuPy, NumPy, JAX, PyTorch or Numba array, or an object with __cuda_array_interface__"

#: (top-level package, class name) of a class in the array's MRO -> library.
_CLASSES = {
    ("numpy", "ndarray"): NUMPY,
    ("cupy", "ndarray"): CUPY,
    ("torch", "Tensor"): TORCH,
    ("jaxlib", "ArrayImpl"): JAX,
    ("jax", "Tracer"): "JAX tracer",
    ("numba", "DeviceNDArrayBase"): NUMBA,
    ("numba_cuda", "DeviceNDArrayBase"): NUMBA,
}

# `DLDeviceType` (dlpack.h).
_DL_CPU, _DL_CUDA, _DL_CUDA_MANAGED = 1, 2, 13

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@functools.lru_cache(maxsize=None)
def _library_of_class(cls: type) -> str | None:
    for base in cls.__mro__:
        package = base.__module__.partition(".")[0]
        if (package, base.__name__) in _CLASSES:
            return _CLASSES[package, base.__name__]
    return None


def library_of(name: str, array: Any) -> str:
    """The library of `array`, the argument called `name`; TypeError where it is not an array."""
    library = _library_of_class(type(array))
    if library is None and hasattr(array, "__cuda_array_interface__"):
        return CUDA
    if library is None:
        raise TypeError(f"{name} is a {type_name(array)}; allowed: {ACCEPTED}")
    if library == "JAX tracer":
        raise TypeError(f"{name} is a JAX tracer; sagepp.attention takes concrete arrays only: "
                        "call it outside jax.jit, jax.vmap and jax.grad")
    return library


def common_library(q: Any, k: Any, v: Any) -> str:
    """The one library that q, k and v belong to; TypeError where there is none."""
    library = library_of("q", q)
    for name, array in (("k", k), ("v", v)):
        if type(array) is not type(q) and library_of(name, array) != library:
            raise TypeError(f"{name} is a {type_name(array)}, but q is a {type_name(q)}; "
                            "q, k and v must be arrays of one library")
    return library


def type_name(value: Any) -> str:
    """`package.Class`, as the user writes it: `cupy.ndarray`, `torch.Tensor`, `list`."""
    cls = type(value)
    package = cls.__module__.partition(".")[0]
    return cls.__qualname__ if package == "builtins" else f"{package}.{cls.__qualname__}"


def to_native(name: str, array: Any, library: str) -> Any:
    """View `array` (of a library that is not native) as a `cupy.ndarray` or a `numpy.ndarray`.

    Call it inside :func:`caller_stream`. TypeError, naming the argument, where the library cannot
    export it: an unsupported dtype, a sparse or a sharded array.
    """
    try:
        return _IMPORT[library](array)
    except (TypeError, ValueError, RuntimeError, NotImplementedError, BufferError) as error:
        raise TypeError(f"{name}, a {type_name(array)}, cannot be read: {error}") from error


def from_native(array: Any, like: Any, library: str) -> Any:
    """Hand `array`, a `cupy.ndarray` or a `numpy.ndarray`, to the library (and device) of `like`."""
    return _EXPORT[library](array, like)


@contextlib.contextmanager
def caller_stream(array: Any, library: str):
    """Make the stream that the caller works on CuPy's current stream.

    PyTorch has a current stream of its own. JAX and Numba have none: their arrays are ordered
    against CuPy's current stream when they are imported and exported.
    """
    if library == TORCH and array.is_cuda:
        cupy = import_cupy()
        stream = sys.modules["torch"].cuda.current_stream(array.device).cuda_stream
        with cupy.cuda.Device(array.device.index):
            with cupy.cuda.ExternalStream(stream) if stream else cupy.cuda.Stream.null:
                yield
    else:
        yield


def import_cupy():
    """The module `cupy`; ImportError with the command that installs it."""
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            "sagepp needs CuPy to compute on a GPU: pip install 'sagepp[cuda12]' "
            "or, for CUDA 13 alone, 'sagepp[cuda13]'") from error
    return cupy


def _import_torch(tensor):
    tensor = tensor.detach()
    if tensor.is_cuda:
        return import_cupy().from_dlpack(tensor)
    if tensor.device.type != "cpu":
        raise TypeError(f"it is on {tensor.device}; allowed: cuda, cpu")
    torch = sys.modules["torch"]
    if tensor.dtype == torch.bfloat16:  # unknown to Tensor.numpy()
        return tensor.view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy()


def _export_torch(array, like):
    torch = sys.modules["torch"]
    if not isinstance(array, np.ndarray):
        return torch.from_dlpack(array)
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _import_jax(array):
    device_type = int(array.__dlpack_device__()[0])
    if device_type == _DL_CPU:
        return np.asarray(array)
    if device_type in (_DL_CUDA, _DL_CUDA_MANAGED):
        return import_cupy().from_dlpack(array)
    raise TypeError(f"it is on {array.devices()}; allowed: an NVIDIA GPU, the CPU")


def _export_jax(array, like):
    jax = sys.modules["jax"]
    if isinstance(array, np.ndarray):
        return jax.device_put(array, next(iter(like.devices())))
    return jax.dlpack.from_dlpack(array)


class _Unordered:
    """The CUDA array interface of `owner` without its stream, which CuPy would synchronise with."""

    def __init__(self, owner: Any, interface: dict):
        self.owner = owner
        self.__cuda_array_interface__ = {**interface, "stream": None}


def _import_cuda_array(array):
    cupy = import_cupy()
    interface = array.__cuda_array_interface__
    stream = interface.get("stream")
    if stream is not None:
        device = cupy.cuda.Device(cupy.cuda.runtime.pointerGetAttributes(interface["data"][0]).device)
        with device:
            event = cupy.cuda.Event(disable_timing=True)
            event.record(cupy.cuda.ExternalStream(stream))
            cupy.cuda.get_current_stream().wait_event(event)
    return cupy.asarray(_Unordered(array, interface))


def _export_numba(array, like):
    return sys.modules["numba"].cuda.as_cuda_array(array)


_IMPORT = {TORCH: _import_torch, JAX: _import_jax, NUMBA: _import_cuda_array,
           CUDA: _import_cuda_array}
_EXPORT = {TORCH: _export_torch, JAX: _export_jax, NUMBA: _export_numba,
           CUDA: lambda array, like: array}
