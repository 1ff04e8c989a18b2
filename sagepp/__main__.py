"""``python -m sagepp info | compile | demo``: what is there, what compiles, does it work."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import sys
import time

import numpy as np

import sagepp
from sagepp import arrays, jit, launch, plan

#: Accuracy that `demo` insists on, against float64 on normally distributed inputs. SageAttention's
#: kernels have a relative L1 of 0.037 to 0.038 there; the rest is room for the small sizes.
MAX_RELATIVE_L1 = 0.05
MIN_COSINE = 0.998


#: Modules with a command line of their own.
REPORTS = {
    "accuracy": "errors against float64 over inputs that stress attention",
    "paper": "the paper's comparison of FP16 and FP32 accumulators",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sagepp", description=sagepp.__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, GPUs and the kernel that each of them gets")
    compile_parser = commands.add_parser(
        "compile", help="build every kernel, without a GPU; fails on a spill in an attention kernel")
    compile_parser.add_argument("--arch", nargs="+", default=["all"], choices=["all", *jit.TARGETS],
                                metavar="ARCH", help=f"'all' (default: {' '.join(plan.ARCHITECTURES)}), "
                                f"or of: {' '.join(jit.TARGETS)}")
    compile_parser.add_argument("--json", action="store_true", help="print JSON")
    commands.add_parser("demo", help="attention on this machine, checked against float64 and timed")
    for name, text in REPORTS.items():
        commands.add_parser(name, add_help=False, help=text)
    options, rest = parser.parse_known_args(arguments)
    if options.command in REPORTS:
        return importlib.import_module(f"sagepp.{options.command}").main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "info":
        return info()
    if options.command == "compile":
        archs = plan.ARCHITECTURES if "all" in options.arch else tuple(options.arch)
        return compile_all(archs, as_json=options.json)
    return demo()


# --- info --------------------------------------------------------------------------------------


def info() -> int:
    """Print a line a fact; what is missing is said, with the command that installs it."""
    rows = [("sagepp", sagepp.__version__), ("Python", platform.python_version()),
            ("NumPy", np.__version__), ("ml_dtypes", importlib.metadata.version("ml_dtypes"))]
    try:
        cupy = arrays.import_cupy()
        rows.append(("CuPy", cupy.__version__))
    except ImportError as error:
        cupy = None
        rows.append(("CuPy", f"not installed; {error}"))
    try:
        rows.append(("NVRTC", ".".join(map(str, jit.nvrtc_version()))))
    except ImportError as error:
        rows.append(("NVRTC", f"none; {error}"))
    rows.append(("kernel cache", str(jit.cache_dir())))
    if cupy is not None:
        rows += _gpu_rows(cupy)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


def _gpu_rows(cupy) -> list[tuple[str, str]]:
    driver = cupy.cuda.runtime.driverGetVersion()
    if not driver:
        return [("driver", "none: NumPy arrays are computed on the CPU")]
    rows = [("driver", f"CUDA {driver // 1000}.{driver % 1000 // 10}")]
    for device in range(gpu_count()):
        properties = cupy.cuda.runtime.getDeviceProperties(device)
        rows.append((f"GPU {device}", f"{properties['name'].decode()}, {_kernel_of(device)}"))
    return rows if len(rows) > 1 else [*rows, ("GPU", "none")]


def _kernel_of(device: int) -> str:
    try:
        arch = jit.arch_of(device)
    except RuntimeError as error:
        return f"not supported: {error}"
    chosen = plan.make_plan(jit.family_of(arch), 128)
    return f"{arch}, kernel {chosen.kernel}, P and V in {chosen.v_dtype}"


def gpu_count() -> int:
    """Number of GPUs that CuPy sees; 0 without CuPy, without a driver, without a GPU."""
    try:
        import cupy

        return cupy.cuda.runtime.getDeviceCount()
    except (ImportError, RuntimeError):
        return 0


# --- compile -----------------------------------------------------------------------------------


def compile_all(archs: tuple[str, ...], as_json: bool = False) -> int:
    """Build every variant of every kernel. 1 where an attention kernel spills or ptxas warns."""
    rows, failures = [], []
    for arch in archs:
        for source, function, defines in launch.kernel_variants(jit.family_of(arch)):
            cubin = jit.compile_cubin(source, arch, defines)
            used = cubin.resources[function]
            variant = " ".join(f"{name}={value}" for name, value in defines)
            rows.append({
                "arch": arch, "kernel": function, "variant": variant, "registers": used.registers,
                "spill bytes": used.spill_stores + used.spill_loads, "shared bytes": used.shared,
                "seconds": round(cubin.seconds, 2), "cached": cubin.cached})
            label = f"{function} ({variant}) for {arch}"
            if source.startswith("attention") and rows[-1]["spill bytes"]:
                failures.append(f"{label} spills {rows[-1]['spill bytes']} bytes")
            failures += [f"{label}: {line}" for line in cubin.warnings]
    print(json.dumps({"kernels": rows, "failures": failures}, indent=1) if as_json else table(rows))
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def table(rows: list[dict]) -> str:
    """The rows as text, by tabulate where it is installed."""
    try:
        from tabulate import tabulate
    except ImportError:
        lines = [list(rows[0])] + [[str(value) for value in row.values()] for row in rows]
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip()
                         for line in lines)
    return tabulate(rows, headers="keys")


# --- demo --------------------------------------------------------------------------------------


def demo() -> int:
    """Attention on the GPU, or on the CPU where there is none: accuracy against float64, and time."""
    on_gpu = gpu_count() > 0
    if on_gpu:
        batch, heads, seq_len, head_dim = 1, 16, 4096, 128
    else:
        batch, heads, seq_len, head_dim = 1, 4, 1024, 128
        print("No GPU was found: the NumPy reference computes the same bits on the CPU, slowly.")
    accurate = True
    for is_causal in (False, True):
        print(f"attention, batch {batch}, {heads} heads, {seq_len} tokens, head_dim {head_dim}, float16"
              f"{', causal' if is_causal else ''}")
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((batch, heads, seq_len, head_dim)).astype(np.float16)
                   for _ in range(3))
        o = (_run_gpu if on_gpu else _run_cpu)(q, k, v, is_causal)
        accurate &= _check_accuracy(o, q, k, v, is_causal)
    print("accuracy: within bounds" if accurate else
          f"accuracy: OUT OF BOUNDS (relative L1 <= {MAX_RELATIVE_L1}, cosine >= {MIN_COSINE})")
    return 0 if accurate else 1


def _run_cpu(q, k, v, is_causal):
    start = time.perf_counter()
    o = sagepp.attention(q, k, v, is_causal=is_causal)
    print(f"  reference on the CPU: {time.perf_counter() - start:.2f} s")
    return o


def _run_gpu(q, k, v, is_causal):
    import cupy

    inputs = [cupy.asarray(array) for array in (q, k, v)]
    cupy.cuda.get_current_stream().synchronize()
    start = time.perf_counter()
    o = sagepp.attention(*inputs, is_causal=is_causal)
    cupy.cuda.get_current_stream().synchronize()
    first = time.perf_counter() - start
    events = [cupy.cuda.Event() for _ in range(2)]
    times = []
    for _ in range(20):
        events[0].record()
        sagepp.attention(*inputs, is_causal=is_causal)
        events[1].record()
        events[1].synchronize()
        times.append(cupy.cuda.get_elapsed_time(*events))
    median = sorted(times)[len(times) // 2]
    batch, heads, seq_len, head_dim = q.shape
    operations = 4 * batch * heads * seq_len ** 2 * head_dim / (2 if is_causal else 1)
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    print(f"  {name}: {median * 1e3:.0f} us a call, quantisation included, "
          f"{operations / median / 1e9:.0f} TFLOP/s (first call {first:.2f} s)")
    return o.get()


def _check_accuracy(o, q, k, v, is_causal, num_heads: int = 2) -> bool:
    """Compare the first heads with float64 attention."""
    from sagepp.reference import exact

    expected, _ = exact.attention(
        *(array[:1, :num_heads].astype(np.float64) for array in (q, k, v)),
        is_causal=is_causal, sm_scale=q.shape[3] ** -0.5)
    actual = o[:1, :num_heads].astype(np.float64)
    cosine = (actual * expected).sum() / np.sqrt((actual ** 2).sum() * (expected ** 2).sum())
    relative_l1 = np.abs(actual - expected).sum() / np.abs(expected).sum()
    print(f"  against float64, {num_heads} heads: cosine {cosine:.6f}, relative L1 {relative_l1:.4f}")
    return bool(cosine >= MIN_COSINE and relative_l1 <= MAX_RELATIVE_L1)


if __name__ == "__main__":
    sys.exit(main())
