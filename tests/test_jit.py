"""Source to cubin: what is compiled, what is remembered, and what is said when it cannot be."""

import json
import os
import subprocess
import sys
import types

import pytest

from sagepp import __main__ as cli
from sagepp import jit, launch, plan

KERNEL = r"""
#include "scale.cuh"
extern "C" __global__ void scale(float* x) {
    __shared__ float y[64];
    y[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = scaled(y[63 - threadIdx.x]) + 1.0f;
}
"""

HEADER = r"""
#pragma once
#include "factor.cuh"
__device__ float scaled(float x) { return x * FACTOR; }
"""

# 200 values a thread that stay live together, in 32 registers.
SPILLS = r"""
extern "C" __global__ void __maxnreg__(32) attention_spills(float* x) {
    float a[200];
    #pragma unroll
    for (int i = 0; i < 200; ++i) a[i] = x[i * threadIdx.x];
    #pragma unroll
    for (int i = 0; i < 200; ++i) a[i] = a[i] * a[(i * 7 + 1) % 200];
    #pragma unroll
    for (int i = 0; i < 200; ++i) x[i + 200 * threadIdx.x] = a[i];
}
"""


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder of sources, an empty cache, and no memory of earlier compilations."""
    pytest.importorskip("cupy")
    try:
        jit.nvrtc_version()
    except ImportError as error:
        pytest.skip(str(error))
    folder = tmp_path / "kernels_src"
    folder.mkdir()
    for name, text in (("scale.cu", KERNEL), ("scale.cuh", HEADER), ("attention_spills.cu", SPILLS),
                       ("factor.cuh", "#ifndef FACTOR\n#define FACTOR 2.0f\n#endif\n")):
        (folder / name).write_text(text)
    monkeypatch.setattr(jit, "source_dir", lambda: folder)
    monkeypatch.setenv("SAGEPP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "_cubins", {})
    return folder


def forget():
    """What a new process would not know."""
    jit._cubins.clear()


@pytest.mark.parametrize("arch", jit.TARGETS)
def test_every_target_compiles_without_a_gpu(sources, arch):
    if arch == "sm_88" and jit.nvrtc_version() < (13, 0):
        pytest.skip("sm_88 came with NVRTC 13.0")
    cubin = jit.compile_cubin("scale.cu", arch)
    assert cubin.path.read_bytes()[:4] == b"\x7fELF" and not cubin.cached
    used = cubin.resources["scale"]
    assert 0 < used.registers < 64 and used.shared >= 256 and used.spill_stores == 0
    assert not cubin.warnings


def test_nothing_is_contracted(sources):
    """The multiplication and the addition of the kernel stay two instructions."""
    assert "--fmad=false" in jit.FLAGS
    fused = jit.compile_cubin("scale.cu", "sm_80", options=("--fmad=true",)).path.read_bytes()
    assert jit.compile_cubin("scale.cu", "sm_80").path.read_bytes() != fused


def test_included_files_are_found_recursively(sources):
    assert list(jit.read_sources("scale.cu")) == ["scale.cu", "scale.cuh", "factor.cuh"]


def test_a_second_process_finds_it_on_the_disk(sources, tmp_path, monkeypatch):
    first = jit.compile_cubin("scale.cu", "sm_89")
    forget()
    monkeypatch.setattr(jit, "_compile", None)
    second = jit.compile_cubin("scale.cu", "sm_89")
    assert second.cached and second.key == first.key and second.resources == first.resources
    assert second.path.parent == tmp_path / "cache"
    assert jit.compile_cubin("scale.cu", "sm_89") is second
    record = json.loads(second.path.with_suffix(".json").read_text())
    assert record["source"] == "scale.cu" and "--gpu-architecture=sm_89" in record["flags"]
    assert sorted(file.suffix for file in second.path.parent.iterdir()) == [".cubin", ".json"]


def test_the_key_covers_everything_that_the_image_depends_on(sources, monkeypatch):
    def key(*arguments, **options):
        return jit.compile_cubin("scale.cu", *arguments, **options).key

    keys = [key("sm_80"), key("sm_86"), key("sm_80", (("FACTOR", "3.0f"),)),
            key("sm_80", (("FACTOR", 4),)), key("sm_80", options=("-lineinfo",))]
    (sources / "factor.cuh").write_text("#define FACTOR 5.0f\n")
    keys.append(key("sm_80"))
    (sources / "scale.cu").write_text(KERNEL + "\n")
    keys.append(key("sm_80"))
    monkeypatch.setattr(jit, "nvrtc_version", lambda: (99, 1))
    keys.append(key("sm_80"))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("damage", ["cut cubin", "no cubin", "cut json", "no json", "wrong json"])
def test_a_damaged_cache_is_written_anew(sources, damage):
    path = jit.compile_cubin("scale.cu", "sm_80").path
    image = path.read_bytes()
    what, suffix = damage.split()
    victim = path.with_suffix("." + suffix)
    if what == "no":
        victim.unlink()
    else:
        victim.write_bytes(b"[1]" if what == "wrong" else victim.read_bytes()[:100])
    forget()
    again = jit.compile_cubin("scale.cu", "sm_80")
    assert not again.cached and again.path.read_bytes() == image
    forget()
    assert jit.compile_cubin("scale.cu", "sm_80").cached


def test_a_cache_that_cannot_be_written_costs_time_alone(sources, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAGEPP_CACHE_DIR", str(tmp_path / "file" / "cache"))
    cubin = jit.compile_cubin("scale.cu", "sm_80")
    assert cubin.path.read_bytes()[:4] == b"\x7fELF"
    assert jit.compile_cubin("scale.cu", "sm_80") is cubin  # compiled once in this process
    assert (tmp_path / "file").read_text() == ""


def test_a_failed_write_leaves_no_file_behind(sources, tmp_path, monkeypatch):
    def replace(source, target):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(OSError, match="disk full"):
            jit._write_pair(tmp_path, "key", b"image", {})
    assert not list(tmp_path.glob(".key*"))


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SAGEPP_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert jit.cache_dir() == tmp_path / ".cache" / "sagepp"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert jit.cache_dir() == tmp_path / "xdg" / "sagepp"
    monkeypatch.setenv("SAGEPP_CACHE_DIR", str(tmp_path / "mine"))
    assert jit.cache_dir() == tmp_path / "mine"


def test_an_error_in_the_source_shows_the_log(sources):
    (sources / "scale.cu").write_text('extern "C" __global__ void scale(float* x) { x[0] = nonsense; }')
    with pytest.raises(jit.CompileError, match=r"(?s)scale.cu with .*sm_80.*\bscale\.cu\(1\).*nonsense"):
        jit.compile_cubin("scale.cu", "sm_80")


def test_a_missing_include_is_named(sources):
    (sources / "factor.cuh").unlink()
    with pytest.raises(jit.CompileError, match=r"(?s)scale\.cuh\(3\).*factor.cuh"):
        jit.compile_cubin("scale.cu", "sm_80")


def test_a_missing_source_is_named(sources):
    with pytest.raises(FileNotFoundError, match="no CUDA source 'scan.cu'"):
        jit.compile_cubin("scan.cu", "sm_80")


def test_an_unknown_target_is_refused_by_name(sources):
    with pytest.raises(jit.CompileError, match="(?s)sm_90z.*gpu-architecture"):
        jit.compile_cubin("scale.cu", "sm_90z")


def test_an_old_nvrtc_is_named_with_what_is_needed(sources, monkeypatch):
    monkeypatch.setattr(jit, "nvrtc_version", lambda: (12, 4))
    with pytest.raises(jit.CompileError, match=r"needs NVRTC 12\.8 or later, but CuPy found 12\.4"):
        jit.compile_cubin("scale.cu", "sm_89", requires_nvrtc=(12, 8))
    jit.compile_cubin("scale.cu", "sm_80")


def test_without_nvrtc_the_extra_is_named(monkeypatch):
    def get_version():
        raise RuntimeError("no libnvrtc.so.12")

    monkeypatch.setattr(jit, "_nvrtc", lambda: types.SimpleNamespace(getVersion=get_version))
    jit.nvrtc_version.cache_clear()
    with pytest.raises(ImportError, match=r"finds no NVRTC.*pip install 'sagepp\[cuda12\]'"):
        jit.nvrtc_version()


def test_without_cupy_the_extra_is_named(monkeypatch):
    for name in ("cupy", "cupy_backends", "cupy_backends.cuda", "cupy_backends.cuda.libs"):
        monkeypatch.setitem(sys.modules, name, None)
    jit._nvrtc.cache_clear()
    jit.nvrtc_version.cache_clear()
    with pytest.raises(ImportError, match=r"needs CuPy.*pip install 'sagepp\[cuda12\]'"):
        jit.compile_cubin("scale.cu", "sm_80")


@pytest.mark.parametrize("capability, arch", [
    ((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a"),
    ((12, 0), "sm_120a"), ((12, 1), "sm_121a")])
def test_a_gpu_gets_the_target_with_all_its_instructions(capability, arch):
    assert jit.target(*capability) == arch


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1), (13, 0)])
def test_an_unsupported_gpu_is_named_with_what_is_supported(capability):
    with pytest.raises(RuntimeError, match=r"Tesla T4 has compute capability \d+\.\d.*supported: 8\.0"):
        jit.target(*capability, "Tesla T4")


def test_every_target_has_a_plan():
    assert {jit.family_of(arch) for arch in jit.TARGETS} == set(plan.ARCHITECTURES)
    assert jit.family_of("sm_103a") == "sm_100a"
    with pytest.raises(ValueError, match="arch is 'sm_75'; allowed: sm_80"):
        jit.family_of("sm_75")


def test_ptxas_notes_are_warnings():
    log = ("ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async is serialized\n"
           "ptxas info    : Used 12 registers\nptxas warning : something\n")
    cubin = jit.Cubin("key", None, log, 0.0, False)
    assert [line.split(":")[0].split()[1] for line in cubin.warnings] == ["info", "warning"]


def test_a_kernel_is_loaded_once_a_device(sources, monkeypatch):
    cupy = pytest.importorskip("cupy")
    device, loaded = [0], []

    class RawModule:
        def __init__(self, path):
            self.path = path

        def get_function(self, name):
            loaded.append(name)
            return types.SimpleNamespace(kernel=None, path=self.path)

    monkeypatch.setattr(cupy, "RawModule", RawModule)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: device[0])
    jit._kernel.cache_clear()
    first = jit.get_kernel("scale.cu", "scale", "sm_80")
    assert jit.get_kernel("scale.cu", "scale", "sm_80") is first and loaded == ["scale"]
    assert first.path.endswith(".cubin") and not hasattr(first, "max_dynamic_shared_size_bytes")
    device[0] = 1
    second = jit.get_kernel("scale.cu", "scale", "sm_80", dynamic_shared=99 * 1024)
    assert second is not first and second.max_dynamic_shared_size_bytes == 99 * 1024
    jit._kernel.cache_clear()


@pytest.mark.gpu
def test_a_kernel_runs(sources):
    cupy = pytest.importorskip("cupy")
    x = cupy.arange(64, dtype=cupy.float32)
    kernel = jit.get_kernel("scale.cu", "scale", jit.arch_of(), (("FACTOR", "3.0f"),))
    kernel((1,), (64,), (x,))
    assert (x.get() == [3 * (63 - i) + 1 for i in range(64)]).all()
    jit._kernel.cache_clear()


# --- the command line ------------------------------------------------------------------------------


@pytest.fixture
def variants(sources, monkeypatch):
    """Two kernels, the second of which spills."""
    listed = [("scale.cu", "scale", (("FACTOR", 3),)), ("attention_spills.cu", "attention_spills", ())]
    monkeypatch.setattr(launch, "kernel_variants", lambda arch: listed)
    return listed


def test_compile_prints_a_row_a_kernel(variants, capsys):
    del variants[1]
    assert cli.main(["compile", "--arch", "sm_80", "sm_90a"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["arch", "kernel", "variant", "registers"]
    assert [line.split()[:3] for line in lines if "FACTOR" in line] == [
        ["sm_80", "scale", "FACTOR=3"], ["sm_90a", "scale", "FACTOR=3"]]


def test_compile_fails_where_an_attention_kernel_spills(variants, capsys):
    assert cli.main(["compile", "--arch", "sm_89", "--json"]) == 1
    printed = capsys.readouterr()
    rows = {row["kernel"]: row for row in json.loads(printed.out)["kernels"]}
    assert rows["scale"]["spill bytes"] == 0 and rows["attention_spills"]["spill bytes"] > 0
    assert rows["attention_spills"]["registers"] == 32 and rows["scale"]["shared bytes"] >= 256
    assert "attention_spills () for sm_89 spills" in printed.err


def test_compile_refuses_an_unknown_architecture(capsys):
    with pytest.raises(SystemExit):
        cli.main(["compile", "--arch", "sm_75"])
    assert "sm_75" in capsys.readouterr().err


def test_the_table_needs_no_tabulate(monkeypatch):
    monkeypatch.setitem(sys.modules, "tabulate", None)
    assert cli.table([{"arch": "sm_80", "n": 1}, {"arch": "sm_100a", "n": 20}]) == (
        "arch     n\nsm_80    1\nsm_100a  20")


def test_info_says_what_is_missing():
    """In a process that has no CuPy."""
    script = "import sys; sys.modules['cupy'] = None; sys.modules['cupy_backends'] = None\n" \
             "from sagepp import __main__; sys.exit(__main__.main(['info']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'sagepp[cuda12]'" in done.stdout and "kernel cache" in done.stdout


def test_info_works_here(capsys):
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.startswith("sagepp")
