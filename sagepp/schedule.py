"""How the work of a call is dealt out: grids, who makes which codes, which work items are cut.

Everything here depends on shapes and on the GPU's number of SMs alone, and nothing changes a bit of a result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .plan import Plan

# As in `kernels_src/quantize.cu` and `statistics.cuh`.
SUM_CHUNKS = 16  #: partial sums of K and V a head, at most (docs/numerics.md, section 1)
ROTATION = 16  #: channels of Q and K that are rotated together
MAX_GRID_YZ = 65535  #: of CUDA, CTAs along y and z


@dataclass(frozen=True)
class Geometry:
    """Everything about a call except the data: shapes, strides in elements, options."""

    batch: int
    num_heads_q: int
    num_heads_kv: int
    seq_q: int
    seq_kv: int
    head_dim: int
    strides: tuple[tuple[int, int, int], ...]  #: (b, h, s) of q, k, v, o
    bfloat16: bool
    aligned: bool
    is_causal: bool
    causal_alignment: str
    sm_scale: float
    return_lse: bool
    smooth_k: bool

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads_q // self.num_heads_kv

    @property
    def heads_kv(self) -> int:
        """KV heads of the whole batch."""
        return self.batch * self.num_heads_kv

    @property
    def causal_offset(self) -> int:
        """Row i sees the keys up to i + this one."""
        bottom_right = self.causal_alignment == "bottom-right"
        return self.seq_kv - self.seq_q if self.is_causal and bottom_right else 0

    def scalars(self, plan: Plan) -> dict[str, int | np.float32]:
        """Kernel arguments that are not arrays."""
        scalars = {name: getattr(self, name) for name in (
            "batch", "num_heads_q", "num_heads_kv", "seq_q", "seq_kv", "head_dim")}
        for name, strides in zip("qkvo", self.strides):
            for axis, stride in zip("bhs", strides):
                scalars[f"{name}_stride_{axis}"] = stride
        scalars["causal_offset"] = self.causal_offset
        scalars["group"] = self.group
        scalars["sm_scale"] = np.float32(self.sm_scale)
        # the rotation of Q and K leaves out a factor of 1/4 each
        scalars["softmax_scale"] = np.float32(self.sm_scale * np.log2(np.e) / ROTATION)
        return scalars


def attention_grid(plan: Plan, batch: int, num_heads: int, seq_q: int, num_sms: int):
    """Grid and block size of the attention kernel: (x, y, z), threads."""
    row_blocks = -(-seq_q // plan.block_m)
    if plan.kernel == "mma":
        if max(num_heads, batch) > MAX_GRID_YZ:
            raise ValueError(f"q has batch {batch} and {num_heads} heads; this kernel takes {MAX_GRID_YZ} of each")
        return (row_blocks, num_heads, batch), 32 * plan.num_warps
    return (min(num_sms, row_blocks * num_heads * batch), 1, 1), 32 * plan.num_warps  # persistent


def q_tiles(geometry: Geometry, plan: Plan) -> int:
    """Tiles of a head of Q in `quantize`: `q_tiles` of q_scales.cuh."""
    return -(-align(geometry.seq_q, plan.block_m) // (128 if plan.head_dim <= 128 else 64))


def ctas_an_sm(plan: Plan) -> int:
    """CTAs of `quantize` that an SM holds at least: its launch bounds."""
    return 6 if plan.head_dim <= 128 else 5


def divisor(d: int) -> int:
    """struct Divisor (divisor.cuh), of a number below 2**31, as one integer of 8 bytes."""
    shift = (d - 1).bit_length()
    return -((-1 << 32 + shift) // d) - (1 << 32) | shift << 32


def tiles_of_a_cta(code_tiles: int, resident: int) -> int:
    """Tiles that a CTA of `quantize` makes codes of, where there are `code_tiles` and the GPU holds `resident` CTAs."""
    return 2 if code_tiles >= 4 * resident else 1


def quantize_grid(geometry: Geometry, plan: Plan, num_sms: int, early_heads: int) -> tuple[int, dict[str, int]]:
    """CTAs of `quantize`, and its arguments that say what they do.

    Codes of Q and K are made of the first `early_heads` KV heads, and of the query heads with them.

    `lead`, by how many KV heads statistics are ahead of codes: far enough for them to be ready when the codes start,
    and, where they are those of all keys, not so far that V has left L2 by then.
    """
    g = geometry
    heads_kv = g.heads_kv
    resident = ctas_an_sm(plan) * num_sms
    v_ctas = max(1, plan.head_dim // 128)  # `V_CTAS` of quantize_v.cuh
    kv_tiles, tiles_of_q = -(-g.seq_kv // plan.block_n), q_tiles(g, plan)
    early_q_heads = early_heads * g.group
    cta_tiles = tiles_of_a_cta((heads_kv * v_ctas + early_heads) * kv_tiles + early_q_heads * tiles_of_q, resident)
    kv_tile_ctas, q_head_ctas = -(-kv_tiles // cta_tiles), -(-tiles_of_q // cta_tiles)
    statistics_ctas, code_ctas = count_statistics_ctas(plan, g.seq_kv), kv_tile_ctas * (1 + v_ctas)
    ahead = 0.9 * 128 / plan.head_dim  # of the CTAs that the GPU holds
    at_least = 16 if is_sampled(plan, g.seq_kv) else 4
    head_ctas = statistics_ctas + kv_tiles * (1 + v_ctas)  # if they had one tile each
    lead = min(heads_kv, max(at_least, math.ceil(ahead * resident / head_ctas)))
    return heads_kv * (statistics_ctas + code_ctas) + early_q_heads * q_head_ctas, {
        "heads_kv": heads_kv, "early_heads": early_heads, "lead": lead, "cta_tiles": cta_tiles,
        "kv_tile_ctas": kv_tile_ctas, "q_head_ctas": q_head_ctas,
        "by_statistics_ctas": divisor(statistics_ctas), "by_code_ctas": divisor(code_ctas),
        "by_round_ctas": divisor(statistics_ctas + code_ctas), "by_q_head_ctas": divisor(q_head_ctas),
        "by_num_heads_kv": divisor(g.num_heads_kv), "by_num_heads_q": divisor(g.num_heads_q),
        "by_group": divisor(g.group)}


#: Tiles that cutting an item in two costs, about: another start of the pipeline, and the sums that are passed on.
CUT_TILES = 12


def count_shared_items(geometry: Geometry, plan: Plan, ctas: int) -> int:
    """Items that the CTAs of `attention_wgmma.cu` share in equal parts (`Schedule` there): 0 where it does not pay."""
    g = geometry
    items, tiles = -(-g.seq_q // plan.block_m) * g.num_heads_q * g.batch, -(-g.seq_kv // plan.block_n)
    shared = items % ctas + ctas
    pays = items >= shared > ctas and (2 * ctas - shared) * tiles >= CUT_TILES * ctas
    return shared if plan.kernel == "wgmma" and not g.is_causal and pays else 0


class Late(NamedTuple):
    """Whose codes of Q and K `late_codes` makes, and with how many CTAs: KV heads from `early_heads` on."""

    early_heads: int
    ctas: int = 0

    def arguments(self, geometry: Geometry, plan: Plan) -> dict[str, int]:
        """Of `late_codes` and the attention kernel."""
        g, tiles_of_q = geometry, q_tiles(geometry, plan)
        head_tiles = -(-g.seq_kv // plan.block_n) + g.group * tiles_of_q
        return {"head_tiles": head_tiles, "by_head_tiles": divisor(head_tiles), "by_q_tiles": divisor(tiles_of_q),
                "num_late_tiles": (g.heads_kv - self.early_heads) * head_tiles}


#: Microseconds on an H200 ("Late heads" in docs/performance.md): an SM attends to a tile of keys; an SM makes late codes
#: of 16384 numbers of Q or K, of FP16 and BF16, without and with an LSE; what passes before the first ones are there.
_KEY_TILE_US = {"chord": {64: 0.85, 96: 0.68, 128: 0.77, 192: 0.48, 256: 0.76},
                "code": {64: 0.69, 96: 0.58, 128: 0.71, 192: 0.45, 256: 0.73}}
_LATE_US = {(False, False): 0.80, (True, False): 1.05, (False, True): 1.0, (True, True): 1.35}
_LATE_START_US = 8
_ITEM_TILES = 3.3  #: that an item takes beside its own
_GAIN_US = 0.0095  #: by which a call is shorter for 16384 late numbers, if the SMs that make them cost nothing
_LEAST_GAIN_US, _MORE_SMS_GAIN_US = 5, 3  #: for which heads are late, and for which more SMs make their codes
_LATE_PART = 0.6  #: of the attention kernel's time, in which late codes are made


def late_heads(geometry: Geometry, plan: Plan, ctas: int) -> Late:
    """Which heads are late, where the attention kernel has `ctas` CTAs.

    All but the first heads, where that is worth the SMs' time; or so many that the items and their codes fill the last
    round of items, which without them has SMs to spare.
    """
    g = geometry
    none = best = Late(g.heads_kv)
    if plan.kernel != "wgmma" or not g.aligned or not is_sampled(plan, min(g.seq_q, g.seq_kv)):
        return none
    if g.is_causal and plan.head_dim > 128:
        return none  # it lost 1%
    head_items = g.group * -(-g.seq_q // plan.block_m)
    numbers = (g.group * g.seq_q + g.seq_kv) * g.head_dim  # of a KV head
    padded = (head_items * plan.block_m + align(g.seq_kv, plan.block_n)) * plan.head_dim
    head_us = _LATE_US[g.bfloat16, g.return_lse] * padded / 16384  # of an SM
    item_us = _KEY_TILE_US[plan.p_form][plan.channels] * (_mean_tiles(g, plan) + _ITEM_TILES)
    items = g.heads_kv * head_items
    rounds = items / ctas

    def end_us(places: int) -> float:
        """When all items are done, if something else has the places of some more."""
        return item_us * (places / ctas if g.is_causal else -(-places // ctas))

    best_us = rounds * item_us if count_shared_items(g, plan, ctas) else end_us(items)
    most = int(_LATE_PART * rounds)
    for missed in range(most, 0, -max(1, most // 16)):  # rounds in which an SM makes codes; most first: fewest SMs
        for end in range(math.ceil(rounds), math.ceil(rounds) + 6):
            sms = min((end * ctas - items) // missed, ctas // 3)
            late = int(sms * missed * item_us / head_us)
            for _ in range(2):  # fewer heads, and so fewer SMs, and so more heads that are needed before
                if late > 0:
                    sms = math.ceil(late * head_us / (missed * item_us))
                    waiting = (_LATE_START_US + head_us / sms) / item_us  # rounds, until the first of them is there
                    begun = 1 + (waiting if g.is_causal else int(waiting + 0.3))  # rounds, by then
                    late = min(late, g.heads_kv - math.ceil((ctas - sms) * begun / head_items))
            us = end_us(items + missed * sms) - late * _GAIN_US * numbers / 16384
            if late > 0 and us < best_us - (_LEAST_GAIN_US if best is none else _MORE_SMS_GAIN_US):
                best_us, best = us, Late(g.heads_kv - late, sms)
    return best


def _mean_tiles(geometry: Geometry, plan: Plan) -> float:
    """Key tiles of an item."""
    g, tiles = geometry, -(-geometry.seq_kv // plan.block_n)
    if not g.is_causal:
        return tiles
    first = g.causal_offset + min(plan.block_m, g.seq_q)  # keys that the last row of the first block sees
    last = g.causal_offset + g.seq_q
    return (min(max(first, 0), g.seq_kv) + min(max(last, 0), g.seq_kv)) / 2 / plan.block_n


def is_sampled(plan: Plan, seq_kv: int) -> bool:
    """Whether a sample stands for all keys in the statistics: `Keys` of statistics.cuh."""
    return plan.sample and seq_kv >= 1024


def count_statistics_ctas(plan: Plan, seq_kv: int) -> int:
    """Chunks of the statistics of K and V: `Keys` of statistics.cuh."""
    if is_sampled(plan, seq_kv):
        return 2 * min(SUM_CHUNKS, seq_kv // 512)
    return 2 * -(-seq_kv // max(256, 16 * -(-seq_kv // (16 * SUM_CHUNKS))))


def align(n: int, to: int = 256) -> int:
    """`n` rounded up to a multiple of `to`. The default is the alignment, in bytes, of arrays in a `_Region`."""
    return -(-n // to) * to
