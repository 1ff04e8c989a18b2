// Section 1 of docs/numerics.md: sums, extremes, and what follows from them for each channel.
#pragma once

#include "progress.cuh"
#include "int8.cuh"

// docs/numerics.md: the largest number of chunks, the lanes of a chunk, and the keys of the smallest chunk
constexpr int SUM_CHUNKS = 16, SUM_LANES = 16, MIN_CHUNK_KEYS = 256;
// With SAMPLE_KEYS, from SAMPLED_FROM keys on, SAMPLE consecutive ones of every SAMPLE_OF stand for all keys.
constexpr int SAMPLED_FROM = 1024, SAMPLE_OF = 512, SAMPLE = 64;
// A CTA takes a chunk. Its threads share STATISTICS_ROWS rows (keys) at a time, STATISTICS_THREADS a row; thread
// row r adds the THREAD_LANES lanes r, r + STATISTICS_ROWS, ... of 8 channels.
constexpr int STATISTICS_THREADS = HEAD_DIM / 8, STATISTICS_ROWS = THREADS / STATISTICS_THREADS;
constexpr int THREAD_LANES = SUM_LANES / STATISTICS_ROWS;

// The keys that statistics are made of, a sample or all. Chunk c is those from `c * distance` on, `length` at most.
struct Keys {
    int seq_kv, chunks, distance, length;

    __device__ __forceinline__ Keys(int seq_kv, bool sample) : seq_kv(seq_kv) {
        if (!sample || !SAMPLE_KEYS || seq_kv < SAMPLED_FROM) {
            length = distance = max(MIN_CHUNK_KEYS, SUM_LANES * ceil_div(seq_kv, SUM_CHUNKS * SUM_LANES));
            chunks = ceil_div(seq_kv, distance);
        } else {
            chunks = min(SUM_CHUNKS, seq_kv / SAMPLE_OF);
            distance = seq_kv / chunks;
            length = distance / SAMPLE_OF * SAMPLE;
        }
    }
    __device__ __forceinline__ int begin(int chunk) const { return chunk * distance; }
    __device__ __forceinline__ int end(int chunk) const { return min(begin(chunk) + length, seq_kv); }
    __device__ __forceinline__ bool is_sample() const { return length < distance; }
    __device__ __forceinline__ int count() const { return is_sample() ? chunks * length : seq_kv; }
    // Arrivals: of every chunk, then of what follows from them.
    __device__ __forceinline__ int done() const { return chunks + 1; }
};

// Keys on their way to the thread that adds them, KEYS a batch, BATCHES under way. A thread reads only what it
// has copied itself: no barrier.
struct StatisticsRing {
    static constexpr int KEYS = 4, BATCHES = 4;
    typedef uint4 Batch[KEYS][THREADS];
    Batch batches[BATCHES];
};

static_assert(StatisticsRing::KEYS % THREAD_LANES == 0, "a batch starts with the first lane");

// Of 8 channels and a thread's keys. Extremes stay in the input's type, two in a word.
struct Statistics {
    float sum[THREAD_LANES][8];
    unsigned minimum[4], maximum[4];

    __device__ __forceinline__ Statistics() {
#pragma unroll
        for (int lane = 0; lane < THREAD_LANES; ++lane) {
#pragma unroll
            for (int i = 0; i < 8; ++i) sum[lane][i] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            minimum[i] = IN_BF16 ? 0x7F807F80u : 0x7C007C00u;  // +inf
            maximum[i] = IN_BF16 ? 0xFF80FF80u : 0xFC00FC00u;
        }
    }

