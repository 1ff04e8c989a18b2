"""Is it worth it on this GPU? Times sagepp and what else one would call, side by side.

    python bench.py --quick                 # under a minute
    python bench.py --json docs/results/NAME.json
    python bench.py --head-dim 128 --seq-len 8192 --no-causal --sustained

Normally distributed FP16 inputs, the same for all; 16k tokens in all (32k for sequences of 16k and more),
32 heads of 64, 16 of 128 or 8 of 256. TFLOP/s are 4 B H Sq Skv D / time, half of it for causal attention. How long
the load lasts decides the clock, so there are two timings: *burst*, the median of 7 timings of 1 to 3
launches, the chip resting before each, and *sustained*, the mean over 0.5 s after 1.5 s of load.

"kernel" is the attention kernel alone, "whole call" FP16 in, FP16 out, quantisation included. Peers that
take FP8 get inputs that are FP8 already. Without a GPU, the reference runs and its accuracy is shown.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import functools
import importlib
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

import sagepp
from sagepp import accuracy, jit, launch, plan
from sagepp.__main__ import MAX_RELATIVE_L1, MIN_COSINE, gpu_count, table
from sagepp.reference import exact

REST = 0.05  # s, before each burst
TIMINGS = 7
WARM_UP, MEASURED = 1.5, 0.5  # s, sustained
HOST_CALLS = 50
ROWS, HEADS = 64, 2  # compared with float64
CPU_SEQ_LEN = 512


class Case(NamedTuple):
    head_dim: int
    seq_len: int
    is_causal: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, num_heads, seq_len, head_dim)."""
        tokens = 32768 if self.seq_len >= 16384 else 16384
        return max(1, tokens // self.seq_len), 2048 // plan.padded_head_dim(self.head_dim), self.seq_len, self.head_dim

    def of(self, kernels) -> list[str]:
        """Those of the kernels that are written for the head dimension."""
        return [kernel for kernel in kernels if plan.padded_head_dim(self.head_dim) in plan.head_dims(kernel)]

    def __str__(self):
        return f"d={self.head_dim} S={self.seq_len}{' causal' if self.is_causal else ''}"


def flop(shape, is_causal: bool) -> float:
    """Of attention with as many keys as queries."""
    batch, num_heads, seq_len, head_dim = shape
    return 4 * batch * num_heads * seq_len**2 * head_dim / (2 if is_causal else 1)


@functools.lru_cache(maxsize=2)
def make_inputs(shape) -> tuple[np.ndarray, ...]:
    """FP16 q, k, v, N(0, 1)."""
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal(shape, np.float32).astype(np.float16) for _ in "qkv")


# --- accuracy ----------------------------------------------------------------------------------


