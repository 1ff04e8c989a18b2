"""Random problems, GPU against reference, bit for bit: ``python -m tests.soak --kernel mma``.

The GPU computes in this process, the reference in a pool of others. Every problem prints on one line
where it fails, and ``tests.strategies.Problem(...)`` of that line brings it back. Exit status 1 if a bit
differs.
"""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy is loaded

import argparse  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

import numpy as np  # noqa: E402

from sagepp import jit, launch, schedule  # noqa: E402
from sagepp.plan import make_plan  # noqa: E402

from . import bits, strategies  # noqa: E402

MAX_FAILURES = 20


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--kernel", choices=strategies.KERNELS, default="mma")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--seed", type=strategies.seed_of, default=0, help='a number, or "random"')
    parser.add_argument("--sms", type=int, help="pretend that the GPU has so many: some problems then have cut items")
    parser.add_argument("--late-on", type=int, metavar="SMS", help="all KV heads but the first are late, on so many SMs")
    parser.add_argument("--json", metavar="FILE", help="also write what is printed")
    options = parser.parse_args(arguments)
    if options.sms:
        launch._num_sms, schedule.CUT_TILES = lambda device: options.sms, 0
    if options.late_on:
        schedule.late_heads = strategies.late_heads(1, options.late_on)
    with multiprocessing.get_context("fork").Pool(options.workers) as pool:  # before CUDA starts
        record = soak(pool, options)
    print(json.dumps(record, indent=1))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(record, file, indent=1)
    return int(record["differing_bits"] or record["failed_problems"])


def soak(pool, options):
    """Run the comparison; what was done and found, ready for JSON."""
    import cupy

    print(f"seed {options.seed}", flush=True)
    start = time.perf_counter()
    arch = jit.family_of(jit.arch_of())
    pool.map(_compile, variants(arch, options.kernel), chunksize=1)
    compiled = time.perf_counter()
    problems = [strategies.random_problem(options.seed, i, options.kernel) for i in range(options.examples)]
    tasks = [(problem, make_plan(arch, problem.head_dim, options.kernel)) for problem in problems]
    values, differing_bits, failures = 0, 0, []
    for (problem, plan), expected in zip(tasks, pool.imap(_reference, tasks, chunksize=2)):
        actual = strategies.on_gpu(problem, options.kernel)
        values += sum(x.size for x in expected)
        differs = sum(map(count_differing_bits, actual, expected))
        differing_bits += differs
        if differs:
            failures.append(repr(problem))
            if len(failures) <= MAX_FAILURES:
                report(problem, plan, actual, expected)
    gpu = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    return {
        "command": f"python -m tests.soak --examples {options.examples} --kernel {options.kernel} --seed {options.seed}"
        + (f" --sms {options.sms}" if options.sms else "")
        + (f" --late-on {options.late_on}" if options.late_on else ""),
        "gpu": gpu, "driver": cupy.cuda.runtime.driverGetVersion(), "arch": arch,
        "cupy": cupy.__version__, "numpy": np.__version__, "nvrtc": ".".join(map(str, jit.nvrtc_version())),
        "problems": len(problems), "values": values, "differing_bits": differing_bits,
        "failed_problems": len(failures), "failures": failures[:MAX_FAILURES],
        "compile_seconds": round(compiled - start, 1),
        "seconds": round(time.perf_counter() - compiled, 1),
    }  # fmt: skip


def variants(arch, kernel):
    """Arguments of `jit.compile_cubin` for every specialisation that `random_problem` may need."""
    for plan in {make_plan(arch, head_dim, kernel) for head_dim in strategies.head_dims_of(kernel)}:
        nvrtc = (12, 8) if plan.v_dtype == "e4m3" else (12, 0)
        for bfloat16, flag in itertools.product((False, True), repeat=2):
            defines = launch.attention_defines(plan, bfloat16=bfloat16, is_causal=flag, return_lse=True)
            yield launch.attention_source(plan), arch, defines, nvrtc
            for aligned in (False, True):
                defines = launch.quantize_defines(
                    plan, bfloat16=bfloat16, return_lse=True, smooth_k=flag, aligned=aligned)
                yield "quantize.cu", arch, defines, (12, 0)


def _compile(variant):
    """In the pool: the result is in the cache folder."""
    source, arch, defines, nvrtc = variant
    jit.compile_cubin(source, arch, defines, requires_nvrtc=nvrtc)


def _reference(task):
    return strategies.by_reference(*task)


def count_differing_bits(actual, expected):
    """Bits that differ; all NaNs are one value."""
    nan = bits.is_nan(actual) & bits.is_nan(expected)
    different = np.where(nan, 0, bits.bits_of(actual) ^ bits.bits_of(expected))
    return int(np.bitwise_count(different).sum())


def report(problem, plan, actual, expected):
    for name, x, y in zip(("o", "lse"), actual, expected):
        try:
            bits.assert_same_bits(x, y, plan, f"{name} of {problem}")
        except AssertionError as error:
            print(error, flush=True)


if __name__ == "__main__":
    sys.exit(main())
