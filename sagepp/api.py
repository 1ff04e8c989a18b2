"""The public call: check the arguments, bring them to one form, dispatch to the GPU or the CPU.

Every argument is checked here, before anything is launched, so that the layers below check nothing.
What a check finds out depends on shapes, strides and dtypes only and is remembered: a repeated call
pays for one dictionary lookup.
"""

from __future__ import annotations

import functools
import numbers
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from . import arrays, plan

LAYOUTS = ("HND", "NHD")
ALIGNMENTS = ("bottom-right", "top-left")
KERNELS = (None, *plan.KERNELS)
MAX_HEAD_DIM = 256

_DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
_FLOAT16, _, _FLOAT32 = _DTYPES


def attention(
    q: Any,
    k: Any,
    v: Any,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    *,
    causal_alignment: str = "bottom-right",
    smooth_k: bool = True,
    kernel: str | None = None,
) -> Any:
    """Softmax attention, ``softmax(sm_scale * q k^T) v``, in INT8 and FP8 (SageAttention2++).

    Q and K are quantised to INT8, P and V to FP8 (E4M3), and the second product is accumulated in
    FP16 by the tensor core and promoted to FP32 at short intervals (arXiv 2505.21136; the exact
    sequence of roundings is `docs/numerics.md`). For inference: there is no backward pass.

    The arrays come from CuPy, PyTorch, JAX, Numba or any object with ``__cuda_array_interface__``,
    and so does the result; it runs on the caller's current stream, without synchronising and
    without writing to its inputs. NumPy arrays, and PyTorch and JAX arrays on the CPU, are computed
    by the NumPy reference: the same function, thousands of times slower.

    Parameters
    ----------
    q : array, (batch, num_heads, seq_len, head_dim) for "HND", (batch, seq_len, num_heads, head_dim)
        for "NHD"
        float16, bfloat16 or float32. Any strides that have unit stride in the last dimension, no copy
        is made. `head_dim` is 1 to 256; which of them a GPU supports is for the kernel to say.
        float32 is a convenience that costs a pass over each tensor: q, k and v are rounded to
        float16 first (a value beyond 65504 becomes infinite: convert such tensors to bfloat16
        instead), and the result is widened to float32.
    k, v : array
        Of the same batch, head_dim and dtype as `q`, with a sequence length and a number of heads of
        their own; q's number of heads is a multiple of it (grouped-query attention: query heads
        ``i * group`` to ``(i + 1) * group - 1`` use key/value head ``i``).
    tensor_layout : {"HND", "NHD"}
        The order of heads and sequence in q, k, v and the result.
    is_causal : bool
        Query ``i`` sees the keys up to ``i`` (`causal_alignment` says from which end).
    sm_scale : float, optional
        Factor of the scores, positive. Default ``head_dim ** -0.5``.
    return_lse : bool
        Return ``(o, lse)`` instead of ``o``.
    causal_alignment : {"bottom-right", "top-left"}
        For a causal problem whose sequence lengths differ. "bottom-right": the last query sees every
        key, as with a KV cache. "top-left": the first query sees the first key alone.
    smooth_k : bool
        Subtract the mean key of each head before quantising: the softmax does not change, the
        rounding error does where K has channel offsets.
    kernel : {None, "mma", "mma_fp16", "wgmma", "wgmma_fast"}
        Force a kernel, for tests and measurements. None takes the fastest for the GPU.

    Returns
    -------
    o : array
        Shape, layout, dtype, library and device of `q`; contiguous. A row that sees no key is 0.
    lse : array, (batch, num_heads, seq_len), float32
        Only with `return_lse`. Natural logarithm of the sum of ``exp(sm_scale * q k^T)`` over the
        keys that the row sees; ``-inf`` where it sees none.

    Raises
    ------
    TypeError, ValueError
        Before anything is launched, naming the argument, what it was and what is allowed.
    ImportError
        Where a GPU array is given and CuPy or NVRTC is missing.
    RuntimeError
        Where the GPU is not supported, naming it and what is.
    """
    library = arrays.common_library(q, k, v)
    return_lse = _flag("return_lse", return_lse)
    options = _Options(
        _choice("tensor_layout", tensor_layout, LAYOUTS),
        _flag("is_causal", is_causal),
        sm_scale if sm_scale is None else _real("sm_scale", sm_scale),
        return_lse,
        _choice("causal_alignment", causal_alignment, ALIGNMENTS),
        _flag("smooth_k", smooth_k),
        _choice("kernel", kernel, KERNELS),
    )
    if library == arrays.CUPY:
        o, lse = _on_gpu(q, k, v, options)
    elif library == arrays.NUMPY:
        o, lse = _on_cpu(q, k, v, options)
    else:
        with arrays.caller_stream(q, library):
            native = [arrays.to_native(name, array, library)
                      for name, array in (("q", q), ("k", k), ("v", v))]
            on_cpu = _same_side(native)
            o, lse = (_on_cpu if on_cpu else _on_gpu)(*native, options)
            o = arrays.from_native(o, q, library)
            if return_lse:
                lse = arrays.from_native(lse, q, library)
    return (o, lse) if return_lse else o