def errors(o, case: Case, qkv) -> dict[str, float]:
    """Of the first heads of `o`, some rows of each, against float64. `o[:1, :HEADS]` is NumPy's."""
    q, k, v = (x[:1, :HEADS] for x in qkv)
    blocks = accuracy.row_blocks(case.seq_len, ROWS // 2, ROWS)
    expected = accuracy.on_blocks(exact.masked_attention, blocks, q, k, v, case.is_causal)
    actual = np.concatenate([o[:1, :HEADS, rows] for rows in blocks], axis=2)
    return exact.errors(actual, expected)


def complaint(figures: dict[str, float]) -> str | None:
    """What is wrong with the accuracy of a sagepp kernel; None if nothing is."""
    if figures["relative_l1"] <= MAX_RELATIVE_L1 and figures["cosine"] >= MIN_COSINE:  # False for NaN
        return None
    return (f"relative L1 {figures['relative_l1']:.4f} and cosine {figures['cosine']:.6f} against float64; "
            f"allowed: at most {MAX_RELATIVE_L1}, at least {MIN_COSINE}")


# --- timing ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=None)
def _spin():
    """Keeps one thread busy while the host enqueues: what is timed then starts without the host."""
    import cupy

    code = "extern \"C\" __global__ void spin(long long n) { long long t = clock64(); while (clock64() - t < n); }"
    return cupy.RawKernel(code, "spin")


def _elapsed(run, launches: int) -> float:
    """Seconds a launch, of launches one behind the other."""
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    _spin()((1,), (1,), (np.int64(400_000),))
    start.record()
    for _ in range(launches):
        run()
    end.record()
    end.synchronize()
    return cupy.cuda.get_elapsed_time(start, end) / launches / 1e3


def burst(run) -> float:
    """Seconds: median of a few launches on a chip that has rested."""
    run()
    launches = 3 if _elapsed(run, 1) < 5e-3 else 1
    timings = []
    for _ in range(TIMINGS):
        time.sleep(REST)
        timings.append(_elapsed(run, launches))
    return statistics.median(timings)


def sustained(run) -> float:
    """Seconds: mean under a load that has lasted."""
    estimate = _elapsed(run, 3)
    for _ in range(math.ceil(WARM_UP / estimate)):
        run()
    return _elapsed(run, math.ceil(MEASURED / estimate))


def host_microseconds(run) -> float:
    """What a call costs the caller, who does not wait for the GPU: median."""
    import cupy

    times = []
    for _ in range(HOST_CALLS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        if len(times) % 10 == 0:
            cupy.cuda.Device().synchronize()
    return statistics.median(times) * 1e6


# --- peers -------------------------------------------------------------------------------------


def _torch_sdpa(backend: str, dtype: str):
    def build(qkv, is_causal):
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = (x.to(getattr(torch, dtype)) for x in qkv)

        def run():
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

        return run

    return build


def cudnn_fp8(qkv, is_causal):
    """cuDNN's FP8 forward pass: E4M3 in and out, scales of one for Q, K and V.

    P is scaled by 256 and the result by 64, which costs no time: else most of both would be subnormal.
    """
    try:
        return _cudnn_fp8(qkv, is_causal)
    except Exception:  # not for this layout: (batch, seq_len, num_heads, head_dim) in memory
        return _cudnn_fp8([x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv], is_causal)


def _cudnn_fp8(qkv, is_causal):
    import cudnn
    import torch

    shape, stride = tuple(qkv[0].shape), tuple(qkv[0].stride())
    e4m3, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    graph = cudnn.pygraph(io_data_type=e4m3, intermediate_data_type=fp32, compute_data_type=fp32, handle=handle)
    scalar = dict(dim=(1, 1, 1, 1), stride=(1, 1, 1, 1), data_type=fp32)
    scales = {"descale_q": 1, "descale_k": 1, "descale_v": 1, "descale_s": 1 / 256, "scale_s": 256, "scale_o": 64}
    inputs = {name: graph.tensor(name=name, dim=shape, stride=stride, data_type=e4m3) for name in "qkv"}
    inputs |= {name: graph.tensor(name=name, **scalar) for name in scales}
    o, _, *amax = graph.sdpa_fp8(**inputs, attn_scale=shape[3] ** -0.5, use_causal_mask=is_causal,
                                 generate_stats=False, name="sdpa")
    o.set_output(True).set_dim(shape).set_stride(stride).set_data_type(e4m3)
    for x in amax:
        x.set_output(True).set_dim(scalar["dim"]).set_stride(scalar["stride"]).set_data_type(fp32)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()

    device = qkv[0].device
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=device)
    arrays = {inputs[name]: x.to(torch.float8_e4m3fn) for name, x in zip("qkv", qkv)}
    arrays |= {inputs[name]: torch.full((1, 1, 1, 1), value, dtype=torch.float32, device=device)
               for name, value in scales.items()}
    arrays |= {x: torch.empty((1, 1, 1, 1), dtype=torch.float32, device=device) for x in amax}
    arrays[o] = output = torch.empty_like(arrays[inputs["q"]])

    def run():
        graph.execute(arrays, workspace, handle=handle)
        return output

    run.output_scale = scales["scale_o"]
    return run


def _flash_attention_3(dtype: str):
    def build(qkv, is_causal):
        import torch
        from flash_attn_interface import flash_attn_func

        q, k, v = (x.transpose(1, 2).contiguous().to(getattr(torch, dtype)) for x in qkv)

        def run():
            o = flash_attn_func(q, k, v, causal=is_causal)
            return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)

        return run

    return build


