"""The paper's comparison of accumulators: ``python -m sagepp paper``.

SageAttention2++ (arXiv 2505.21136, section 3.2 and table 1) accumulates P V in FP16 and narrows the ranges of P
and V so that nothing overflows; it reports that accuracy stays that of FP32 accumulators at full range.
Here the same scheme (a running maximum, P from the exact exponential, no smoothing of V) runs on the model of
Ada's tensor core, on the inputs of `sagepp.accuracy`, with Q and K quantised as in this library.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np

from . import accuracy
from .plan import make_plan
from .reference import attention as reference
from .reference import exact, formats, tensor_core

#: Accumulator, top of P's range, top of V's range. 448 and 2.25 are not a power of two apart, so V falls on
#: other codes: the second entry tells that difference from the accumulator's.
RANGES = (("f32", 448.0, 448.0), ("f32", 448.0, 2.25), ("f16", 448.0, 2.25), ("f16", 224.0, 4.5), ("f16", 112.0, 9.0))
INTERVAL = 64  # keys between two promotions


def attend(problem, v, accumulator: str, p_range: float, v_range: float) -> np.ndarray:
    """Output (heads, rows, head_dim) float32 of one KV head, v (seq_kv, head_dim), without a mask."""
    plan = problem.plan
    scale = problem.q.scale[..., None] * np.repeat(problem.k.scale.reshape(-1), plan.block_n // 4)
    k_codes = problem.k.codes.reshape(-1, plan.head_dim)
    scores = tensor_core.int8_dot(problem.q.codes, k_codes.T).astype(np.float32) * scale
    scores = scores[..., : problem.seq_kv]
    v_scale = np.abs(v).max(axis=0) / np.float32(v_range)
    v_codes = formats.from_e4m3(formats.to_e4m3(v / v_scale))
    bound = np.full(scores.shape[:2], -np.inf, np.float32)
    total = np.zeros((*scores.shape[:2], v.shape[-1] + 1), np.float32)  # O and, last, l
    rule = ("sm_89", "mma.sync", "e4m3", accumulator)
    for first in range(0, problem.seq_kv, INTERVAL):
        keys = slice(first, min(first + INTERVAL, problem.seq_kv))
        new = np.maximum(bound, scores[..., keys].max(axis=-1))
        p = np.exp2(scores[..., keys] - new[..., None]) * np.float32(p_range)
        product = tensor_core.mma(formats.from_e4m3(formats.to_e4m3(p)), v_codes[keys], np.float32(0), rule)
        tile = np.concatenate([product, p.sum(axis=-1, keepdims=True)], axis=-1)
        total = total * np.exp2(bound - new)[..., None] + tile
        bound = new
    return total[..., :-1] / total[..., -1:] * v_scale


def compare(qkv, rows: int) -> list[dict]:
    """Errors of every entry of `RANGES` on some rows of q, k, v (1, heads, seq_len, head_dim)."""
    q, k, v = qkv
    plan = make_plan("sm_89", q.shape[-1], "mma")
    blocks = accuracy.row_blocks(q.shape[2], plan.block_m, rows)
    truth = accuracy.on_blocks(exact.masked_attention, blocks, q, k, v, False)
    q = np.concatenate([q[:, :, block] for block in blocks], axis=2)
    problems = [
        reference.quantize_head(q[0, [h]], k[0, h], v[0, h], None, q.shape[-1] ** -0.5, True, plan, frozenset())
        for h in range(q.shape[1])
    ]
    records = []
    for accumulator, p_range, v_range in RANGES:
        heads = [attend(problem, v[0, h].astype(np.float32), accumulator, p_range, v_range)[0]
                 for h, problem in enumerate(problems)]
        records.append({"accumulator": accumulator, "p_range": p_range, "v_range": v_range,
                        **exact.errors(np.stack(heads)[None], truth)})
    return records


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sagepp paper", description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=256, help="query rows of each head that are compared")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    records = []
    print(f"{'distribution':20}{'d':>4} {'accumulator':12}{'P':>5}{'V':>7}{'cosine':>11}{'relative_l1':>13}")
    for distribution in accuracy.DISTRIBUTIONS:
        for head_dim in (64, 128):
            qkv = accuracy.make_inputs(distribution, options.heads, options.seq_len, head_dim)
            for record in compare(qkv, options.rows):
                print(f"{distribution:20}{head_dim:4} {record['accumulator']:12}{record['p_range']:5g}"
                      f"{record['v_range']:7g}{record['cosine']:11.6f}{record['relative_l1']:13.6f}", flush=True)
                records.append({"distribution": distribution, "head_dim": head_dim,
                                "seq_len": options.seq_len, **record})
    if options.json:
        with open(options.json, "w") as file:
            json.dump(records, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
