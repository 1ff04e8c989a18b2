"""Attention problems at random: for hypothesis, and from a seed.

A `Problem` is a few numbers that print on one line and rebuild the same arrays anywhere, so a
failure can be copied from a log: ``strategies.Problem(...).arrays()``.
"""

import secrets
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from sagepp import attention, schedule
from sagepp.plan import ARCHITECTURES, KERNELS, head_dims, kernels, make_plan, padded_head_dim
from sagepp.reference.attention import attention as reference

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Problem:
    """Shapes, options and values of one call. `kinds`: of q, k and v, from `VALUES`."""

    batch: int = 1
    heads_kv: int = 1
    group: int = 1
    seq_q: int = 1
    seq_kv: int = 1
    head_dim: int = 64
    dtype: str = "float16"
    kinds: tuple = ("normal", "normal", "normal")
    storage: str = "contiguous"
    tensor_layout: str = "HND"
    is_causal: bool = False
    causal_alignment: str = "bottom-right"
    sm_scale: float | None = None
    smooth_k: bool = True
    seed: int = 0

    def options(self):
        """Keyword arguments that `sagepp.attention` and the reference share."""
        names = ("is_causal", "causal_alignment", "sm_scale", "smooth_k")
        return {name: getattr(self, name) for name in names}

    def arrays(self):
        """q, k, v as NumPy arrays (batch, heads, seq_len, head_dim)."""
        rng = np.random.default_rng(self.seed)
        heads_q = self.heads_kv * self.group
        return tuple(
            values(kind, (self.batch, heads, seq, self.head_dim), DTYPES[self.dtype], rng)
            for kind, heads, seq in zip(
                self.kinds, (heads_q, self.heads_kv, self.heads_kv), (self.seq_q, self.seq_kv, self.seq_kv)
            )
        )

    def stored(self, array, copy=np.array):
        """`array` in `tensor_layout`, as a view of a buffer that `copy` made: see `STORAGE`."""
        if self.tensor_layout == "NHD":
            array = array.transpose(0, 2, 1, 3)
        return store(array, self.storage, copy)


# ---------------------------------------------------------------------------- values


def _finite_bits(shape, dtype, rng):
    bits = rng.integers(0, 1 << 16, shape, dtype=np.uint16)
    return np.where(np.isfinite(bits.view(dtype)), bits, np.uint16(0)).view(dtype)


def _subnormal(shape, dtype, rng):
    mantissa_bits = 10 if dtype == np.float16 else 7
    bits = rng.integers(0, 1 << mantissa_bits, shape) | rng.integers(0, 2, shape) << 15
    return bits.astype(np.uint16).view(dtype)


def _largest(shape, dtype, rng):
    return np.asarray(ml_dtypes.finfo(dtype).max) * rng.choice([-1, 1], shape).astype(dtype)


def _huge_rows(shape, dtype, rng):
    """Small, but for one row in a hundred at the end of the range: Q and K overflow FP16 on the way to INT8."""
    small = (0.1 * rng.standard_normal(shape)).astype(dtype)
    return np.where(rng.random((*shape[:-1], 1)) < 0.01, _largest(shape, dtype, rng), small)


def _offsets(shape, rng):
    return rng.standard_normal(shape) + 8 * rng.standard_normal((*shape[:-2], 1, shape[-1]))


def _outlier_channels(shape, rng):
    return rng.standard_normal(shape) * np.where(rng.random((*shape[:-2], 1, shape[-1])) < 0.05, 20, 1)


def _spiked(shape, rng):
    """One row in a hundred, far beyond the others: the softmax's bound moves late, and a lot."""
    return rng.standard_normal(shape) * np.where(rng.random((*shape[:-1], 1)) < 0.01, 100, 1)


def _rising(shape, rng):
    """Rows grow along the sequence: the bound moves in every tile."""
    ramp = np.linspace(0.1, 10, shape[-2])[:, None]
    return ramp * (1 + 0.1 * rng.standard_normal(shape))


def _late(shape, rng):
    """Much larger in a few rows: of a long sequence, they are not in the sample."""
    return rng.standard_normal(shape) * np.where(np.abs(np.arange(shape[-2]) - 200)[:, None] < 4, 200, 1)


def _not_finite(shape, rng):
    odd = rng.choice([np.nan, np.inf, -np.inf], shape)
    return np.where(rng.random((*shape[:-1], 1)) < 0.02, odd, rng.standard_normal(shape))


