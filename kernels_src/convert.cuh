// Conversions and packed instructions that the quantisation needs beside `ptx.cuh` (PTX ISA, "Data Movement and
// Conversion Instructions: cvt, cp.async", "Half Precision Floating Point Instructions: min, max").
// IN_BF16 selects the type of the input: two 16-bit numbers in a word, the first in the low half.
#pragma once

#include "ptx.cuh"

// ---- input -------------------------------------------------------------------------------------

// 16 bytes to shared memory, past L1; zeros unless they exist (nothing is read then).
__device__ __forceinline__ void copy_16_bytes(uint4* to, const void* from, bool exist) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(shared_address(to)), "l"(from), "r"(exist ? 16 : 0) : "memory");
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

// The smaller, or larger, one of each half; NaN where one of the two is NaN.
__device__ __forceinline__ unsigned min_pair(unsigned a, unsigned b) {
    unsigned c;
#if IN_BF16
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
#else
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
#endif
    return c;
}

__device__ __forceinline__ unsigned max_pair(unsigned a, unsigned b) {
    unsigned c;
#if IN_BF16
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
#else
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
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

// ---- E4M3 --------------------------------------------------------------------------------------

// The four numbers of a word of E4M3 codes (`cvt_e4m3x4`), exactly. sm_89 and later.
// The empty asm makes the word opaque. Otherwise the compiler takes the two halves from the conversions that made
// them; ptxas 12.9 joins those into one instruction, and the register of a half is then read, but never written.
__device__ __forceinline__ void from_e4m3(unsigned word, float (&x)[4]) {
    asm volatile("" : "+r"(word));
    asm("{\n.reg .b16 low, high, a, b, c, d;\n.reg .b32 first, second;\nmov.b32 {low, high}, %4;\n"
        "cvt.rn.f16x2.e4m3x2 first, low;\ncvt.rn.f16x2.e4m3x2 second, high;\n"
        "mov.b32 {a, b}, first;\nmov.b32 {c, d}, second;\n"
        "cvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\ncvt.f32.f16 %2, c;\ncvt.f32.f16 %3, d;\n}"
        : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]) : "r"(word));
}
