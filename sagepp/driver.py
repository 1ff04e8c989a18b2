"""What CuPy cannot ask the CUDA driver for: launches with attributes, and exceptions from a capture's rules.

Of a launch everything but the stream is known beforehand, so it is one call of the driver with structures that are
there already ("CUDA Driver API", Execution Control).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
                ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)),
                ("num_attributes", ctypes.c_uint)]


_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_CAPTURE_MODE_RELAXED = 2  # CUstreamCaptureMode


@functools.lru_cache(maxsize=None)
def _function(name: str, parameters: int):
    """A function of the driver, of so many pointers."""
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    function = getattr(library, name)
    function.argtypes, function.restype = [ctypes.c_void_p] * parameters, ctypes.c_int
    return function


def _check(status: int) -> None:
    if status:
        from cupy_backends.cuda.api import driver

        driver.check_status(status)


class KernelLaunch:
    """One kernel, grid and array of argument pointers; called with a stream, it launches them there.

    `function` is a CUfunction, `arguments` the address of the pointers, which stay the caller's; `grid` has three
    dimensions, `threads` is the size of a CTA, `shared_bytes` its dynamic shared memory. An `early` kernel starts
    where CTAs of the one before it make room, once all of those have executed ``griddepcontrol.launch_dependents``;
    it reads nothing of theirs before ``griddepcontrol.wait``. Compute capability 9.0 and later.
    """

    def __init__(self, function: int, grid, threads: int, shared_bytes: int, arguments: int, *, early: bool):
        self._function, self._arguments = function, arguments
        self._attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self._config = _Config(grid=tuple(grid), block=(threads, 1, 1), shared_bytes=shared_bytes,
                               attributes=ctypes.pointer(self._attribute), num_attributes=int(early))
        self._config_address = ctypes.addressof(self._config)
        self._launch = _function("cuLaunchKernelEx", 4)

    def __call__(self, stream: int) -> None:
        self._config.stream = stream
        _check(self._launch(self._config_address, self._function, self._arguments, None))


@contextlib.contextmanager
def relaxed_capture():
    """While this thread captures a stream, in whatever mode: lets it get memory, and wait for a stream that is not
    captured, without spoiling the capture.
    """
    exchange, mode = _function("cuThreadExchangeStreamCaptureMode", 1), ctypes.c_int(_CAPTURE_MODE_RELAXED)
    _check(exchange(ctypes.addressof(mode)))
    try:
        yield
    finally:
        _check(exchange(ctypes.addressof(mode)))
