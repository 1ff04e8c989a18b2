// Section 1 of docs/numerics.md: sums, extremes, and what follows from them for each channel.
#pragma once

#include "rows.cuh"

constexpr int SUM_CHUNKS = 16, SUM_LANES = 16;

// Of 8 channels. Extremes stay in the input's type, two in a word.
struct Statistics {
    float sum[8];
    unsigned minimum[4], maximum[4];

    __device__ Statistics() {
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            minimum[i] = IN_BF16 ? 0x7F807F80u : 0x7C007C00u;  // +inf
            maximum[i] = IN_BF16 ? 0xFF80FF80u : 0xFC00FC00u;
        }
    }

    __device__ __forceinline__ void add_key(uint4 x) {
        x = finite(x);
        const unsigned words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2 pair = widen(words[i]);
            sum[2 * i] = __fadd_rn(sum[2 * i], pair.x);
            sum[2 * i + 1] = __fadd_rn(sum[2 * i + 1], pair.y);
            minimum[i] = min_pair(minimum[i], words[i]);
            maximum[i] = max_pair(maximum[i], words[i]);
        }
    }

    // Adds those of the thread `lanes` threads up in the warp.
    __device__ __forceinline__ void add_lane(int lanes) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] = __fadd_rn(sum[i], __shfl_down_sync(~0u, sum[i], lanes));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            minimum[i] = min_pair(minimum[i], __shfl_down_sync(~0u, minimum[i], lanes));
            maximum[i] = max_pair(maximum[i], __shfl_down_sync(~0u, maximum[i], lanes));
        }
    }
};

// 16 words a thread, for half of the CTA's threads, without bank conflicts.
typedef unsigned StatisticsBuffer[16][THREADS / 2];

// Threads [count, 2 * count) hand their statistics to threads [0, count), which add them.
__device__ __forceinline__ void add_upper_threads(Statistics& s, StatisticsBuffer& buffer, int count) {
    int thread = threadIdx.x;
    __syncthreads();
    if (thread >= count && thread < 2 * count) {
#pragma unroll
        for (int i = 0; i < 8; ++i) buffer[i][thread - count] = __float_as_uint(s.sum[i]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            buffer[8 + i][thread - count] = s.minimum[i];
            buffer[12 + i][thread - count] = s.maximum[i];
        }
    }
    __syncthreads();
    if (thread < count) {
#pragma unroll
        for (int i = 0; i < 8; ++i) s.sum[i] = __fadd_rn(s.sum[i], __uint_as_float(buffer[i][thread]));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            s.minimum[i] = min_pair(s.minimum[i], buffer[8 + i][thread]);
            s.maximum[i] = max_pair(s.maximum[i], buffer[12 + i][thread]);
        }
    }
}

// Keys `key, key + SUM_LANES, ...` below `end`, in this order.
__device__ __forceinline__ void add_keys(Statistics& s, const Rows& rows, int channel, int key, int end) {
    constexpr int UNROLL = 4;
    for (; key + (UNROLL - 1) * SUM_LANES < end; key += UNROLL * SUM_LANES) {
        uint4 x[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) x[i] = rows.load(key + i * SUM_LANES, channel);
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) s.add_key(x[i]);
    }
    for (; key < end; key += SUM_LANES) s.add_key(rows.load(key, channel));
}

// Where a chunk's partial results are: [batch * KV head][K, V][sum, minimum, maximum][chunk][channel].
__device__ __forceinline__ long long partial_index(int kv_head, int is_v, int what, int chunk) {
    return (((static_cast<long long>(kv_head) * 2 + is_v) * 3 + what) * SUM_CHUNKS + chunk) * HEAD_DIM;
}

