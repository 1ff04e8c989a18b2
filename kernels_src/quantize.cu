// Q, K and V to INT8, INT8 and E4M3 (or FP16), in tiles ready for the attention kernels: sections 1 to
// 3 of docs/numerics.md, and `reference/quantize.py` step by step.
//
// Four kernels: `statistics` and `finish_statistics` (what is known of each channel), `quantize` (all
// codes and scales), `finish_v_offset` (prefix sums over the key tiles).

#include "ptx.cuh"
#include "statistics.cuh"

constexpr int KEY_GROUPS = 4;            // scales of K a tile
constexpr int GROUP_KEYS = BLOCK_N / KEY_GROUPS;
constexpr int PANEL = HEAD_DIM < 128 ? HEAD_DIM : 128;  // bytes of a row of Q or K that lie together
constexpr int V_CHUNK_KEYS = V_F16 ? 8 : 16;            // keys in 16 bytes of V
constexpr int V_CHUNKS = BLOCK_N / V_CHUNK_KEYS;
constexpr int V_ROWS = HEAD_DIM + ROW_SUM_ROWS;
constexpr int Q_BLOCK_ROWS = 64;         // rows that a CTA quantises
// Warps that share a key group: as few as its values fit the registers of.
constexpr int GROUP_VALUES = GROUP_KEYS * HEAD_DIM / 32, MAX_VALUES = 32;
constexpr int GROUP_WARPS = GROUP_VALUES <= MAX_VALUES ? 1 : GROUP_VALUES <= 2 * MAX_VALUES ? 2 : 4;

static_assert(BLOCK_M % Q_BLOCK_ROWS == 0, "a CTA quantises 64 rows of a query tile");
static_assert(BLOCK_N % 16 == 0, "16 bytes of E4M3 are 4 keys of each key group");

// Adding it to |x| < 2^22 rounds x to an integer, to nearest even, and leaves it in the low bits.
constexpr float ROUNDING = 12582912.0f;
[[maybe_unused]] constexpr unsigned ROUNDING_BITS = 0x4B400000;
[[maybe_unused]] constexpr float LOST_UNIT = 65536.0f;

// ---- 2. rotation and INT8, Q and K -------------------------------------------------------------

// What a thread has of a row: [block of 8 channels][channel].
typedef float RowValues[BLOCKS][8];

// Walsh-Hadamard butterflies of step 1, 2, ... HEAD_DIM / 2.
__device__ __forceinline__ void rotate(RowValues& x) {
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
        for (int h = 1; h < 8; h *= 2) {
#pragma unroll
            for (int d = 0; d < 8; ++d) {
                if (d & h) continue;
                const float low = x[block][d], high = x[block][d + h];
                x[block][d] = __fadd_rn(low, high);
                x[block][d + h] = __fsub_rn(low, high);
            }
        }
    }
#pragma unroll
    for (int lanes = 1; lanes < ROW_THREADS; lanes *= 2) {
        // 1 * x + other and -1 * x + other: one instruction, rounded as the sum and the difference are
        const float sign = threadIdx.x & lanes ? -1.0f : 1.0f;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
            for (int d = 0; d < 8; ++d) {
                const float other = __shfl_xor_sync(~0u, x[block][d], lanes);
                x[block][d] = __fmaf_rn(x[block][d], sign, other);
            }
        }
    }
#pragma unroll
    for (int h = 1; h < BLOCKS; h *= 2) {
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            if (block & h) continue;
#pragma unroll
            for (int d = 0; d < 8; ++d) {
                const float low = x[block][d], high = x[block + h][d];
                x[block][d] = __fadd_rn(low, high);
                x[block + h][d] = __fsub_rn(low, high);
            }
        }
    }
}

// Largest magnitude, NaN if a value is NaN.
__device__ __forceinline__ float largest(const RowValues& x, float amax) {
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
        for (int d = 0; d < 8; ++d) amax = max_or_nan(amax, fabsf(x[block][d]));
    }
    return amax;
}

// Over groups of `lanes` threads.
__device__ __forceinline__ float largest_of_lanes(float amax, int lanes) {
#pragma unroll
    for (int other = 1; other < lanes; other *= 2)
        amax = max_or_nan(amax, __shfl_xor_sync(~0u, amax, other));
    return amax;
}

// div(127, amax), ready for `int8_codes`, which is right for a finite positive factor alone.
__device__ __forceinline__ bool usual_inverse(float amax, float& inverse) {
    inverse = __fdiv_rn(127.0f, amax);
    return inverse > 0.0f && is_finite(inverse);
}

