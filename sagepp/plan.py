"""Problem + architecture -> kernel, tile sizes and numerical parameters. Pure Python, no GPU.

A :class:`Plan` is everything that decides the bits of a result besides the inputs: the kernels are
compiled from it and the reference is run with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")

#: Architectures whose tensor cores multiply E4M3 with FP16 accumulators natively through `mma.sync`.
_NATIVE_FP8_MMA = ("sm_89", "sm_120a")

FP16_MAX = 65504
#: Largest P that enters a product: E4M3 code 111, and 2 for FP16 (docs/numerics.md, step 7).
P_MAX = {"e4m3": 120.0, "f16": 2.0}


@dataclass(frozen=True)
class Plan:
    """One specialisation of the attention kernel (docs/numerics.md)."""

    arch: str  #: NVRTC target, for example "sm_90a"
    kernel: str  #: "mma" (mma.sync) or "wgmma"
    head_dim: int  #: padded: 64, 128 or 256
    channels: int  #: of those, what the kernel computes; the others are 0
    block_m: int  #: query rows of a CTA
    block_n: int  #: keys of a tile
    promote_every: int  #: tiles of a promotion interval
    v_dtype: str  #: "e4m3" or "f16": the type of P and V
    p_form: str  #: "ex2", "code" or "chord": how P is formed (step 6)
    v_max: float  #: top of V's range
    row_sum_unit: float  #: value of the column whose product with P is the row sum
    sample: bool  #: whether a sample stands for all keys in the statistics of long K and V
    num_warps: int
    stages: int

    @property
    def aim(self) -> int:
        """log2 of P at the bound."""
        return 4 if self.v_dtype == "e4m3" else -4

    @property
    def mma_behaviour(self) -> tuple[str, str, str, str]:
        """Key of the P V instruction in `reference/tensor_core.py`."""
        return (self.arch, "wgmma" if self.kernel == "wgmma" else "mma.sync", self.v_dtype, "f16")


def v_range(interval: int, v_dtype: str) -> float:
    """Largest V on the E4M3 grid for which `interval` keys at `P_MAX` cannot overflow FP16."""
    limit = FP16_MAX / (interval * P_MAX[v_dtype])
    step = 2.0**-9
    while limit >= step * 16:  # 3 mantissa bits: 8 steps an octave
        step *= 2
    return step * int(limit / step)


def row_sum_unit(interval: int, v_dtype: str) -> float:
    """Largest power of two, up to 1, within `v_range`."""
    return min(1.0, 2.0 ** math.floor(math.log2(v_range(interval, v_dtype))))


def padded_head_dim(head_dim: int) -> int:
    """64, 128 or 256, whichever holds `head_dim`."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


#: Names that `kernel` may have -> (source, type of P and V, form of P).
KERNELS = {
    "mma": ("mma", "e4m3", "ex2"),
    "mma_fp16": ("mma", "f16", "ex2"),
    "wgmma": ("wgmma", "e4m3", "chord"),
    "wgmma_fast": ("wgmma", "e4m3", "code"),
}


def kernels(arch: str) -> tuple[str, ...]:
    """What `kernel` may be on an architecture, the default first."""
    if arch == "sm_90a":
        return ("wgmma", "wgmma_fast", "mma_fp16", "mma")
    if arch in _NATIVE_FP8_MMA:
        return ("mma", "mma_fp16")
    return ("mma_fp16",) if arch in ("sm_80", "sm_86") else ("mma_fp16", "mma")


def head_dims(kernel: str) -> tuple[int, ...]:
    """The head dimensions that a kernel is compiled for: it computes the first one that is large enough."""
    return (64, 96, 128, 192, 256) if KERNELS[kernel][0] == "wgmma" else (64, 128)


@lru_cache(maxsize=None)
def make_plan(arch: str, head_dim: int, kernel: str | None = None) -> Plan:
    """The plan for a head dimension (1..128, on Hopper 1..256) on an architecture.

    `kernel` forces one of `kernels(arch)`: "mma" (FP8 P V through `mma.sync`), "mma_fp16" (FP16 P V
    through `mma.sync`), "wgmma" (Hopper), "wgmma_fast" (Hopper, P by a linear approximation). None takes
    the default of the architecture.
    """
    allowed = kernels(arch)
    kernel = allowed[0] if kernel is None else kernel
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}; allowed: None, {', '.join(map(repr, KERNELS))}")
    if kernel not in allowed:
        raise ValueError(f"kernel is {kernel!r}, which {arch} does not have; "
                         f"allowed there: {', '.join(map(repr, allowed))}")
    d = padded_head_dim(head_dim)
    source, v_dtype, p_form = KERNELS[kernel]
    channels = next((channels for channels in head_dims(kernel) if head_dim <= channels), None)
    if channels is None:
        raise ValueError(f"head_dim is {head_dim}; kernel {kernel!r} supports 1 to {head_dims(kernel)[-1]}")
    if source == "mma":
        # 32 rows a warp; 16 where ptxas spills otherwise
        shape = dict(block_m=128, block_n=64, promote_every=1, num_warps=8 if arch == "sm_100a" else 4, stages=2)
    elif d == 256:
        shape = dict(block_m=128, block_n=64, promote_every=8, num_warps=12, stages=4)
    elif d == 64:
        shape = dict(block_m=192, block_n=128, promote_every=4, num_warps=16, stages=4)
    else:
        shape = dict(block_m=128, block_n=128, promote_every=4, num_warps=12, stages=4)
    interval = shape["block_n"] * shape["promote_every"]
    return Plan(arch, source, d, channels, v_dtype=v_dtype, p_form=p_form, v_max=v_range(interval, v_dtype),
                row_sum_unit=row_sum_unit(interval, v_dtype), sample=source == "wgmma", **shape)


def default_cpu_plan(head_dim: int, kernel: str | None = None) -> Plan:
    """The plan that the reference uses for NumPy inputs.

    By default SageAttention2++ as published, on Ada (beyond a head_dim of 128, as on Hopper); a `kernel` as the
    first architecture that has it computes it.
    """
    kernel = kernel or ("mma" if head_dim <= 128 else "wgmma")
    return make_plan(next(arch for arch in ARCHITECTURES if kernel in kernels(arch)), head_dim, kernel)
