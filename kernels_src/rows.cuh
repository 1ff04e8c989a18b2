// Rows of Q, K and V as `quantize.cu` reads them.
#pragma once

#include "convert.cuh"

typedef unsigned short Half;  // FP16 or BF16 bits

constexpr int THREADS = 128, WARPS = 4;  // of a CTA
constexpr int KEY_GROUPS = 4;            // scales of K a tile
constexpr int GROUP_KEYS = BLOCK_N / KEY_GROUPS;

static_assert(HEAD_DIM == 64 || HEAD_DIM == 128 || HEAD_DIM == 256, "padded head dimension");

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < __int_as_float(0x7F800000); }

// The rows of one head: (seq_len, head_dim).
struct Rows {
    const Half* data;
    long long stride;  // elements from a row to the next
    int head_dim;      // the actual one, at most HEAD_DIM

    __device__ Rows(const Half* tensor, int b, int h, long long stride_b, long long stride_h,
                    long long stride_s, int head_dim)
        : data(tensor + b * stride_b + h * stride_h), stride(stride_s), head_dim(head_dim) {}

    __device__ __forceinline__ const Half* at(int row, int channel) const { return data + row * stride + channel; }

    // 8 channels from p = at(row, channel) to shared memory; zeros beyond head_dim, and where the row does not
    // exist: nothing is read then. There after `cp_async_commit` and `cp_async_wait`.
    // ALIGNED: rows (head_dim), strides and addresses are multiples of 16 bytes.
    __device__ __forceinline__ void copy(uint4* to, const Half* p, int channel, bool exists) const {
#if ALIGNED
        copy_16_bytes(to, p, exists && channel < head_dim);
#else
        if (exists) {
            unsigned x[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i] = channel + i < head_dim ? p[i] : 0u;
            *to = make_uint4(x[0] | x[1] << 16, x[2] | x[3] << 16, x[4] | x[5] << 16, x[6] | x[7] << 16);
        } else {
            *to = make_uint4(0, 0, 0, 0);
        }
#endif
    }
};

// f(channel) for every channel, by the threads of a CTA.
template <class F> __device__ __forceinline__ void for_each_channel(F f) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM; i += THREADS) {
        if (HEAD_DIM % THREADS == 0 || i + threadIdx.x < HEAD_DIM) f(i + threadIdx.x);
    }
}

// K and V: an element that is NaN or infinite counts as 0.
__device__ __forceinline__ unsigned finite(unsigned pair) {
    constexpr unsigned EXPONENT = IN_BF16 ? 0x7F807F80u : 0x7C007C00u;
    constexpr unsigned CARRY = IN_BF16 ? 0x00800080u : 0x04000400u;
    const unsigned special = (pair & EXPONENT) + CARRY;  // bits 15 and 31: the exponent is all ones
    return pair & ~((special >> 15 & 0x00010001u) * 0xFFFFu);
}

__device__ __forceinline__ uint4 finite(uint4 x) {
    return make_uint4(finite(x.x), finite(x.y), finite(x.z), finite(x.w));
}

// 8 numbers, exactly.
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