// Where the inverse overflows every value but 0 saturates; where amax is not finite the codes are 0.
// Leaves the codes themselves in x, for an inverse of 1.
__device__ __forceinline__ void unusual_values(RowValues& x, float amax) {
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
        for (int d = 0; d < 8; ++d)
            x[block][d] = is_finite(amax) && x[block][d] != 0.0f ? copysignf(127.0f, x[block][d]) : 0.0f;
    }
}

__device__ __forceinline__ uint2 int8_codes(const float (&x)[8], float inverse) {
    unsigned code[8], pair[4];
#pragma unroll
    for (int i = 0; i < 8; ++i) code[i] = __float_as_uint(__fadd_rn(__fmul_rn(x[i], inverse), ROUNDING));
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i] = __byte_perm(code[2 * i], code[2 * i + 1], 0x0040);
    return make_uint2(__byte_perm(pair[0], pair[1], 0x5410), __byte_perm(pair[2], pair[3], 0x5410));
}

// Codes of one row into a tile of `rows` rows, [panel][row][PANEL], 16-byte chunks swizzled.
__device__ __forceinline__ void store_codes(signed char* tile, int rows, int row, const RowValues& x,
                                            float inverse) {
    const int swizzle = PANEL == 128 ? row & 7 : row >> 1 & 3;
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
        const int channel = block_channel(block), panel = channel / PANEL, chunk = channel % PANEL / 16;
        const int offset = (panel * rows + row) * PANEL + (chunk ^ swizzle) * 16 + channel % 16;
        *reinterpret_cast<uint2*>(tile + offset) = int8_codes(x[block], inverse);
    }
}

// 64 rows of one head of Q.
__device__ __forceinline__ void quantize_q(const Rows& rows, int seq_q, int first_row, const float* k_mean,
                                           const float* q_factor, signed char* codes, float* scale,
                                           float* mean_dot, float softmax_scale) {
    constexpr int PASSES = Q_BLOCK_ROWS / (WARPS * WARP_ROWS);
    const int row_0 = first_row + threadIdx.x / 32 * WARP_ROWS + warp_row();
    uint4 raw[PASSES][BLOCKS];
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int row = row_0 + pass * WARPS * WARP_ROWS;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block)
            raw[pass][block] = row < seq_q ? rows.load(row, block_channel(block)) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int row = row_0 + pass * WARPS * WARP_ROWS;
        RowValues x;
        float dot[BLOCKS];
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            float factor[8], mean[8];
            widen(raw[pass][block], x[block]);
            load_floats(q_factor + block_channel(block), factor);
            if (WITH_MEAN_DOT) load_floats(k_mean + block_channel(block), mean);
            dot[block] = 0.0f;
#pragma unroll
            for (int d = 0; d < 8; ++d) {
                if (WITH_MEAN_DOT) dot[block] = __fmaf_rn(x[block][d], mean[d], dot[block]);
                x[block][d] = __fmul_rn(x[block][d], factor[d]);
            }
        }
        rotate(x);
        const float amax = largest_of_lanes(largest(x, 0.0f), ROW_THREADS);
        float inverse, row_scale = __fmul_rn(__fdiv_rn(amax, 127.0f), softmax_scale);
        if (!is_finite(amax)) row_scale = __int_as_float(0x7FFFFFFF);
        if (!usual_inverse(amax, inverse)) {
            unusual_values(x, amax);
            inverse = 1.0f;
        }
        store_codes(codes + static_cast<long long>(row / BLOCK_M) * BLOCK_M * HEAD_DIM, BLOCK_M, row % BLOCK_M,
                    x, inverse);
        if (WITH_MEAN_DOT) {
#pragma unroll
            for (int lanes = 1; lanes < ROW_THREADS; lanes *= 2) {
#pragma unroll
                for (int block = 0; block < BLOCKS; ++block)
                    dot[block] = __fadd_rn(dot[block], __shfl_xor_sync(~0u, dot[block], lanes));
            }
#pragma unroll
            for (int h = 1; h < BLOCKS; h *= 2) {
#pragma unroll
                for (int block = 0; block < BLOCKS; block += 2 * h)
                    dot[block] = __fadd_rn(dot[block], dot[block + h]);
            }
            if (row_thread() == 0) mean_dot[row] = dot[0];
        }
        if (row_thread() == 0) scale[row] = row_scale;
    }
}

