"""On a GPU: the bits of the reference, whatever the problem, and wherever and however often it runs.

``SAGEPP_GPU_EXAMPLES`` is the number of random problems a kernel (default 50), ``SAGEPP_GPU_SEED`` what
they start from (a number, by default 0, or "random"). The reference takes the time: ``pytest -m gpu -n 8``
shares it out.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import strategies
import worst_case
from bits import assert_same_bits
from hypothesis import given, seed, settings
from strategies import Problem, problems

import sagepp
from sagepp import jit, launch, schedule
from sagepp.plan import make_plan

pytestmark = pytest.mark.gpu

EXAMPLES = int(os.environ.get("SAGEPP_GPU_EXAMPLES", 50))
SEED = strategies.seed_of(os.environ.get("SAGEPP_GPU_SEED", "0"))
SHARDS = 8

each_kernel = pytest.mark.parametrize("kernel", strategies.KERNELS)


def plan_of(kernel, head_dim):
    """The plan on this GPU, which may have no such kernel."""
    try:
        return make_plan(jit.family_of(jit.arch_of()), head_dim, kernel)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every allocation starts as NaN, so that what is not written shows."""
    import cupy

    pool = cupy.get_default_memory_pool()

    def malloc(size):
        memory = pool.malloc(size)
        if size:
            memory.memset_async(0xFF, size, cupy.cuda.get_current_stream())
        return memory

    with cupy.cuda.using_allocator(malloc):
        yield


def call(arrays, kernel, **options):
    """(o, lse) of NumPy arrays, as NumPy arrays."""
    import cupy

    result = sagepp.attention(*map(cupy.asarray, arrays), return_lse=True, kernel=kernel, **options)
    return tuple(map(cupy.asnumpy, result))


def assert_same(actual, expected, plan=None, note=""):
    for name, x, y in zip(("o", "lse"), actual, expected):
        assert_same_bits(x, y, plan, f"{name} {note}")


