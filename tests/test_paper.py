"""The paper's claim about FP16 accumulators, on the model of Ada's tensor core."""

import pytest

from sagepp import accuracy, paper


@pytest.mark.parametrize("distribution", accuracy.DISTRIBUTIONS)
def test_fp16_accumulators_are_as_accurate_as_fp32_ones(distribution):
    _, fp32, *fp16 = paper.compare(accuracy.make_inputs(distribution, 1, 1024, 64), rows=128)
    assert fp32["accumulator"] == "f32" and len(fp16) == 3
    same_ranges = fp16[0]
    assert abs(same_ranges["cosine"] - fp32["cosine"]) < 1e-4
    assert abs(same_ranges["relative_l1"] - fp32["relative_l1"]) < 1e-4
    for record in fp16:  # a wider range of V loses less of a heavy tail's small values
        assert record["accumulator"] == "f16"
        assert record["relative_l1"] < fp32["relative_l1"] + 1e-4