def _mixture(shape, dtype, rng):
    parts = [values(kind, shape, dtype, rng) for kind in rng.choice(list(_SIMPLE), 3)]
    return np.choose(rng.integers(0, 3, (*shape[:-1], 1)), [p.view(np.uint16) for p in parts]).view(dtype)


# Functions of (shape, rng) whose float64 result is rounded, and of (shape, dtype, rng).
_SIMPLE = {
    "normal": lambda shape, rng: rng.standard_normal(shape),
    "zeros": lambda shape, rng: np.zeros(shape),
    "constant channels": lambda shape, rng: rng.standard_normal((*shape[:-2], 1, shape[-1])) + np.zeros(shape),
    "channel offsets": _offsets,
    "heavy tails": lambda shape, rng: rng.standard_t(2, shape).clip(-6e4, 6e4),
    "outlier channels": _outlier_channels,
    "small integers": lambda shape, rng: rng.integers(-2, 3, shape).astype(float),
    "peaked": lambda shape, rng: 8 * rng.standard_normal(shape),
    "tiny": lambda shape, rng: 1e-4 * rng.standard_normal(shape),
    "tiniest": lambda shape, rng: 1e-6 * rng.standard_normal(shape),
    "spiked rows": _spiked,
    "rising": _rising,
    "late": _late,
    "not finite": _not_finite,
}
_OF_DTYPE = {
    "subnormal": _subnormal,
    "largest": _largest,
    "huge rows": _huge_rows,
    "any bits": _finite_bits,
    "mixture": _mixture,
}
VALUES = (*_SIMPLE, *_OF_DTYPE)
FINITE_VALUES = tuple(kind for kind in VALUES if kind not in ("not finite", "mixture"))


def values(kind, shape, dtype, rng):
    """An array of `dtype` with values of one of the `VALUES`."""
    with np.errstate(invalid="ignore", over="ignore"):
        if kind in _OF_DTYPE:
            return _OF_DTYPE[kind](shape, dtype, rng)
        return _SIMPLE[kind](shape, rng).astype(dtype)


# ---------------------------------------------------------------------------- storage

#: How an array lies in memory. What is around a slice is NaN, so that reading it shows.
STORAGE = ("contiguous", "sliced", "odd offset", "transposed", "reversed", "strided sequence")


def store(array, storage, copy=np.array):
    """A view, equal to the 4-D `array`, of a buffer made by `copy(numpy array)`; unit last stride."""
    if storage == "contiguous":
        return copy(np.ascontiguousarray(array))
    if storage == "transposed":
        return copy(np.ascontiguousarray(array.transpose(1, 2, 0, 3))).transpose(2, 0, 1, 3)
    if storage == "reversed":
        return copy(np.ascontiguousarray(array[:, ::-1, ::-1]))[:, ::-1, ::-1]
    last = slice(3, 3 + array.shape[3]) if storage == "odd offset" else slice(8, 8 + array.shape[3])
    step = 3 if storage == "strided sequence" else 1
    where = (slice(1, None), slice(None, -1), slice(step, -step, step), last)
    a, b, c, d = array.shape
    buffer = np.full((a + 1, b + 1, c * step + step + 1, d + 16), np.nan, array.dtype)
    buffer[where] = array
    return copy(buffer)[where]


# ---------------------------------------------------------------------------- problems

def plans():
    """Every plan that differs in bits: all architectures, kernels and padded head dimensions."""
    return [make_plan(arch, d, kernel) for arch in ARCHITECTURES for kernel in kernels(arch) for d in head_dims(kernel)
            if d == padded_head_dim(d)]


def kernel_name(plan):
    """What `kernel` was when the plan was made."""
    return next(name for name in kernels(plan.arch) if make_plan(plan.arch, plan.channels, name) == plan)


def plan_id(plan):
    return f"{plan.arch}-{kernel_name(plan)}-d{plan.head_dim}"


#: Lengths around which tiles, row blocks and the chunks of the sums begin or end.
EDGES = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 511, 512, 513)
HEAD_DIMS = (1, 2, 8, 15, 16, 32, 63, 64, 65, 80, 96, 127, 128)
LARGE_HEAD_DIMS = (129, 160, 192, 255, 256, 256)  #: for the kernels that have them
SM_SCALES = (None, None, None, 0.05, 1.0, 3.7, 1e-4, 1e6)
MAX_SEQ_Q, MAX_SEQ_KV = 300, 600
LONG_SEQ_KV = (1023, 1024, 1025, 1500, 1535, 1536)  #: where the statistics of K become those of a sample

