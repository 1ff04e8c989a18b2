"""The validators themselves, and a short run of them where there is a GPU."""

import numpy as np
import pytest

from sagepp import jit

from . import validate

ARCHS = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"]


@pytest.fixture
def processes():
    validate.pool()


@pytest.mark.gpu
@pytest.mark.parametrize("name", validate.ELEMENTWISE)
def test_elementwise_function_has_the_bits_of_the_model(processes, name):
    row = validate.validate_elementwise(name, inputs=1 << 24)
    assert row["mismatches"] == 0, row["first mismatch"]


@pytest.mark.gpu
def test_matrix_instructions_have_the_bits_of_the_model(processes):
    rows = [validate.validate_mma(key, dots=200_000) for key in validate.instructions(jit.arch_of())]
    assert rows and all(row["mismatches"] == 0 for row in rows), rows


# ---------------------------------------------------------------------------- without a GPU


@pytest.mark.parametrize("arch", ARCHS)
def test_sources_compile(arch):
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy is not installed")
    try:
        assert validate.compile_cubin("elementwise.cu", arch)
        for key in validate.instructions(arch):
            assert validate.compile_cubin("mma.cu", arch, validate.mma_defines(key)), key
    except (ImportError, OSError) as error:
        pytest.skip(f"NVRTC does not load: {error}")


def test_elementwise_inputs_are_a_permutation():
    assert validate.STRIDE % 2 == 1
    inputs = validate.elementwise_inputs(2**32 - 2, 4)
    np.testing.assert_array_equal(inputs, [(i * validate.STRIDE) % 2**32 for i in (-2, -1, 0, 1)])


@pytest.mark.parametrize("name", validate.ELEMENTWISE)
def test_elementwise_check_finds_a_wrong_bit(name):
    first, count = 12345, validate.CACHED + 17
    with np.errstate(all="ignore"):
        validate.SHARED[:count] = validate.ELEMENTWISE[name][1](validate.elementwise_inputs(first, count))
    assert validate.check_elementwise(name, first, 0, count) == (0, None)
    validate.SHARED[validate.CACHED + 3] ^= 1
    mismatches, text = validate.check_elementwise(name, first, 0, count)
    assert mismatches == 1 and "GPU" in text


@pytest.mark.parametrize("key", validate.instructions("sm_90a"), ids="-".join)
def test_mma_check_finds_a_wrong_bit(key):
    a, b, c, names = validate.generate(key, 32, len(validate.SCENARIOS), seed=0)
    d = validate.model_mma(key, a, b, c)
    assert validate.check_mma(key, a, b, c, d, names) == ({}, None)
    d[2, 5, 7] ^= 1
    assert validate.check_mma(key, a, b, c, d, names)[0] == {names[2]: 1}


def test_every_length_of_chain_is_run_and_checked(monkeypatch):
    key = ("sm_90", "wgmma", "e4m3", "f16")
    monkeypatch.setattr(validate, "run_mma", validate.model_mma)
    row = validate.validate_mma(key, dots=1)
    assert row["count"] == len(validate.CHAINS) * 2 * len(validate.SCENARIOS) * validate.M * validate.N
    assert row["mismatches"] == 0
    monkeypatch.setattr(validate, "run_mma", lambda *args: validate.model_mma(*args) ^ 1)
    assert validate.validate_mma(key, dots=1)["mismatches"] == row["count"]


def test_scenarios_reach_what_they_are_for():
    key = ("sm_90", "wgmma", "f16", "f16")
    a, b, c, names = validate.generate(key, 128, 2 * len(validate.SCENARIOS), seed=0)
    d = validate.model_mma(key, a, b, c).view(np.float16)
    result = {name: d[names.index(name)] for name in validate.SCENARIOS}
    assert np.isnan(result["special"]).any() and np.isinf(result["special"]).any()
    assert np.isfinite(result["special"]).any()
    assert np.isinf(result["overflowing"]).any()
    assert np.isfinite(result["attention"]).all()
    assert (a[names.index("sparse")] == 0x8000).any()
    signs = (a[..., None, :] ^ b[:, None]) & 0x8000
    zeros = names.index("signed zeros")
    assert (a[zeros] & 0x7FFF == 0).all() and (b[zeros] & 0x7FFF).all()
    assert ((signs[zeros] == 0).all(axis=-1) ^ (signs[zeros] == 0x8000).all(axis=-1)).all()
    assert (signs[zeros] == 0).any() and (signs[zeros] == 0x8000).any()