def sage_attention(qkv, is_causal):
    from sageattention import sageattn

    return lambda: sageattn(*qkv, tensor_layout="HND", is_causal=is_causal)


class Peer(NamedTuple):
    module: str  #: that it comes in
    build: object  #: torch q, k, v, is_causal -> a function that returns o of (batch, num_heads, seq_len, head_dim)
    whole_call: bool  #: takes FP16 or BF16


PEERS = {
    "FlashAttention-2": Peer("torch", _torch_sdpa("FLASH_ATTENTION", "float16"), True),
    "cuDNN BF16": Peer("torch", _torch_sdpa("CUDNN_ATTENTION", "bfloat16"), True),
    "cuDNN FP8": Peer("cudnn", cudnn_fp8, False),
    "FA3 BF16": Peer("flash_attn_interface", _flash_attention_3("bfloat16"), True),
    "FA3 FP8": Peer("flash_attn_interface", _flash_attention_3("float8_e4m3fn"), False),
    "SageAttention": Peer("sageattention", sage_attention, True),
}


def importable_peers(left_out: dict[str, str]) -> list[str]:
    """Names of those whose module is there; the others go to `left_out`, name -> reason."""
    names = []
    for name, peer in PEERS.items():
        try:
            importlib.import_module("torch")  # brings the libraries that the others look for
            importlib.import_module(peer.module)
            names.append(name)
        except Exception as error:  # an ImportError, or whatever a broken installation raises
            left_out[name] = _first_line(error)
    return names


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"


# --- one case on the GPU -----------------------------------------------------------------------


def _tflops(case: Case, run, timings) -> dict[str, float]:
    work = flop(case.shape, case.is_causal) / 1e12
    return {timing.__name__: float(f"{work / timing(run):.5g}") for timing in timings}


def measure_kernel(case: Case, kernel: str, host, qkv, timings) -> dict:
    """A row of one of sagepp's kernels; "wrong" says what is wrong with its output, or is None."""
    import cupy

    poisoned = cupy.full(case.shape, np.nan, np.float16)
    prepared = launch.prepare(*qkv, is_causal=case.is_causal, kernel=kernel, out=poisoned)
    prepared.quantize()
    prepared.attend()

    def whole_call():
        return sagepp.attention(*qkv, is_causal=case.is_causal, kernel=kernel)

    figures = errors(cupy.asnumpy(prepared.o[:1, :HEADS]), case, host)
    wrong = complaint(figures)
    if not bool(cupy.isfinite(prepared.o).all()):
        wrong = "an output that is not finite, or was not written"
    elif not bool((whole_call().view(np.uint16) == prepared.o.view(np.uint16)).all()):
        wrong = "the whole call and its parts return different bits"
    return {"name": kernel, "peer": False, "kernel": _tflops(case, prepared.attend, timings),
            "whole call": _tflops(case, whole_call, timings),
            "host us": round(host_microseconds(whole_call), 1), **figures, "wrong": wrong}


def measure_peer(case: Case, name: str, host, qkv, timings) -> dict:
    """A row of a peer; raises what it raises."""
    import torch

    peer = PEERS[name]
    with torch.no_grad():
        run = peer.build([torch.from_dlpack(x) for x in qkv], case.is_causal)
        o = run()[:1, :HEADS].float().cpu().numpy() / getattr(run, "output_scale", 1)
        measured = _tflops(case, run, timings)
        return {"name": name, "peer": True, "kernel": measured, "whole call": measured if peer.whole_call else {},
                "host us": round(host_microseconds(run), 1), **errors(o, case, host)}


def measure_case(case: Case, kernels, peers, timings, left_out) -> list[dict]:
    """The rows of a case, peers last; a peer that fails goes to `left_out`."""
    import cupy

    host = make_inputs(case.shape)
    qkv = [cupy.asarray(x) for x in host]
    rows = [measure_kernel(case, kernel, host, qkv, timings) for kernel in case.of(kernels)]
    for name in peers:
        try:
            rows.append(measure_peer(case, name, host, qkv, timings))
        except Exception as error:  # of somebody else's library
            left_out[f"{name}, {case}"] = _first_line(error)
    default = plan.kernels(jit.family_of(jit.arch_of()))[0]
    batch, num_heads, _, _ = case.shape
    return [{**case._asdict(), "batch": batch, "num_heads": num_heads, "default": row["name"] == default, **row}
            for row in rows]