    __device__ __forceinline__ void add_key(int lane, uint4 x) {
        const unsigned words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = widen(words[i]);
            sum[lane][2 * i] = __fadd_rn(sum[lane][2 * i], pair.x);
            sum[lane][2 * i + 1] = __fadd_rn(sum[lane][2 * i + 1], pair.y);
            minimum[i] = min_pair(minimum[i], words[i]);
            maximum[i] = max_pair(maximum[i], words[i]);
        }
    }

    // Adds keys `key, key + STATISTICS_ROWS, ...` below `end`, in this order, 8 channels from `channel` on.
    // SPECIALS: NaN and infinities count as 0.
    template <bool SPECIALS>
    __device__ __forceinline__ void add_keys(StatisticsRing& ring, const Rows& rows, int channel, int key,
                                             int end) {
        const Half* p = rows.at(key, channel);
        const long long step = STATISTICS_ROWS * rows.stride;
        int copied = key;
        const auto copy = [&](StatisticsRing::Batch& batch) {
            if (copied < end) {
#pragma unroll
                for (int i = 0; i < StatisticsRing::KEYS; ++i, p += step, copied += STATISTICS_ROWS)
                    rows.copy(&batch[i][threadIdx.x], p, channel, copied < end);
            }
            cp_async_commit();
        };
#pragma unroll
        for (int i = 0; i < StatisticsRing::BATCHES; ++i) copy(ring.batches[i]);
#pragma unroll 1
        for (int i = 0; key < end; ++i) {
            StatisticsRing::Batch& batch = ring.batches[i % StatisticsRing::BATCHES];
            cp_async_wait<StatisticsRing::BATCHES - 1>();
            const bool whole = key + (StatisticsRing::KEYS - 1) * STATISTICS_ROWS < end;
            if (whole) {
#pragma unroll
                for (int j = 0; j < StatisticsRing::KEYS; ++j)
                    add_key(j % THREAD_LANES, SPECIALS ? finite(batch[j][threadIdx.x]) : batch[j][threadIdx.x]);
            } else {
#pragma unroll
                for (int j = 0; j < StatisticsRing::KEYS; ++j) {
                    if (key + j * STATISTICS_ROWS >= end) break;
                    add_key(j % THREAD_LANES, SPECIALS ? finite(batch[j][threadIdx.x]) : batch[j][threadIdx.x]);
                }
            }
            key += StatisticsRing::KEYS * STATISTICS_ROWS;
            copy(batch);
        }
        cp_async_wait<0>();
    }

    // Whether a NaN or an infinity was added: it shows in the extremes.
    __device__ __forceinline__ bool special() const {
        bool found = false;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 low = widen(minimum[i]), high = widen(maximum[i]);
            const float infinity = __int_as_float(0x7F800000);
            found |= !(low.x > -infinity && low.y > -infinity && high.x < infinity && high.y < infinity);
        }
        return found;
    }
};

// Of a chunk, in global memory: sums, and the extremes of channels 2i and 2i + 1 in word i. 2 HEAD_DIM words in
// all, as sagepp/launch.py counts for `chunks`.
struct ChunkStatistics {
    float sum[HEAD_DIM];
    unsigned minimum[HEAD_DIM / 2], maximum[HEAD_DIM / 2];
};

// x[l] += x[l + COUNT / 2] and so on, down to x[0].
template <int COUNT> __device__ __forceinline__ float add_lanes(float* x) {
    if constexpr (COUNT > 1) {
#pragma unroll
        for (int lane = 0; lane < COUNT / 2; ++lane) x[lane] = __fadd_rn(x[lane], x[lane + COUNT / 2]);
        add_lanes<COUNT / 2>(x);
    }
    return x[0];
}

union StatisticsShared {
    StatisticsRing ring;
    struct {
        float sums[STATISTICS_ROWS][HEAD_DIM];
        unsigned minima[STATISTICS_ROWS][HEAD_DIM / 2], maxima[STATISTICS_ROWS][HEAD_DIM / 2];
    };
};

// Chunk number `chunk` of the keys. Returns, to all threads, whether there is a NaN or an
// infinity; a thread that meets one adds its keys again, without it.
__device__ __forceinline__ bool chunk_statistics(const Rows& rows, const Keys& keys, int chunk,
                                                 StatisticsShared& shared, ChunkStatistics& out) {
    const int row = threadIdx.x / STATISTICS_THREADS, channel = threadIdx.x % STATISTICS_THREADS * 8;
    const int begin = keys.begin(chunk) + row, end = keys.end(chunk);
    Statistics s;
    s.add_keys<false>(shared.ring, rows, channel, begin, end);
    const bool special = s.special();
    if (special) {
        s = Statistics();
        s.add_keys<true>(shared.ring, rows, channel, begin, end);
    }

    float of_thread[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float of_lane[THREAD_LANES];
#pragma unroll
        for (int lane = 0; lane < THREAD_LANES; ++lane) of_lane[lane] = s.sum[lane][i];
        of_thread[i] = add_lanes<THREAD_LANES>(of_lane);
    }
    __syncthreads();  // the ring is free
    float4* sums = reinterpret_cast<float4*>(&shared.sums[row][channel]);
    sums[0] = make_float4(of_thread[0], of_thread[1], of_thread[2], of_thread[3]);
    sums[1] = make_float4(of_thread[4], of_thread[5], of_thread[6], of_thread[7]);
    *reinterpret_cast<uint4*>(&shared.minima[row][channel / 2]) =
        make_uint4(s.minimum[0], s.minimum[1], s.minimum[2], s.minimum[3]);
    *reinterpret_cast<uint4*>(&shared.maxima[row][channel / 2]) =
        make_uint4(s.maximum[0], s.maximum[1], s.maximum[2], s.maximum[3]);
    const bool special_chunk = __syncthreads_or(special);
    for_each_channel([&](int c) {
        float of_row[STATISTICS_ROWS];
#pragma unroll
        for (int i = 0; i < STATISTICS_ROWS; ++i) of_row[i] = shared.sums[i][c];
        out.sum[c] = add_lanes<STATISTICS_ROWS>(of_row);
        const bool is_minimum = c < HEAD_DIM / 2;  // half of the threads take the minima, half the maxima
        const int pair = c % (HEAD_DIM / 2);
        unsigned extreme = is_minimum ? shared.minima[0][pair] : shared.maxima[0][pair];
#pragma unroll
        for (int i = 1; i < STATISTICS_ROWS; ++i)
            extreme = is_minimum ? min_pair(extreme, shared.minima[i][pair])
                                 : max_pair(extreme, shared.maxima[i][pair]);
        (is_minimum ? out.minimum : out.maximum)[pair] = extreme;
    });
    return special_chunk;
}

