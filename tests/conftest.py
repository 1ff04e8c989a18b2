"""Hypothesis profiles, and the tests that need a GPU skip themselves with a reason.

`HYPOTHESIS_PROFILE` picks the profile: "ci" (default: the same examples on every run) or "gpu" (new
examples on every run, and more of them).
"""

import functools
import os

import hypothesis
import pytest

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("gpu", deadline=None, print_blob=True, max_examples=200)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@functools.lru_cache(maxsize=None)
def no_gpu_reason():
    """Why the tests marked `gpu` cannot run here; None where they can."""
    try:
        import cupy
    except ImportError:
        return "no CuPy"
    runtime = cupy.cuda.runtime
    if not runtime.driverGetVersion():
        return "no CUDA driver"
    try:
        if not runtime.getDeviceCount():
            return "no device"
    except runtime.CUDARuntimeError as error:
        return f"no device: {error}"
    from sagepp import jit

    try:
        jit.arch_of(0)
    except RuntimeError as error:
        return str(error)
    return None


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and no_gpu_reason():
        pytest.skip(f"needs a GPU: {no_gpu_reason()}")