// The key groups `part * (WARPS / GROUP_WARPS) ...` of a tile, GROUP_WARPS warps each.
__device__ __forceinline__ void quantize_k(const Rows& rows, int seq_kv, int tile, int part,
                                           const float* k_mean, const float* k_factor, signed char* codes,
                                           float* scale, float* scale_max) {
    constexpr int PASS_KEYS = GROUP_WARPS * WARP_ROWS, PASSES = ceil_div(GROUP_KEYS, PASS_KEYS);
    const int warp = threadIdx.x / 32;
    const int group = part * (WARPS / GROUP_WARPS) + warp / GROUP_WARPS;
    const int first = warp % GROUP_WARPS * WARP_ROWS + warp_row();  // place in the group, of pass 0
    const int group_key = tile * BLOCK_N + group * GROUP_KEYS;
    const int keys = min(GROUP_KEYS, seq_kv - group_key);  // that exist; may be negative
    uint4 raw[PASSES][BLOCKS];
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int place = first + pass * PASS_KEYS;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block)
            raw[pass][block] = place < keys ? rows.load(group_key + place, block_channel(block))
                                            : make_uint4(0, 0, 0, 0);
    }
    RowValues x[PASSES];
    float amax = 0.0f;
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const bool exists = first + pass * PASS_KEYS < keys;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            float mean[8], factor[8];
            load_floats(k_mean + block_channel(block), mean);
            load_floats(k_factor + block_channel(block), factor);
            widen(finite(raw[pass][block]), x[pass][block]);
#pragma unroll
            for (int d = 0; d < 8; ++d) {
                const float centred = __fsub_rn(x[pass][block][d], mean[d]);
                x[pass][block][d] = exists ? __fmul_rn(centred, factor[d]) : 0.0f;
            }
        }
        rotate(x[pass]);
        amax = largest(x[pass], amax);
    }
    amax = largest_of_lanes(amax, 32);
    if (GROUP_WARPS > 1) {
        __shared__ float warp_amax[WARPS];
        if (threadIdx.x % 32 == 0) warp_amax[warp] = amax;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < GROUP_WARPS; ++i) amax = fmaxf(amax, warp_amax[warp / GROUP_WARPS * GROUP_WARPS + i]);
    }
    float inverse;
    const bool usual = usual_inverse(amax, inverse);
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int place = first + pass * PASS_KEYS;
        if (!usual) {
            unusual_values(x[pass], amax);
            inverse = 1.0f;
        }
        if (GROUP_KEYS % PASS_KEYS == 0 || place < GROUP_KEYS)
            store_codes(codes, BLOCK_N, place / 2 * 8 + group * 2 + place % 2, x[pass], inverse);
    }
    if (warp % GROUP_WARPS == 0 && threadIdx.x % 32 == 0) {
        const float group_scale = __fdiv_rn(amax, 127.0f);
        scale[group] = group_scale;
        atomicMax(reinterpret_cast<int*>(scale_max), __float_as_int(group_scale));  // not negative
    }
}

// ---- 3. V --------------------------------------------------------------------------------------

// The 4 threads with the same channels (lane % 8) hold a word of each of 8 channels, one a key group:
// they exchange them, so that thread t has the 16 bytes of channels t (in `low`) and t + 4 (in `high`).
__device__ __forceinline__ void transpose(unsigned (&word)[8], int t, uint4& low, uint4& high) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (i & step) continue;
            const bool upper = t & step;
            const unsigned other = __shfl_xor_sync(~0u, upper ? word[i] : word[i + step], step * ROW_THREADS);
            (upper ? word[i] : word[i + step]) = other;
        }
    }
    low = make_uint4(word[0], word[1], word[2], word[3]);
    high = make_uint4(word[4], word[5], word[6], word[7]);
}

// Codes of one channel at KEYS consecutive places of P's fragment, as a word; adds up what they lost.
template <int KEYS>
__device__ __forceinline__ unsigned v_codes_word(const float (&y)[KEYS][8], int channel, unsigned& lost) {
#if V_F16
    return cvt_f16x2(y[0][channel], y[1][channel]);
#else
    unsigned word = 0;
#pragma unroll
    for (int i = 0; i < KEYS; i += 2) {
        const unsigned short codes = to_e4m3_pair(y[i][channel], y[i + 1][channel]);
        const float2 value = from_e4m3_pair(codes);
        word |= static_cast<unsigned>(codes) << 8 * i;
        // fma: the product by 65536 is exact, so this rounds to the integer, as to_int_rn does
        lost += __float_as_uint(__fmaf_rn(__fsub_rn(y[i][channel], value.x), LOST_UNIT, ROUNDING));
        lost += __float_as_uint(__fmaf_rn(__fsub_rn(y[i + 1][channel], value.y), LOST_UNIT, ROUNDING));
        lost -= 2 * ROUNDING_BITS;
    }
    return word;
#endif
}

