"""Inputs that drive the FP16 accumulators of a plan to their limit: "No partial sum overflows" of numerics.md.

Only one channel of Q and K is not zero, so that all their codes are 127 or -127 and the scores are what they
should be: in the first tile the smallest, afterwards higher by as much as the row says. The rows lie around
the difference at which P would reach the limit that moves the bound; below it, P is at its maximum in every key
of an interval. V is at an end of its range everywhere, with a mean of zero.
"""

from unittest import mock

import numpy as np
import strategies
from hypothesis import strategies as st

from sagepp.plan import FP16_MAX
from sagepp.reference import quantize, tensor_core
from sagepp.reference.attention import P_LIMIT, attention

INTERVALS = 4  # of promotion; in pairs, the second of which has the signs of the first reversed
ROWS = 200
BELOW_THE_LIMIT, ABOVE_THE_LIMIT = 0.4, 0.1  # range of the rows, in log2 of P
SHARP = 0.8  # of the largest FP16 number: what some sum must reach

#: What hypothesis draws: a seed, and arguments of `arrays` and of the call.
DRAWN = {
    "seed": st.integers(0, 2**32 - 1),
    "dtype": st.sampled_from(list(strategies.DTYPES)),
    "options": st.fixed_dictionaries({"is_causal": st.booleans(), "smooth_k": st.booleans()}),
}


def arrays(plan, seed, dtype):
    """q (1, 1, ROWS, D), k and v (1, 1, INTERVALS promotion intervals, D)."""
    rng, dtype = np.random.default_rng(seed), strategies.DTYPES[dtype]
    keys = INTERVALS * plan.promote_every * plan.block_n
    limit = np.log2(P_LIMIT[plan.v_dtype]) - plan.aim  # in log2, above the bound
    rise = rng.permutation(np.linspace(limit - BELOW_THE_LIMIT, limit + ABOVE_THE_LIMIT, ROWS))
    q = np.zeros((1, 1, ROWS, plan.head_dim))
    q[0, 0, :, 0] = rise * plan.head_dim**0.5 / np.log2(np.e)
    k = np.zeros((1, 1, keys, plan.head_dim))
    k[0, 0, plan.block_n :, 0] = 1
    return q.astype(dtype), k.astype(dtype), signs(plan, keys, rng)[None, None].astype(dtype)


def signs(plan, keys, rng):
    """(keys, D) of -1 and 1 in every interval: all the same, runs of every power of two in the order of the
    products, and at random."""
    length = keys // INTERVALS
    position = np.arange(length)
    runs = [np.where(position >> i & 1, -1, 1) for i in range(length.bit_length() + 1)]
    pairs = []
    for _ in range(INTERVALS // 2):
        share = rng.random(plan.head_dim) ** 0.25  # of the ones: mostly near 1, where sums are large
        pattern = np.where(rng.random((length, plan.head_dim)) < share, 1, -1)
        pattern[:, : len(runs)] = np.transpose(runs)
        pattern *= rng.choice([-1, 1], plan.head_dim)
        pairs += [pattern, -pattern]
    in_order = np.roll(np.concatenate(pairs), -plan.block_n, axis=0)  # the first interval is a tile shorter
    in_order = in_order.reshape(-1, plan.block_n, plan.head_dim)
    of_key = np.empty_like(in_order)
    of_key[:, quantize.v_order(plan)] = in_order
    return of_key.reshape(keys, plan.head_dim)


def by_reference(plan, inputs, options):
    """(o, lse), having checked that the accumulators of the model came near their limit and not beyond."""
    peaks = []

    def watched(*operands):
        sums = mma(*operands)
        peaks.append(np.abs(sums[..., :-1]).max())  # infinity and NaN stay; the last column is the row sum's
        return sums

    mma = tensor_core.mma
    with mock.patch.object(tensor_core, "mma", watched):
        o, lse = attention(*inputs, plan=plan, **options)
    assert SHARP * FP16_MAX < np.max(peaks) <= FP16_MAX
    assert np.isfinite(o).all() and np.isfinite(lse).all()
    return o, lse
