"""Compare the NumPy model with the GPU, bit for bit: ``python -m tests.hardware.validate``.

    --what ex2,cvt,mma   names of `ELEMENTWISE`, `mma` for every instruction this GPU has, or `all`
    --json FILE          also write what is printed, with GPU, driver and versions
    --goldens FOLDER     write what the GPU returned for a few matrices: tests/data reads them back
    --dots N, --inputs N smaller runs; by default ten million dot products for each instruction and
                         length of chain, and all 2**32 inputs of an elementwise function

The GPU produces, the CPU checks, with a process a core. Exit status 1 if anything differs.
"""

import argparse
import functools
import json
import mmap
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from sagepp import jit
from sagepp.reference import formats, p_forms, special, tensor_core

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "kernels_src"

# ---------------------------------------------------------------------------- the GPU


def compile_cubin(source, arch, defines=()):
    """A file of this folder, compiled by NVRTC alone: no GPU is needed."""
    from cupy_backends.cuda.libs import nvrtc

    header = (KERNELS / "log2.cuh").read_bytes()
    program = nvrtc.createProgram((HERE / source).read_text(), source, (header,), (b"log2.cuh",))
    options = (f"--gpu-architecture={arch}", "--std=c++17", "--fmad=false", *(f"-D{d}" for d in defines))
    try:
        nvrtc.compileProgram(program, options)
        return nvrtc.getCUBIN(program) + b"\0"  # CuPy 14.2 cuts the last byte off, as of a PTX text
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{source} for {arch}: {error}\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


@functools.cache
def cubin_folder():
    return tempfile.TemporaryDirectory()  # removed at exit


@functools.cache
def load(source, defines=()):
    import cupy

    handle, path = tempfile.mkstemp(suffix=".cubin", dir=cubin_folder().name)
    os.write(handle, compile_cubin(source, jit.arch_of(), defines))
    os.close(handle)
    return cupy.RawModule(path=path)


def describe_gpu():
    import cupy
    from cupy_backends.cuda.libs import nvrtc

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return {
        "gpu": properties["name"].decode(),
        "arch": jit.arch_of(),
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "nvrtc": ".".join(map(str, nvrtc.getVersion())),
        "cupy": cupy.__version__,
        "numpy": np.__version__,
    }


# ---------------------------------------------------------------------------- the processes

PIECE = 1 << 26  # elementwise outputs a launch
TASK = 1 << 20  # of them a process checks in one go
CACHED = 1 << 15  # inputs whose intermediate arrays fit the L2 cache

# What the GPU returned, seen by the processes without a copy: they are forked after this is made.
SHARED = np.frombuffer(mmap.mmap(-1, PIECE * 4), np.uint32)


@functools.cache
def pool():
    """Forked, and never touching CUDA; start it before the GPU is first used."""
    return multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)))


# ---------------------------------------------------------------------------- elementwise functions

STRIDE = 0x9E3779B1


def _mix(x):
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _float(bits):
    return bits.view(np.float32)


def _bits(x):
    return np.where(np.isnan(x), np.uint32(formats.FP32_NAN), x.view(np.uint32))


def _second(bits):
    return _float(_mix(bits))


def _third(bits):
    return _float(_mix(_mix(bits)))


def _near_product(bits):
    product = _bits(_float(bits) * _second(bits))
    exponent = ((_mix(_mix(bits)) & 63) << 23) - np.uint32(32 << 23)
    return _float((product ^ (_mix(bits) & np.uint32(0x807FFFFF))) + exponent)


def _positive_normal(bits):
    return _float(np.uint32(0x00800000) + bits % np.uint32(0x7F000000))


def _chord(bits):
    return p_forms.FORMS["chord"].codes((bits & 0x7FFF).astype(np.int32)).astype(np.uint32)