@contextlib.contextmanager
def late_heads(early_heads, ctas):
    """Calls in which `late_codes` makes the codes of all KV heads but the first ones, wherever it can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "late_heads", strategies.late_heads(early_heads, ctas))
        patch.setattr(launch, "_calls", launch._Calls())  # of which none was made otherwise
        yield


def check(problem, kernel):
    plan = plan_of(kernel, problem.head_dim)
    expected = strategies.by_reference(problem, plan)
    assert_same(strategies.on_gpu(problem, kernel), expected, plan, problem)
    if plan.kernel == "wgmma":
        with late_heads(problem.seed % 2, ctas=1 + problem.seq_kv % 3):
            assert_same(strategies.on_gpu(problem, kernel), expected, plan, f"late heads, {problem}")


# ---------------------------------------------------------------------------- the reference's bits


@each_kernel
@pytest.mark.parametrize("shard", range(SHARDS))
def test_output_and_lse_are_those_of_the_reference(kernel, shard):
    plan_of(kernel, 64)

    @seed(SEED * SHARDS + shard)
    @settings(max_examples=-(-EXAMPLES // SHARDS), derandomize=False, database=None)
    @given(problem=problems(kernel=kernel))
    def on_random_problems(problem):
        check(problem, kernel)

    on_random_problems()


@each_kernel
@pytest.mark.parametrize("problem", [
    Problem(seq_q=1, seq_kv=1, head_dim=1),
    Problem(seq_q=700, seq_kv=2100, head_dim=128, is_causal=True),
    Problem(seq_q=700, seq_kv=2100, head_dim=256, is_causal=True),
    Problem(seq_q=300, seq_kv=1500, head_dim=200, dtype="bfloat16", kinds=("rising", "rising", "normal")),
    Problem(seq_q=1, seq_kv=5000, head_dim=64, group=8),
    Problem(seq_q=300, seq_kv=100, head_dim=64, is_causal=True),
    Problem(seq_q=100, seq_kv=300, head_dim=64, is_causal=True, causal_alignment="top-left"),
    Problem(seq_q=256, seq_kv=512, kinds=("rising", "rising", "normal")),
    Problem(seq_q=256, seq_kv=512, kinds=("normal", "not finite", "not finite"), is_causal=True),
    Problem(seq_q=130, seq_kv=257, dtype="bfloat16", kinds=("largest",) * 3),
    Problem(seq_q=130, seq_kv=257, dtype="bfloat16", kinds=("subnormal",) * 3),
    Problem(seq_q=130, seq_kv=257, kinds=("zeros",) * 3),
    # steep key groups, which some rows do not see
    Problem(seq_q=257, seq_kv=700, kinds=("spiked rows", "spiked rows", "normal"), is_causal=True),
    Problem(group=2, seq_q=400, seq_kv=1200, head_dim=128, kinds=("normal", "late", "normal"), is_causal=True,
            causal_alignment="top-left", sm_scale=3.0),
    Problem(seq_q=100, seq_kv=1100, head_dim=250, dtype="bfloat16", kinds=("any bits", "any bits", "normal")),
    # a group of K whose scale is NaN, and rows that do not see it
    Problem(group=2, seq_q=22, seq_kv=1024, head_dim=63, dtype="bfloat16", kinds=("normal", "huge rows", "normal"),
            is_causal=True, causal_alignment="top-left", sm_scale=1e6, seed=2),
    Problem(heads_kv=2, seq_q=2, seq_kv=1024, head_dim=5, dtype="bfloat16", is_causal=True, causal_alignment="top-left",
            kinds=("channel offsets", "huge rows", "normal"), sm_scale=1e6),
    Problem(batch=3, heads_kv=2, group=4, seq_q=65, seq_kv=63, head_dim=80, tensor_layout="NHD",
            storage="odd offset", dtype="bfloat16", smooth_k=False, sm_scale=0.3),
], ids=repr)  # fmt: skip
def test_chosen_problems(kernel, problem):
    check(problem, kernel)


@pytest.mark.parametrize("kernel", ["wgmma", "wgmma_fast"])
@pytest.mark.parametrize("num_sms", [2, 4, 7])
@pytest.mark.parametrize("problem", [
    Problem(heads_kv=3, group=3, seq_q=300, seq_kv=1700, head_dim=128),
    Problem(batch=3, heads_kv=5, seq_q=150, seq_kv=1025, head_dim=64, kinds=("rising", "rising", "normal")),
    Problem(heads_kv=3, seq_q=333, seq_kv=1900, head_dim=200, kinds=("normal", "spiked rows", "heavy tails")),
    Problem(heads_kv=3, seq_q=333, seq_kv=1900, head_dim=192, kinds=("rising", "rising", "normal")),
    Problem(heads_kv=5, seq_q=333, seq_kv=1500, head_dim=96, kinds=("normal", "spiked rows", "heavy tails")),
    Problem(heads_kv=5, seq_q=333, seq_kv=1500, head_dim=96, kinds=("spiked rows", "spiked rows", "normal")),
    Problem(heads_kv=11, seq_q=130, seq_kv=1100, kinds=("not finite", "not finite", "not finite")),
], ids=repr)  # fmt: skip
def test_a_cta_continues_what_another_began(kernel, num_sms, problem, monkeypatch):
    """`Schedule` of attention_wgmma.cu, on as many SMs as make it cut items in two; every launch like the first."""
    import cupy

    plan = plan_of(kernel, problem.head_dim)
    monkeypatch.setattr(launch, "_num_sms", lambda device: num_sms)
    monkeypatch.setattr(schedule, "CUT_TILES", 0)
    monkeypatch.setattr(launch, "_calls", launch._Calls())  # none of a GPU with more SMs
    arrays = list(map(cupy.asarray, problem.arrays()))
    prepared = launch.prepare(*arrays, return_lse=True, kernel=kernel, **problem.options())
    tiles = -(-problem.seq_kv // plan.block_n)
    share, rest = divmod(prepared._launch.shared_items * tiles, num_sms)
    ends = [(share * cta + min(cta, rest)) % tiles for cta in range(1, num_sms)]  # of shares: tile of an item
    assert max(ends) >= 4, "no item is cut"  # they are cut at multiples of four
    expected = strategies.by_reference(problem, plan)
    prepared.quantize()
    for _ in range(2):
        prepared.o.fill(np.nan)
        prepared.lse.fill(np.nan)
        prepared.attend()
        assert_same([cupy.asnumpy(x) for x in (prepared.o, prepared.lse)], expected, plan, problem)
    for _ in range(3):
        result = sagepp.attention(*arrays, return_lse=True, kernel=kernel, **problem.options())
        assert_same(map(cupy.asnumpy, result), expected, plan, problem)


@pytest.mark.parametrize("kernel", ["wgmma", "wgmma_fast"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128, 192, 256])
def test_late_heads_have_the_same_bits(kernel, dtype, head_dim):
    """In every kind of call: with an LSE and without, causal and not; the whole of a head or the GPU is late."""
    import cupy

    plan = plan_of(kernel, head_dim)
    for problem in (
            Problem(2, 3, 2, 300, 1700, head_dim, dtype=dtype, kinds=("normal", "channel offsets", "normal")),
            Problem(1, 4, 3, 260, 1100, head_dim, dtype=dtype, kinds=("spiked rows", "not finite", "normal"),
                    is_causal=True, tensor_layout="NHD"),
            Problem(3, 1, 1, 130, 1025, head_dim, dtype=dtype, kinds=("huge rows", "huge rows", "normal")),
            Problem(1, 2, 1, 200, 140, head_dim, dtype=dtype, kinds=("any bits", "subnormal", "normal"))):
        arrays = [problem.stored(x, cupy.asarray) for x in problem.arrays()]
        options = dict(kernel=kernel, tensor_layout=problem.tensor_layout, **problem.options())
        expected = sagepp.attention(*arrays, return_lse=True, **options)
        assert_same(strategies.on_gpu(problem, kernel), strategies.by_reference(problem, plan), plan, problem)
        for early_heads, ctas in (0, 1), (1, 2), (2, 40):
            with late_heads(early_heads, ctas):
                for _ in range(3):
                    assert_same(map(cupy.asnumpy, sagepp.attention(*arrays, return_lse=True, **options)),
                                map(cupy.asnumpy, expected), plan, problem)
                    assert_same_bits(cupy.asnumpy(sagepp.attention(*arrays, **options)), cupy.asnumpy(expected[0]), plan,
                                     str(problem))
                for made in launch._calls.of_key.values():
                    assert bool(made._launch.make_late_codes) == (early_heads < problem.batch * problem.heads_kv)
                    region, (memory,) = made._launch.counters, made._counters.values()
                    assert not cupy.ndarray((region.bytes // 4,), np.uint32, memory).any()


def test_a_long_call_has_late_heads():
    """By the rule that is used; and the bits of a call that has none."""
    import cupy

    plan_of("wgmma", 128)
    rng = cupy.random.default_rng(0)
    arrays = [rng.standard_normal((2, 16, 8192, 128), dtype=np.float32).astype(np.float16) for _ in range(3)]
    for is_causal in False, True:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "_calls", launch._Calls())
            results = [sagepp.attention(*arrays, is_causal=is_causal) for _ in range(3)]
            (made,) = launch._calls.of_key.values()
            assert made._launch.make_late_codes
        prepared = launch.prepare(*arrays, is_causal=is_causal)
        prepared.quantize()
        prepared.attend()
        for result in results:
            assert (result.view(np.uint16) == prepared.o.view(np.uint16)).all()


@each_kernel
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_fp16_accumulator_near_its_limit(kernel, head_dim):
    plan = plan_of(kernel, head_dim)

    @seed(SEED)
    @settings(max_examples=20, derandomize=False, database=None)
    @given(**worst_case.DRAWN)
    def at_the_limit(seed, dtype, options):
        arrays = worst_case.arrays(plan, seed, dtype)
        o, lse = call(arrays, kernel, **options)
        assert np.isfinite(o).all() and np.isfinite(lse).all()
        assert_same((o, lse), worst_case.by_reference(plan, arrays, options), plan)

    at_the_limit()


# ---------------------------------------------------------------------------- the same bits everywhere


@each_kernel
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_call_and_every_stream_returns_the_same_bits(kernel, is_causal):
    import cupy

    plan_of(kernel, 128)
    shapes = [Problem(2, 4, 2, 333, 777, 128), Problem(2, 4, 2, 333, 777, 128, seed=1), Problem(1, 3, 1, 500, 200, 100)]
    inputs = [[cupy.asarray(x) for x in problem.arrays()] for problem in shapes]
    first = [call(arrays, kernel, is_causal=is_causal) for arrays in inputs]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(4)]
    cupy.cuda.Device().synchronize()
    results = []
    for i in range(24):
        with streams[i % 4]:
            results.append(sagepp.attention(*inputs[i % 3], return_lse=True, kernel=kernel, is_causal=is_causal))
    cupy.cuda.Device().synchronize()
    for i, result in enumerate(results):
        assert_same(map(cupy.asnumpy, result), first[i % 3], note=f"call {i}")


@each_kernel
@pytest.mark.parametrize("is_causal", [False, True])
def test_counters_are_clear_after_a_call(kernel, is_causal):
    """Those of 130 KV heads: more than the threads that clear them."""
    import cupy

    plan_of(kernel, 64)
    arrays = map(cupy.asarray, Problem(13, 10, 1, 260, 1300, 64).arrays())
    prepared = launch.prepare(*arrays, is_causal=is_causal, kernel=kernel)
    region = prepared._launch.counters
    counters = cupy.ndarray((region.bytes // 4,), np.uint32, prepared._counters)
    prepared.quantize()
    assert counters.any()
    prepared.attend()
    assert not counters.any()


@each_kernel
@pytest.mark.parametrize("is_causal", [False, True])
def test_position_in_the_batch_and_among_the_heads_does_not_matter(kernel, is_causal):
    plan_of(kernel, 64)
    q, k, v = Problem(3, 3, 2, 200, 300).arrays()
    o, lse = call((q, k, v), kernel, is_causal=is_causal)
    for b in range(3):
        for h in range(3):
            heads = slice(2 * h, 2 * h + 2)
            alone = (q[b : b + 1, heads], k[b : b + 1, h : h + 1], v[b : b + 1, h : h + 1])
            expected = (o[b : b + 1, heads], lse[b : b + 1, heads])
            assert_same(call(alone, kernel, is_causal=is_causal), expected, note=f"batch {b}, KV head {h}")


@each_kernel
@pytest.mark.parametrize("is_causal", [False, True])
def test_copies_of_a_problem_have_the_same_bits(kernel, is_causal):
    """In 64 positions: more blocks than run at a time."""
    plan_of(kernel, 128)
    one = Problem(1, 1, 2, 513, 700, 128).arrays()
    o, lse = call(one, kernel, is_causal=is_causal)
    copies = call([np.tile(x, (4, 16, 1, 1)) for x in one], kernel, is_causal=is_causal)
    assert_same(copies, (np.tile(o, (4, 16, 1, 1)), np.tile(lse, (4, 16, 1))))


@each_kernel
@pytest.mark.parametrize("rows", [slice(0, 1), slice(130, 131), slice(77, 333)], ids=str)
def test_a_row_does_not_depend_on_the_others(kernel, rows):
    plan_of(kernel, 64)
    q, k, v = Problem(2, 1, 2, 333, 400, kinds=("normal", "rising", "normal")).arrays()
    o, lse = call((q, k, v), kernel)
    assert_same(call((q[:, :, rows], k, v), kernel), (o[:, :, rows], lse[:, :, rows]))


@each_kernel
@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_a_graph_replays_the_same_bits_on_new_values(kernel, late):
    import cupy

    plan_of(kernel, 64)
    problem = Problem(1, 2, 2, 150, 260, is_causal=True)
    others = replace(problem, seed=1).arrays()
    buffers = [cupy.asarray(x) for x in problem.arrays()]
    expected = call(others, kernel, is_causal=True)
    options = dict(is_causal=True, return_lse=True, kernel=kernel)
    stream = cupy.cuda.Stream(non_blocking=True)
    with late_heads(1, 1) if late else contextlib.nullcontext(), stream:
        sagepp.attention(*buffers, **options)
        stream.begin_capture()
        o, lse = sagepp.attention(*buffers, **options)
        graph = stream.end_capture()
        for buffer, other in zip(buffers, others):
            buffer.set(other)
        for _ in range(3):
            graph.launch(stream)
        stream.synchronize()
    assert_same((cupy.asnumpy(o), cupy.asnumpy(lse)), expected)


@each_kernel
def test_a_graph_has_two_kernels_a_call_and_clears_nothing(kernel):
    """Captured in the mode that forbids most. (What the tests poison memory with is captured, too.)"""
    import cupy

    plan_of(kernel, 64)
    arrays = Problem(1, 2, 2, 150, 260).arrays()
    buffers = [cupy.asarray(x) for x in arrays]
    expected = sagepp.attention(*buffers, kernel=kernel)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        sagepp.attention(*buffers, kernel=kernel)
        cupy.get_default_memory_pool().free_all_blocks()
        spare = [cupy.empty(2**22, np.uint8) for _ in range(8)]
        del spare  # for results and workspaces: they come from the pool of the captured stream
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeGlobal)
        results = [sagepp.attention(*buffers, kernel=kernel) for _ in range(3)]
        graph = stream.end_capture()
        for _ in range(3):
            for result in results:
                result.fill(np.nan)
            graph.launch(stream)
        stream.synchronize()
    drawn = graph.debug_dot_str()
    assert set(re.findall(r"MEMSET\W+(\d+),", drawn)) <= {"255"}, drawn
    assert drawn.count("quantize") == drawn.count("attention") == len(results), drawn
    for result in results:
        assert_same_bits(cupy.asnumpy(result), cupy.asnumpy(expected))


@each_kernel
def test_inputs_stay_and_the_output_does_not_depend_on_the_lse(kernel):
    import cupy

    plan_of(kernel, 64)
    arrays = Problem(2, 2, 2, 150, 260).arrays()
    buffers = [cupy.asarray(x) for x in arrays]
    with_lse, _ = sagepp.attention(*buffers, return_lse=True, kernel=kernel)
    alone = sagepp.attention(*buffers, kernel=kernel)
    assert_same_bits(cupy.asnumpy(alone), cupy.asnumpy(with_lse))
    for buffer, array in zip(buffers, arrays):
        assert_same_bits(cupy.asnumpy(buffer), array)


@each_kernel
def test_strides_beyond_32_bits(kernel):
    """Two batch members more than 2**31 elements apart, in one buffer that q, k and v share."""
    import cupy

    plan = plan_of(kernel, 64)
    apart = 2**31 + 64
    free, _ = cupy.cuda.runtime.memGetInfo()
    if free < 3 * apart:
        pytest.skip(f"{free} bytes of GPU memory are free, {3 * apart} are needed")
    problem = Problem(2, 1, 1, 70, 130, is_causal=True)
    arrays = problem.arrays()
    buffer = cupy.cuda.Memory(2 * (apart + 2**20))
    views, start = [], 0
    for array in arrays:
        b, h, s, d = array.shape
        strides = (2 * apart, 2 * s * d, 2 * d, 2)
        pointer = cupy.cuda.MemoryPointer(buffer, start)
        views.append(cupy.ndarray(array.shape, array.dtype, pointer, strides=strides))
        views[-1][...] = cupy.asarray(array)
        start += 2 * h * s * d
    result = sagepp.attention(*views, is_causal=True, return_lse=True, kernel=kernel)
    assert_same(map(cupy.asnumpy, result), strategies.by_reference(problem, plan), plan)


def test_float32_is_rounded_to_float16_and_the_result_widened():
    import cupy

    arrays = [x.astype(np.float32) + np.float32(1e-5) for x in Problem(1, 2, 1, 70, 130).arrays()]
    expected = call([x.astype(np.float16) for x in arrays], None)
    for _ in range(2):
        o, lse = sagepp.attention(*map(cupy.asarray, arrays), return_lse=True)
        assert o.dtype == np.float32
        assert_same_bits(cupy.asnumpy(o), expected[0].astype(np.float32))
        assert_same_bits(cupy.asnumpy(lse), expected[1])


@each_kernel
def test_both_layouts_have_the_same_bits(kernel):
    import cupy

    plan_of(kernel, 64)
    arrays = Problem(2, 4, 2, 70, 130).arrays()
    expected = call(arrays, kernel, is_causal=True)
    swapped = [cupy.ascontiguousarray(cupy.asarray(x).transpose(0, 2, 1, 3)) for x in arrays]
    o, lse = sagepp.attention(*swapped, "NHD", True, return_lse=True, kernel=kernel)
    assert o.flags.c_contiguous
    assert_same((cupy.asnumpy(o.transpose(0, 2, 1, 3)), cupy.asnumpy(lse)), expected)


def test_every_gpu_of_the_host_returns_the_same_bits():
    """From a thread whose current device is another one, and in turns: kernels are loaded on each."""
    import cupy

    devices = range(cupy.cuda.runtime.getDeviceCount())
    if len(devices) < 2:
        pytest.skip("there is one GPU")
    arrays = Problem(1, 4, 2, 333, 777, 128).arrays()
    expected = call(arrays, None)
    inputs = []
    for device in devices:
        with cupy.cuda.Device(device):
            inputs.append([cupy.asarray(x) for x in arrays])
            cupy.cuda.Device().synchronize()
    for device in 2 * [*reversed(devices)]:
        o, lse = sagepp.attention(*inputs[device], return_lse=True)
        assert o.data.device_id == lse.data.device_id == device
        with cupy.cuda.Device(device):
            cupy.cuda.Device().synchronize()
            assert_same((cupy.asnumpy(o), cupy.asnumpy(lse)), expected, note=f"device {device}")
    assert cupy.cuda.runtime.getDevice() == 0


# As on four SMs, so that items are cut, then with late heads; a CTA of the quantiser has two tiles. Bounds move, a key
# group is steep, and eight keys of a head of V are so large, or NaN, that it is quantised twice. The head_dim is an
# argument.
SANITIZED = """
import sys, cupy, numpy as np, sagepp
from sagepp import launch, schedule
launch._num_sms, schedule.CUT_TILES, schedule.tiles_of_a_cta = lambda device: 4, 0, lambda *_: 2
rng = np.random.default_rng(0)
for is_late, is_causal, factor in (False, False, 1), (False, False, 300), (True, False, 1), (True, True, np.nan):
    schedule.late_heads = lambda geometry, *_: schedule.Late(1, 2) if is_late else schedule.Late(3)
    q, k, v = (rng.standard_normal((1, 3, s, int(sys.argv[1]))).astype(np.float16) for s in (300, 1700, 1700))
    k[:, 1, 200:208] *= 30
    k[:, 2, 400] *= 5000
    v[:, 2, 200:208] *= factor
    launch._calls.of_key.clear()
    sagepp.attention(*map(cupy.asarray, (q, k, v)), is_causal=is_causal, return_lse=True)
    cupy.cuda.Device().synchronize()
"""


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("tool", ["memcheck", "synccheck"])
def test_a_sanitizer_finds_nothing(tool, head_dim):
    """`synccheck`: among others, no instruction of `wgmma` where one warp of its warpgroup comes alone."""
    plan_of(None, head_dim)
    sanitizer = shutil.which("compute-sanitizer")
    if not sanitizer:
        pytest.skip("there is no compute-sanitizer")
    found = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED, str(head_dim)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert found.returncode == 0 and "ERROR SUMMARY: 0 errors" in found.stdout, found.stdout[-3000:] + found.stderr
