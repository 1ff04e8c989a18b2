"""Attention as the kernels compute it, bit for bit: sections 4 to 8 of docs/numerics.md.

Rows do not depend on each other, so all rows of the query heads that share a KV head go through the
loop over key tiles together: arrays are (heads, rows, ...).
"""

from dataclasses import dataclass, replace

import numpy as np

from . import exact, formats, quantize, special, tensor_core
from .p_forms import FORMS

NEGATIVE_INFINITY = np.float32(-np.inf)
LN2 = np.float32(np.log(2))
LARGEST_STEP = np.float32(2**90)  # of a score, in log2: times any score it is finite
FP32_MAX = np.finfo(np.float32).max

P_LIMIT = {"e4m3": np.float32(128), "f16": np.float32(2)}

PARTS = frozenset({"qk", "p", "v", "accumulator"})


def attention(q, k, v, *, is_causal=False, causal_alignment="bottom-right", sm_scale=None,
              smooth_k=True, plan, exact_parts=frozenset()):
    """(o, lse) of q (B, Hq, Sq, D) and k, v (B, Hkv, Skv, D), FP16 or BF16.

    o is (B, Hq, Sq, D) in q's dtype; lse, natural logarithm, is (B, Hq, Sq) float32. A row that sees
    no key is 0 and -inf. `exact_parts`, a subset of `PARTS`, is computed without rounding to the
    narrow formats: an error budget, which no kernel computes.
    """
    offset = exact.causal_offset(q.shape[2], k.shape[2], is_causal, causal_alignment)
    return masked_attention(q, k, v, offset, sm_scale, smooth_k, plan=plan, exact_parts=exact_parts)


def masked_attention(q, k, v, offset=None, sm_scale=None, smooth_k=True, *, plan,
                     exact_parts=frozenset()):
    """`attention` where row i sees the keys up to ``i + offset``; all of them if `offset` is None."""
    sm_scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    plan, exact_parts = _budget(plan, exact_parts)
    group = q.shape[1] // k.shape[1]
    o = np.empty(q.shape, q.dtype)
    lse = np.empty(q.shape[:3], np.float32)
    for b, h in np.ndindex(*k.shape[:2]):
        heads = slice(h * group, (h + 1) * group)
        problem = quantize_head(q[b, heads], k[b, h], v[b, h], offset, sm_scale, smooth_k, plan, exact_parts)
        o[b, heads], lse[b, heads] = attend(problem, q.shape[-1], q.dtype)
    return o, lse


def _budget(plan, exact_parts):
    """The parts, and what they imply: products of unrounded factors are no tensor core's."""
    exact_parts = frozenset(exact_parts)
    if exact_parts - PARTS:
        raise ValueError(f"exact_parts is {set(exact_parts)}; allowed: any of {set(PARTS)}")
    if exact_parts & {"p", "v"}:
        exact_parts |= {"accumulator"}
    if exact_parts & {"qk", "p"}:
        plan = replace(plan, p_form="ex2")
    return plan, exact_parts


@dataclass(frozen=True)
class Problem:
    """The quantised heads of one KV head, and the mask."""

    q: quantize.QuantizedQ  #: (heads, rows, ...)
    k: quantize.QuantizedK  #: (n_tiles, block_n, ...)
    v: quantize.QuantizedV
    seq_kv: int
    offset: int | None
    sm_scale: np.float32
    plan: object
    exact_parts: frozenset


@dataclass
class State:
    """What a row carries from tile to tile: its bound (heads, rows), and sums.

    The sums are (heads, rows, head_dim + 1): O and, last, l; T and l_T of the promotion interval.
    """

    bound: np.ndarray
    total: np.ndarray
    partial: np.ndarray

    def promote(self):
        """O = O + T, T = 0."""
        self.total += self.partial
        self.partial[...] = 0

    @property
    def o(self):
        return self.total[..., :-1]

    @property
    def l(self):
        return self.total[..., -1]