// Of one channel, from the chunks of its head, which other CTAs have written: past L1.
__device__ __forceinline__ void mean_and_spread(const ChunkStatistics* chunks, int channel, const Keys& keys,
                                                bool subtract_mean, float& mean, float& spread) {
    float sums[SUM_CHUNKS], sum = 0.0f;
    unsigned minima[SUM_CHUNKS], maxima[SUM_CHUNKS];
#pragma unroll
    for (int chunk = 0; chunk < SUM_CHUNKS; ++chunk) {
        const bool exists = chunk < keys.chunks;
        const ChunkStatistics& s = chunks[exists ? chunk : 0];
        sums[chunk] = exists ? __ldcg(s.sum + channel) : 0.0f;
        minima[chunk] = __ldcg(s.minimum + channel / 2);
        maxima[chunk] = __ldcg(s.maximum + channel / 2);
    }
#pragma unroll
    for (int chunk = 0; chunk < SUM_CHUNKS; ++chunk) {
        sum = __fadd_rn(sum, sums[chunk]);
        minima[0] = min_pair(minima[0], minima[chunk]);
        maxima[0] = max_pair(maxima[0], maxima[chunk]);
    }
    const float2 low = widen(minima[0]), high = widen(maxima[0]);
    const float minimum = channel % 2 ? low.y : low.x, maximum = channel % 2 ? high.y : high.x;
    mean = subtract_mean ? __fdiv_rn(sum, __int2float_rn(keys.count())) : 0.0f;
    spread = max_or_nan(__fsub_rn(maximum, mean), __fsub_rn(mean, minimum));
    if (!is_finite(spread)) mean = 0.0f, spread = fmaxf(maximum, -minimum);
}

// sign(d) of section 2: whether the channel is negated before the butterflies.
__device__ __forceinline__ bool rotation_sign(unsigned channel) {
    unsigned h = channel * 0x9E3779B1u;
    return (h ^ (h >> 15)) * 0x85EBCA6Bu >> 31;
}

// What quantisation needs to know of each channel; arrays of HEAD_DIM. The factors of Q and K are the balance, and
// its reciprocal, with the sign of the rotation; `k_addend` subtracts K's mean.
__device__ __forceinline__ void finish_k(const ChunkStatistics* chunks, const Keys& keys, float* k_mean,
                                         Factor* k_factor, Factor* k_addend, Factor* q_factor) {
    for_each_channel([&](int channel) {
        float mean, spread;
        mean_and_spread(chunks, channel, keys, SMOOTH_K, mean, spread);
        const float sign = rotation_sign(channel) ? -1.0f : 1.0f;
#if IN_BF16
        const float balance = spread > 0.0f ? __fsqrt_rn(spread) : 1.0f;
        const float factor = __fmul_rn(sign, __fdiv_rn(1.0f, balance));
        k_mean[channel] = mean;
        k_factor[channel] = factor;
        k_addend[channel] = -__fmul_rn(mean, factor);
        q_factor[channel] = __fmul_rn(sign, balance);
#else
        const float least = fmaxf(0x1p-12f, __fmul_rn(fabsf(mean), 0x1p-13f));
        const float balance = spread > 0.0f ? __fsqrt_rn(fmaxf(spread, least)) : 1.0f;
        const unsigned factor_bits = cvt_f16x2(__fmul_rn(sign, __fdiv_rn(1.0f, balance)), 0.0f);
        const float factor = low_half(factor_bits);
        const unsigned addend_bits = cvt_f16x2(-__fmul_rn(mean, factor), 0.0f);
        k_mean[channel] = __fdiv_rn(-low_half(addend_bits), factor);  // what is subtracted indeed
        k_factor[channel] = factor_bits;
        k_addend[channel] = addend_bits;
        q_factor[channel] = cvt_f16x2(__fdiv_rn(1.0f, factor), 0.0f);
#endif
    });
}

__device__ __forceinline__ void finish_v(const ChunkStatistics* chunks, const Keys& keys, float* v_mean,
                                         float* v_inverse, float* v_scale) {
    for_each_channel([&](int channel) {
        float mean, spread;
        mean_and_spread(chunks, channel, keys, true, mean, spread);
        v_mean[channel] = mean;
        v_inverse[channel] = fminf(__fdiv_rn(V_MAX, spread), 3.40282347e38f);  // that where the spread is 0
        v_scale[channel] = __fdiv_rn(spread, V_MAX);
    });
}
