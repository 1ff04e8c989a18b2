// Conversions and packed instructions of the quantisation, one PTX instruction a wrapper (PTX ISA,
// "Data Movement and Conversion Instructions: cvt", "Floating Point Instructions: min, max").
// IN_BF16 selects the type of the input: two 16-bit numbers in a word, the first in the low half.
#pragma once

// ---- input -------------------------------------------------------------------------------------

__device__ __forceinline__ uint4 load_16_bytes(const void* p) {
    uint4 x;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}

// The two numbers of a word, exactly.
__device__ __forceinline__ float2 widen(unsigned pair) {
#if IN_BF16
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
#else
    float2 x;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(x.x), "=f"(x.y) : "r"(pair));
    return x;
#endif
}

__device__ __forceinline__ unsigned min_pair(unsigned a, unsigned b) {
    unsigned c;
#if IN_BF16
    asm("min.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
#else
    asm("min.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
#endif
    return c;
}

__device__ __forceinline__ unsigned max_pair(unsigned a, unsigned b) {
    unsigned c;
#if IN_BF16
    asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
#else
    asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
#endif
    return c;
}

// ---- FP32 --------------------------------------------------------------------------------------

// The larger one; NaN if one is NaN (fmaxf returns the other).
__device__ __forceinline__ float max_or_nan(float a, float b) {
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

// ---- E4M3, nearest even ------------------------------------------------------------------------

#if !V_F16  // E4M3 needs sm_89
// Two codes in 16 bits, the first in the low byte.
__device__ __forceinline__ unsigned short to_e4m3_pair(float low, float high) {
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ float2 from_e4m3_pair(unsigned short pair) {
    float2 x;
    asm("{\n.reg .b16 low, high;\n.reg .b32 halves;\ncvt.rn.f16x2.e4m3x2 halves, %2;\n"
        "mov.b32 {low, high}, halves;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(x.x), "=f"(x.y) : "h"(pair));
    return x;
}
#endif
