"""The kernels for every architecture, compiled and read as machine code. No GPU.

What is checked: no spills, no local memory, no warnings, the MMA instructions that the plan means and no
others, and the length of the main loop on Ada. `nvdisasm` comes from PyPI (nvidia-cuda-nvdisasm).
"""

import concurrent.futures
import functools
import os
import re
import shutil
import site
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from sagepp import jit, launch, schedule
from sagepp.plan import ARCHITECTURES, make_plan

NATIVE_FP8_MMA = ("sm_89", "sm_120a")
LOCAL_MEMORY = {"LDL", "STL"}
#: Names of tensor core instructions: IMMA, HMMA, QMMA, IGMMA, QGMMA.
MMA = re.compile(r"[A-Z]G?MMA$")
#: Instructions a score of the main loop of SageAttention's sm_89 kernel, FP16 accumulators, CUDA 13.0.
SAGEATTENTION_INSTRUCTIONS = {128: 14.7, 64: 10.1}


# --- what is compiled --------------------------------------------------------------------------


class Variant(NamedTuple):
    arch: str
    source: str
    function: str
    defines: tuple

    def __str__(self):
        value = dict(self.defines)
        kernel = self.source.removesuffix(".cu").removeprefix("attention_")
        flags = [name for name, define in (
            ("causal", "CAUSAL"), ("lse", "RETURN_LSE"), ("lse", "WITH_MEAN_DOT"),
            ("bf16", "OUT_BF16"), ("bf16", "IN_BF16")) if value.get(define)]
        form = [launch.P_FORMS[value["P_FORM"]]] if "P_FORM" in value else []
        v_type = ["f16" if value["V_F16"] else "e4m3"] if "V_F16" in value else []
        return "-".join([self.arch, kernel, *form, *v_type, f"d{value.get('CHANNELS', value['HEAD_DIM'])}",
                         f"n{value['BLOCK_N']}", *flags])

    @property
    def expected_mma(self) -> set[str]:
        if self.source == "attention_wgmma.cu":
            return {"IGMMA", "QGMMA"}
        native = not dict(self.defines)["V_F16"] and self.arch in NATIVE_FP8_MMA
        return {"IMMA", "QMMA" if native else "HMMA"}


def variants(arch: str) -> list[Variant]:
    """Of 96 and 192 channels, which take the way of 128 and 256, a quarter: FP16 with an LSE."""
    found = [Variant(arch, *variant) for variant in dict.fromkeys(launch.kernel_variants(arch))]
    return [variant for variant in found
            if variant.function != "attention" or dict(variant.defines)["CHANNELS"] not in (96, 192)
            or {("RETURN_LSE", 1), ("OUT_BF16", 0)} <= set(variant.defines)]


VARIANTS = [variant for arch in ARCHITECTURES for variant in variants(arch)]
ATTENTION = [variant for variant in VARIANTS if variant.function == "attention"]


@functools.lru_cache(maxsize=None)
def compilations(arch: str) -> dict:
    """Variant -> future of its cubin and machine code; those of an architecture are compiled side by side."""
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    futures = {variant: pool.submit(build, variant) for variant in VARIANTS if variant.arch == arch}
    pool.shutdown(wait=False)
    return futures


def build(variant: Variant):
    """The cubin, and nvdisasm's finished process: None for a kernel that nobody reads, or without nvdisasm."""
    cubin = jit.compile_cubin(variant.source, variant.arch, variant.defines)
    if nvdisasm() is None or variant.function != "attention":
        return cubin, None
    return cubin, subprocess.run([nvdisasm(), "-c", str(cubin.path)], capture_output=True, text=True)


@functools.lru_cache(maxsize=None)
def no_compiler_reason():
    """Why nothing can be compiled here; None where it can."""
    try:
        version = jit.nvrtc_version()
    except ImportError as error:
        return str(error)
    return None if version >= (12, 8) else f"NVRTC {version} does not know FP8 MMA with FP16 accumulators"


def compiled(variant: Variant) -> jit.Cubin:
    if no_compiler_reason():
        pytest.skip(no_compiler_reason())
    return compilations(variant.arch)[variant].result()[0]