def compile_kernels(cases, kernels) -> None:
    """All that the cases need, side by side."""
    arch = jit.arch_of()
    jobs = set()
    for case in cases:
        for kernel in case.of(kernels):
            chosen = plan.make_plan(jit.family_of(arch), case.head_dim, kernel)
            jobs.add(("quantize.cu", arch, launch.quantize_defines(chosen, aligned=case.head_dim % 8 == 0)))
            jobs.add((launch.attention_source(chosen), arch,
                      launch.attention_defines(chosen, is_causal=case.is_causal)))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda job: jit.compile_cubin(*job), jobs))


# --- what is printed and written ---------------------------------------------------------------


def printable(rows: list[dict], timing: str) -> list[dict]:
    """Rows for `table`: TFLOP/s, and of each kernel the ratios to each peer, kernel / whole call."""
    peers = {(*_case(row), row["name"]): row for row in rows if row["peer"]}
    names = dict.fromkeys(row["name"] for row in peers.values())
    return [{
        "d": row["head_dim"], "S": row["seq_len"], "causal": "yes" if row["is_causal"] else "no",
        "": row["name"] + (" (default)" if row["default"] else ""), "kernel": row["kernel"].get(timing, ""),
        "whole call": row["whole call"].get(timing, ""), "host us": row["host us"],
        **{name: "" if row["peer"] else _ratios(row, peers.get((*_case(row), name)), timing) for name in names},
        "cosine": f"{row['cosine']:.5f}", "rel. L1": f"{row['relative_l1']:.4f}", "RMSE": f"{row['rmse']:.2e}",
    } for row in rows]


def _case(row: dict) -> Case:
    return Case(*(row[field] for field in Case._fields))


def _ratios(row: dict, peer: dict | None, timing: str) -> str:
    parts = [part for part in ("kernel", "whole call") if peer and timing in peer[part]]
    return " / ".join(f"{row[part][timing] / peer[part][timing]:.2f}x" for part in parts)


def verdict(rows: list[dict]) -> int:
    """Exit status: 1 if the output of a kernel is wrong, which is said."""
    wrong = [f"WRONG: {row['name']}, {_case(row)}: {row['wrong']}" for row in rows if row.get("wrong")]
    print("\n".join(wrong) or "outputs: checked against float64")
    return 1 if wrong else 0


def _output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent,
                              timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def git_commit() -> str | None:
    """Of this checkout; "-modified" behind it if files differ from it."""
    commit = _output_of("git", "rev-parse", "HEAD")
    return commit and commit + ("-modified" if _output_of("git", "status", "--porcelain", "-uno") else "")


def versions() -> dict[str, str | None]:
    """Of everything that a figure may depend on; without what is not there."""
    found = {"sagepp": sagepp.__version__, "python": platform.python_version(), "numpy": np.__version__}
    readers = {
        "cupy": lambda: importlib.import_module("cupy").__version__,
        "nvrtc": lambda: ".".join(map(str, jit.nvrtc_version())),
        "driver CUDA": lambda: importlib.import_module("cupy").cuda.runtime.driverGetVersion(),
        "torch": lambda: importlib.import_module("torch").__version__,
        "torch cuDNN": lambda: importlib.import_module("torch").backends.cudnn.version(),
        "cudnn frontend": lambda: importlib.import_module("cudnn").__version__,
        "cudnn": lambda: importlib.import_module("cudnn").backend_version_string(),
    }
    for name, read in readers.items():
        try:
            found[name] = read()
        except Exception:  # not installed, or broken: a benchmark of the rest is still one
            continue
    return found


