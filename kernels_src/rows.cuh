// Rows of Q, K and V as `quantize.cu` reads them.
//
// 8 threads hold a row, or 64 channels of it, each of them blocks of 8 consecutive channels, 64 apart:
// then the last dimension is read in pieces of 128 bytes, and Walsh-Hadamard butterflies need 3 shuffles
// an element for any head dimension.
#pragma once

#include "convert.cuh"

typedef unsigned short Half;  // FP16 or BF16 bits

constexpr int THREADS = 128, WARPS = 4;
constexpr int ROW_THREADS = 8;           // threads that share a row
constexpr int WARP_ROWS = 32 / ROW_THREADS;
constexpr int BLOCKS = HEAD_DIM / 64;    // blocks of 8 channels that a thread has of a row

static_assert(HEAD_DIM == 64 || HEAD_DIM == 128 || HEAD_DIM == 256, "padded head dimension");

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < __int_as_float(0x7F800000); }

__device__ __forceinline__ int row_thread() { return threadIdx.x % ROW_THREADS; }
__device__ __forceinline__ int warp_row() { return threadIdx.x % 32 / ROW_THREADS; }

// First channel of a thread's block number `block`.
__device__ __forceinline__ int block_channel(int block) { return 64 * block + 8 * row_thread(); }

// The rows of one head.
struct Rows {
    const Half* data;
    long long stride;
    int head_dim;  // the actual one, at most HEAD_DIM

    __device__ Rows(const Half* tensor, int b, int h, long long stride_b, long long stride_h,
                    long long stride_s, int head_dim)
        : data(tensor + b * stride_b + h * stride_h), stride(stride_s), head_dim(head_dim) {}

    // 8 channels of a row, zeros beyond head_dim. ALIGNED: head_dim, strides and addresses are multiples
    // of 16 bytes.
    __device__ __forceinline__ uint4 load(int row, int channel) const {
        const Half* p = data + row * stride + channel;
#if ALIGNED
        return channel < head_dim ? load_16_bytes(p) : make_uint4(0, 0, 0, 0);
#else
        unsigned x[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = channel + i < head_dim ? p[i] : 0u;
        return make_uint4(x[0] | x[1] << 16, x[2] | x[3] << 16, x[4] | x[5] << 16, x[6] | x[7] << 16);
#endif
    }
};

// K and V: an element that is NaN or infinite counts as 0.
__device__ __forceinline__ uint4 finite(uint4 x) {
    constexpr unsigned EXPONENT = IN_BF16 ? 0x7F807F80u : 0x7C007C00u;
    constexpr unsigned CARRY = IN_BF16 ? 0x00800080u : 0x04000400u;
    unsigned* words = reinterpret_cast<unsigned*>(&x);
    unsigned special[4];  // bit 15 of a half: its exponent is all ones
#pragma unroll
    for (int i = 0; i < 4; ++i) special[i] = (words[i] & EXPONENT) + CARRY;
    if ((special[0] | special[1] | special[2] | special[3]) & 0x80008000u) {
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] &= ~((special[i] >> 15 & 0x00010001u) * 0xFFFFu);
    }
    return x;
}

__device__ __forceinline__ void widen(uint4 x, float (&y)[8]) {
    const unsigned words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 pair = widen(words[i]);
        y[2 * i] = pair.x, y[2 * i + 1] = pair.y;
    }
}

// 8 consecutive floats, 16-byte aligned.
__device__ __forceinline__ void load_floats(const float* p, float (&x)[8]) {
    float4 low = reinterpret_cast<const float4*>(p)[0], high = reinterpret_cast<const float4*>(p)[1];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}
