// Section 2 of docs/numerics.md for the part of a row of Q or K that a thread has in registers: rotation, largest
// magnitude, INT8 codes. Of FP16 inputs in FP16 (`int8_fp16.cuh`), of BF16 ones in FP32.
#pragma once

#include "int8_fp16.cuh"
#include "rows.cuh"

// What is computed with, and how a factor of a channel is stored.
#if IN_BF16
typedef float Number, Factor;
constexpr int NUMBER_CHANNELS = 1;  // channels in a Number
#else
typedef Pair Number;
typedef unsigned short Factor;
constexpr int NUMBER_CHANNELS = 2;
#endif
constexpr int VECTOR_NUMBERS = 8 / NUMBER_CHANNELS;  // of 8 channels, 16 bytes of input
constexpr int BLOCK_NUMBERS = ROTATION / NUMBER_CHANNELS;

// What a thread has of a row: [block][channels of the block].
template <int BLOCKS> using RowValues = Number[BLOCKS][BLOCK_NUMBERS];

// 1.5 * 2^23. Adding it to |x| < 2^22 rounds x to an integer, to nearest even; the bits of the sum are
// ROUNDING_BITS plus that integer.
constexpr float ROUNDING = 12582912.0f;
[[maybe_unused]] constexpr unsigned ROUNDING_BITS = 0x4B400000;

// ---- BF16 inputs: the functions of int8_fp16.cuh in FP32 -----------------------------------------

__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float larger(float a, float b) { return max_or_nan(fabsf(a), fabsf(b)); }
__device__ __forceinline__ float largest_of_pair(float x) { return x; }

__device__ __forceinline__ void rotate(float (&x)[ROTATION]) { butterflies(x); }

__device__ __forceinline__ uint4 int8_codes(const float (&x)[ROTATION], float inverse) {
    unsigned code[16], pair[8];
#pragma unroll
    for (int i = 0; i < 16; ++i) code[i] = __float_as_uint(__fmaf_rn(x[i], inverse, ROUNDING));
#pragma unroll
    for (int i = 0; i < 8; ++i) pair[i] = __byte_perm(code[2 * i], code[2 * i + 1], 0x0040);
    return make_uint4(__byte_perm(pair[0], pair[1], 0x5410), __byte_perm(pair[2], pair[3], 0x5410),
                      __byte_perm(pair[4], pair[5], 0x5410), __byte_perm(pair[6], pair[7], 0x5410));
}

// ---- a thread's blocks -------------------------------------------------------------------------

// 8 channels of an input, 16-byte aligned.
__device__ __forceinline__ void load_vector(const uint4* p, Pair* x) {
    const uint4 words = *p;
    x[0] = {words.x}, x[1] = {words.y}, x[2] = {words.z}, x[3] = {words.w};
}

__device__ __forceinline__ void load_vector(const uint4* p, float* x) {
    float y[8];
    widen(*p, y);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = y[i];
}

// 8 factors, 16-byte aligned.
__device__ __forceinline__ void load_factors(const unsigned short* p, Pair (&x)[4]) {
    load_vector(reinterpret_cast<const uint4*>(p), x);
}

__device__ __forceinline__ void load_factors(const float* p, float (&x)[8]) { load_floats(p, x); }

// A number a channel, in shared memory.
template <class T> struct Factors {
    static constexpr int AT_ONCE = 16 / sizeof(T);
    __align__(16) T of_channel[HEAD_DIM];

    // By all threads of the CTA; there after `cp_async_commit`, `cp_async_wait` and a barrier.
    __device__ __forceinline__ void copy(const T* from) {
        for (int i = AT_ONCE * threadIdx.x; i < HEAD_DIM; i += AT_ONCE * THREADS)
            cp_async_16(shared_address(of_channel + i), from + i);
    }
    // Those of channels 8 * vector ... 8 * vector + 7.
    template <class Numbers> __device__ __forceinline__ void load(int vector, Numbers& x) const {
        load_factors(of_channel + 8 * vector, x);
    }
};

// fma(x, mean, dot) of 8 channels, in order.
__device__ __forceinline__ void add_products(const float* x, const float (&mean)[8], float& dot) {
#pragma unroll
    for (int i = 0; i < 8; ++i) dot = __fmaf_rn(x[i], mean[i], dot);
}

__device__ __forceinline__ void add_products(const Pair* x, const float (&mean)[8], float& dot) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
        dot = __fmaf_rn(i % 2 ? high_half(x[i / 2].bits) : low_half(x[i / 2].bits), mean[i], dot);
}

template <int BLOCKS> __device__ __forceinline__ void rotate(RowValues<BLOCKS>& x) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) rotate(x[b]);
}

template <int BLOCKS> __device__ __forceinline__ void set_zero(RowValues<BLOCKS>& x) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
        for (int i = 0; i < BLOCK_NUMBERS; ++i) x[b][i] = Number{};
    }
}

// Largest magnitude, NaN if a value is NaN.
template <int BLOCKS> __device__ __forceinline__ float largest(const RowValues<BLOCKS>& x) {
    Number amax[4] = {x[0][0], x[0][1], x[0][2], x[0][3]};  // chains that do not wait for each other
#pragma unroll
    for (int i = 4; i < BLOCKS * BLOCK_NUMBERS; ++i)
        amax[i % 4] = larger(amax[i % 4], x[i / BLOCK_NUMBERS][i % BLOCK_NUMBERS]);
    return largest_of_pair(larger(larger(amax[0], amax[1]), larger(amax[2], amax[3])));
}

// Over each aligned group of `lanes` threads of the warp.
__device__ __forceinline__ float largest_of_lanes(float amax, int lanes) {
#pragma unroll
    for (int other = 1; other < lanes; other *= 2)
        amax = max_or_nan(amax, __shfl_xor_sync(~0u, amax, other));
    return amax;
}

// Over the warp. As integers, numbers of one sign are in order, and NaN is above all.
__device__ __forceinline__ float largest_of_warp(float amax) {
    return __uint_as_float(warp_max(__float_as_uint(amax)));
}

// What `int8_codes` multiplies by.
template <int BLOCKS> __device__ __forceinline__ Pair inverse_of(Pair (&)[BLOCKS][ROTATION / 2], float amax) {
    return int8_inverse(amax);
}

// Where div(127, amax) is not usual it overflowed, and every value but 0 saturates; or amax is not finite, and the
// codes are 0. The codes themselves are then left in x, for an inverse of 1.
template <int BLOCKS> __device__ __forceinline__ float inverse_of(float (&x)[BLOCKS][ROTATION], float amax) {
    const float inverse = __fdiv_rn(127.0f, amax);
    if (inverse > 0.0f && is_finite(inverse)) return inverse;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
        for (int d = 0; d < ROTATION; ++d)
            x[b][d] = is_finite(amax) && x[b][d] != 0.0f ? copysignf(127.0f, x[b][d]) : 0.0f;
    }
    return 1.0f;
}

__device__ __forceinline__ float int8_scale(float amax, float) { return __fdiv_rn(amax, 127.0f); }
