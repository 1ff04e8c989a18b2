"""CUDA source to a loaded kernel: NVRTC to a cubin, a cache on disk, a CuPy `RawModule`.

CuPy compiles for ``sm_<capability>`` only and knows no architecture-specific target (``sm_90a``), so
NVRTC is called directly, through CuPy's binding of it, which needs no GPU and no driver. Nothing here
knows what the kernels compute.

The cache is a folder of ``<key>.cubin`` and ``<key>.json``: ``$SAGEPP_CACHE_DIR``, or ``sagepp`` in the
user's cache folder. The key covers the source, every file it includes, the flags, the architecture and
the version of NVRTC. Both files are written under a temporary name and renamed, the JSON last: it holds
the hash of the cubin, so that whatever else is found there counts as absent. A folder that cannot be
written costs time, not correctness.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .arrays import import_cupy

#: NVRTC target -> (compute capability, the architecture of `sagepp.plan` whose kernels it runs).
TARGETS = {
    "sm_80": ((8, 0), "sm_80"),
    "sm_86": ((8, 6), "sm_86"),
    "sm_87": ((8, 7), "sm_86"),
    "sm_88": ((8, 8), "sm_86"),
    "sm_89": ((8, 9), "sm_89"),
    "sm_90a": ((9, 0), "sm_90a"),
    "sm_100a": ((10, 0), "sm_100a"),
    "sm_103a": ((10, 3), "sm_100a"),
    "sm_120a": ((12, 0), "sm_120a"),
    "sm_121a": ((12, 1), "sm_120a"),
}

#: On every compilation. `--fmad=false`: the numerical contract counts every rounding.
FLAGS = ("--std=c++17", "--fmad=false", "--device-as-default-execution-space", "--ptxas-options=-v")

_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


class CompileError(RuntimeError):
    """NVRTC refused a kernel; the message holds its log."""


class Resources(NamedTuple):
    """What ptxas reports of one kernel."""

    registers: int  #: a thread
    spill_stores: int  #: bytes a thread
    spill_loads: int  #: bytes a thread
    stack: int  #: bytes a thread
    shared: int  #: bytes a CTA, static shared memory only
    barriers: int  #: of the 16 that a CTA can have; an SM has 64


@dataclass(frozen=True)
class Cubin:
    """A compiled source file."""

    key: str  #: hex digest of everything that the image depends on
    path: Path  #: of the image
    log: str  #: what NVRTC and ptxas printed
    seconds: float  #: that the compilation took
    cached: bool  #: taken from the disk

    @property
    def resources(self) -> dict[str, Resources]:
        """Kernel name -> what it uses."""
        return parse_resources(self.log)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings, and ptxas' notes of the C75xx family: a `wgmma` that had to be serialised."""
        return tuple(line.strip() for line in self.log.splitlines()
                     if "warning" in line.lower() or re.search(r"\(C75\d\d\)", line))


def parse_resources(log: str) -> dict[str, Resources]:
    """Kernel name -> resources, from the output of ``ptxas -v``."""
    found = {}
    for block in log.split("Compiling entry function ")[1:]:
        name = block.split("'", 2)[1]

        def number(unit):
            match = re.search(rf"(\d+) {unit}", block)
            return int(match[1]) if match else 0

        found[name] = Resources(
            registers=int(re.search(r"Used (\d+) registers", block)[1]),
            spill_stores=number("bytes spill stores"), spill_loads=number("bytes spill loads"),
            stack=number("bytes stack frame"), shared=number("bytes smem"), barriers=number("barriers"))
    return found


# --- what is there -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=None)
def _nvrtc():
    try:
        from cupy_backends.cuda.libs import nvrtc
    except ImportError:
        import_cupy()
        raise
    return nvrtc


@functools.lru_cache(maxsize=None)
def nvrtc_version() -> tuple[int, int]:
    """Version of the NVRTC that CuPy loads; ImportError, with what to install, where there is none."""
    try:
        return tuple(_nvrtc().getVersion())
    except RuntimeError as error:
        raise ImportError(
            "CuPy is installed, but finds no NVRTC, the CUDA compiler: pip install 'sagepp[cuda12]' "
            "or 'sagepp[cuda13]', or set CUDA_PATH to a CUDA toolkit") from error


