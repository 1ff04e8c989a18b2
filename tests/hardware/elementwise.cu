// One kernel a function: `out[i]` is what the GPU makes of the FP32 bit pattern `i * STRIDE`. STRIDE
// is odd, so 2**32 indices are all inputs, and fewer are spread over them. Functions of two or three
// operands take the others from a hash of the first.

#include "log2.cuh"

#define STRIDE 0x9E3779B1u

__device__ unsigned mix(unsigned x) {  // the finaliser of MurmurHash3
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
}

__device__ float as_float(unsigned x) { return __uint_as_float(x); }
__device__ unsigned as_bits(float x) { return __float_as_uint(x); }
__device__ float second(unsigned x) { return as_float(mix(x)); }
__device__ float third(unsigned x) { return as_float(mix(mix(x))); }
// Near the product of the first two, so that sums of two exponents' difference up to 63 are common.
__device__ float near_product(unsigned x) {
    const unsigned product = as_bits(__fmul_rn(as_float(x), second(x)));
    return as_float((product ^ (mix(x) & 0x807FFFFFu)) + ((mix(mix(x)) & 63u) << 23) - (32u << 23));
}

__device__ unsigned ex2_approx_ftz(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return as_bits(y);
}

__device__ unsigned cvt_e4m3x2(float x) {  // both operands are x: the two bytes must agree
    unsigned short y = 0;
#if __CUDA_ARCH__ >= 890
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %1;" : "=h"(y) : "f"(x));
#endif
    return y;
}

__device__ unsigned cvt_f16(float x) {
    unsigned short y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

__device__ unsigned cvt_bf16(float x) {
    unsigned short y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

__device__ unsigned cvt_u8x4(unsigned x) {
    unsigned y;
    asm("{\n.reg .b32 high;\ncvt.pack.sat.u8.s32.b32 high, %1, %1, 0;\n"
        "cvt.pack.sat.u8.s32.b32 %0, %1, %1, high;\n}" : "=r"(y) : "r"(x));
    return y;
}

__device__ unsigned cvt_u16x2(unsigned x) {
    unsigned y;
    asm("cvt.pack.sat.u16.s32 %0, %1, %1;" : "=r"(y) : "r"(x));
    return y;
}

__device__ unsigned chord(unsigned x) {  // E4M3 codes of both halves, as kernels_src/softmax.cuh makes them
    unsigned steps = x & 0x7FFF7FFFu, p;
    unsigned short y = 0;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(p) : "r"(steps + 0x02000200u), "r"(0x39A839A8u), "r"(steps));
#if __CUDA_ARCH__ >= 890
    asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(y) : "r"(p));
#endif
    return y;
}

#define ELEMENTWISE(name, result)                                                                  \
    extern "C" __global__ void check_##name(unsigned first, unsigned count, unsigned* out) {       \
        const unsigned step = gridDim.x * blockDim.x;                                              \
        for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {           \
            const unsigned bits = (first + i) * STRIDE;                                            \
            const float x = as_float(bits);                                                        \
            out[i] = result;                                                                       \
        }                                                                                          \
    }

ELEMENTWISE(ex2, ex2_approx_ftz(x))
ELEMENTWISE(cvt, cvt_e4m3x2(x))
ELEMENTWISE(fp16, cvt_f16(x))
ELEMENTWISE(bf16, cvt_bf16(x))
ELEMENTWISE(int_rn, __float2int_rn(x))
ELEMENTWISE(log2, as_bits(log2_rn(as_float(0x00800000u + bits % 0x7F000000u))))
ELEMENTWISE(fma, as_bits(__fmaf_rn(x, second(bits), third(bits))))
ELEMENTWISE(fma_near, as_bits(__fmaf_rn(x, second(bits), near_product(bits))))
ELEMENTWISE(sqrt, as_bits(__fsqrt_rn(x)))
ELEMENTWISE(u8, cvt_u8x4(bits))
ELEMENTWISE(u16, cvt_u16x2(bits))
ELEMENTWISE(chord, chord(bits))
ELEMENTWISE(mul_ru, as_bits(__fmul_ru(x, second(bits))))
ELEMENTWISE(add_rd, as_bits(__fadd_rd(x, second(bits))))
ELEMENTWISE(div, as_bits(__fdiv_rn(x, second(bits))))