class _Options(NamedTuple):
    """The checked arguments other than the arrays; names as in :func:`attention`."""

    tensor_layout: str
    is_causal: bool
    sm_scale: float | None
    return_lse: bool
    causal_alignment: str
    smooth_k: bool
    kernel: str | None


def _on_gpu(q, k, v, options):
    """`q, k, v` are `cupy.ndarray`. Returns `(o, lse or None)`."""
    cupy, launch = _gpu_modules()
    q_data, k_data, v_data = q.data, k.data, v.data
    device = q_data.device_id
    if k_data.device_id != device or v_data.device_id != device:
        _reject_devices(device, k_data.device_id, v_data.device_id)
    if cupy.cuda.runtime.getDevice() != device:
        with cupy.cuda.Device(device):
            return _on_gpu(q, k, v, options)
    addresses = q_data.ptr | k_data.ptr | v_data.ptr
    if addresses & 1:
        raise ValueError("q, k or v starts at an odd address; allowed: multiples of the item size")
    described = (q.shape, q.strides, q.dtype, k.shape, k.strides, k.dtype, v.shape, v.strides, v.dtype)
    key = (device, addresses & 15 == 0, described, options)
    call = launch.find_call(key)
    if call is None:
        sm_scale, widen = _check_arrays(*described, options.tensor_layout, options.sm_scale)
        if widen:
            o, lse = _on_gpu(*(x.astype(_FLOAT16) for x in (q, k, v)), options)
            return o.astype(_FLOAT32), lse
        call = launch.new_call(key, q, k, v, **options._replace(sm_scale=sm_scale)._asdict())
    return call(q, k, v)


@functools.lru_cache(maxsize=None)
def _gpu_modules():
    import cupy

    from . import launch

    return cupy, launch


def _on_cpu(q, k, v, options):
    """`q, k, v` are `numpy.ndarray`. Returns `(o, lse)`."""
    sm_scale, widen = _check_arrays(
        q.shape, q.strides, q.dtype, k.shape, k.strides, k.dtype, v.shape, v.strides, v.dtype,
        options.tensor_layout, options.sm_scale)
    from .reference.attention import attention as reference

    if widen:
        q, k, v = q.astype(_FLOAT16), k.astype(_FLOAT16), v.astype(_FLOAT16)
    if options.tensor_layout == "NHD":
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    o, lse = reference(
        q, k, v,
        is_causal=options.is_causal, causal_alignment=options.causal_alignment,
        sm_scale=sm_scale, smooth_k=options.smooth_k,
        plan=plan.default_cpu_plan(q.shape[3], options.kernel))
    if options.tensor_layout == "NHD":
        o = np.ascontiguousarray(o.transpose(0, 2, 1, 3))
    return o.astype(_FLOAT32) if widen else o, lse


