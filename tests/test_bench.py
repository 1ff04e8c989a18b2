"""`bench.py` without a GPU: what it counts, runs, prints and writes. CuPy and torch are stand-ins."""

import contextlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from sagepp import launch
from sagepp.plan import make_plan
from sagepp.reference import attention as reference

BENCH = Path(__file__).parent.parent / "bench.py"


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench", BENCH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "gpu_count", lambda: 0)
    monkeypatch.setattr(module, "versions", lambda: {"numpy": np.__version__})
    return module


@pytest.mark.parametrize("is_causal, expected", [(False, 4 * 2 * 16 * 8192**2 * 128), (True, 2 * 2 * 16 * 8192**2 * 128)])
def test_flop(bench, is_causal, expected):
    assert bench.flop((2, 16, 8192, 128), is_causal) == expected


@pytest.mark.parametrize("head_dim, seq_len, shape", [
    (128, 1024, (16, 16, 1024, 128)), (64, 8192, (2, 32, 8192, 64)), (128, 16384, (2, 16, 16384, 128)),
    (64, 32768, (1, 32, 32768, 64)), (256, 8192, (2, 8, 8192, 256))])
def test_every_case_has_as_many_tokens(bench, head_dim, seq_len, shape):
    assert bench.Case(head_dim, seq_len, False).shape == shape


def test_without_a_gpu_the_reference_runs(bench, capsys, tmp_path):
    file = tmp_path / "result.json"
    assert bench.main(["--seq-len", "128", "--head-dim", "64", "--kernels", "mma", "wgmma_fast", "--causal",
                       "--json", str(file), "--commit", "abc"]) == 0
    printed = capsys.readouterr().out
    assert "No GPU" in printed and "left out" in printed and "cuDNN FP8" in printed and "checked" in printed
    written = json.loads(file.read_text())
    assert written["commit"] == "abc" and written["gpu"] is None and written["versions"]
    assert written["command"] and written["left out"]["FlashAttention-2"] == "no GPU"
    assert [(row["name"], row["seq_len"], row["is_causal"]) for row in written["rows"]] == [
        ("mma", 128, True), ("wgmma_fast", 128, True)]
    assert all(0 < row["relative_l1"] < bench.MAX_RELATIVE_L1 for row in written["rows"])


def test_a_wrong_output_is_a_failure(bench, capsys, monkeypatch):
    monkeypatch.setattr(bench.sagepp, "attention", lambda q, k, v, **options: q)
    assert bench.main(["--seq-len", "64", "--head-dim", "64", "--kernels", "mma", "--no-causal"]) == 1
    assert "WRONG: mma, d=64 S=64: relative L1" in capsys.readouterr().out


def test_nan_is_a_complaint(bench):
    figures = {"relative_l1": float("nan"), "cosine": float("nan")}
    assert "relative L1 nan" in bench.complaint(figures)
    assert bench.complaint({"relative_l1": 0.037, "cosine": 0.9993}) is None


# --- with stand-ins ----------------------------------------------------------------------------


class Tensor:
    """A torch tensor, as far as it is used."""

    def __init__(self, array):
        self.array = array

    def __getitem__(self, index):
        return Tensor(self.array[index])

    def float(self):
        return self

    cpu = float

    def numpy(self):
        return self.array.astype(np.float32)


class Prepared:
    def __init__(self, q, k, v, *, is_causal, kernel, out):
        self.o, self._arguments = out, (q, k, v, is_causal, kernel)

    def quantize(self):
        pass

    def attend(self):
        q, k, v, is_causal, kernel = self._arguments
        self.o[...] = reference.attention(q, k, v, is_causal=is_causal, plan=make_plan("sm_89", 64, kernel))[0]


