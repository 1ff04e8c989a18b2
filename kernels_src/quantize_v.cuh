// Section 3 of docs/numerics.md: V to E4M3 (or FP16), transposed, and `v_offset`.
#pragma once

#include "int8.cuh"
#include "progress.cuh"
#include "statistics.cuh"

constexpr int V_CHUNK_KEYS = V_F16 ? 8 : 16;            // keys in a chunk, 16 bytes of codes of V
constexpr int V_CHUNKS = BLOCK_N / V_CHUNK_KEYS;        // of a tile
constexpr int V_ROWS = CHANNELS + ROW_SUM_ROWS;         // of codes: further channels are 0, and not stored

// A warp makes the codes of a chunk and 64 channels, from V_KEYS keys of every key group. V_WIDTH warps beside
// each other make V_CHANNELS channels of the chunk, and the CTA V_STEP chunks a step. V_CTAS: CTAs of a tile.
constexpr int V_CHANNELS = HEAD_DIM < 128 ? HEAD_DIM : 128, V_CTAS = HEAD_DIM / V_CHANNELS;
constexpr int V_WIDTH = V_CHANNELS / 64, V_STEP = WARPS / V_WIDTH;
constexpr int V_STEPS = V_CHUNKS / V_STEP, V_KEYS = V_CHUNK_KEYS / KEY_GROUPS;
constexpr int V_STEP_KEYS = V_STEP * V_KEYS;  // of a key group in a step

static_assert(BLOCK_N % 16 == 0, "16 bytes of E4M3 are 4 keys of each key group");
static_assert(V_CHUNKS % V_STEP == 0, "all warps have as many steps");
static_assert(!(V_F16 && ROW_SUM_ROWS), "the rows of the row sum are E4M3");

// In shared memory: a chunk's keys of 64 channels for each warp and step, two channels in a word, whose place its codes
// take; sums over a warp's keys; and the sums of the threads' ranges of tiles.
typedef unsigned VRows[V_STEPS][WARPS][KEY_GROUPS * V_KEYS][32];
typedef struct {  // of two tiles that follow each other
    unsigned lost[WARPS][64];
    float magnitude[WARPS][64];
} VSums[2];
typedef uint4 VRangeSums[THREADS];

[[maybe_unused]] constexpr float LOST_UNIT = 65536.0f;  // `lost` counts 1 / 65536 of V's codes

// 1.5 * 2^23. Adding it to |x| < 2^22 rounds x to an integer, to nearest even; the bits of the sum are
// ROUNDING_BITS plus that integer.
[[maybe_unused]] constexpr float ROUNDING = 12582912.0f;
[[maybe_unused]] constexpr unsigned ROUNDING_BITS = 0x4B400000;

// Row of a channel in a tile of V (`channel_order` of the reference is the inverse). For `wgmma`, where a thread
// has columns 2t and 2t + 1 of every 8 of the product, these are 8 neighbouring channels of every 32.
__device__ __forceinline__ int v_row(int channel) {
    if (!ROW_SUM_ROWS) return channel;
    return (channel & ~31) | (channel >> 1 & 3) << 3 | (channel >> 3 & 3) << 1 | (channel & 1);
}

// Codes of one channel and V_KEYS consecutive keys of a key group, as a word. Adds what each of them lost, in
// 1 / 65536 and with ROUNDING_BITS too many, to `lost`, and its magnitude to `magnitude`: exactly, as all are multiples
// of 2**-9, below 2**15.
__device__ __forceinline__ unsigned v_codes_word(const float (&y)[V_KEYS], unsigned& lost, float& magnitude) {
#if V_F16
    return cvt_f16x2(y[0], y[1]);
#else
    const unsigned word = cvt_e4m3x4(y[0], y[1], y[2], y[3]);
    float value[4];
    from_e4m3(word, value);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        // fma: the product by 65536 is exact, so this rounds to the integer, as to_int_rn does
        lost += __float_as_uint(__fmaf_rn(__fsub_rn(y[i], value[i]), LOST_UNIT, ROUNDING)) +
                __float_as_uint(__fmaf_rn(__fsub_rn(y[i + 1], value[i + 1]), LOST_UNIT, ROUNDING));
    }
    if (SAMPLE_KEYS) {
#pragma unroll
        for (int i = 0; i < 4; ++i) magnitude = __fadd_rn(magnitude, fabsf(value[i]));
    }
    return word;
#endif
}