def quantize_head(q, k, v, offset, sm_scale, smooth_k, plan, exact_parts):
    """q (heads, rows, head_dim) and one KV head (seq_kv, head_dim)."""
    seq_kv = k.shape[-2]
    channels = quantize.channels_of(k, v, plan, smooth_k)
    rounded = "qk" not in exact_parts
    return Problem(
        quantize.quantize_q(q, channels, sm_scale, plan, rounded),
        quantize.quantize_k(k, channels, plan, rounded),
        quantize.quantize_v(v, channels, plan, "v" not in exact_parts),
        seq_kv, offset, np.float32(sm_scale), plan, exact_parts,
    )  # fmt: skip


def attend(problem, head_dim, dtype):
    """Output (heads, rows, head_dim) in `dtype` and LSE (heads, rows) of one KV head."""
    heads, rows = problem.q.scale.shape
    plan = problem.plan
    state = State(
        np.full((heads, rows), NEGATIVE_INFINITY),
        np.zeros((heads, rows, head_dim + 1), np.float32),
        np.zeros((heads, rows, head_dim + 1), np.float32),
    )
    row_scale = limit_row_scale(problem.q.scale, problem.k.scale_max)
    values = problem.v.values()[..., :head_dim]
    unit = np.full((*values.shape[:-1], 1), np.float32(plan.row_sum_unit))
    v_and_unit = np.concatenate([values, unit], axis=-1)[:, quantize.v_order(plan)]
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for tile in range(len(problem.k.codes)):
            first = 0 if problem.offset is None else max(0, tile * plan.block_n - problem.offset)
            if first >= rows:
                break
            see = slice(first, rows)
            if plan.promote_every == 1:  # the tile before was an interval, and ends before the bound moves
                state.promote()
            p = softmax(state, problem, row_scale, tile, see)
            if (tile + 1) % plan.promote_every == 0:  # the first interval is a tile shorter
                state.promote()
            state.partial[:, see] = multiply(p, v_and_unit[tile], state.partial[:, see], plan, problem.exact_parts)
        state.promote()
        return finish(state, problem, dtype), log_sum_exp(state, problem)


def limit_row_scale(q_scale, k_scale_max):
    with np.errstate(divide="ignore", over="ignore"):
        limit = np.minimum(LARGEST_STEP / k_scale_max, FP32_MAX)
        return np.where(q_scale > limit, limit, q_scale)


# ---------------------------------------------------------------------------- 5 and 6. one key tile


def softmax(state, problem, row_scale, tile, rows):
    """P of one key tile, in position order, of the rows (a slice) that see any of it; their bounds move."""
    plan, exact_parts = problem.plan, problem.exact_parts
    form = FORMS[plan.p_form]
    q_codes, k_codes = problem.q.codes[:, rows], problem.k.codes[tile]
    scores = dot(q_codes, k_codes.T, exact_parts)
    visible = visible_keys(problem, tile, rows)
    a = row_scale[:, rows, None] * problem.k.scale[tile]
    top = largest_scores(scores, visible)
    bound = state.bound[:, rows]

    if tile == 0:  # the first that any row sees
        moved = np.ones(bound.shape, bool)
        p = np.empty(scores.shape, np.float32)
    else:
        p = np.where(visible, form.p(scores, a, top, bound, plan, exact_parts), np.float32(0))
        moved = reached_limit(p, plan)
    if moved.any():
        row_visible = np.broadcast_to(visible, scores.shape)[moved]
        new = row_bound(top[moved], a[moved], plan)
        change = (bound[moved] - new) / form.steps_per_octave
        alpha = np.zeros(new.shape, np.float32) if tile == 0 else special.ex2(change)
        bound[moved] = new
        moved_p = form.p(scores[moved], a[moved], top[moved], new, plan, exact_parts)
        p[moved] = np.where(row_visible, moved_p, np.float32(0))
        total, partial = state.total[:, rows], state.partial[:, rows]
        total[moved] *= alpha[:, None]
        partial[moved] = shrink(partial[moved], alpha[:, None], exact_parts)
    return p[..., quantize.v_order(plan)]


