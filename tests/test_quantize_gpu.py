"""Every buffer that `kernels_src/quantize.cu` writes holds the bits of `reference/quantize.py`."""

from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from bits import assert_same_bits
from hypothesis import given, strategies as st

from sagepp.plan import make_plan
from sagepp.reference import quantize as reference

pytestmark = pytest.mark.gpu

DTYPES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
VALUES = ("normal", "offsets", "heavy", "constant", "zero", "subnormal", "tiniest", "tiny rows", "largest", "huge rows",
          "special huge rows", "wide", "special", "late", "late alone", "late special")
#: What both sides keep of each channel.
CHANNELS = ("k_mean", "k_factor", "k_addend", "q_factor")


def make_values(rng, kind, shape, dtype):
    """Random values of a kind; `special` ones have NaN or infinities in them."""
    x = rng.standard_normal(shape)
    limit = float(ml_dtypes.finfo(dtype).max)
    if kind == "offsets":
        x = x + 10 * rng.standard_normal((1, shape[1], 1, shape[3]))
    elif kind == "heavy":
        x = np.sign(x) * np.abs(x) ** 5
    elif kind == "constant":
        x = np.broadcast_to(rng.standard_normal((1, 1, 1, shape[3])), shape)
    elif kind == "zero":
        x = np.copysign(0.0, x)
    elif kind == "subnormal":
        x = x * float(ml_dtypes.finfo(dtype).tiny) / 4
    elif kind == "tiniest":
        x = x * 1e-6
    elif kind == "tiny rows":
        x = x * np.where(np.arange(shape[2])[:, None] % 200 < 100, 1e-5, 1)
    elif kind.endswith("huge rows"):  # what overflows FP16 on the way to INT8, few of them in the sample of K
        x = np.where(rng.random((*shape[:3], 1)) < 0.01, np.copysign(limit, x), 0.1 * x)
        if kind.startswith("special"):
            x = np.where(rng.random(shape) < 0.001, np.nan, x)
    elif kind == "largest":
        x = np.copysign(limit, x) * rng.choice([1.0, 0.5, 0.0], size=shape)
    elif kind == "wide":
        x = x * 10.0 ** rng.uniform(-30, 30, shape)
    elif kind == "late":  # beyond what a sample of long K and V says
        x = np.where(np.abs(np.arange(shape[2]) - 200)[:, None] < 4, 100 * x, x)
    elif kind == "late alone":
        x = np.where(np.arange(shape[2])[:, None] == 200, x, 0)
    elif kind == "late special":
        x = np.where(np.arange(shape[2])[:, None] == 200, np.copysign(np.inf, x), x)
        return x.astype(dtype)
    elif kind == "special":
        x = np.where(rng.random(shape) < 0.02, rng.choice([np.nan, np.inf, -np.inf], size=shape), x)
        return x.astype(dtype)
    return np.clip(x, -limit, limit).astype(dtype)


def on_gpu(array, layout, pad, offset):
    """A copy on the GPU, as a view that starts `offset` elements into rows with `pad` elements around."""
    import cupy

    batch, heads, seq, d = array.shape
    order = (0, 2, 1, 3) if layout == "NHD" else (0, 1, 2, 3)
    shape = tuple(array.shape[axis] for axis in order)
    memory = np.zeros((*shape[:3], d + pad), array.dtype)
    memory[...] = 7  # read by mistake, it would show
    memory[..., offset:offset + d] = array.transpose(order)
    return cupy.asarray(memory)[..., offset:offset + d].transpose(order)