// Part number `part` of tiles `first_tile` to `end_tile` - 1 of V, V_CHANNELS channels: a warp takes a chunk of 64
// channels at a time. Returns, to the thread of a channel, whether codes of a tile are too large: by a sample, a NaN or an
// infinity is, too.
// codes: [tile][V_CHUNKS][V_ROWS][16 bytes]; lost_out: [tile][HEAD_DIM], in 1 / 65536 of a code (not with FP16 codes).
__device__ __forceinline__ bool quantize_v(VRows& v, VSums& sums, const Rows& rows, int first_tile, int end_tile,
                                           int part, const unsigned& statistics, const Keys& keys,
                                           const float* v_mean, const float* v_inverse, unsigned char* codes,
                                           unsigned* lost_out) {
    const int seq_kv = keys.seq_kv;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_channel = part * V_CHANNELS + warp % V_WIDTH * 64;
    const int warp_key = warp / V_WIDTH * V_KEYS;  // in a key group, at its tile's first step
    // A lane copies 8 channels of V_KEYS keys of key group lane / 8: the steps in turn, tile after tile.
    const int copied_channel = first_channel + lane % 8 * 8;
    int copied = first_tile * BLOCK_N + lane / 8 * GROUP_KEYS + warp_key;
    const Half* p = rows.at(copied, copied_channel);
    const auto copy_step = [&](int step) {
        if (copied < end_tile * BLOCK_N) {
#pragma unroll
            for (int i = 0; i < V_KEYS; ++i, p += rows.stride)
                rows.copy(reinterpret_cast<uint4*>(v[step][warp][lane / 8 * V_KEYS + i]) + lane % 8, p, copied_channel,
                          copied + i < seq_kv);
            const int other_groups = step < V_STEPS - 1 ? 0 : BLOCK_N - GROUP_KEYS;  // on the way to the next tile
            p += (V_STEP_KEYS - V_KEYS + other_groups) * rows.stride, copied += V_STEP_KEYS + other_groups;
        }
        cp_async_commit();
    };
    copy_step(0);
    const bool clean = wait(statistics, keys.done()) && !keys.is_sample();
    const int channel = first_channel + 2 * lane;
    const float2 mean = __ldcg(reinterpret_cast<const float2*>(v_mean + channel));
    const float2 inverse = __ldcg(reinterpret_cast<const float2*>(v_inverse + channel));
#pragma unroll
    for (int step = 1; step < V_STEPS; ++step) copy_step(step);
    constexpr int TILE_BYTES = V_CHUNKS * V_ROWS * 16;
    codes += static_cast<long long>(first_tile) * TILE_BYTES, lost_out += static_cast<long long>(first_tile) * HEAD_DIM;
    bool exceeds = false;
#pragma unroll 1
    for (int tile = first_tile; tile < end_tile; ++tile, codes += TILE_BYTES, lost_out += HEAD_DIM) {
        const bool whole = (tile + 1) * BLOCK_N <= seq_kv;
        unsigned lost[2] = {};
        float magnitude[2] = {};
#pragma unroll 1
        for (int step = 0; step < V_STEPS; ++step) {
            cp_async_wait<V_STEPS - 1>();
            __syncwarp();
            if (clean) {
#pragma unroll 1
                for (int i = 0; i < KEY_GROUPS * V_KEYS; ++i)
                    v[step][warp][i][lane] = finite(v[step][warp][i][lane]);
            }
            unsigned raw[KEY_GROUPS][V_KEYS];
#pragma unroll
            for (int t = 0; t < KEY_GROUPS; ++t) {
#pragma unroll
                for (int i = 0; i < V_KEYS; ++i) {
                    raw[t][i] = v[step][warp][t * V_KEYS + i][lane];
                }
            }
            unsigned word[2][KEY_GROUPS];
#pragma unroll
            for (int t = 0; t < KEY_GROUPS; ++t) {
                float y[2][V_KEYS];
#pragma unroll
                for (int i = 0; i < V_KEYS; ++i) {
                    const float2 x = widen(raw[t][i]);
                    y[0][i] = __fmul_rn(__fsub_rn(x.x, mean.x), inverse.x);
                    y[1][i] = __fmul_rn(__fsub_rn(x.y, mean.y), inverse.y);
                }
                if (!whole) {
                    const int key = tile * BLOCK_N + t * GROUP_KEYS + step * V_STEP_KEYS + warp_key;
                    const int count = seq_kv - key;  // that exist
#pragma unroll
                    for (int i = 0; i < V_KEYS; ++i) {
                        if (i >= count) y[0][i] = y[1][i] = 0.0f;
                    }
                }
                word[0][t] = v_codes_word(y[0], lost[0], magnitude[0]);
                word[1][t] = v_codes_word(y[1], lost[1], magnitude[1]);
            }
            uint4* out = reinterpret_cast<uint4*>(codes) + (warp / V_WIDTH + step * V_STEP) * V_ROWS + first_channel;
            const uint4 low = make_uint4(word[0][0], word[0][1], word[0][2], word[0][3]);
            const uint4 high = make_uint4(word[1][0], word[1][1], word[1][2], word[1][3]);
            uint4* staged = reinterpret_cast<uint4*>(v[step][warp]);
            __syncwarp();
            staged[v_row(2 * lane)] = low, staged[v_row(2 * lane + 1)] = high;
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 64; i += 32)
                if (CHANNELS == HEAD_DIM || first_channel + i < CHANNELS) out[lane + i] = staged[lane + i];
            __syncwarp();
            copy_step(step);
        }
#if ROW_SUM_ROWS
        // four E4M3 codes of ROW_SUM_UNIT: a power of two, whose exponent has the bias 7 instead of 127
        const unsigned unit = (__float_as_uint(ROW_SUM_UNIT) / (1 << 23) - 120) * 8 * 0x01010101u;
        static_assert(V_CHUNKS * ROW_SUM_ROWS <= THREADS, "a thread has one of these");
        const int i = threadIdx.x;
        if (part == 0 && i < V_CHUNKS * ROW_SUM_ROWS)
            reinterpret_cast<uint4*>(codes)[i / ROW_SUM_ROWS * V_ROWS + CHANNELS + i % ROW_SUM_ROWS] =
                make_uint4(unit, unit, unit, unit);
#endif
#if !V_F16
        auto& of_tile = sums[tile & 1];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            of_tile.lost[warp][2 * lane + i] = lost[i], of_tile.magnitude[warp][2 * lane + i] = magnitude[i];
        __syncthreads();  // and who writes them again has seen the next one
        const int c = threadIdx.x;
        if (c < V_CHANNELS) {
            unsigned sum = 0u - BLOCK_N * ROUNDING_BITS;
            float size = 0.0f;
#pragma unroll
            for (int i = 0; i < V_STEP; ++i) {
                sum += of_tile.lost[i * V_WIDTH + c / 64][c % 64];
                size = __fadd_rn(size, of_tile.magnitude[i * V_WIDTH + c / 64][c % 64]);
            }
            lost_out[part * V_CHANNELS + c] = sum;
            exceeds |= SAMPLE_KEYS && !(size <= BLOCK_N * V_MAX);
        }
#endif
    }
    return exceeds;
}

