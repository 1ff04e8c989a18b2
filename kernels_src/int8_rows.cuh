// Rows of Q and K in shared memory, as the threads of a warp share them: ROW_THREADS a row, WARP_ROWS rows at a time.
// Block b of a thread's share, of BLOCKS, is number `block_of_row(b)` of the row.
#pragma once

#include "int8.cuh"

constexpr int PANEL = HEAD_DIM < 128 ? HEAD_DIM : 128;  // bytes of a row of codes of Q or K that lie together
constexpr int ROW_THREADS = HEAD_DIM < 128 ? 2 : 4;
constexpr int WARP_ROWS = 32 / ROW_THREADS;
constexpr int BLOCKS = HEAD_DIM / (ROTATION * ROW_THREADS);

__device__ __forceinline__ int row_thread() { return threadIdx.x % ROW_THREADS; }
__device__ __forceinline__ int warp_row() { return threadIdx.x % 32 / ROW_THREADS; }

__device__ __forceinline__ int block_of_row(int b) { return row_thread() + ROW_THREADS * b; }

constexpr int VECTORS = HEAD_DIM / 8;         // of a row of input, 16 bytes each
constexpr int CODE_CHUNKS = HEAD_DIM / 16;  // of a row of codes, 16 bytes each

// What the numbers of vectors, and of chunks, are xor-ed with in a warp's rows in shared memory: eight threads beside
// each other, which have block b of neighbouring rows, then use different banks.
__device__ __forceinline__ int vector_swizzle(int r) { return HEAD_DIM < 128 ? (r & 1) | (r & 2) << 1 : r & 1; }
__device__ __forceinline__ int chunk_swizzle(int r) { return HEAD_DIM < 128 ? r & 2 : (r & 1) << 2; }

// Place of vector `half` (of 2) of a thread's block b in its row: their number, swizzled. What is known of b when
// compiled stays apart, so that it becomes an offset of the load.
__device__ __forceinline__ int vector_place(int b, int half) {
    constexpr int STEP = 2 * ROW_THREADS;
    const int swizzle = vector_swizzle(warp_row());
    return (STEP * b ^ (swizzle & -STEP)) + ((2 * row_thread() + half) ^ (swizzle & (STEP - 1)));
}

// A thread's share of a row, 8 channels at a time: f(the words of the input, numbers to make of them, number of their
// vector, their block).
template <class F> __device__ __forceinline__ void load_row(RowValues<BLOCKS>& x, const uint4 (&row)[VECTORS], F f) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) f(row[vector_place(b, half)], x[b] + 4 * half, 2 * block_of_row(b) + half, b);
    }
}

// FP16 numbers as they are.
__device__ __forceinline__ void load_row(RowValues<BLOCKS>& x, const uint4 (&row)[VECTORS]) {
    load_row(x, row, [](const uint4& words, Pair* y, int, int) { load_vector(&words, y); });
}

// f(8 channels of a thread's share of a row, number of their vector). Rarely, and so not unrolled.
template <class F> __device__ __forceinline__ void for_each_vector(uint4 (&row)[VECTORS], F f) {
#pragma unroll 1
    for (int i = 0; i < 2 * BLOCKS; ++i) f(row[vector_place(i / 2, i % 2)], 2 * block_of_row(i / 2) + i % 2);
}

__device__ __forceinline__ uint4 words_of(const Pair (&x)[4]) {
    return make_uint4(x[0].bits, x[1].bits, x[2].bits, x[3].bits);
}

// What the numbers of the 16-byte chunks of a panel are xor-ed with in a row of codes.
__device__ __forceinline__ int swizzle(int row) { return PANEL == 128 ? row & 7 : row >> 1 & 3; }

// Sum of the blocks' sums of a row, in all of its threads.
__device__ __forceinline__ float add_dots(float (&dot)[BLOCKS]) {
#pragma unroll
    for (int half = BLOCKS / 2; half > 0; half /= 2) {
#pragma unroll
        for (int b = 0; b < half; ++b) dot[b] = __fadd_rn(dot[b], dot[b + half]);
    }
#pragma unroll
    for (int half = ROW_THREADS / 2; half > 0; half /= 2) dot[0] = __fadd_rn(dot[0], __shfl_xor_sync(~0u, dot[0], half));
    return dot[0];
}

// A row of Q for every ROW_THREADS threads, times its factors, rotated, and scaled where FP16 needs that: then `unscale` is
// not 1, by which its scale is multiplied. Returns the largest magnitude, an FP16 number. of(number of a vector): `OfQ`;
// f(words of the input, number of their vector, their block) sees the input once. The warp's other rows may be changed.
template <class Of, class F>
__device__ __forceinline__ float rotated_q(RowValues<BLOCKS>& x, uint4 (&row)[VECTORS], float& unscale, Of of, F f) {
    float amax;
    unscale = 1.0f;
#pragma unroll 1
    for (bool is_scaled = false;; is_scaled = true) {
        if (is_scaled) {
            load_row(x, row);
        } else {
            load_row(x, row, [&](const uint4& words, Pair* y, int vector, int b) {
                f(words, vector, b);
                unscaled(words, of(vector), y);
            });
        }
        rotate(x);
        amax = largest_of_lanes(largest(x), ROW_THREADS);
        if (__all_sync(~0u, is_usual(amax))) break;
        if (is_scaled) {
            if (!is_finite(amax)) {  // an element is not, or overflowed
                set_zero(x);
                amax = 0.0f, unscale = __int_as_float(0x7FFFFFFF);
            }
            break;
        }
        float power = 1.0f, of_row = amax;
#if IN_BF16
        of_row = 0.0f;
        for_each_vector(row, [&](const uint4& words, int vector) {
            of_row = max_or_nan(of_row, largest_product(words, of(vector)));
        });
        of_row = largest_of_lanes(of_row, ROW_THREADS);
#endif
        if (!is_usual(amax)) power = power_of(of_row);
        unscale = 1.0f / power;
        for_each_vector(row, [&](uint4& words, int vector) {
            Pair y[4];
            scaled(words, of(vector), power, y);
            words = words_of(y);
        });
    }
    return amax;
}
