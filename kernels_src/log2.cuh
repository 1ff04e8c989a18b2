// Base-2 logarithm from integer and FMA steps alone, so that the NumPy reference
// (`sagepp.reference.formats.log2`) returns the same bits. Same steps, names and coefficients there.
#pragma once

// x: positive, normal, finite. Error below 1.7 ulp; powers of two are exact.
__device__ __forceinline__ float log2_rn(float x) {
    const int SQRT_HALF_BITS = 0x3F3504F3;
    const int bits = __float_as_int(x);
    const int exponent = (bits - SQRT_HALF_BITS) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
    const float f = __fadd_rn(__int_as_float(bits - (exponent << 23)), -1.0f);
    float p = -0x1.479160p-4f;
    p = __fmaf_rn(p, f, 0x1.4ee6a6p-3f);
    p = __fmaf_rn(p, f, -0x1.8bd97cp-3f);
    p = __fmaf_rn(p, f, 0x1.abb9a4p-3f);
    p = __fmaf_rn(p, f, -0x1.eb171ep-3f);
    p = __fmaf_rn(p, f, 0x1.273996p-2f);
    p = __fmaf_rn(p, f, -0x1.7156c8p-2f);
    p = __fmaf_rn(p, f, 0x1.ec7208p-2f);
    p = __fmaf_rn(p, f, -0x1.715476p-1f);
    p = __fmaf_rn(p, f, 0x1.715476p+0f);
    return __fmaf_rn(f, p, __int2float_rn(exponent));
}