def natural_order(codes):
    """(heads, tiles, panels, rows, W) swizzled -> (heads, tiles, rows, panels * W)."""
    heads, tiles, panels, rows, width = codes.shape
    row = np.arange(rows)[:, None]
    chunk = np.arange(width // 16)[None]
    place = chunk ^ (row & 7 if width == 128 else row >> 1 & 3)
    codes = codes.reshape(heads, tiles, panels, rows, width // 16, 16)
    codes = np.take_along_axis(codes, place[None, None, None, :, :, None], axis=4)
    return codes.reshape(heads, tiles, panels, rows, width).transpose(0, 1, 3, 2, 4).reshape(
        heads, tiles, rows, panels * width)


def expected_buffers(q, k, v, sm_scale, smooth_k, plan):
    """The reference, with batch and heads flattened, name -> array."""
    def flat(x):
        return np.reshape(x, (-1, *np.shape(x)[2:]))

    group = q.shape[1] // k.shape[1]
    channels = reference.channels_of(k, v, plan, smooth_k)
    of_q_heads = reference.Channels(**{name: np.repeat(x, group, axis=1) for name, x in vars(channels).items()})
    quantized_q = reference.quantize_q(q, of_q_heads, sm_scale, plan)
    quantized_k = reference.quantize_k(k, channels, plan)
    quantized_v = reference.quantize_v(v, channels, plan)
    return {
        **{name: flat(getattr(channels, name)) for name in CHANNELS},
        "q_codes": flat(quantized_q.codes), "q_scale": flat(quantized_q.scale),
        "q_mean_dot": flat(quantized_q.mean_dot),
        "k_codes": flat(quantized_k.codes)[:, :, reference.k_order(plan)],
        "k_scale": flat(quantized_k.scale), "k_scale_max": quantized_k.scale_max.reshape(-1),
        "v_codes": flat(quantized_v.codes)[:, :, reference.v_order(plan)][..., reference.channel_order(plan)[:plan.channels]],
        "v_scale": flat(quantized_v.scale) + np.float32(0), "v_offset": flat(quantized_v.offset)}


def actual_buffers(buffers, seq_q, return_lse, plan):
    """What the kernels wrote, in the layout of :func:`expected_buffers`."""
    b = {name: x.get() for name, x in buffers.items()}
    q_codes = natural_order(b["q_codes"])
    q_codes = q_codes.reshape(q_codes.shape[0], -1, plan.head_dim)
    assert not q_codes[:, seq_q:].any(), "rows beyond the last query have the code 0"
    codes = b["v_codes"]
    assert (codes[:, :, :, plan.channels:] == reference.formats.to_e4m3(plan.row_sum_unit)).all()
    codes = codes[:, :, :, :plan.channels].copy()
    codes = codes.view(np.float16) if plan.v_dtype == "f16" else codes
    actual = {
        **{name: b[name] for name in CHANNELS},
        "q_codes": q_codes[:, :seq_q], "q_scale": b["q_scale"][:, :seq_q],
        "k_codes": natural_order(b["k_codes"]), "k_scale": b["k_scale"], "k_scale_max": b["k_scale_max"],
        "v_codes": codes.transpose(0, 1, 2, 4, 3).reshape(*codes.shape[:2], plan.block_n, plan.channels),
        "v_scale": b["v_scale"] + np.float32(0), "v_offset": b["v_offset"]}
    if return_lse:
        actual["q_mean_dot"] = b["q_mean_dot"][:, :seq_q]
    return actual


def check_largest(largest, scales, cta_tiles, plan):
    """`largest_q_scales` has, for each tile of Q, the largest scale of all tiles of the same CTA."""
    cta_rows = cta_tiles * (128 if plan.head_dim <= 128 else 64)
    for tile in range(largest.shape[1]):
        rows = slice(tile // cta_tiles * cta_rows, (tile // cta_tiles + 1) * cta_rows)
        assert_same_bits(largest[:, tile], np.fmax.reduce(scales[:, rows], axis=1, initial=0), plan, f"tile {tile}")


def check(q, k, v, kernel, placement=("HND", 0, 0), return_lse=True, smooth_k=True, note="", cta_tiles=1):
    """Compare the buffers of one call, in which a CTA makes the codes of `cta_tiles` tiles."""
    from sagepp import jit, launch, schedule

    plan = make_plan(jit.family_of(jit.arch_of()), q.shape[3], kernel)
    sm_scale = q.shape[3] ** -0.5
    with mock.patch.object(schedule, "tiles_of_a_cta", lambda *_: cta_tiles):
        buffers = launch.quantize(*(on_gpu(x, *placement) for x in (q, k, v)), sm_scale=sm_scale,
                                  return_lse=return_lse, smooth_k=smooth_k, kernel=kernel)
    actual = actual_buffers(buffers, q.shape[2], return_lse, plan)
    expected = expected_buffers(q, k, v, sm_scale, smooth_k, plan)
    for name, array in actual.items():
        assert_same_bits(array, expected[name], plan, f"{name}; {note}")
    check_largest(buffers["largest_q_scales"].get(), expected["q_scale"], cta_tiles, plan)


def skip_without_plan(kernel, head_dim):
    from sagepp import jit

    try:
        make_plan(jit.family_of(jit.arch_of()), head_dim, kernel)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(params=[None, "mma", "mma_fp16", "wgmma", "wgmma_fast"])
def kernel(request):
    skip_without_plan(request.param, 64)
    return request.param


@pytest.mark.parametrize("cta_tiles", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 8, 77, 96, 150, 192, 200, 256])
def test_quantised_buffers_equal_the_reference(kernel, head_dim, dtype, cta_tiles):
    skip_without_plan(kernel, head_dim)
    rng = np.random.default_rng(head_dim)
    q = make_values(rng, "normal", (2, 4, 500, head_dim), DTYPES[dtype])
    k = make_values(rng, "offsets", (2, 2, 1037, head_dim), DTYPES[dtype])
    v = make_values(rng, "offsets", (2, 2, 1037, head_dim), DTYPES[dtype])
    check(q, k, v, kernel, cta_tiles=cta_tiles)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_values(kernel, dtype, values):
    rng = np.random.default_rng(0)
    q, k, v = (make_values(rng, values, (1, 2, seq, 64), DTYPES[dtype]) for seq in (300, 1100, 1100))
    for smooth_k in (True, False):
        check(q, k, v, kernel, smooth_k=smooth_k, cta_tiles=1 + smooth_k)


cases = st.fixed_dictionaries({
    "seed": st.integers(0, 2**32 - 1), "batch": st.integers(1, 2), "num_heads_kv": st.integers(1, 2),
    "group": st.integers(1, 3), "seq_q": st.integers(1, 300), "seq_kv": st.integers(1, 600) | st.integers(1000, 1500),
    "head_dim": st.integers(1, 128) | st.integers(129, 256), "dtype": st.sampled_from(sorted(DTYPES)),
    "values": st.tuples(*[st.sampled_from(VALUES)] * 3), "layout": st.sampled_from(["HND", "NHD"]),
    "pad": st.sampled_from([0, 3, 8]), "cta_tiles": st.integers(1, 4), "return_lse": st.booleans(),
    "smooth_k": st.booleans(), "kernel": st.sampled_from([None, "mma", "mma_fp16", "wgmma", "wgmma_fast"])})


@given(cases)
def test_any_problem(case):
    from sagepp import jit

    try:
        make_plan(jit.family_of(jit.arch_of()), case["head_dim"], case["kernel"])
    except ValueError:
        case["kernel"], case["head_dim"] = None, min(128, case["head_dim"])
    rng = np.random.default_rng(case["seed"])
    dtype, d = DTYPES[case["dtype"]], case["head_dim"]
    heads_kv = case["num_heads_kv"]
    shapes = [(case["batch"], heads_kv * case["group"], case["seq_q"], d)]
    shapes += 2 * [(case["batch"], heads_kv, case["seq_kv"], d)]
    q, k, v = (make_values(rng, kind, shape, dtype) for kind, shape in zip(case["values"], shapes))
    pad = case["pad"]
    check(q, k, v, case["kernel"], (case["layout"], pad, pad // 2 * (pad != 8)), case["return_lse"],
          case["smooth_k"], note=str(case), cta_tiles=case["cta_tiles"])


def test_two_calls_return_the_same_bits(kernel):
    from sagepp import launch

    rng = np.random.default_rng(1)
    arrays = [on_gpu(make_values(rng, "heavy", (2, 3, 700, 128), DTYPES["fp16"]), "HND", 0, 0) for _ in range(3)]
    first, second = ({name: x.get() for name, x in launch.quantize(*arrays, kernel=kernel).items()}
                     for _ in range(2))
    for name in first.keys() - {"chunks"}:  # of which there may be fewer
        assert_same_bits(second[name], first[name], note=name)