def report(rows, left_out, commit, gpu=None) -> dict:
    """What `--json` writes."""
    query = "--query-gpu=driver_version,power.limit,clocks.max.sm"
    command = " ".join(["python", *(Path(argument).name for argument in sys.argv)])  # without folders
    return {"command": command, "date": datetime.date.today().isoformat(), "gpu": gpu,
            "driver, power limit, maximal clock": gpu and _output_of("nvidia-smi", query, "--format=csv,noheader"),
            "commit": commit or git_commit(), "versions": versions(), "left out": left_out, "rows": rows}


def write_json(path: str | None, content: dict) -> None:
    if path:
        Path(path).write_text(json.dumps(content, indent=1) + "\n")


# --- the two programs --------------------------------------------------------------------------


def run_gpu(options) -> int:
    import cupy

    gpu = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())["name"].decode()
    available = plan.kernels(jit.family_of(jit.arch_of()))
    kernels = options.kernels or available
    if unknown := [kernel for kernel in kernels if kernel not in available]:
        raise SystemExit(f"--kernels: {', '.join(unknown)}; {gpu} has {', '.join(available)}")
    default_lengths = (1024, 8192) if options.quick else (1024, 2048, 4096, 8192, 16384, 32768)
    cases = [Case(head_dim, seq_len, is_causal) for head_dim in options.head_dim for is_causal in options.causal
             for seq_len in options.seq_len or default_lengths]
    timings = [burst, sustained] if options.sustained else [burst]
    left_out, rows = {}, []
    peers = importable_peers(left_out)
    print(f"{gpu}; kernels of sagepp: {', '.join(kernels)}; peers: {', '.join(peers) or 'none'}", flush=True)
    compile_kernels(cases, kernels)
    for i, case in enumerate(cases):
        rows += measure_case(case, kernels, peers, timings, left_out)
        print(f"  {i + 1}/{len(cases)} {case}", file=sys.stderr, flush=True)
        write_json(options.json, report(rows, left_out, options.commit, gpu))
    for timing in timings:
        print(f"\n{timing.__name__}: TFLOP/s, and the ratios to each peer, kernel / whole call")
        print(table(printable(rows, timing.__name__)))
    for name, reason in left_out.items():
        print(f"left out: {name} ({reason})")
    return verdict(rows)


def run_cpu(options) -> int:
    rows, left_out = [], {name: "no GPU" for name in ("times and TFLOP/s", *PEERS)}
    cases = [Case(head_dim, seq_len, is_causal) for head_dim in options.head_dim for is_causal in options.causal
             for seq_len in options.seq_len or [CPU_SEQ_LEN]]
    for case in cases:
        qkv = make_inputs((1, HEADS, case.seq_len, case.head_dim))
        for kernel in case.of(options.kernels or [kernel for _, kernel in accuracy.CPU_PLANS]):
            figures = errors(sagepp.attention(*qkv, is_causal=case.is_causal, kernel=kernel), case, qkv)
            rows.append({**case._asdict(), "name": kernel, **figures, "wrong": complaint(figures)})
    print(f"No GPU: this is the accuracy of the NumPy reference, which returns the GPU's bits, on {HEADS} heads.")
    print(table([{name: value for name, value in row.items() if name != "wrong"} for row in rows]))
    print(f"left out, because there is no GPU: {', '.join(left_out)}")
    write_json(options.json, report(rows, left_out, options.commit))
    return verdict(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="sequences of 1024 and 8192 only")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128, 64], metavar="D")
    parser.add_argument("--seq-len", type=int, nargs="+", metavar="S", help="default: 1024 to 32768")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, help="default: both")
    parser.add_argument("--kernels", nargs="+", choices=list(plan.KERNELS), metavar="KERNEL",
                        help=f"of {', '.join(plan.KERNELS)}; default: all that the GPU has")
    parser.add_argument("--sustained", action="store_true", help="sustained timings too, 2 s each")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured, and with what")
    parser.add_argument("--commit", help="what --json says of the source, where git cannot be asked")
    options = parser.parse_args(arguments)
    options.causal = [False, True] if options.causal is None else [options.causal]
    return run_gpu(options) if gpu_count() else run_cpu(options)


if __name__ == "__main__":
    sys.exit(main())
