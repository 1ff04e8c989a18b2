"""Softmax attention in float64: the truth that accuracy is measured against."""

import numpy as np

ROWS_AT_ONCE = 256


def causal_offset(seq_q, seq_kv, is_causal, causal_alignment):
    """Row i sees the keys up to ``i + causal_offset``; None where there is no mask."""
    if not is_causal:
        return None
    return {"bottom-right": seq_kv - seq_q, "top-left": 0}[causal_alignment]


def attention(q, k, v, *, is_causal=False, causal_alignment="bottom-right", sm_scale=None):
    """Float64 (o, lse) of q (B, Hq, Sq, D) and k, v (B, Hkv, Skv, D); o is (B, Hq, Sq, D), lse (B, Hq, Sq).

    A row that sees no key is 0, with an LSE of -inf.
    """
    offset = causal_offset(q.shape[2], k.shape[2], is_causal, causal_alignment)
    return masked_attention(q, k, v, offset, sm_scale)


def masked_attention(q, k, v, offset=None, sm_scale=None):
    """`attention` where row i sees the keys up to ``i + offset``; all of them if `offset` is None."""
    sm_scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    group = q.shape[1] // k.shape[1]
    o = np.empty(q.shape, np.float64)
    lse = np.empty(q.shape[:3], np.float64)
    for b, h in np.ndindex(*q.shape[:2]):
        head_q, head_k, head_v = (x.astype(np.float64) for x in (q[b, h], k[b, h // group], v[b, h // group]))
        for first in range(0, q.shape[2], ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            scores = head_q[rows] @ head_k.T * sm_scale
            if offset is not None:
                last_key = first + np.arange(len(scores)) + offset
                scores[np.arange(len(head_k)) > last_key[:, None]] = -np.inf
            o[b, h, rows], lse[b, h, rows] = _softmax_product(scores, head_v)
    return o, lse


def _softmax_product(scores, v):
    top = scores.max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = np.exp(scores - np.where(np.isneginf(top), 0, top))
        total = p.sum(axis=-1, keepdims=True)
        o = np.where(total == 0, 0, p @ v / total)
        return o, (np.log(total) + top)[:, 0]


def errors(o, exact):
    """How far `o` is from `exact`, over all elements: cosine similarity, relative L1, RMSE."""
    o, exact = np.asarray(o).astype(np.float64).ravel(), np.asarray(exact).astype(np.float64).ravel()
    norm = np.linalg.norm(o) * np.linalg.norm(exact)
    return {
        "cosine": float(o @ exact / norm) if norm else 1.0,
        "relative_l1": float(np.abs(o - exact).sum() / max(np.abs(exact).sum(), np.finfo(float).tiny)),
        "rmse": float(np.sqrt(np.mean((o - exact) ** 2))),
    }