# --- machine code ------------------------------------------------------------------------------


class Instruction(NamedTuple):
    predicate: str  #: "@!P0", or "" where it is always executed
    opcode: str  #: without its modifiers: "IMMA"
    modifiers: str  #: ".16832.S8.S8"
    target: str  #: label of a branch, or ""


_SECTION = re.compile(r"\s*\.section\s+([^,\s]+)")
_LABEL = re.compile(r"([.$][^\s:]+):\s*$")
_INSTRUCTION = re.compile(
    r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)(?:\s[^`;]*(?:`\(([^)]+)\))?)?")


def parse(listing: str, function: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a function in nvdisasm's listing; label -> number of the instruction behind it."""
    instructions, labels, inside = [], {}, False
    for line in listing.splitlines():
        if section := _SECTION.match(line):
            inside = section[1] == f".text.{function}"
        elif inside and (label := _LABEL.match(line)):
            labels[label[1]] = len(instructions)
        elif inside and (match := _INSTRUCTION.match(line)):
            predicate, opcode, modifiers, target = match.groups(default="")
            instructions.append(Instruction(predicate.strip(), opcode, modifiers, target))
    return instructions, labels


@functools.lru_cache(maxsize=None)
def nvdisasm() -> str | None:
    """Path of the program: of the wheel, or on PATH."""
    for folder in (*site.getsitepackages(), *sys.path):
        for file in sorted(Path(folder).glob("nvidia/*/bin/nvdisasm*")):
            return str(file)
    return shutil.which("nvdisasm")


@functools.lru_cache(maxsize=None)
def machine_code(variant: Variant) -> tuple[list[Instruction], dict[str, int]]:
    cubin = compiled(variant)
    if nvdisasm() is None:
        pytest.skip("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    done = compilations(variant.arch)[variant].result()[1]
    assert done.returncode == 0, f"nvdisasm cannot read {cubin.path}: {done.stderr}"
    instructions, labels = parse(done.stdout, variant.function)
    assert len(instructions) > 500 and any(i.opcode == "EXIT" for i in instructions), \
        f"no machine code in nvdisasm's listing of {cubin.path}: {done.stdout[:500]}"
    return instructions, labels


# --- loops -------------------------------------------------------------------------------------


def shortest_iteration(instructions, labels, first: int, last: int) -> Counter | None:
    """Opcodes of one pass through the loop from `first` to the backward branch `last`.

    Of the ways from one to the other, along the code and its forward branches, it is the one with the most
    products of P and V, then the most asynchronous copies, then the fewest instructions: a whole tile, the
    next one being loaded, and nothing of what happens to some tiles only (a mask, a bound that moves).
    None if there is no way.
    """
    best = {last: ((0, 0, -1), None)}  # instruction -> (score of the rest of the way, next instruction)
    for i in range(last - 1, first - 1, -1):
        predicate, opcode, _, target = instructions[i]
        successors = []
        if opcode == "BRA":
            successors.append(labels.get(target, -1))
        if predicate or opcode not in ("BRA", "EXIT", "RET"):
            successors.append(i + 1)
        ways = [(best[j][0], j) for j in successors if i < j <= last and j in best]
        if ways:
            (products, copies, length), following = max(ways)
            best[i] = (products + (opcode == "QMMA"), copies + (opcode == "LDGSTS"), length - 1), following
    if first not in best:
        return None
    opcodes, i = Counter(), first
    while i is not None:
        opcodes[instructions[i].opcode] += 1
        i = best[i][1]
    return opcodes


def main_loop(instructions, labels, products: int) -> Counter:
    """Opcodes of the main loop, for one tile: the shortest loop with `products` of each kind, or a multiple."""
    found = []
    for last, (_, opcode, _, target) in enumerate(instructions):
        if opcode == "BRA" and labels.get(target, last + 1) <= last:
            opcodes = shortest_iteration(instructions, labels, labels[target], last)
            if opcodes and min(opcodes["IMMA"], opcodes["QMMA"]) >= products:
                tiles = opcodes["IMMA"] // products
                found.append((opcodes.total() / tiles, opcodes, tiles))
    assert found, f"no loop with {products} IMMA and {products} QMMA or more"
    _, opcodes, tiles = min(found, key=lambda item: item[0])
    return Counter({opcode: count / tiles for opcode, count in opcodes.items()})


LISTING = """
	.section	.text.other,"ax",@progbits
        /*0000*/                   HMMA.16816.F16 R0, R0, R0, R0 ;
	.section	.text.attention,"ax",@progbits
.text.attention:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   IMMA.16832.S8.S8 R4, R4.ROW, R8.COL, R4 ;
        /*0020*/              @!P1 BRA `(.L_x_2) ;
        /*0030*/                   FMNMX R1, R2, R3, !PT ;
        /*0040*/                   FMNMX R1, R2, R3, !PT ;
.L_x_2:
        /*0050*/               @P2 BRA `(.L_x_3) ;
        /*0060*/                   LDGSTS.E.128 [R4], [R6.64] ;
.L_x_3:
        /*0070*/         @P4       BRA `(.L_x_1) ;
        /*0080*/               @P0 BRA `(.L_x_4) ;
        /*0090*/                   QMMA.16832.F16.E4M3.E4M3 R4, R4, R8, R4 ;
.L_x_4:
        /*00a0*/                   UISETP.NE.AND UP0, UPT, UR4, URZ, UPT ;
        /*00b0*/              @!P0 BRA `(.L_x_1) ;
        /*00c0*/                   EXIT ;
.L_x_5:
        /*00d0*/                   BRA `(.L_x_5);
"""


def test_the_main_loop_of_a_listing():
    """The mask (FMNMX) and the inner repetition are left out, the load and the product are not."""
    instructions, labels = parse(LISTING, "attention")
    assert len(instructions) == 14 and labels[".L_x_1"] == 1
    assert instructions[1] == ("", "IMMA", ".16832.S8.S8", "") and instructions[2] == ("@!P1", "BRA", "", ".L_x_2")
    loop = main_loop(instructions, labels, products=1)
    assert loop == {"IMMA": 1, "BRA": 5, "LDGSTS": 1, "QMMA": 1, "UISETP": 1}
    with pytest.raises(AssertionError, match="no loop with 2"):
        main_loop(instructions, labels, products=2)


# --- the kernels -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_ptxas_has_nothing_to_say(variant):
    """Neither a warning nor a note of the C75xx family, a `wgmma` that had to be serialised."""
    assert compiled(variant).warnings == ()


@pytest.mark.parametrize("variant", ATTENTION, ids=str)
def test_an_attention_kernel_does_not_spill(variant):
    used = compiled(variant).resources["attention"]
    assert (used.spill_stores, used.spill_loads, used.stack) == (0, 0, 0), used


@pytest.mark.parametrize("variant", ATTENTION, ids=str)
def test_an_attention_kernel_has_the_machine_code_that_its_plan_means(variant):
    instructions, _ = machine_code(variant)
    used = {i.opcode for i in instructions if MMA.match(i.opcode)}
    assert used == variant.expected_mma
    wide = {i.opcode + i.modifiers for i in instructions
            if i.opcode in ("HMMA", "QMMA", "QGMMA") and ".F32" in i.modifiers}
    assert not wide, f"accumulators of P V that are not FP16: {wide}"
    local = [i.opcode for i in instructions if i.opcode in LOCAL_MEMORY]
    assert local == []


@pytest.mark.parametrize("head_dim", SAGEATTENTION_INSTRUCTIONS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_the_main_loop_on_ada_is_shorter_than_that_of_sageattention(head_dim, is_causal):
    plan = make_plan("sm_89", head_dim, "mma")
    variant = Variant(plan.arch, launch.attention_source(plan), "attention",
                      launch.attention_defines(plan, is_causal=is_causal))
    rows = plan.block_m // plan.num_warps
    products = rows * plan.block_n * head_dim // (16 * 8 * 32)  # of m16n8k32, for Q K^T and again for P V
    loop = main_loop(*machine_code(variant), products)
    a_score = loop.total() / (rows * plan.block_n / 32)
    print(  # shown by pytest -rP
        f"d={head_dim}: {a_score:.2f} instructions a score, {loop.total():.0f} a tile: "
          + ", ".join(f"{opcode} {count:.0f}" for opcode, count in loop.most_common()))
    assert loop["QMMA"] >= products
    assert a_score < SAGEATTENTION_INSTRUCTIONS[head_dim], loop


@pytest.mark.parametrize("head_dim", SAGEATTENTION_INSTRUCTIONS)
def test_two_ctas_share_an_sm_on_ada(head_dim):
    """65536 registers, given out by 8 a thread; 100 KiB of shared memory, of which a CTA takes 1 for itself."""
    plan = make_plan("sm_89", head_dim, "mma")
    for variant in ATTENTION:
        if variant.arch == "sm_89" and {("CHANNELS", head_dim), ("V_F16", 0)} <= set(variant.defines):
            used = compiled(variant).resources["attention"]
            registers = -(-used.registers // 8) * 8 * 32 * plan.num_warps
            shared = launch.attention_shared_bytes(plan) + used.shared + 1024
            assert 2 * registers <= 65536 and 2 * shared <= 100 * 1024, (str(variant), registers, shared)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.function == "late_codes"], ids=str)
def test_late_codes_have_an_sm_for_themselves(variant):
    """Beside a CTA of it, the SM's 65536 registers are too few for one of the attention kernel, or for another one. In
    BF16 a few are spilled."""
    used, defines = compiled(variant).resources["late_codes"], dict(variant.defines)
    registers = -(-used.registers // 8) * 8 * defines["LATE_THREADS"]
    assert 65536 < 2 * registers <= 2 * 65536 and defines["LATE_SHARED_BYTES"] <= 227 * 1024
    attention = [other for other in ATTENTION if other.source == "attention_wgmma.cu"
                 and dict(other.defines)["HEAD_DIM"] == defines["HEAD_DIM"]]
    assert attention
    for other in attention:
        of_attention = compiled(other).resources["attention"].registers * 32 * dict(other.defines)["NUM_WARPS"]
        assert registers + of_attention > 65536, str(other)
    assert used.spill_stores <= (100 if defines["IN_BF16"] else 0), used


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.function == "quantize"], ids=str)
def test_as_many_ctas_of_the_quantiser_share_an_sm_as_the_launch_counts_on(variant):
    """65536 registers, given out by 8 a thread, and 64 barriers; on data centre GPUs from Hopper on 228 KiB of shared
    memory, of which a CTA takes 1 for itself."""
    used, head_dim = compiled(variant).resources["quantize"], dict(variant.defines)["HEAD_DIM"]
    ctas = schedule.ctas_an_sm(make_plan(variant.arch, head_dim))
    registers = -(-used.registers // 8) * 8 * 32 * launch.QUANTIZE_WARPS
    assert ctas * registers <= 65536 and 0 < ctas * used.barriers <= 64, used
    if variant.arch in ("sm_90a", "sm_100a"):
        assert ctas * (used.shared + 1024) <= 228 * 1024, used


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v.function == "quantize" and not dict(v.defines)["V_F16"]], ids=str)
def test_every_e4m3_code_that_is_read_back_was_written(variant):
    """ptxas 12.9 joins the conversions of a word's two halves; who reads a half then reads another value.

    The register that a code is read from was last written, in the order of the listing, by the conversion or by
    what puts halves together, and not by whatever used it before (`from_e4m3` in kernels_src/convert.cuh).
    """
    cubin = compiled(variant)
    if nvdisasm() is None:
        pytest.skip("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    listing = subprocess.run(
        [nvdisasm(), "-c", str(cubin.path)], capture_output=True, text=True, check=True).stdout
    writer, reads = {}, 0  # register -> opcode, with its modifiers
    for opcode, target, operands in re.findall(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+) (R\d+)\b([^;]*)", listing, re.MULTILINE):
        if opcode == "F2FP.F16.E4M3.UNPACK_B":
            reads += 1
            code = re.search(r"R\d+", operands)[0]
            assert writer[code].startswith(("F2FP.SATFINITE", "PRMT", "LOP3", "IMAD", "LEA")), (code, writer[code])
        writer[target] = opcode
    assert reads >= 16