// One tile of V: a warp takes 16 bytes of keys of 64 channels at a time. codes: [V_CHUNKS][V_ROWS][16].
__device__ __forceinline__ void quantize_v(const Rows& rows, int seq_kv, int tile, const float* v_mean,
                                           const float* v_inverse, unsigned char* codes, int* lost_out) {
    constexpr int KEYS = V_CHUNK_KEYS / KEY_GROUPS, CHUNK_STEP = WARPS / BLOCKS;
    const int warp = threadIdx.x / 32, block = warp % BLOCKS, channel = block_channel(block);
    const int t = warp_row();  // the key group
    float mean[8], inverse[8];
    load_floats(v_mean + channel, mean);
    load_floats(v_inverse + channel, inverse);
    unsigned lost[8] = {};
#pragma unroll 2
    for (int chunk = warp / BLOCKS; chunk < V_CHUNKS; chunk += CHUNK_STEP) {
        const int key = tile * BLOCK_N + t * GROUP_KEYS + chunk * KEYS;
        uint4 raw[KEYS];
#pragma unroll
        for (int i = 0; i < KEYS; ++i)
            raw[i] = key + i < seq_kv ? rows.load(key + i, channel) : make_uint4(0, 0, 0, 0);
        float y[KEYS][8];
#pragma unroll
        for (int i = 0; i < KEYS; ++i) {
            widen(finite(raw[i]), y[i]);
#pragma unroll
            for (int d = 0; d < 8; ++d) {
                const float scaled = __fmul_rn(__fsub_rn(y[i][d], mean[d]), inverse[d]);
                y[i][d] = key + i < seq_kv ? scaled : 0.0f;
            }
        }
        unsigned word[8];
#pragma unroll
        for (int d = 0; d < 8; ++d) word[d] = v_codes_word<KEYS>(y, d, lost[d]);
        uint4 low, high;
        transpose(word, t, low, high);
        uint4* out = reinterpret_cast<uint4*>(codes) + chunk * V_ROWS + channel + t;
        out[0] = low;
        out[4] = high;
    }
#if ROW_SUM_ROWS
    const unsigned unit = to_e4m3_pair(ROW_SUM_UNIT, ROW_SUM_UNIT) * 0x00010001u;
    for (int i = threadIdx.x; i < V_CHUNKS * ROW_SUM_ROWS; i += THREADS)
        reinterpret_cast<uint4*>(codes)[i / ROW_SUM_ROWS * V_ROWS + HEAD_DIM + i % ROW_SUM_ROWS] =
            make_uint4(unit, unit, unit, unit);
#endif
#if !V_F16
    __shared__ unsigned lost_of_warp[WARPS][64];
#pragma unroll
    for (int d = 0; d < 8; ++d) {
#pragma unroll
        for (int lanes = ROW_THREADS; lanes < 32; lanes *= 2) lost[d] += __shfl_xor_sync(~0u, lost[d], lanes);
        if (d % KEY_GROUPS == t) lost_of_warp[warp][8 * row_thread() + d] = lost[d];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < HEAD_DIM; c += THREADS) {
        unsigned sum = 0;
#pragma unroll
        for (int i = 0; i < CHUNK_STEP; ++i) sum += lost_of_warp[i * BLOCKS + c / 64][c % 64];
        lost_out[c] = static_cast<int>(sum);
    }
#endif
}

// ---- the kernel --------------------------------------------------------------------------------

