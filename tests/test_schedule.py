"""`kernels_src/schedule.cuh`, compiled for the CPU: whatever the problem, its CTAs do every tile once, in a valid order."""

import shutil
import subprocess
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, strategies as st

from sagepp import jit
from sagepp.plan import make_plan
from sagepp.schedule import attention_grid, count_shared_items

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

#: A line of numbers a problem in; out, a line a part, in the order in which CTAs start them, and then the ticket.
PROGRAM = r"""
#include <algorithm>
#include <cstdio>
#include <vector>
using std::max;
using std::min;
#define __device__
struct int2 { int x, y; };
static int2 make_int2(int x, int y) { return {x, y}; }
static struct { unsigned x; } gridDim, blockIdx;
static unsigned atomicAdd(unsigned* p, unsigned x) { unsigned before = *p; *p += x; return before; }
#include "schedule.cuh"

int main() {
    int batch, heads_q, heads_kv, seq_q, seq_kv, causal_offset, shared_items, ctas;
    while (scanf("%d %d %d %d %d %d %d %d", &batch, &heads_q, &heads_kv, &seq_q, &seq_kv, &causal_offset, &shared_items,
                 &ctas) == 8) {
        Problem problem{heads_q, heads_kv, seq_q, seq_kv, causal_offset, batch * heads_q, shared_items};
        unsigned ticket = 0;
        gridDim.x = ctas;
        std::vector<int> parts(ctas), busy(ctas);  // of each CTA: how many so far, tiles of these
        for (int running = ctas; running > 0;) {   // the CTA that is free first goes on; -1: it has ended
            int cta = -1;
            for (int i = 0; i < ctas; ++i)
                if (parts[i] >= 0 && (cta < 0 || busy[i] < busy[cta])) cta = i;
            blockIdx.x = cta;
            Part part;
            if (Schedule{problem}.part(parts[cta]++, part, &ticket)) {
                printf("%d %d %d %d %d %d %d\n", cta, part.item.head, part.item.kv_head, part.item.row_block, part.begin,
                       part.end, part.item.num_tiles);
                busy[cta] += part.end - part.begin;
            } else {
                parts[cta] = -1, --running;
            }
        }
        printf("%u\n", ticket);
        fflush(stdout);
    }
}
"""


class Part(SimpleNamespace):
    """A line of `PROGRAM`, and when the CTA was free for it, in tiles."""

    def item(self):
        return self.head, self.row_block


@pytest.fixture(scope="module", params=[(128, False), (64, False), (256, False), (128, True), (64, True)], ids=str)
def schedule(request, tmp_path_factory):
    """(plan, is_causal, f(numbers of a problem) -> its parts)."""
    head_dim, is_causal = request.param
    plan = make_plan("sm_90a", head_dim)
    folder = tmp_path_factory.mktemp("schedule")
    (folder / "main.cpp").write_text(PROGRAM)
    defines = {"BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n, "PROMOTE_EVERY": plan.promote_every, "CAUSAL": int(is_causal)}
    subprocess.run([COMPILER, "-std=c++17", "-O1", f"-I{jit.source_dir()}", *(f"-D{n}={x}" for n, x in defines.items()),
                    "-o", folder / "main", folder / "main.cpp"], check=True)  # fmt: skip
    with subprocess.Popen(folder / "main", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        def parts_of(*numbers):
            print(*numbers, file=process.stdin, flush=True)
            parts, busy = [], {}
            while len(line := process.stdout.readline().split()) > 1:
                cta, head, kv_head, row_block, begin, end, num_tiles = map(int, line)
                start = busy.get(cta, 0)
                busy[cta] = start + end - begin
                parts.append(Part(cta=cta, head=head, kv_head=kv_head, row_block=row_block, begin=begin, end=end,
                                  num_tiles=num_tiles, start=start))
            assert line == ["0"], "the ticket is 0 again"
            return parts

        yield plan, is_causal, parts_of
        process.stdin.close()


@given(batch=st.integers(1, 3), heads_kv=st.integers(1, 5), group=st.integers(1, 3), seq_q=st.integers(1, 3000),
       seq_kv=st.integers(1, 9000), top_left=st.booleans(), num_sms=st.integers(1, 140), cut_tiles=st.integers(0, 12))
def test_every_tile_is_done_once_and_shares_fit(
        schedule, batch, heads_kv, group, seq_q, seq_kv, top_left, num_sms, cut_tiles):  # fmt: skip
    plan, is_causal, parts_of = schedule
    heads_q = heads_kv * group
    (ctas, _, _), _ = attention_grid(plan, batch, heads_q, seq_q, num_sms)
    geometry = SimpleNamespace(batch=batch, num_heads_q=heads_q, seq_q=seq_q, seq_kv=seq_kv, is_causal=is_causal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sagepp.schedule.CUT_TILES", cut_tiles)
        shared_items = count_shared_items(geometry, plan, ctas)
    causal_offset = 0 if top_left or not is_causal else seq_kv - seq_q
    parts = parts_of(batch, heads_q, heads_kv, seq_q, seq_kv, causal_offset, shared_items, ctas)

    items = {}
    for part in parts:
        items.setdefault(part.item(), []).append(part)
    row_blocks = -(-seq_q // plan.block_m)
    assert sorted(items) == [(head, block) for head in range(batch * heads_q) for block in range(row_blocks)]
    for (head, block), pieces in items.items():
        last_row = min((block + 1) * plan.block_m, seq_q) - 1
        keys = min(seq_kv, max(0, last_row + causal_offset + 1)) if is_causal else seq_kv
        pieces.sort(key=lambda part: part.begin)
        assert pieces[0].begin == 0 and pieces[-1].end == pieces[0].num_tiles == -(-keys // plan.block_n)
        assert all(part.kv_head == head // group for part in pieces)
        for first, rest in pairwise(pieces):
            assert first.end == rest.begin and first.end % min(4, plan.promote_every) == 0
            assert rest.cta == first.cta + 1, "it continues what the CTA before has begun"
            assert first.start + first.end <= rest.start + 8, "and need not wait for it"
        assert len(pieces) <= 2

    if shared_items:
        tiles = [sum(part.end - part.begin for part in parts if part.cta == cta) for cta in range(ctas)]
        assert max(tiles) - min(tiles) <= 8, "the shares are equal"
        for cta in range(ctas):
            continued = [part.begin > 0 for part in parts if part.cta == cta]
            assert not any(continued[:-1]), "what waits comes last"


@pytest.mark.parametrize("schedule", [(128, True), (64, True)], indirect=True, ids=str)
@given(batch=st.integers(1, 3), heads=st.integers(1, 40), seq=st.integers(2000, 6000), num_sms=st.integers(8, 132))
def test_causal_ctas_end_together(schedule, batch, heads, seq, num_sms):
    """Up to a quarter of the longest item, where a CTA has more than that to do."""
    plan, _, parts_of = schedule
    (ctas, _, _), _ = attention_grid(plan, batch, heads, seq, num_sms)
    parts = parts_of(batch, heads, heads, seq, seq, 0, 0, ctas)
    ends = [max(part.start + part.end for part in parts if part.cta == cta) for cta in range(ctas)]
    even = sum(part.end for part in parts) / ctas
    longest = max(part.end for part in parts)
    assert max(ends) <= max(longest, even + longest / 4 + 1)