#: Field of `Problem` -> the values to choose from; of a tuple of two integers in a list, a range.
CHOICES = {
    "batch": [1, 2, 3],
    "heads_kv": [1, 2, 3],
    "group": [1, 1, 2, 4],
    "dtype": list(DTYPES),
    "storage": list(STORAGE),
    "tensor_layout": ["HND", "NHD"],
    "is_causal": [False, True],
    "causal_alignment": ["bottom-right", "top-left"],
    "sm_scale": list(SM_SCALES),
    "smooth_k": [True, True, False],
}


def head_dims_of(kernel):
    """Actual head dimensions to choose from, for a kernel or (None) for all of them."""
    large = kernel is not None and max(head_dims(kernel)) > 128
    return HEAD_DIMS + LARGE_HEAD_DIMS if large else HEAD_DIMS


def problems(max_seq_q=MAX_SEQ_Q, max_seq_kv=MAX_SEQ_KV, kinds=VALUES, kernel=None, **fixed):
    """Hypothesis strategy of `Problem` for a kernel, or for all of them; `fixed` fields keep their value."""

    def lengths(limit):
        return st.integers(1, limit) | st.sampled_from([n for n in EDGES if n <= limit])

    fields = {name: st.sampled_from(choices) for name, choices in CHOICES.items()}
    fields["seq_q"], fields["seq_kv"] = lengths(max_seq_q), lengths(max_seq_kv)
    if max_seq_kv == MAX_SEQ_KV:
        fields["seq_kv"] |= st.sampled_from(LONG_SEQ_KV)
    choices = head_dims_of(kernel)
    fields["head_dim"] = st.integers(1, max(choices)) | st.sampled_from(choices)
    fields["kinds"] = st.tuples(*[st.sampled_from(kinds)] * 3)
    fields["seed"] = st.integers(0, 2**32 - 1)
    fields.update({name: st.just(value) for name, value in fixed.items()})
    return st.builds(Problem, **fields)


def seed_of(text):
    """The number, or one drawn where the text is "random"."""
    return secrets.randbits(32) if text == "random" else int(text)


def random_problem(seed, index, kernel=None):
    """Problem number `index` of the sequence that `seed` stands for, for a kernel or for all of them."""
    rng = np.random.default_rng((seed, index))

    def pick(choices):
        return choices[rng.integers(len(choices))]

    def length(limit):
        return int(pick([n for n in EDGES if n <= limit]) if rng.random() < 0.5 else rng.integers(1, limit + 1))

    head_dim_choices = head_dims_of(kernel)
    fields = {name: pick(choices) for name, choices in CHOICES.items()}
    return Problem(
        **fields,
        seq_q=length(MAX_SEQ_Q),
        seq_kv=int(pick(LONG_SEQ_KV)) if rng.random() < 0.1 else length(MAX_SEQ_KV),
        head_dim=int(pick(head_dim_choices) if rng.random() < 0.7 else rng.integers(1, max(head_dim_choices) + 1)),
        kinds=("normal",) * 3 if rng.random() < 0.2 else tuple(pick(VALUES) for _ in range(3)),
        seed=int(rng.integers(2**32)),
    )


# ---------------------------------------------------------------------------- both sides


def by_reference(problem, plan):
    """(o, lse) by the reference, NumPy, in the layout HND."""
    return reference(*problem.arrays(), plan=plan, **problem.options())


def late_heads(early_heads, ctas):
    """In place of `late_heads` of sagepp/schedule.py: all but the first KV heads are, wherever they can."""

    def some_late(geometry, plan, _):
        can = plan.kernel == "wgmma" and geometry.aligned and early_heads < geometry.heads_kv
        return schedule.Late(early_heads, ctas) if can else schedule.Late(geometry.heads_kv)

    return some_late


def on_gpu(problem, kernel):
    """(o, lse) by the public call on the current GPU, as NumPy arrays in the layout HND."""
    import cupy

    q, k, v = (problem.stored(x, cupy.asarray) for x in problem.arrays())
    o, lse = attention(
        q, k, v, problem.tensor_layout, return_lse=True, kernel=kernel, **problem.options())
    if problem.tensor_layout == "NHD":
        o = o.transpose(0, 2, 1, 3)
    return cupy.asnumpy(o), cupy.asnumpy(lse)