# name -> (the instruction, the model as a function of the bit patterns of the first operand)
ELEMENTWISE = {
    "ex2": ("ex2.approx.ftz.f32", lambda bits: _bits(special.ex2(_float(bits)))),
    "cvt": ("cvt.rn.satfinite.e4m3x2.f32", lambda bits: formats.to_e4m3(_float(bits)) * np.uint32(0x0101)),
    "fp16": ("cvt.rn.f16.f32", lambda bits: formats.to_fp16(_float(bits)).view(np.uint16)),
    "bf16": ("cvt.rn.bf16.f32", lambda bits: formats.to_bf16(_float(bits)).view(np.uint16)),
    "int_rn": ("cvt.rni.s32.f32", lambda bits: formats.to_int_rn(_float(bits)).view(np.uint32)),
    "log2": ("log2_rn", lambda bits: _bits(formats.log2(_positive_normal(bits)))),
    "fma": ("fma.rn.f32", lambda bits: _bits(formats.fma(_float(bits), _second(bits), _third(bits)))),
    "fma_near": (
        "fma.rn.f32, sum near the product",
        lambda bits: _bits(formats.fma(_float(bits), _second(bits), _near_product(bits))),
    ),
    "sqrt": ("sqrt.rn.f32", lambda bits: _bits(np.sqrt(_float(bits)))),
    "u8": ("cvt.pack.sat.u8.s32", lambda bits: (bits.view(np.int32).clip(0, 255) * 0x01010101).view(np.uint32)),
    "u16": ("cvt.pack.sat.u16.s32", lambda bits: (bits.view(np.int32).clip(0, 65535) * 0x00010001).astype(np.uint32)),
    "chord": ("fma.rn.f16x2, cvt.rn.satfinite.e4m3x2.f16x2", lambda bits: _chord(bits) | _chord(bits >> 16) << 8),
    "mul_ru": ("mul.rp.f32", lambda bits: _bits(formats.mul_ru(_float(bits), _second(bits)))),
    "add_rd": ("add.rm.f32", lambda bits: _bits(formats.add_rd(_float(bits), _second(bits)))),
    "div": ("div.rn.f32", lambda bits: _bits(formats.div(_float(bits), _second(bits)))),
}


def elementwise_inputs(first, count):
    """The bit patterns that the kernels of elementwise.cu make of these indices."""
    return (np.arange(count, dtype=np.uint32) + np.uint32(first)) * np.uint32(STRIDE)


def check_elementwise(name, first, offset, count):
    """(mismatches, the first as text) of SHARED[offset:][:count], whose indices start at `first`."""
    mismatches, text = 0, None
    model = ELEMENTWISE[name][1]
    with np.errstate(all="ignore"):
        for start in range(0, count, CACHED):
            bits = elementwise_inputs(first + start, min(CACHED, count - start))
            returned = SHARED[offset + start :][: len(bits)]
            expected = model(bits)
            wrong = np.flatnonzero(returned != expected)
            mismatches += len(wrong)
            if len(wrong) and text is None:
                i = wrong[0]
                text = f"input 0x{bits[i]:08X}: GPU 0x{returned[i]:X}, model 0x{expected[i]:X}"
    return mismatches, text


def validate_elementwise(name, inputs=1 << 32):
    """One row of the report: all inputs, or as many spread over them."""
    import cupy

    pool()
    started = time.perf_counter()
    kernel = load("elementwise.cu").get_function(f"check_{name}")
    out = cupy.empty(PIECE, cupy.uint32)
    mismatches, text = 0, None
    for first in range(0, inputs, PIECE):
        count = min(PIECE, inputs - first)
        kernel((1024,), (256,), (np.uint32(first), np.uint32(count), out))
        out.get(out=SHARED)
        tasks = [(name, first + i, i, min(TASK, count - i)) for i in range(0, count, TASK)]
        for wrong, example in pool().starmap(check_elementwise, tasks, chunksize=1):
            mismatches += wrong
            text = text or example
    return _row(ELEMENTWISE[name][0], inputs, mismatches, text, started)


