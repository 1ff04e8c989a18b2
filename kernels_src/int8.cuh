// Section 2 of docs/numerics.md for the part of a row of Q or K that a thread has in registers: rotation, largest
// magnitude, INT8 codes.
#pragma once

#include "rows.cuh"

constexpr int ROTATION = 16;  // channels that are rotated together, a block: its codes are 16 bytes

// What a thread has of a row: [block][channel of the block].
template <int BLOCKS> using RowValues = float[BLOCKS][ROTATION];

// 1.5 * 2^23. Adding it to |x| < 2^22 rounds x to an integer, to nearest even; the bits of the sum are
// ROUNDING_BITS plus that integer.
constexpr float ROUNDING = 12582912.0f;
[[maybe_unused]] constexpr unsigned ROUNDING_BITS = 0x4B400000;

// Walsh-Hadamard butterflies of step 1, 2, 4, 8 in each block.
template <int BLOCKS> __device__ __forceinline__ void rotate(RowValues<BLOCKS>& x) {
#pragma unroll
    for (int h = 1; h < ROTATION; h *= 2) {
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
            for (int d = 0; d < ROTATION; ++d) {
                if (d & h) continue;
                const float low = x[b][d], high = x[b][d + h];
                x[b][d] = __fadd_rn(low, high);
                x[b][d + h] = __fsub_rn(low, high);
            }
        }
    }
}

// Largest magnitude, NaN if a value is NaN.
template <int BLOCKS> __device__ __forceinline__ float largest(const RowValues<BLOCKS>& x) {
    float amax[4] = {};  // chains that do not wait for each other
#pragma unroll
    for (int d = 0; d < ROTATION; ++d) {
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) amax[d % 4] = max_or_nan(amax[d % 4], fabsf(x[b][d]));
    }
    return max_or_nan(max_or_nan(amax[0], amax[1]), max_or_nan(amax[2], amax[3]));
}

// Over each aligned group of `lanes` threads of the warp.
__device__ __forceinline__ float largest_of_lanes(float amax, int lanes) {
#pragma unroll
    for (int other = 1; other < lanes; other *= 2)
        amax = max_or_nan(amax, __shfl_xor_sync(~0u, amax, other));
    return amax;
}

// inverse = div(127, amax). Returns whether `int8_codes` may use it: it is wrong for 0, infinity and NaN.
__device__ __forceinline__ bool usual_inverse(float amax, float& inverse) {
    inverse = __fdiv_rn(127.0f, amax);
    return inverse > 0.0f && is_finite(inverse);
}

// Where the inverse is not usual: it overflowed, and every value but 0 saturates; or amax is not finite, and the
// codes are 0. Leaves the codes themselves in x, for an inverse of 1.
template <int BLOCKS> __device__ __forceinline__ void unusual_values(RowValues<BLOCKS>& x, float amax) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
        for (int d = 0; d < ROTATION; ++d)
            x[b][d] = is_finite(amax) && x[b][d] != 0.0f ? copysignf(127.0f, x[b][d]) : 0.0f;
    }
}

// x * inverse, rounded once to an integer, a byte each.
__device__ __forceinline__ uint4 int8_codes(const float (&x)[16], float inverse) {
    unsigned code[16], pair[8];
#pragma unroll
    for (int i = 0; i < 16; ++i) code[i] = __float_as_uint(__fmaf_rn(x[i], inverse, ROUNDING));
#pragma unroll
    for (int i = 0; i < 8; ++i) pair[i] = __byte_perm(code[2 * i], code[2 * i + 1], 0x0040);
    return make_uint4(__byte_perm(pair[0], pair[1], 0x5410), __byte_perm(pair[2], pair[3], 0x5410),
                      __byte_perm(pair[4], pair[5], 0x5410), __byte_perm(pair[6], pair[7], 0x5410));
}