// CTA: 64 channels of one chunk of K or of V. Grid: BLOCKS * SUM_CHUNKS * 2 for each batch * KV head.
extern "C" __global__ void __launch_bounds__(THREADS) statistics(
    const Half* k, const Half* v, long long k_stride_b, long long k_stride_h, long long k_stride_s,
    long long v_stride_b, long long v_stride_h, long long v_stride_s, float* partial,
    int num_heads_kv, int seq_kv, int head_dim) {
    __shared__ StatisticsBuffer buffer;
    int index = blockIdx.x;
    const int block = index % BLOCKS, chunk = index / BLOCKS % SUM_CHUNKS;
    const int is_v = index / (BLOCKS * SUM_CHUNKS) % 2, kv_head = index / (BLOCKS * SUM_CHUNKS * 2);
    const int b = kv_head / num_heads_kv, h = kv_head % num_heads_kv;
    const Rows rows = is_v ? Rows(v, b, h, v_stride_b, v_stride_h, v_stride_s, head_dim)
                           : Rows(k, b, h, k_stride_b, k_stride_h, k_stride_s, head_dim);
    const int chunk_keys = SUM_LANES * ceil_div(seq_kv, SUM_CHUNKS * SUM_LANES);
    const int begin = chunk * chunk_keys + threadIdx.x / ROW_THREADS;  // threadIdx.x / 8: the lane, 0..15
    const int end = min((chunk + 1) * chunk_keys, seq_kv), channel = block_channel(block);

    Statistics s;
    add_keys(s, rows, channel, begin, end);
    add_upper_threads(s, buffer, THREADS / 2);  // lane + 8
    add_upper_threads(s, buffer, THREADS / 4);  // lane + 4
    s.add_lane(2 * ROW_THREADS);
    s.add_lane(ROW_THREADS);

    if (threadIdx.x >= ROW_THREADS) return;
    float minimum[8], maximum[8];
    widen(make_uint4(s.minimum[0], s.minimum[1], s.minimum[2], s.minimum[3]), minimum);
    widen(make_uint4(s.maximum[0], s.maximum[1], s.maximum[2], s.maximum[3]), maximum);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        partial[partial_index(kv_head, is_v, 0, chunk) + channel + i] = s.sum[i];
        partial[partial_index(kv_head, is_v, 1, chunk) + channel + i] = minimum[i];
        partial[partial_index(kv_head, is_v, 2, chunk) + channel + i] = maximum[i];
    }
}

__device__ __forceinline__ void mean_and_spread(const float* partial, int kv_head, int is_v, int seq_kv,
                                                bool subtract_mean, float& mean, float& spread) {
    float sum = 0.0f, minimum = __int_as_float(0x7F800000), maximum = -minimum;
#pragma unroll
    for (int chunk = 0; chunk < SUM_CHUNKS; ++chunk) {
        sum = __fadd_rn(sum, partial[partial_index(kv_head, is_v, 0, chunk) + threadIdx.x]);
        minimum = fminf(minimum, partial[partial_index(kv_head, is_v, 1, chunk) + threadIdx.x]);
        maximum = fmaxf(maximum, partial[partial_index(kv_head, is_v, 2, chunk) + threadIdx.x]);
    }
    mean = subtract_mean ? __fdiv_rn(sum, __int2float_rn(seq_kv)) : 0.0f;
    spread = max_or_nan(__fsub_rn(maximum, mean), __fsub_rn(mean, minimum));
    if (!is_finite(spread)) mean = 0.0f, spread = fmaxf(maximum, -minimum);
}

__device__ __forceinline__ bool rotation_sign(unsigned channel) {
    unsigned h = channel * 0x9E3779B1u;
    return (h ^ (h >> 15)) * 0x85EBCA6Bu >> 31;
}

// CTA: a KV head; thread: a channel. The factors of Q and K are the balance and the rotation's sign.
extern "C" __global__ void __launch_bounds__(HEAD_DIM) finish_statistics(
    const float* partial, float* k_mean, float* k_factor, float* q_factor, float* v_mean,
    float* v_inverse, float* v_scale, float* k_scale_max, int seq_kv) {
    const int kv_head = blockIdx.x;
    const long long i = static_cast<long long>(kv_head) * HEAD_DIM + threadIdx.x;
    float mean, spread;
    mean_and_spread(partial, kv_head, 0, seq_kv, SMOOTH_K, mean, spread);
    const float balance = spread > 0.0f ? __fsqrt_rn(spread) : 1.0f;
    const float sign = rotation_sign(threadIdx.x) ? -1.0f : 1.0f;
    k_mean[i] = mean;
    k_factor[i] = __fmul_rn(sign, __fdiv_rn(1.0f, balance));
    q_factor[i] = __fmul_rn(sign, balance);

    mean_and_spread(partial, kv_head, 1, seq_kv, true, mean, spread);
    const float inverse = __fdiv_rn(V_MAX, spread);
    v_mean[i] = mean;
    v_inverse[i] = is_finite(inverse) ? inverse : 0.0f;
    v_scale[i] = __fdiv_rn(spread, V_MAX);
    if (threadIdx.x == 0) k_scale_max[kv_head] = 0.0f;
}