# ---------------------------------------------------------------------------- matrix instructions

M = N = 64
CHAINS = (32, 128, 512)  # values of K
CODES = {"e4m3": np.uint8, "f16": np.uint16}
ACCUMULATORS = {"f16": (np.float16, np.uint16), "f32": (np.float32, np.uint32)}


def to_operand(codes, operand):
    """Codes of E4M3 or FP16 as the float32 values that `tensor_core.mma` takes."""
    return formats.from_e4m3(codes) if operand == "e4m3" else codes.view(np.float16).astype(np.float32)


def _codes(x, operand):
    x = np.asarray(x, np.float32)
    return formats.to_e4m3(x) if operand == "e4m3" else formats.to_fp16(x).view(np.uint16)


def _finite_codes(rng, operand, shape):
    sign, largest = {"e4m3": (0x80, 0x7E), "f16": (0x8000, 0x7BFF)}[operand]
    codes = rng.integers(0, largest, shape, CODES[operand], endpoint=True)
    return codes | rng.choice(np.array([0, sign], CODES[operand]), shape)


def _uniform_exponents(rng, shape, lowest, highest):
    significand = rng.choice([-1.0, 1.0], shape) * rng.uniform(1, 2, shape)
    return significand * 2.0 ** rng.integers(lowest, highest, shape)


def _attention(rng, operand, k):
    p = 256 * np.exp2(-np.abs(rng.normal(size=(M, k)) * 4))
    return _codes(p, operand), _codes(np.clip(rng.normal(size=(N, k)) * 0.6, -1.875, 1.875), operand)


def _ordinary(rng, operand, k):
    return (_codes(_uniform_exponents(rng, (rows, k), -7, 3), operand) for rows in (M, N))


def _all_codes(rng, operand, k):
    return (_finite_codes(rng, operand, (rows, k)) for rows in (M, N))


def _subnormal(rng, operand, k):
    lowest = {"e4m3": -10, "f16": -25}[operand]
    return (_codes(_uniform_exponents(rng, (rows, k), lowest, lowest + 6), operand) for rows in (M, N))