// v_offset[n] of a head for n = 0 ... num_tiles: a thread takes 4 channels and a range of the tiles. A call, because it
// takes many registers, once a head.
// lost: [num_tiles][HEAD_DIM]; v_offset: [num_tiles + 1][HEAD_DIM].
static __device__ __noinline__ void finish_v_offset(VRangeSums& range_sums, const unsigned* lost, int num_tiles,
                                                    int seq_kv, const float* v_mean, const float* v_scale,
                                                    float* v_offset) {
    constexpr int WIDTH = HEAD_DIM / 4, RANGES = THREADS / WIDTH;
    const int thread = threadIdx.x % WIDTH, range = threadIdx.x / WIDTH, range_tiles = ceil_div(num_tiles, RANGES);
    const int begin = range * range_tiles, end = min(begin + range_tiles, num_tiles);
    const float4 mean = __ldcg(reinterpret_cast<const float4*>(v_mean) + thread);
    float4* out = reinterpret_cast<float4*>(v_offset) + thread;
    if (range == 0) out[0] = mean;
#if V_F16
    for (int tile = begin; tile < end; ++tile) out[(tile + 1LL) * WIDTH] = mean;
#else
    const float4 scale = __ldcg(reinterpret_cast<const float4*>(v_scale) + thread);
    const uint4* in = reinterpret_cast<const uint4*>(lost) + thread;
    const auto add = [](uint4& sum, uint4 x) { sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w; };
    constexpr int AT_ONCE = 8;  // loads that are under way
    const auto for_each_tile = [&](auto f) {  // f(tile, its `lost`)
        for (int first = begin; first < end; first += AT_ONCE) {
            uint4 x[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                if (first + i < end) x[i] = __ldcg(in + static_cast<long long>(first + i) * WIDTH);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                if (first + i < end) f(first + i, x[i]);
        }
    };
    uint4 sum = {};
    for_each_tile([&](int, uint4 x) { add(sum, x); });
    range_sums[threadIdx.x] = sum;
    __syncthreads();
    sum = {};
    for (int i = 0; i < range; ++i) add(sum, range_sums[i * WIDTH + thread]);
    for_each_tile([&](int tile, uint4 x) {
        add(sum, x);
        const int keys = static_cast<int>(min((tile + 1LL) * BLOCK_N, static_cast<long long>(seq_kv)));
        const float unit = __fdiv_rn(1.0f, __fmul_rn(LOST_UNIT, __int2float_rn(keys)));
        const auto offset = [=](float scale, unsigned lost, float mean) {
            return __fmaf_rn(__fmul_rn(scale, unit), __int2float_rn(static_cast<int>(lost)), mean);
        };
        out[(tile + 1LL) * WIDTH] = make_float4(offset(scale.x, sum.x, mean.x), offset(scale.y, sum.y, mean.y),
                                                offset(scale.z, sum.z, mean.z), offset(scale.w, sum.w, mean.w));
    });
#endif
}