def arch_of(device: int | None = None) -> str:
    """NVRTC target of a GPU, the current one by default; RuntimeError where it is not supported."""
    cupy = import_cupy()
    return _arch_of(cupy.cuda.runtime.getDevice() if device is None else device)


@functools.lru_cache(maxsize=None)
def _arch_of(device: int) -> str:
    properties = import_cupy().cuda.runtime.getDeviceProperties(device)
    return target(properties["major"], properties["minor"], properties["name"].decode())


def target(major: int, minor: int, name: str = "this GPU") -> str:
    """NVRTC target of a compute capability: ``(9, 0)`` -> ``"sm_90a"``."""
    for arch, (capability, _) in TARGETS.items():
        if capability == (major, minor):
            return arch
    supported = ", ".join(_dotted(capability) for capability, _ in TARGETS.values())
    raise RuntimeError(f"{name} has compute capability {major}.{minor}, which sagepp does not support; "
                       f"supported: {supported}")


def family_of(arch: str) -> str:
    """The architecture of `sagepp.plan` whose kernels run on `arch`: ``"sm_87"`` -> ``"sm_86"``."""
    if arch not in TARGETS:
        raise ValueError(f"arch is {arch!r}; allowed: {', '.join(TARGETS)}")
    return TARGETS[arch][1]


def cache_dir() -> Path:
    """Folder of the compiled kernels; it need not exist."""
    if os.environ.get("SAGEPP_CACHE_DIR"):
        return Path(os.environ["SAGEPP_CACHE_DIR"])
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "sagepp" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "sagepp"


# --- compiling ---------------------------------------------------------------------------------


def source_dir():
    """Folder of the CUDA sources, as `importlib.resources` sees it."""
    return importlib.resources.files("sagepp.kernels_src")


def read_sources(source_name: str) -> dict[str, str]:
    """`source_name` and, recursively, the files it includes as ``#include "..."``: name -> text.

    An included file that is not there is left to NVRTC, which says where it is included.
    """
    folder, sources, pending = source_dir(), {}, [source_name]
    while pending:
        name = pending.pop(0)
        file = folder / name
        if name in sources or (name != source_name and not file.is_file()):
            continue
        try:
            sources[name] = file.read_text(encoding="utf-8")
        except OSError as error:
            raise FileNotFoundError(f"sagepp has no CUDA source {source_name!r} in {folder}") from error
        pending += _INCLUDE.findall(sources[name])
    return sources


def compile_cubin(
    source_name: str,
    arch: str,
    defines: tuple[tuple[str, int | str], ...] = (),
    options: tuple[str, ...] = (),
    *,
    requires_nvrtc: tuple[int, int] = (12, 0),
) -> Cubin:
    """Compile a file of `kernels_src` for an NVRTC target (``"sm_90a"``), or find it compiled.

    `defines` become ``-DNAME=VALUE``, `options` are passed to NVRTC as they are. `requires_nvrtc` is the
    oldest NVRTC that knows the instructions used (12.8 for FP8 `mma` with FP16 accumulators).
    Needs no GPU. Raises :class:`CompileError` with NVRTC's log, ImportError where CuPy or NVRTC is
    missing.
    """
    version = nvrtc_version()
    if version < requires_nvrtc:
        raise CompileError(
            f"{source_name} for {arch} needs NVRTC {_dotted(requires_nvrtc)} or later, but CuPy found "
            f"{_dotted(version)}: pip install -U 'nvidia-cuda-nvrtc-cu12>={_dotted(requires_nvrtc)}', or "
            "set CUDA_PATH to a newer CUDA toolkit")
    sources = read_sources(source_name)
    flags = (f"--gpu-architecture={arch}", *FLAGS, *(f"-D{name}={value}" for name, value in defines),
             *options)
    key = hashlib.sha256(
        json.dumps([source_name, sources, flags, version]).encode()).hexdigest()[:40]
    if key not in _cubins:
        _cubins[key] = _find(key) or _compile(key, source_name, sources, flags)
    return _cubins[key]