@pytest.fixture
def gpu(bench, monkeypatch):
    """A GPU that computes with NumPy and takes a millisecond for everything."""
    event = types.SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    runtime = types.SimpleNamespace(getDevice=lambda: 0, getDeviceProperties=lambda device: {"name": b"Stand-in"})
    cuda = types.SimpleNamespace(
        Event=lambda: event, get_elapsed_time=lambda start, end: 1.0, runtime=runtime,
        Device=lambda: types.SimpleNamespace(synchronize=lambda: None))
    cupy = types.SimpleNamespace(
        cuda=cuda, full=np.full, asarray=np.asarray, asnumpy=np.asarray, isfinite=np.isfinite,
        RawKernel=lambda code, name: lambda *arguments: None)
    torch = types.SimpleNamespace(no_grad=contextlib.nullcontext, from_dlpack=Tensor)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(launch, "prepare", Prepared)
    monkeypatch.setattr(bench.jit, "arch_of", lambda: "sm_89")
    monkeypatch.setattr(bench.jit, "compile_cubin", lambda *arguments: None)
    monkeypatch.setattr(bench, "gpu_count", lambda: 1)
    monkeypatch.setattr(bench.Case, "shape", property(lambda case: (1, 2, case.seq_len, case.head_dim)))
    for name, value in (("REST", 0), ("TIMINGS", 1), ("HOST_CALLS", 1), ("WARM_UP", 1e-3), ("MEASURED", 1e-3)):
        monkeypatch.setattr(bench, name, value)

    def exact(qkv, is_causal):
        arrays = [x.array for x in qkv]
        return lambda: Tensor(bench.exact.attention(*arrays, is_causal=is_causal)[0])

    def broken(qkv, is_causal):
        raise RuntimeError("No execution plans support the graph.\nAt all.")

    monkeypatch.setattr(bench, "PEERS", {
        "16-bit": bench.Peer("torch", exact, True), "8-bit": bench.Peer("torch", exact, False),
        "broken": bench.Peer("torch", broken, False), "missing": bench.Peer("no_such_module", exact, True)})
    return cupy


ARGUMENTS = ["--seq-len", "64", "--head-dim", "64"]


def test_kernels_and_peers_are_measured_alike(bench, gpu, capsys, tmp_path):
    file = tmp_path / "result.json"
    assert bench.main([*ARGUMENTS, "--sustained", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "Stand-in" in printed and "mma (default)" in printed and "1.00x / 1.00x" in printed
    assert "left out: missing (ModuleNotFoundError" in printed
    assert "left out: broken, d=64 S=64 causal (RuntimeError: No execution plans support the graph.)" in printed
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == ["mma", "mma_fp16", "16-bit", "8-bit"] * 2
    assert [row["default"] for row in rows[:4]] == [True, False, False, False]
    assert rows[0]["kernel"].keys() == {"burst", "sustained"}
    tflops = bench.flop((1, 2, 64, 64), False) / 1e-3 / 1e12
    # the stand-in's clock shows a millisecond, however many launches were timed: 3 of them in a burst
    assert rows[0]["kernel"]["burst"] == rows[2]["kernel"]["burst"] == pytest.approx(3 * tflops, rel=1e-4)
    assert rows[2]["whole call"] and not rows[3]["whole call"] and rows[0]["host us"] > 0
    assert rows[2]["relative_l1"] < 1e-3 < rows[0]["relative_l1"] and rows[0]["wrong"] is None


def test_an_output_that_is_not_written_is_found(bench, gpu, capsys, monkeypatch):
    monkeypatch.setattr(Prepared, "attend", lambda self: None)
    assert bench.main([*ARGUMENTS, "--no-causal", "--kernels", "mma"]) == 1
    assert "WRONG: mma, d=64 S=64: an output that is not finite" in capsys.readouterr().out


def test_a_call_that_differs_from_its_parts_is_found(bench, gpu, capsys, monkeypatch):
    monkeypatch.setattr(bench.sagepp, "attention", lambda q, k, v, **options: q)
    assert bench.main([*ARGUMENTS, "--no-causal", "--kernels", "mma"]) == 1
    assert "different bits" in capsys.readouterr().out


def test_a_kernel_that_the_gpu_lacks_is_refused(bench, gpu):
    with pytest.raises(SystemExit, match="wgmma; Stand-in has mma, mma_fp16"):
        bench.main([*ARGUMENTS, "--kernels", "wgmma"])


def test_the_table_shows_ratios_of_kernels_only(bench):
    errors = {"cosine": 0.9993, "relative_l1": 0.037, "rmse": 0.002}
    case = {"head_dim": 128, "seq_len": 1024, "is_causal": True, "host us": 20.0, **errors}
    rows = [
        {**case, "name": "wgmma", "default": True, "peer": False, "kernel": {"burst": 1400.0}, "whole call": {"burst": 1200.0}},
        {**case, "name": "A", "default": False, "peer": True, "kernel": {"burst": 350.0}, "whole call": {"burst": 350.0}},
        {**case, "name": "B", "default": False, "peer": True, "kernel": {"burst": 1000.0}, "whole call": {}},
        {**case, "is_causal": False, "name": "wgmma", "default": True, "peer": False, "kernel": {"burst": 1.0},
         "whole call": {"burst": 1.0}}]
    lines = bench.printable(rows, "burst")
    assert [(line["A"], line["B"]) for line in lines] == [("4.00x / 3.43x", "1.40x"), ("", ""), ("", ""), ("", "")]
    assert lines[0][""] == "wgmma (default)" and lines[2]["whole call"] == "" and lines[0]["causal"] == "yes"
    assert "4.00x / 3.43x" in bench.table(lines)
