// Section 2 of docs/numerics.md for the part of a row of Q or K that a thread has in registers: factors, rotation, largest
// magnitude, INT8 codes. In FP16 (`int8_fp16.cuh`), but that BF16 inputs are multiplied by their factors in FP32.
#pragma once

#include "int8_fp16.cuh"
#include "rows.cuh"

// What a thread has of a row: [block][two channels of it].
template <int BLOCKS> using RowValues = Pair[BLOCKS][ROTATION / 2];

__device__ __forceinline__ void load_vector(const uint4* p, Pair* x) {
    const uint4 words = *p;
    x[0] = {words.x}, x[1] = {words.y}, x[2] = {words.z}, x[3] = {words.w};
}

// ---- 8 channels of an input, 16 bytes, times their factors and a power of two ---------------------
// A row of Q, or a key group of K, stays `unscaled` where its largest magnitude then `is_usual`. Otherwise it is computed
// again, `scaled` by `power_of` that magnitude; of BF16 inputs of the largest one before they were rounded to FP16, where
// 0 may be all that is left.

// Whether FP16 holds the numbers well.
__device__ __forceinline__ bool fits_fp16(float amax) { return amax >= 0x1p-9f && amax <= 65504.0f; }

#if IN_BF16
typedef float Factor, VectorFactors[8];

struct OfQ {
    VectorFactors factor;
    __device__ __forceinline__ float product(float x, int i) const { return __fmul_rn(x, factor[i]); }
};

struct OfK {
    VectorFactors factor, addend;
    __device__ __forceinline__ float product(float x, int i) const { return __fmaf_rn(x, factor[i], addend[i]); }
};

__device__ __forceinline__ bool is_usual(float amax) { return fits_fp16(amax); }

// Half the reciprocal of the power of two that `largest` is at least, as far as that is a normal number: what is scaled
// is below 1 then, or below 4 where `largest` is 2^126 or more.
__device__ __forceinline__ float power_of(float largest) {
    return __int_as_float((253 - min(__float_as_int(largest) >> 23, 252)) << 23);
}

template <class Of> __device__ __forceinline__ void scaled(uint4 words, const Of& of, float power, Pair* x) {
    float y[8];
    widen(words, y);
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = __fmul_rn(of.product(y[i], i), power);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = {cvt_f16x2(y[2 * i], y[2 * i + 1])};
}

template <class Of> __device__ __forceinline__ void unscaled(uint4 words, const Of& of, Pair* x) {
    scaled(words, of, 1.0f, x);
}

// The largest magnitude before rounding to FP16, NaN if a value is NaN.
template <class Of> __device__ __forceinline__ float largest_product(uint4 words, const Of& of) {
    float y[8], largest = 0.0f;
    widen(words, y);
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = max_or_nan(largest, fabsf(of.product(y[i], i)));
    return largest;
}
#else
typedef unsigned short Factor;
typedef Pair VectorFactors[4];

struct OfQ {
    VectorFactors factor;
    __device__ __forceinline__ Pair product(Pair x, int i) const { return mul_rn(x, factor[i]); }
    __device__ __forceinline__ Pair product(Pair x, int i, Pair power) const { return product(mul_rn(x, power), i); }
};

struct OfK {
    VectorFactors factor, addend;
    __device__ __forceinline__ Pair product(Pair x, int i) const { return fma_rn(x, factor[i], addend[i]); }
    __device__ __forceinline__ Pair product(Pair x, int i, Pair power) const {
        const float p = low_half(power.bits), down = fminf(p, 1.0f), up = fmaxf(p, 1.0f);
        const Pair downs = {cvt_f16x2(down, down)}, ups = {cvt_f16x2(up, up)};
        return mul_rn(fma_rn(mul_rn(x, downs), factor[i], mul_rn(addend[i], downs)), ups);
    }
};

__device__ __forceinline__ bool is_usual(float amax) { return amax == 0.0f || fits_fp16(amax); }
__device__ __forceinline__ float power_of(float amax) { return amax < 1.0f ? 0x1p12f : 0x1p-13f; }

template <class Of> __device__ __forceinline__ void scaled(uint4 words, const Of& of, float power, Pair* x) {
    load_vector(&words, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = of.product(x[i], i, {cvt_f16x2(power, power)});
}

template <class Of> __device__ __forceinline__ void unscaled(uint4 words, const Of& of, Pair* x) {
    load_vector(&words, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = of.product(x[i], i);
}
#endif

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
        static_assert(HEAD_DIM <= AT_ONCE * THREADS, "a thread copies once");
        const int i = AT_ONCE * threadIdx.x;
        if (i < HEAD_DIM) cp_async_16(shared_address(of_channel + i), from + i);
    }
    // Those of channels 8 * vector ... 8 * vector + 7.
    template <class Numbers> __device__ __forceinline__ void load(int vector, Numbers& x) const {
        load_factors(of_channel + 8 * vector, x);
    }
};

// fma(x, mean, dot) of 8 channels of an input, in order.
__device__ __forceinline__ void add_products(uint4 words, const float (&mean)[8], float& dot) {
    float x[8];
    widen(words, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) dot = __fmaf_rn(x[i], mean[i], dot);
}

// ---- a thread's blocks -------------------------------------------------------------------------

template <int BLOCKS> __device__ __forceinline__ void rotate(RowValues<BLOCKS>& x) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) rotate(x[b]);
}

template <int BLOCKS> __device__ __forceinline__ void set_zero(RowValues<BLOCKS>& x) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
        for (int i = 0; i < ROTATION / 2; ++i) x[b][i] = Pair{};
    }
}

// Largest magnitude, NaN if a value is NaN.
template <int BLOCKS> __device__ __forceinline__ float largest(const RowValues<BLOCKS>& x) {
    Pair amax[4] = {x[0][0], x[0][1], x[0][2], x[0][3]};  // chains that do not wait for each other
#pragma unroll
    for (int i = 4; i < BLOCKS * ROTATION / 2; ++i)
        amax[i % 4] = larger(amax[i % 4], x[i / (ROTATION / 2)][i % (ROTATION / 2)]);
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