def _cancelling(rng, operand, k):
    """Products in pairs of opposite sign, in random places, and a few that are left over."""
    a, b = _ordinary(rng, operand, k)
    a[:, k // 2 :] = a[:, : k // 2]
    b[:, k // 2 :] = b[:, : k // 2] ^ (0x80 if operand == "e4m3" else 0x8000)
    order = rng.permutation(k)
    a, b = a[:, order], b[:, order]
    a[rng.random(a.shape) < 0.02] = 1
    return a, b


def _sparse(rng, operand, k):
    """Mostly zeros of both signs."""
    for codes in _ordinary(rng, operand, k):
        sign = CODES[operand](0x80 if operand == "e4m3" else 0x8000)
        yield np.where(rng.random(codes.shape) < 0.85, codes & sign, codes)


def _overflowing(rng, operand, k):
    highest = 8
    return (_codes(_uniform_exponents(rng, (rows, k), highest - 4, highest), operand) for rows in (M, N))


def _special(rng, operand, k):
    """Here and there NaN of either sign, and infinities where the format has them."""
    kinds = {"e4m3": [0x7F, 0xFF], "f16": [0x7C00, 0xFC00, 0x7E00, 0xFFFF, 0x7C01]}[operand]
    for codes in _ordinary(rng, operand, k):
        where = rng.random(codes.shape) < 1 / (4 * k)
        codes[rng.random(codes.shape) < 0.1] = 0  # for infinity times zero
        yield np.where(where, rng.choice(np.array(kinds, CODES[operand]), codes.shape), codes)


def _signed_zeros(rng, operand, k):
    """Zeros times anything: all products of a sum are +0, or all of them are -0."""
    sign = CODES[operand](0x80 if operand == "e4m3" else 0x8000)
    signs = [rng.choice([CODES[operand](0), sign], (rows, 1)) for rows in (M, N)]
    b = _codes(np.abs(_uniform_exponents(rng, (N, k), -7, 3)), operand)
    return np.repeat(signs[0], k, axis=1), b | signs[1]


SCENARIOS = {
    "attention": _attention,
    "ordinary": _ordinary,
    "all codes": _all_codes,
    "subnormal": _subnormal,
    "cancelling": _cancelling,
    "sparse": _sparse,
    "overflowing": _overflowing,
    "special": _special,
    "signed zeros": _signed_zeros,
}


def _accumulator(rng, accumulator, scenario):
    """Bits of C: zeros of both signs, values like the results, or any bit pattern that is a number."""
    dtype, code = ACCUMULATORS[accumulator]
    kind = rng.integers(4)
    if scenario == "special":
        c = rng.choice([0, 1, -2, np.inf, -np.inf, np.nan, -np.nan], (M, N), p=[0.3, 0.3, 0.3] + [0.025] * 4)
    elif kind == 0 or scenario == "signed zeros":
        c = rng.choice([0.0, -0.0], (M, N))
    elif kind == 1:
        c = rng.normal(size=(M, N)) * 2.0 ** rng.integers(-8, 8)
    elif kind == 2:
        c = _uniform_exponents(rng, (M, N), -24, 15)
    else:
        any_bits = rng.integers(0, np.iinfo(code).max, (M, N), code, endpoint=True)
        return np.where(np.isfinite(any_bits.view(dtype)), any_bits, code(0))
    return c.astype(dtype).view(code)


def generate(key, k, items, seed):
    """Codes of a (items, 64, k), b (items, 64, k: a row a column of the product), bits of c, scenarios."""
    rng = np.random.default_rng([seed, k])
    names = [list(SCENARIOS)[i % len(SCENARIOS)] for i in range(items)]
    pairs = [tuple(SCENARIOS[name](rng, key[2], k)) for name in names]
    a, b = (np.stack(operand) for operand in zip(*pairs))
    return a, b, np.stack([_accumulator(rng, key[3], name) for name in names]), names


def mma_defines(key):
    """The macros that make mma.cu this instruction."""
    _, instruction, operand, accumulator = key
    return (
        f"WGMMA={int(instruction == 'wgmma')}",
        f"OPERAND={operand}",
        f"ACCUMULATOR={accumulator}",
        f"F32_ACCUMULATOR={int(accumulator == 'f32')}",
        f"INSTRUCTION_K={32 if operand == 'e4m3' else 16}",
    )


def run_mma(key, a, b, c):
    """What this GPU returns, as bits, for `generate`'s arrays."""
    import cupy

    kernel = load("mma.cu", mma_defines(key)).get_function("mma")
    d = cupy.empty(c.shape, c.dtype)
    k_bytes = a.shape[2] * a.itemsize
    kernel((len(a),), (128,), (cupy.asarray(a), cupy.asarray(b), cupy.asarray(c), d, np.int32(k_bytes)))
    return d.get()


def model_mma(key, a, b, c):
    """The same by the model."""
    dtype, code = ACCUMULATORS[key[3]]
    with np.errstate(invalid="ignore"):
        c = c.view(dtype).astype(np.float32)
    d = tensor_core.mma(to_operand(a, key[2]), to_operand(b, key[2]).swapaxes(1, 2), c, key)
    return (formats.to_fp16(d) if dtype is np.float16 else d).view(code)


def check_mma(key, a, b, c, d, names):
    """(mismatches by scenario, the first as text)"""
    expected = model_mma(key, a, b, c)
    wrong = d != expected
    by_scenario = {}
    for name, of_item in zip(names, wrong.sum(axis=(1, 2))):
        if of_item:
            by_scenario[name] = by_scenario.get(name, 0) + int(of_item)
    if not by_scenario:
        return by_scenario, None
    item, i, j = np.argwhere(wrong)[0]
    return by_scenario, (
        f"{names[item]}, K = {a.shape[2]}, item {item}, row {i}, column {j}: "
        f"GPU 0x{d[item, i, j]:X}, model 0x{expected[item, i, j]:X}, c 0x{c[item, i, j]:X}, "
        f"a {a[item, i].tobytes().hex()}, b {b[item, j].tobytes().hex()}"
    )


def instructions(arch):
    """The rows of the model's table for an NVRTC target such as "sm_90a"."""
    return [key for key in tensor_core.BEHAVIOURS if key[0] == jit.family_of(arch).rstrip("a")]


def validate_mma(key, dots=10_000_000):
    """One row of the report: at least so many dot products for every length of chain."""
    started = time.perf_counter()
    count, by_scenario, text, pending = 0, {}, None, []
    items = 2 * len(SCENARIOS)
    tasks = [(key, k, items, seed) for k in CHAINS for seed in range(-(-dots // (items * M * N)))]
    for task, (a, b, c, _) in zip(tasks, pool().imap(_generate, tasks)):
        d = run_mma(key, a, b, c)
        count += d.size
        pending.append(pool().apply_async(_check_generated, (task, d)))
    for result in pending:
        wrong, example = result.get()
        text = text or example
        for name, of_scenario in wrong.items():
            by_scenario[name] = by_scenario.get(name, 0) + of_scenario
    row = _row(" ".join(key), count, sum(by_scenario.values()), text, started)
    return {**row, "mismatches by scenario": by_scenario or None}


def _generate(task):
    return generate(*task)


def _check_generated(task, d):
    """To generate again takes less time than to send the operands."""
    a, b, c, names = generate(*task)
    return check_mma(task[0], a, b, c, d, names)


def write_goldens(key, folder):
    """A corner of every scenario, as tests/test_tensor_core.py reads it; a few 10 KB an instruction."""
    rows = 12
    a, b, c, _ = generate(key, 64, 2 * len(SCENARIOS), seed=2**31)
    d = run_mma(key, a, b, c)
    np.savez_compressed(
        Path(folder) / f"mma_{'_'.join(key).replace('.', '_')}.npz",
        key=np.array(key),
        a=a[:, :rows],
        b=b[:, :rows].swapaxes(1, 2),
        c=c[:, :rows, :rows],
        d=d[:, :rows, :rows],
    )


# ---------------------------------------------------------------------------- the report


def _row(check, count, mismatches, text, started):
    return {
        "check": check,
        "count": count,
        "mismatches": mismatches,
        "seconds": round(time.perf_counter() - started, 1),
        "first mismatch": text,
    }


def main(arguments=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--what", default="all")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--goldens", metavar="FOLDER")
    parser.add_argument("--dots", type=int, default=10_000_000)
    parser.add_argument("--inputs", type=int, default=1 << 32)
    options = parser.parse_args(arguments)
    what = [*ELEMENTWISE, "mma"] if options.what == "all" else options.what.split(",")
    unknown = set(what) - {*ELEMENTWISE, "mma"}
    if unknown:
        parser.error(f"--what {','.join(sorted(unknown))}: known are {', '.join(ELEMENTWISE)} and mma")

    pool()
    report = {**describe_gpu(), "results": []}
    keys = instructions(report["arch"]) if "mma" in what or options.goldens else []
    jobs = [functools.partial(validate_elementwise, name, options.inputs) for name in what if name != "mma"]
    jobs += [functools.partial(validate_mma, key, options.dots) for key in keys if "mma" in what]
    for job in jobs:
        row = job()
        report["results"].append(row)
        print(" | ".join(f"{name} {value}" for name, value in row.items() if value is not None), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    if options.goldens:
        Path(options.goldens).mkdir(parents=True, exist_ok=True)
        for key in keys:
            write_goldens(key, options.goldens)
    return int(any(row["mismatches"] for row in report["results"]))


if __name__ == "__main__":
    sys.exit(main())
