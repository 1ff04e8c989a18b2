// Section 2 of docs/numerics.md in packed FP16 arithmetic, two channels an instruction: a block of 16 channels in
// eight registers. Needs nothing but `ptx.cuh` (PTX ISA, "Half Precision Floating Point Instructions").
#pragma once

#include "ptx.cuh"

constexpr int ROTATION = 16;  // channels that are rotated together, a block: its codes are 16 bytes

// Two FP16 numbers, the first in the low half.
struct Pair {
    unsigned bits;
};

__device__ __forceinline__ Pair add_rn(Pair a, Pair b) {
    Pair c;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(c.bits) : "r"(a.bits), "r"(b.bits));
    return c;
}

__device__ __forceinline__ Pair sub_rn(Pair a, Pair b) {
    Pair c;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(c.bits) : "r"(a.bits), "r"(b.bits));
    return c;
}

__device__ __forceinline__ Pair mul_rn(Pair a, Pair b) {
    Pair c;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(c.bits) : "r"(a.bits), "r"(b.bits));
    return c;
}

__device__ __forceinline__ Pair fma_rn(Pair a, Pair b, Pair c) { return {fma_f16x2(a.bits, b.bits, c.bits)}; }

// (first + second, first - second), in one instruction.
__device__ __forceinline__ Pair sum_and_difference(Pair x) {
    Pair y;
    asm("{\n.reg .b16 first, second;\n.reg .b32 a, b;\nmov.b32 {first, second}, %1;\n"
        "mov.b32 a, {first, first};\nmov.b32 b, {second, second};\nfma.rn.f16x2 %0, b, %2, a;\n}"
        : "=r"(y.bits) : "r"(x.bits), "r"(0xBC003C00u));  // 1, -1
    return y;
}

// The larger magnitudes, NaN if one is NaN. `largest_of_pair`: of the two, for a pair of such.
__device__ __forceinline__ Pair larger(Pair a, Pair b) {
    Pair c;
    asm("{\n.reg .b32 x, y;\nabs.f16x2 x, %1;\nabs.f16x2 y, %2;\nmax.NaN.f16x2 %0, x, y;\n}"
        : "=r"(c.bits) : "r"(a.bits), "r"(b.bits));
    return c;
}

__device__ __forceinline__ float largest_of_pair(Pair x) {
    float y;
    asm("{\n.reg .b16 first, second;\nmov.b32 {first, second}, %1;\nmax.NaN.f16 first, first, second;\n"
        "cvt.f32.f16 %0, first;\n}" : "=f"(y) : "r"(x.bits));
    return y;
}

// Walsh-Hadamard butterflies of step 1, 2, 4, 8 of the block.
__device__ __forceinline__ void rotate(Pair (&x)[ROTATION / 2]) {
#pragma unroll
    for (int i = 0; i < ROTATION / 2; ++i) x[i] = sum_and_difference(x[i]);
#pragma unroll
    for (int h = 1; h < ROTATION / 2; h *= 2) {
#pragma unroll
        for (int i = 0; i < ROTATION / 2; ++i) {
            if (i & h) continue;
            const Pair low = x[i], high = x[i + h];
            x[i] = add_rn(low, high);
            x[i + h] = sub_rn(low, high);
        }
    }
}

// ---- amax, inverse and scale ---------------------------------------------------------------------
// amax is an FP16 number, as FP32.

// fp16(min(div(127, amax), 65504)), twice. The quotient is nowhere so near to the middle of two FP16 numbers that
// half an ulp and a little of FP32 would matter (tests/test_int8.py). The minimum of NaN, where amax is 0, is 65504.
__device__ __forceinline__ Pair int8_inverse(float amax) {
    const float r = rcp(amax), quotient = __fmul_rn(127.0f, r);
    const float inverse = fminf(__fmaf_rn(__fmaf_rn(-amax, quotient, 127.0f), r, quotient), 65504.0f);
    return {cvt_f16x2(inverse, inverse)};
}

// div(1, inverse). A Newton step from an approximation: its residual is exact, as `inverse` has 11 bits, and
// what it misses is less than the distance of 1 / inverse from the middle of two FP32 numbers.
__device__ __forceinline__ float int8_scale(float amax, Pair inverse) {
    const float x = low_half(inverse.bits), r = rcp(x);
    return amax > 0.0f ? __fmaf_rn(__fmaf_rn(-x, r, 1.0f), r, r) : 0.0f;
}

// x * inverse, rounded once to an integer, a byte each: the low one of 1536 + x * inverse, as FP16 numbers from 1024
// to 2048 are integers. |x * inverse| is at most 127 (1 + 2^-11), which rounds to 127.
__device__ __forceinline__ uint4 int8_codes(const Pair (&x)[ROTATION / 2], Pair inverse) {
    unsigned code[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) code[i] = fma_rn(x[i], inverse, Pair{0x66006600u}).bits;
    return make_uint4(__byte_perm(code[0], code[1], 0x6420), __byte_perm(code[2], code[3], 0x6420),
                      __byte_perm(code[4], code[5], 0x6420), __byte_perm(code[6], code[7], 0x6420));
}