// Grid: for each batch * KV head and key tile GROUP_WARPS CTAs of K and one of V; then for each batch *
// query head one for 64 rows of Q. KV heads come in the opposite order of `statistics`: the last ones
// that it has read are still in the L2 cache, and the first ones stay there for the attention kernel.
extern "C" __global__ void __launch_bounds__(THREADS) quantize(
    const Half* q, const Half* k, const Half* v, long long q_stride_b, long long q_stride_h,
    long long q_stride_s, long long k_stride_b, long long k_stride_h, long long k_stride_s,
    long long v_stride_b, long long v_stride_h, long long v_stride_s, const float* k_mean,
    const float* k_factor, const float* q_factor, const float* v_mean, const float* v_inverse,
    signed char* q_codes, float* q_scale, float* q_mean_dot, signed char* k_codes, float* k_scale,
    float* k_scale_max, unsigned char* v_codes, int* lost, int batch, int num_heads_q, int num_heads_kv,
    int seq_q, int seq_kv, int head_dim, float softmax_scale) {
    const int num_tiles = ceil_div(seq_kv, BLOCK_N), num_kv_heads = batch * num_heads_kv;
    const unsigned kv_ctas_of_head = num_tiles * (GROUP_WARPS + 1), kv_ctas = num_kv_heads * kv_ctas_of_head;
    if (blockIdx.x < kv_ctas) {
        const int kv_head = num_kv_heads - 1 - blockIdx.x / kv_ctas_of_head;
        const int b = kv_head / num_heads_kv, h = kv_head % num_heads_kv;
        const int index = blockIdx.x % kv_ctas_of_head;
        const int tile = index / (GROUP_WARPS + 1), part = index % (GROUP_WARPS + 1);
        const long long tile_index = static_cast<long long>(kv_head) * num_tiles + tile;
        const long long channels = static_cast<long long>(kv_head) * HEAD_DIM;
        if (part < GROUP_WARPS) {
            const Rows rows(k, b, h, k_stride_b, k_stride_h, k_stride_s, head_dim);
            quantize_k(rows, seq_kv, tile, part, k_mean + channels, k_factor + channels,
                k_codes + tile_index * (BLOCK_N * HEAD_DIM), k_scale + tile_index * KEY_GROUPS,
                k_scale_max + kv_head);
        } else {
            const Rows rows(v, b, h, v_stride_b, v_stride_h, v_stride_s, head_dim);
            quantize_v(rows, seq_kv, tile, v_mean + channels, v_inverse + channels,
                v_codes + tile_index * (V_CHUNKS * V_ROWS * 16), lost + tile_index * HEAD_DIM);
        }
    } else {
        const int padded_rows = ceil_div(seq_q, BLOCK_M) * BLOCK_M, ctas_of_head = padded_rows / Q_BLOCK_ROWS;
        const int index = blockIdx.x - kv_ctas, head = index / ctas_of_head;
        const int b = head / num_heads_q, h = head % num_heads_q;
        const long long row = static_cast<long long>(head) * padded_rows;
        const long long channels =
            (static_cast<long long>(b) * num_heads_kv + h / (num_heads_q / num_heads_kv)) * HEAD_DIM;
        const Rows rows(q, b, h, q_stride_b, q_stride_h, q_stride_s, head_dim);
        quantize_q(rows, seq_q, index % ctas_of_head * Q_BLOCK_ROWS, k_mean + channels, q_factor + channels,
            q_codes + row * HEAD_DIM, q_scale + row, q_mean_dot + row, softmax_scale);
    }
}

// v_offset[n] for n = 0 ... num_tiles. CTA: 32 channels of a KV head, 8 ranges of tiles.
extern "C" __global__ void __launch_bounds__(256) finish_v_offset(
    const int* lost, const float* v_mean, const float* v_scale, float* v_offset, int seq_kv) {
    const int num_tiles = ceil_div(seq_kv, BLOCK_N), lane = threadIdx.x % 32, range = threadIdx.x / 32;
    const int kv_head = blockIdx.x / (HEAD_DIM / 32), channel = blockIdx.x % (HEAD_DIM / 32) * 32 + lane;
    const int range_tiles = ceil_div(num_tiles, 8);
    const int begin = range * range_tiles, end = min(begin + range_tiles, num_tiles);
    const float mean = v_mean[static_cast<long long>(kv_head) * HEAD_DIM + channel];
    float* out = v_offset + static_cast<long long>(kv_head) * (num_tiles + 1) * HEAD_DIM + channel;
    if (range == 0) out[0] = mean;
#if V_F16
    for (int tile = begin; tile < end; ++tile) out[(tile + 1LL) * HEAD_DIM] = mean;
#else
    const float scale = v_scale[static_cast<long long>(kv_head) * HEAD_DIM + channel];
    const int* in = lost + static_cast<long long>(kv_head) * num_tiles * HEAD_DIM + channel;
    __shared__ unsigned range_sum[8][32];
    unsigned sum = 0;
#pragma unroll 8
    for (int tile = begin; tile < end; ++tile) sum += in[static_cast<long long>(tile) * HEAD_DIM];
    range_sum[range][lane] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < range; ++i) sum += range_sum[i][lane];
#pragma unroll 4
    for (int tile = begin; tile < end; ++tile) {
        sum += in[static_cast<long long>(tile) * HEAD_DIM];
        const long long keys = min((tile + 1LL) * BLOCK_N, static_cast<long long>(seq_kv));
        const float share = __fdiv_rn(scale, __fmul_rn(LOST_UNIT, __int2float_rn(static_cast<int>(keys))));
        out[(tile + 1LL) * HEAD_DIM] = __fmaf_rn(share, __int2float_rn(static_cast<int>(sum)), mean);
    }
#endif
}