# --- checks ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _check_arrays(q_shape, q_strides, q_dtype, k_shape, k_strides, k_dtype,
                  v_shape, v_strides, v_dtype, tensor_layout, sm_scale) -> tuple[float, bool]:
    """Check the three arrays against each other.

    Returns the softmax scale, and whether the arrays are float32, to be rounded to float16.
    """
    order = ("batch, num_heads, seq_len, head_dim" if tensor_layout == "HND"
             else "batch, seq_len, num_heads, head_dim")
    for name, shape, strides, dtype in (("q", q_shape, q_strides, q_dtype),
                                        ("k", k_shape, k_strides, k_dtype),
                                        ("v", v_shape, v_strides, v_dtype)):
        if len(shape) != 4:
            raise ValueError(f"{name} has shape {shape}; allowed for {tensor_layout!r}: 4 dimensions, "
                             f"({order})")
        if 0 in shape:
            raise ValueError(f"{name} has shape {shape}, ({order}); every dimension must be at least 1")
        if dtype not in _DTYPES:
            raise TypeError(f"{name} has dtype {dtype}; allowed: float16, bfloat16, and float32 "
                            "(which is rounded to float16)")
        if dtype != q_dtype:
            raise TypeError(f"{name} has dtype {dtype}, but q has {q_dtype}; they must be equal")
        if shape[3] > 1 and strides[3] != dtype.itemsize:
            raise ValueError(f"{name} has a stride of {strides[3]} bytes in its last dimension; allowed: "
                             f"{dtype.itemsize}, the item size (make it so with ascontiguousarray)")
        if any(stride % dtype.itemsize for stride in strides):
            raise ValueError(f"{name} has strides {strides} in bytes; allowed: multiples of the item "
                             f"size, {dtype.itemsize}")

    heads, seq = (1, 2) if tensor_layout == "HND" else (2, 1)
    head_dim = q_shape[3]
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"q has head_dim {head_dim}, shape {q_shape}; allowed: 1 to {MAX_HEAD_DIM}")
    for name, shape in (("k", k_shape), ("v", v_shape)):
        for what, axis in (("batch", 0), ("head_dim", 3)):
            if shape[axis] != q_shape[axis]:
                raise ValueError(f"{name} has {what} {shape[axis]}, shape {shape}, but q has "
                                 f"{q_shape[axis]}, shape {q_shape}; they must be equal")
    for what, axis in (("num_heads", heads), ("seq_len", seq)):
        if v_shape[axis] != k_shape[axis]:
            raise ValueError(f"v has {what} {v_shape[axis]}, shape {v_shape}, but k has "
                             f"{k_shape[axis]}, shape {k_shape}; they must be equal")
    if q_shape[heads] % k_shape[heads]:
        raise ValueError(f"q has num_heads {q_shape[heads]}, shape {q_shape}, but k has "
                         f"{k_shape[heads]}, shape {k_shape}; q's must be a multiple of k's")

    widen = q_dtype == _FLOAT32
    if sm_scale is None:
        return head_dim ** -0.5, widen
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.float32(sm_scale)
    if not 0 < rounded < np.inf:
        raise ValueError(f"sm_scale is {sm_scale!r}; allowed: None, or a positive number that is "
                         "finite and not zero in float32")
    return sm_scale, widen


def _choice(name: str, value: Any, allowed: tuple) -> Any:
    """`value`, which must be one of `allowed`: strings, perhaps None."""
    if value is None or type(value) is str:
        if value in allowed:
            return value
    elif isinstance(value, str):
        return _choice(name, str(value), allowed)
    else:
        raise TypeError(f"{name} is a {arrays.type_name(value)}; allowed: {_join(allowed)}")
    raise ValueError(f"{name} is {value!r}; allowed: {_join(allowed)}")


def _flag(name: str, value: Any) -> bool:
    """`value`, which must be a bool of Python or NumPy."""
    if value is True or value is False:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(f"{name} is {value!r}, a {arrays.type_name(value)}; allowed: True, False")


def _real(name: str, value: Any) -> float:
    """`value`, which must be a real number of Python or NumPy, as a float."""
    if type(value) is float:
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # an int beyond float64
            return float("inf")
    raise TypeError(f"{name} is a {arrays.type_name(value)}; allowed: None, or a positive real number")


def _join(allowed: tuple) -> str:
    return ", ".join(repr(value) for value in allowed)


def _same_side(native: list) -> bool:
    """True where all of q, k, v are on the CPU, False where all are on a GPU."""
    on_cpu = [isinstance(array, np.ndarray) for array in native]
    for name, side in zip("kv", on_cpu[1:]):
        if side != on_cpu[0]:
            place = {True: "the CPU", False: "a GPU"}
            raise ValueError(f"{name} is on {place[side]}, but q is on {place[on_cpu[0]]}; "
                             "q, k and v must be on one device")
    return on_cpu[0]


def _reject_devices(q_device: int, k_device: int, v_device: int) -> None:
    name, device = ("k", k_device) if k_device != q_device else ("v", v_device)
    raise ValueError(f"{name} is on GPU {device}, but q is on GPU {q_device}; "
                     "q, k and v must be on one device")
