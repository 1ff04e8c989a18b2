"""Problem + architecture -> kernel, tile sizes and numerical parameters. Pure Python, no GPU.

A :class:`Plan` is everything that decides the bits of a result besides the inputs: the kernels are
compiled from it and the reference is run with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")

#: Architectures whose tensor cores multiply E4M3 with FP16 accumulators natively through `mma.sync`.
_NATIVE_FP8_MMA = ("sm_89", "sm_120a", "sm_121a")

FP16_MAX = 65504
#: Largest P that enters a product: E4M3 code 125, and 2 for FP16 (docs/numerics.md, step 7).
P_MAX = {"e4m3": 416.0, "f16": 2.0}


@dataclass(frozen=True)
class Plan:
    """One specialisation of the attention kernel (docs/numerics.md)."""

    arch: str  #: NVRTC target, for example "sm_90a"
    kernel: str  #: "mma" (mma.sync) or "wgmma"
    head_dim: int  #: padded: 64, 128 or 256
    block_m: int  #: query rows of a CTA
    block_n: int  #: keys of a tile; also the promotion interval
    v_dtype: str  #: "e4m3" or "f16": the type of P and V
    p_form: str  #: "ex2" or "code": how P is formed (step 6)
    v_max: float  #: top of V's range
    row_sum_unit: float  #: value of the column whose product with P is the row sum
    num_warps: int
    stages: int

    @property
    def aim(self) -> int:
        """log2 of P at the bound."""
        return 7 if self.v_dtype == "e4m3" else 0

    @property
    def mma_behaviour(self) -> tuple[str, str, str, str]:
        """Key of the P V instruction in `reference/tensor_core.py`."""
        return (self.arch, "wgmma" if self.kernel == "wgmma" else "mma.sync", self.v_dtype, "f16")


def v_range(block_n: int, v_dtype: str) -> float:
    """Largest V on the E4M3 grid for which `block_n * P_MAX * V` cannot overflow FP16."""
    limit = FP16_MAX / (block_n * P_MAX[v_dtype])
    step = 2.0 ** -9
    while limit >= step * 16:  # 3 mantissa bits: 8 steps an octave
        step *= 2
    return step * int(limit / step)


def padded_head_dim(head_dim: int) -> int:
    """64, 128 or 256, whichever holds `head_dim`."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


@lru_cache(maxsize=None)
def make_plan(arch: str, head_dim: int, kernel: str | None = None) -> Plan:
    """The plan for a head dimension (1..256) on an architecture.

    `kernel` forces one: "mma" (FP8 P V through `mma.sync`), "mma_fp16" (FP16 P V through
    `mma.sync`), "wgmma" (Hopper). None takes the fastest that the architecture has.
    """
    d = padded_head_dim(head_dim)
    if kernel is None:
        kernel = "mma" if arch in _NATIVE_FP8_MMA else "mma_fp16"
    v_dtype = "f16" if kernel == "mma_fp16" else "e4m3"
    if d == 256:
        raise ValueError(f"head_dim is {head_dim}; this version supports 1 to 128")
    if v_dtype == "e4m3" and arch in ("sm_80", "sm_86"):
        raise ValueError(f"kernel is {kernel!r}, but {arch} has no FP8; use 'mma_fp16'")
    if kernel in ("mma", "mma_fp16"):
        return Plan(arch, "mma", d, block_m=128, block_n=64, v_dtype=v_dtype, p_form="ex2",
                    v_max=v_range(64, v_dtype), row_sum_unit=1.0, num_warps=4, stages=2)
    raise ValueError(f"kernel is {kernel!r}; allowed: None, 'mma', 'mma_fp16', 'wgmma'")


def default_cpu_plan(head_dim: int) -> Plan:
    """The plan that the reference uses for NumPy inputs: SageAttention2++ as published, on Ada."""
    return make_plan("sm_89", head_dim, "mma")
