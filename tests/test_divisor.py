"""`Divisor` (kernels_src/divisor.cuh) divides by multiplying: what the host makes is right for every dividend."""

from hypothesis import example, given, strategies as st

from sagepp.schedule import divisor


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1), st.sampled_from([-1, 0, 1]))
@example(1, 2**31 - 1, 0)
@example(2**31 - 1, 2**31 - 2, 0)
@example(7, 2**31 - 2, 1)
def test_quotients(d, x, beside):
    x = min(max(0, x // d * d + beside), 2**31 - 1)  # where quotients change
    multiplier, shift = divisor(d) % 2**32, divisor(d) >> 32
    product = (x * multiplier >> 32) + x
    assert shift < 32 and product < 2**32, "the kernel has 32 bits"
    assert product >> shift == x // d
