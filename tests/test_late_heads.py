"""Which heads are late: `late_heads` of sagepp/schedule.py. What they become, only a GPU shows (test_gpu.py)."""

import pytest
from hypothesis import given, strategies as st

from sagepp import schedule
from sagepp.plan import make_plan


def geometry(batch, num_heads_q, num_heads_kv, seq_q, seq_kv, head_dim, is_causal=False, **options):
    strides = ((0, 0, 0),) * 4
    values = dict(bfloat16=False, aligned=True, causal_alignment="bottom-right", sm_scale=1.0, return_lse=False,
                  smooth_k=True)
    return schedule.Geometry(batch, num_heads_q, num_heads_kv, seq_q, seq_kv, head_dim, strides, is_causal=is_causal,
                             **{**values, **options})


def late_heads(g, kernel="wgmma", num_sms=132):
    plan = make_plan("sm_90a", g.head_dim, kernel)
    ctas = schedule.attention_grid(plan, g.batch, g.num_heads_q, g.seq_q, num_sms)[0][0]
    return schedule.late_heads(g, plan, ctas), plan, ctas


@given(batch=st.integers(1, 64), heads_kv=st.integers(1, 16), group=st.integers(1, 8), seq_q=st.integers(1, 20000),
       seq_kv=st.integers(1, 20000), head_dim=st.integers(1, 256), num_sms=st.integers(1, 132),
       kernel=st.sampled_from(["wgmma", "wgmma_fast"]), is_causal=st.booleans(), bfloat16=st.booleans(),
       return_lse=st.booleans(), causal_alignment=st.sampled_from(["bottom-right", "top-left"]))
def test_some_heads_come_first_and_most_sms_attend(
        batch, heads_kv, group, seq_q, seq_kv, head_dim, num_sms, kernel, **options):  # fmt: skip
    g = geometry(batch, heads_kv * group, heads_kv, seq_q, seq_kv, head_dim, **options)
    late, plan, ctas = late_heads(g, kernel, num_sms)
    heads = batch * heads_kv
    assert 1 <= late.early_heads <= heads and 0 <= late.ctas <= ctas // 3
    assert (late.ctas == 0) == (late.early_heads == heads)
    arguments = late.arguments(g, plan)
    k_tiles, q_tiles = -(-seq_kv // plan.block_n), schedule.q_tiles(g, plan)
    assert arguments["head_tiles"] == k_tiles + group * q_tiles
    assert arguments["num_late_tiles"] == (heads - late.early_heads) * arguments["head_tiles"]
    if late.ctas:
        items = group * -(-seq_q // plan.block_m)  # of a head
        assert late.early_heads * items >= ctas - late.ctas, "a CTA would wait at once"


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kernel", ["wgmma", "wgmma_fast"])
@pytest.mark.parametrize("batch, seq_len", [(16, 1024), (8, 2048), (4, 4096), (2, 8192)])
def test_calls_that_are_measured_have_late_heads(batch, seq_len, kernel, is_causal):
    late, _, _ = late_heads(geometry(batch, 16, 16, seq_len, seq_len, 128, is_causal), kernel)
    assert 0 < late.ctas


@pytest.mark.parametrize("shape, options", [
    ((2, 16, 16, 8192, 8192, 128), dict(aligned=False)),
    ((64, 16, 16, 1, 8192, 128), {}),
    ((64, 16, 16, 512, 512, 128), {}),
    ((1, 32, 1, 8192, 8192, 128), {}),
    ((1, 16, 16, 2048, 2048, 128), {}),
], ids=["not aligned", "one query", "short", "one KV head", "few items"])  # fmt: skip
def test_calls_without_late_heads(shape, options):
    g = geometry(*shape, **options)
    assert late_heads(g)[0] == schedule.Late(g.batch * g.num_heads_kv)


def test_the_portable_kernels_have_none():
    g = geometry(2, 16, 16, 8192, 8192, 128)
    assert schedule.late_heads(g, make_plan("sm_89", 128, "mma"), 132) == schedule.Late(32)