#: Key -> cubin, of this process.
_cubins: dict[str, Cubin] = {}


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _compile(key, source_name, sources, flags) -> Cubin:
    nvrtc = _nvrtc()
    headers = [(name.encode(), text.encode()) for name, text in sources.items() if name != source_name]
    start = time.perf_counter()
    program = nvrtc.createProgram(sources[source_name], source_name,
                                  [text for _, text in headers], [name for name, _ in headers])
    try:
        try:
            nvrtc.compileProgram(program, flags)
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise CompileError(f"NVRTC {_dotted(nvrtc_version())} could not compile {source_name} with "
                               f"{' '.join(flags)}: {error}\n{log}") from None
        # CuPy takes the cubin for text and drops its last byte, a zero.
        image, log = nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)
    seconds = time.perf_counter() - start
    record = {"sha256": hashlib.sha256(image).hexdigest(), "source": source_name, "flags": flags,
              "nvrtc": _dotted(nvrtc_version()), "seconds": round(seconds, 3), "log": log}
    return Cubin(key, _store(key, image, record), log, seconds, cached=False)


def _find(key: str) -> Cubin | None:
    path = cache_dir() / f"{key}.cubin"
    try:
        record = json.loads(path.with_suffix(".json").read_bytes())
        if hashlib.sha256(path.read_bytes()).hexdigest() != record["sha256"]:
            return None
        return Cubin(key, path, record["log"], record["seconds"], cached=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(key: str, image: bytes, record: dict) -> Path:
    """Write the pair to the cache, or else to a folder that lives as long as the process."""
    try:
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return _write_pair(folder, key, image, record)
    except OSError:
        return _write_pair(Path(_process_dir().name), key, image, record)


def _write_pair(folder: Path, key: str, image: bytes, record: dict) -> Path:
    path = folder / f"{key}.cubin"
    for target_path, data in ((path, image), (path.with_suffix(".json"), json.dumps(record).encode())):
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{key}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, target_path)
        except BaseException:
            os.unlink(temporary)
            raise
    return path


@functools.lru_cache(maxsize=None)
def _process_dir() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="sagepp-")


# --- loading -----------------------------------------------------------------------------------


def load(cubin: Cubin):
    """The `cupy.RawModule` of a cubin; CuPy loads it on each device that uses it, once."""
    return _load(cubin.key, str(cubin.path))


@functools.lru_cache(maxsize=None)
def _load(key: str, path: str):
    return import_cupy().RawModule(path=path)


def get_kernel(
    source_name: str,
    function: str,
    arch: str,
    defines: tuple[tuple[str, int | str], ...] = (),
    *,
    options: tuple[str, ...] = (),
    requires_nvrtc: tuple[int, int] = (12, 0),
    dynamic_shared: int = 0,
):
    """A kernel, loaded on the current device: a `cupy.RawKernel`. Repeated calls are a lookup.

    Arguments as of :func:`compile_cubin`; `function` is the ``extern "C"`` name. `dynamic_shared` is the
    dynamic shared memory, in bytes a CTA, that it will be launched with: beyond 48 KiB the driver wants
    to know it beforehand.
    """
    device = import_cupy().cuda.runtime.getDevice()
    return _kernel(device, source_name, function, arch, defines, options, requires_nvrtc, dynamic_shared)


@functools.lru_cache(maxsize=None)
def _kernel(device, source_name, function, arch, defines, options, requires_nvrtc, dynamic_shared):
    cubin = compile_cubin(source_name, arch, defines, options, requires_nvrtc=requires_nvrtc)
    kernel = load(cubin).get_function(function)
    if dynamic_shared > 48 * 1024:
        kernel.max_dynamic_shared_size_bytes = dynamic_shared
    kernel.kernel  # loads it now: a first launch may stand inside a CUDA graph capture
    return kernel
