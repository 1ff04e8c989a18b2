"""Accuracy against float64 over inputs that stress attention: ``python -m sagepp accuracy``.

With a GPU its kernels are measured, without one the reference, on some row blocks of each head. With
``--parts`` the reference also says what each part of the quantisation contributes.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np

from .plan import kernels, make_plan
from .reference import attention as reference
from .reference import exact

#: What is measured without a GPU: (architecture, kernel).
CPU_PLANS = (("sm_89", "mma"), ("sm_80", "mma_fp16"), ("sm_90a", "wgmma"), ("sm_90a", "wgmma_fast"))

#: Column -> the parts that are exact while only this one is quantised.
PARTS = {
    "Q and K": {"p", "v", "accumulator"},
    "P": {"qk", "v", "accumulator"},
    "V": {"qk", "p", "accumulator"},
}

# ---------------------------------------------------------------------------- inputs


def normal(rng, q, k, v):
    """All of them N(0, 1)."""


def k_offsets(rng, q, k, v):
    """K has an offset a channel, N(0, 5**2)."""
    k += 5 * rng.standard_normal((1, 1, 1, k.shape[-1]))


def v_offsets(rng, q, k, v):
    """V has an offset a channel, N(0, 1)."""
    v += rng.standard_normal((1, 1, 1, v.shape[-1]))


def heavy_tails(rng, q, k, v):
    """All of them Student's t with 3 degrees of freedom."""
    for x in (q, k, v):
        x[...] = rng.standard_t(3, x.shape)


def peaked(rng, q, k, v):
    """Q is four times as large."""
    q *= 4


def k_outlier_channels(rng, q, k, v):
    """2% of the channels of K (one at least) are 20 times as large."""
    channels = k.shape[-1]
    k[..., rng.choice(channels, max(1, round(0.02 * channels)), replace=False)] *= 20


DISTRIBUTIONS = {
    f.__name__.replace("_", " "): f
    for f in (normal, k_offsets, v_offsets, heavy_tails, peaked, k_outlier_channels)
}


def make_inputs(distribution: str, heads: int, seq_len: int, head_dim: int, seed: int = 0):
    """FP16 q, k, v (1, heads, seq_len, head_dim) of one of the `DISTRIBUTIONS`."""
    rng = np.random.default_rng(seed)
    qkv = [rng.standard_normal((1, heads, seq_len, head_dim)) for _ in range(3)]
    DISTRIBUTIONS[distribution](rng, *qkv)
    return [x.astype(np.float16) for x in qkv]


# ---------------------------------------------------------------------------- some row blocks


def row_blocks(seq_len: int, block_m: int, rows: int) -> list[slice]:
    """About `rows` query rows, as whole row blocks spread over the sequence, the last one among them."""
    blocks = -(-seq_len // block_m)
    chosen = np.linspace(blocks - 1, 0, min(blocks, max(1, rows // block_m)) + 1)[:-1] if rows < seq_len else range(blocks)
    return [slice(int(i) * block_m, min(seq_len, int(i + 1) * block_m)) for i in sorted(map(int, chosen))]


def on_blocks(attention, blocks, q, k, v, is_causal, **options):
    """Rows of `blocks` of a square problem, by a function like `exact.masked_attention`."""
    parts = [
        attention(q[:, :, rows], k, v, rows.start if is_causal else None, **options)[0] for rows in blocks
    ]
    return np.concatenate(parts, axis=2)


def gpu_attention(blocks, q, k, v, is_causal, kernel):
    """The same rows of what the GPU returns for the whole problem."""
    import cupy

    from .api import attention

    o = cupy.asnumpy(attention(*map(cupy.asarray, (q, k, v)), is_causal=is_causal, kernel=kernel))
    return np.concatenate([o[:, :, rows] for rows in blocks], axis=2)


# ---------------------------------------------------------------------------- the table


def measure(plan, kernel, qkv, is_causal, rows, parts=False, gpu=False) -> dict[str, float]:
    """Errors of one plan on one input; with `parts`, relative L1 of each part alone."""
    blocks = row_blocks(qkv[0].shape[2], plan.block_m, rows)
    truth = on_blocks(exact.masked_attention, blocks, *qkv, is_causal)

    def by_reference(exact_parts=frozenset()):
        return on_blocks(reference.masked_attention, blocks, *qkv, is_causal, plan=plan, exact_parts=exact_parts)

    o = gpu_attention(blocks, *qkv, is_causal, kernel) if gpu else by_reference()
    result = exact.errors(o, truth)
    if parts:
        for name, exact_parts in PARTS.items():
            result[name] = exact.errors(by_reference(exact_parts), truth)["relative_l1"]
        # The tensor core multiplies rounded P and V only: the difference that its sums make.
        result["accumulator"] = exact.errors(o, by_reference({"accumulator"}))["relative_l1"]
    return result


def gpu_plans() -> list[tuple[str, str]]:
    """(architecture, kernel) of everything that runs on this machine's GPU; empty without one."""
    from . import jit

    try:
        arch = jit.family_of(jit.arch_of())
    except Exception:  # no CuPy, no driver, no GPU: whatever CuPy raises
        return []
    return [(arch, kernel) for kernel in kernels(arch)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sagepp accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=512, help="query rows of each head that are compared")
    parser.add_argument("--distributions", nargs="+", choices=DISTRIBUTIONS, default=list(DISTRIBUTIONS), metavar="NAME")
    parser.add_argument("--plans", nargs="+", metavar="ARCH:KERNEL", help="measure the reference of these plans")
    parser.add_argument("--parts", action="store_true", help="also what each part contributes (slow)")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    if options.plans:
        gpu, plans = False, [plan.split(":") for plan in options.plans]
    else:
        gpu, plans = True, gpu_plans()
        if not plans:
            print("No GPU: these are the figures of the NumPy reference.")
            gpu, plans = False, CPU_PLANS
    print(f"seq_len {options.seq_len}, {options.heads} heads, {options.rows} rows of each; errors against float64")
    records = list(_rows(options, plans, gpu))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(records, file, indent=1)
    return 0


def _rows(options, plans, gpu):
    figures = ["cosine", "relative_l1", "rmse"] + ([*PARTS, "accumulator"] if options.parts else [])
    print(f"{'distribution':20}{'d':>4} {'causal':7}{'kernel':18}" + "".join(f"{name:>13}" for name in figures))
    for distribution in options.distributions:
        for head_dim in options.head_dim:
            qkv = make_inputs(distribution, options.heads, options.seq_len, head_dim)
            for is_causal in (False, True):
                for arch, kernel in plans:
                    plan = make_plan(arch, head_dim, kernel)
                    result = measure(plan, kernel, qkv, is_causal, options.rows, options.parts, gpu)
                    print(f"{distribution:20}{head_dim:4} {'yes' if is_causal else 'no':7}{arch + ' ' + kernel:18}"
                          + "".join(f"{result[name]:13.6f}" for name in figures), flush=True)
                    yield {"distribution": distribution, "head_dim": head_dim, "seq_len": options.seq_len,
                           "is_causal": is_causal, "arch": arch, "kernel": kernel, "gpu": gpu, **result}


if __name__ == "__main__":
    sys.exit(main())
