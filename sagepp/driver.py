"""Launches of kernels whose arguments lie in memory already: CuPy's, and one that CuPy does not have."""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """A kernel and everything that its launches have in common. Call it with a stream's address."""

    function: int
    grid: tuple[int, int, int]
    threads: int  #: a CTA
    shared_bytes: int  #: dynamic shared memory a CTA
    arguments: int  #: address of the arguments' addresses; the driver copies what they point at

    def __call__(self, stream: int) -> None:
        _driver().launchKernel(self.function, *self.grid, self.threads, 1, 1, self.shared_bytes, stream, self.arguments, 0)


class EarlyLaunch:
    """A `Launch` that starts when all CTAs of the kernel before it have started: "programmatic dependent launch" (CUDA
    programming guide). Both kernels are written for it (`griddepcontrol`, ptx.cuh). One thread at a time may use it."""

    def __init__(self, launch: Launch):
        self._attribute = _LaunchAttribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=(1,))
        self._config = _LaunchConfig(*launch.grid, launch.threads, 1, 1, launch.shared_bytes, None,
                                     ctypes.addressof(self._attribute), 1)
        self._launch = functools.partial(
            _library().cuLaunchKernelEx, ctypes.byref(self._config), ctypes.c_void_p(launch.function),
            ctypes.c_void_p(launch.arguments), None)

    def __call__(self, stream: int) -> None:
        self._config.stream = stream
        status = self._launch()
        if status:
            _driver().check_status(status)


@functools.lru_cache(maxsize=None)
def can_launch_early() -> bool:
    """Whether the driver can, also in a graph: CUDA 12.3."""
    return _runtime().driverGetVersion() >= 12030 and _library() is not None


def clear(address: int, num_bytes: int, stream: int) -> None:
    """Write zeros to GPU memory."""
    _runtime().memsetAsync(address, 0, num_bytes, stream)


_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _LaunchAttribute(ctypes.Structure):  # CUlaunchAttribute; the value is a union of 64 bytes
    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_char * 4), ("value", ctypes.c_int * 16)]


class _LaunchConfig(ctypes.Structure):  # CUlaunchConfig
    _fields_ = [(name, ctypes.c_uint) for name in (
        "grid_x", "grid_y", "grid_z", "threads_x", "threads_y", "threads_z", "shared_bytes")]
    _fields_ += [("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("num_attributes", ctypes.c_uint)]


@functools.lru_cache(maxsize=None)
def _library():
    """The driver's library; None where there is none, or one that is too old."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        library.cuLaunchKernelEx  # a lookup
    except (OSError, AttributeError):
        return None
    return library


@functools.lru_cache(maxsize=None)
def _driver():
    from cupy_backends.cuda.api import driver

    return driver


@functools.lru_cache(maxsize=None)
def _runtime():
    from cupy_backends.cuda.api import runtime

    return runtime