def visible_keys(problem, tile, rows):
    """(rows, block_n): which keys of the tile each row sees."""
    key = tile * problem.plan.block_n + np.arange(problem.plan.block_n)
    visible = (key < problem.seq_kv)[None, :]
    if problem.offset is None:
        return visible
    return visible & (key <= np.arange(rows.start, rows.stop)[:, None] + problem.offset)


def dot(q_codes, k_codes, exact_parts):
    """Q K^T: exact integers, in float32."""
    if "qk" in exact_parts:
        return np.matmul(q_codes.astype(np.float64), k_codes.astype(np.float64)).astype(np.float32)
    return tensor_core.int8_dot(q_codes, k_codes).astype(np.float32)


def reached_limit(p, plan):
    """Rows where the bound must move: any P at the limit, or (E4M3) NaN."""
    top = p.max(axis=-1)  # NaN where any is
    return (top >= P_LIMIT[plan.v_dtype]) | (np.isnan(top) & (plan.v_dtype == "e4m3"))


def largest_scores(scores, visible):
    """(..., KEY_GROUPS): the largest visible score of each key group, -inf where none is."""
    groups = np.where(visible, scores, NEGATIVE_INFINITY)
    return groups.reshape(*scores.shape[:-1], quantize.KEY_GROUPS, -1).max(axis=-1)


def row_bound(top, a, plan):
    """The new bound of rows, of the largest visible scores of their key groups and a, both (n, KEY_GROUPS)."""
    form = FORMS[plan.p_form]
    scaled = np.where(np.isneginf(top), top, formats.mul_ru(top, form.factor(a, plan)))
    return form.round_bound(np.fmax.reduce(scaled, axis=-1, initial=NEGATIVE_INFINITY))


# ---------------------------------------------------------------------------- 7. products


def shrink(partial, alpha, exact_parts):
    """T alpha, both of them FP16."""
    if "accumulator" in exact_parts:
        return partial * alpha
    return formats.to_fp16(partial * formats.to_fp16(alpha).astype(np.float32))


def multiply(p, v_and_unit, partial, plan, exact_parts=frozenset()):
    """T + P V and the row sum of one tile, in position order, by the plan's tensor-core instruction."""
    if "accumulator" in exact_parts:
        return (partial + np.matmul(p.astype(np.float64), v_and_unit.astype(np.float64))).astype(np.float32)
    return tensor_core.mma(p, v_and_unit, partial, plan.mma_behaviour)


# ---------------------------------------------------------------------------- 8. result


def full_tiles(problem, rows):
    """(rows,): how many tiles every row of the row's block sees whole."""
    plan, n_tiles = problem.plan, len(problem.k.codes)
    if problem.offset is None:
        return np.full(rows, n_tiles)
    seen = np.maximum(0, np.arange(rows) // plan.block_m * plan.block_m + 1 + problem.offset)
    return np.where(seen < problem.seq_kv, seen // plan.block_n, n_tiles)


def finish(state, problem, dtype):
    """O to the output: normalise, scale, add V's mean, round to `dtype`."""
    head_dim, rows = state.o.shape[-1], state.l.shape[-1]
    with np.errstate(divide="ignore"):
        r = np.float32(problem.plan.row_sum_unit) / state.l
    offset = problem.v.offset[full_tiles(problem, rows), :head_dim]
    o = formats.fma(state.o * r[..., None], problem.v.scale[:head_dim], offset)
    o = np.where(state.l[..., None] == 0, np.float32(0), o)
    return formats.to_fp16(o) if dtype == np.float16 else formats.to_bf16(o)


def log_sum_exp(state, problem):
    """Natural LSE of the unsmoothed scores."""
    plan = problem.plan
    form = FORMS[plan.p_form]
    base = state.bound / form.steps_per_octave - np.float32(plan.aim + form.bias)
    log2_l = formats.log2(state.l / np.float32(plan.row_sum_unit))
    mean_score = problem.sm_scale * problem.q.mean_dot
    lse = formats.fma(base + log2_l, LN2, mean_score)
    lse = np.where(np.isnan(state.l), np.float32(np.nan), lse)
    return np.where(state.l == 0, NEGATIVE_INFINITY, lse)
