// Q, K and V to INT8, INT8 and E4M3 (or FP16), in tiles ready for the attention kernels: sections 1 to
// 3 of docs/numerics.md, and `reference/quantize.py` step by step.
//
// One launch of many small CTAs, of four roles: statistics of K or V, codes of V, of K, and of Q. The CTAs start
// in order. The statistics of a KV head stand a few heads ahead of its codes, so that the codes rarely wait for
// them. Of the CTAs that contribute to one result (the means of a head, its `v_offset`), the one that arrives last
// finishes it (`progress.cuh`).
//
// Compiled with: HEAD_DIM, CHANNELS (of those, what is not 0), BLOCK_M, BLOCK_N, V_F16, V_MAX, ROW_SUM_ROWS (above 0
// for `wgmma` alone), ROW_SUM_UNIT, SAMPLE_KEYS, IN_BF16, WITH_MEAN_DOT, SMOOTH_K, ALIGNED (`quantize_defines` in
// sagepp/launch.py).

#include "divisor.cuh"
#include "int8_rows.cuh"
#include "q_scales.cuh"
#include "quantize_v.cuh"
#include "statistics.cuh"

// The rows of Q and K of a CTA are copied to shared memory and worked on in passes. There is room for a tile; the rows of
// the next one take the place of what a pass has done with.
constexpr int PASS_ROWS = THREADS / ROW_THREADS, PASSES = Q_TILE_ROWS / PASS_ROWS;

// K: warps that share a key group, key groups of a pass, passes of a tile.
constexpr int GROUP_WARPS = GROUP_KEYS / WARP_ROWS, PASS_GROUPS = WARPS / GROUP_WARPS;
constexpr int K_PASSES = KEY_GROUPS / PASS_GROUPS;

static_assert(GROUP_KEYS % WARP_ROWS == 0 && WARPS % GROUP_WARPS == 0 && KEY_GROUPS % PASS_GROUPS == 0,
              "a pass holds whole key groups");
static_assert(K_PASSES <= PASSES, "there is room for a tile of K");
static_assert(GROUP_WARPS == 1 || K_PASSES > 1, "a barrier is between two uses of a pass's `warp_largest`");
static_assert(BLOCK_M % WARP_ROWS == 0 && WARP_ROWS % 8 == 0,
              "a warp's rows of Q lie in one row block, and are swizzled as in any other place");

// Attempts at a key group: where it is not usual, a second one without the elements that are not finite; where it still
// is not, a third one that is scaled.
constexpr int CLEANED = 1, SCALED = 2, ATTEMPTS = 3;

// Aligned for more than `cp.async` asks for: with rows from an odd multiple of 16 bytes on, it reads L2 twice.
struct __align__(128) Shared {
    union {
        struct {  // of Q and K, for each pass; codes take the place of the rows that they are made of
            union {
                uint4 rows[WARP_ROWS][VECTORS];
                uint4 codes[WARP_ROWS * CODE_CHUNKS];
            } of_warp[WARPS];
        } passes[PASSES];
        VRows v;
        StatisticsShared statistics;
        VRangeSums range_sums;
    };
    union {
        struct {  // of Q and K
            Factors<Factor> factor;
            union {
                Factors<Factor> addend;  // K
                Factors<float> k_mean;   // Q
            };
            float warp_largest[ATTEMPTS + 1][PASSES][WARPS];
        };
        VSums v_sums;
    };
};

// ---- 2. rotation and INT8, Q and K -------------------------------------------------------------

// A thread's chunks of its warp's codes, on their way to a tile [panel][row][PANEL] of `rows` rows, 16-byte chunks
// swizzled; warp row r is row `tile_row(r)` of the tile.
struct CodePlaces {
    static constexpr int COUNT = WARP_ROWS * CODE_CHUNKS / 32;
    int shared_chunk[COUNT], offset[COUNT];  // number of the chunk, bytes in the tile

    template <class TileRow> __device__ __forceinline__ CodePlaces(int rows, TileRow tile_row) {
#pragma unroll
        for (int j = 0; j < COUNT; ++j) {
            const int i = 32 * j + threadIdx.x % 32, r = i / CODE_CHUNKS, chunk = i % CODE_CHUNKS, row = tile_row(r);
            const int panel = chunk / (PANEL / 16), place = (chunk % (PANEL / 16)) ^ swizzle(row);
            shared_chunk[j] = r * CODE_CHUNKS + (chunk ^ chunk_swizzle(r));
            offset[j] = (panel * rows + row) * PANEL + 16 * place;
        }
    }
};

// Codes of a warp's rows into a tile, to `places`, where the offsets are xor-ed with `flip`. By way of shared memory:
// whole lines are written at once.
template <class Pass>
__device__ __forceinline__ void store_codes(Pass& pass, signed char* tile, const CodePlaces& places, int flip,
                                            const RowValues<BLOCKS>& x, Pair inverse) {
    auto& shared = pass.of_warp[threadIdx.x / 32];
    __syncwarp();
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b)
        shared.codes[warp_row() * CODE_CHUNKS + (block_of_row(b) ^ chunk_swizzle(warp_row()))] =
            int8_codes(x[b], inverse);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < CodePlaces::COUNT; ++j)
        *reinterpret_cast<uint4*>(tile + (places.offset[j] ^ flip)) = shared.codes[places.shared_chunk[j]];
}

// A thread's part in the copies of rows `first` to `end` - 1, pass after pass; rows from `exist` on become 0.
struct RowCopies {
    static constexpr int STEP = 32 / VECTORS;  // rows of a warp at a time
    const Rows& rows;
    const Half* p;  // of the next one, row number `row`
    int row, exist, end;

    __device__ __forceinline__ RowCopies(const Rows& rows, int first, int end, int exist)
        : rows(rows), row(first + threadIdx.x / 32 * WARP_ROWS + threadIdx.x % 32 / VECTORS), exist(exist), end(end) {
        p = rows.at(row, threadIdx.x % VECTORS * 8);
    }

    // Starts those of the next pass, if there is one, when the warp has done with what is there.
    template <class Pass> __device__ __forceinline__ void start(Pass& pass) {
        __syncwarp();
        const int vector = threadIdx.x % VECTORS, r = threadIdx.x % 32 / VECTORS;
        if (row < end) {
#pragma unroll
            for (int i = 0; i < WARP_ROWS; i += STEP, p += STEP * rows.stride)
                rows.copy(&pass.of_warp[threadIdx.x / 32].rows[r + i][vector ^ vector_swizzle(r + i)], p, 8 * vector,
                          row + i < exist);
            p += (PASS_ROWS - WARP_ROWS) * rows.stride, row += PASS_ROWS;
        }
        cp_async_commit();
    }
};

// Rows `first_row` to `end_row` - 1 of one head of Q; those from seq_q on are 0.
// codes: [row block][panel][BLOCK_M][PANEL]; scale (q_scale), mean_dot: of each row; scale_max: of each Q_TILE_ROWS rows,
// which gets the largest one of all of these.
__device__ __forceinline__ void quantize_q(Shared& shared, const Rows& rows, int seq_q, int first_row, int end_row,
                                           const unsigned& statistics, int done, const float* k_mean,
                                           const Factor* q_factor, signed char* codes, float* scale,
                                           float* scale_max, float* mean_dot, float softmax_scale) {
    RowCopies copies(rows, first_row, end_row, seq_q);
    copies.start(shared.passes[0]);
    wait(statistics, done);
    shared.factor.copy(q_factor);
    if (WITH_MEAN_DOT) shared.k_mean.copy(k_mean);
    cp_async_commit();
#pragma unroll
    for (int pass = 1; pass < PASSES; ++pass) copies.start(shared.passes[pass]);
    const CodePlaces places(BLOCK_M, [](int r) { return r; });  // of a warp's first row on, a multiple of WARP_ROWS
    const auto of = [&](int vector) {
        OfQ x;
        shared.factor.load(vector, x.factor);
        return x;
    };
    __shared__ int largest_scale;  // as a float; none is negative, so they are ordered as integers are
    if (threadIdx.x == 0) largest_scale = 0;
    float largest_of_thread = 0.0f;
    cp_async_wait<PASSES - 1>();
    __syncthreads();
#pragma unroll 1  // the code of all roles should fit the instruction cache
    for (int pass = 0, row_0 = first_row; row_0 < end_row; pass = (pass + 1) % PASSES, row_0 += PASS_ROWS) {
        const int row = row_0 + threadIdx.x / ROW_THREADS;
        cp_async_wait<PASSES - 1>();
        __syncwarp();
        auto& row_values = shared.passes[pass].of_warp[threadIdx.x / 32].rows[warp_row()];
        RowValues<BLOCKS> x;
        float dot[BLOCKS] = {}, unscale;
        const float amax = rotated_q(x, row_values, unscale, of, [&](const uint4& words, int vector, int b) {
            if (WITH_MEAN_DOT) {
                float mean[8];
                shared.k_mean.load(vector, mean);
                add_products(words, mean, dot[b]);
            }
        });
        const Pair inverse = int8_inverse(amax);
        const float row_scale = __fmul_rn(__fmul_rn(int8_scale(amax, inverse), unscale), softmax_scale);
        largest_of_thread = fmaxf(largest_of_thread, row_scale);
        const float sum = WITH_MEAN_DOT ? add_dots(dot) : 0.0f;
        const int first = row - warp_row();
        signed char* row_block = codes + static_cast<long long>(first / BLOCK_M) * BLOCK_M * HEAD_DIM;
        store_codes(shared.passes[pass], row_block + first % BLOCK_M * PANEL, places, 0, x, inverse);
        if (row_thread() == 0) {
            scale[row] = row_scale;
            if (WITH_MEAN_DOT) mean_dot[row] = sum;
        }
        copies.start(shared.passes[pass]);
    }
    const float largest_of_rows = largest_of_warp(largest_of_thread);
    if (threadIdx.x % 32 == 0) atomicMax(&largest_scale, __float_as_int(largest_of_rows));
    __syncthreads();
    if (first_row + static_cast<int>(threadIdx.x) * Q_TILE_ROWS < end_row)
        scale_max[first_row / Q_TILE_ROWS + threadIdx.x] = __int_as_float(largest_scale);
}

// Codes of tiles `first_tile` to `end_tile` - 1 of K.
// codes: [tile][panel][BLOCK_N][PANEL], rows in column order; scale: [tile][KEY_GROUPS]; scale_max: of the head, 0 at
// first.
__device__ __forceinline__ void quantize_k(Shared& shared, const Rows& rows, int seq_kv, int first_tile, int end_tile,
                                           const unsigned& statistics, int done, const Factor* k_factor,
                                           const Factor* k_addend, signed char* codes, float* scale, float* scale_max) {
    const int warp = threadIdx.x / 32, group_0 = warp / GROUP_WARPS;
    const int place = warp % GROUP_WARPS * WARP_ROWS + warp_row();  // in the group
    RowCopies copies(rows, first_tile * BLOCK_N, end_tile * BLOCK_N, seq_kv);
    copies.start(shared.passes[0]);
    wait(statistics, done);
    shared.factor.copy(k_factor);
    shared.addend.copy(k_addend);
    cp_async_commit();
#pragma unroll
    for (int pass = 1; pass < K_PASSES; ++pass) copies.start(shared.passes[pass]);
    const CodePlaces places(BLOCK_N, [=](int r) {  // of key group 0: section 2, "Position of a key"
        const int p = place - warp_row() + r;
        return p / 2 * 8 + p % 2;
    });
    constexpr int GROUP_FLIP = 2 * PANEL + 16 * (PANEL == 128 ? 2 : 1);  // two rows on, and what that does to `swizzle`
    const auto of = [&](int vector) {
        OfK x;
        shared.factor.load(vector, x.factor);
        shared.addend.load(vector, x.addend);
        return x;
    };
    cp_async_wait<K_PASSES - 1>();
    __syncthreads();
    // Key groups are numbered through all tiles.
    const int end_group = end_tile * KEY_GROUPS;
#pragma unroll 1
    for (int pass = 0, group = first_tile * KEY_GROUPS + group_0; group < end_group;
         pass = (pass + 1) % K_PASSES, group += PASS_GROUPS) {
        cp_async_wait<K_PASSES - 1>();
        __syncwarp();
        auto& row = shared.passes[pass].of_warp[warp].rows[warp_row()];
        const bool exists = group * GROUP_KEYS + place < seq_kv;
        // Over the key group.
        const auto largest_of_group = [&](float of_thread, int slot) {
            float result = largest_of_warp(of_thread);
            if (GROUP_WARPS > 1) {
                float* of_warps = shared.warp_largest[slot][pass] + warp / GROUP_WARPS * GROUP_WARPS;
                if (threadIdx.x % 32 == 0) of_warps[warp % GROUP_WARPS] = result;
                sync_group<PASS_GROUPS, 32 * GROUP_WARPS>(warp / GROUP_WARPS);
#pragma unroll
                for (int i = 0; i < GROUP_WARPS; ++i) result = max_or_nan(result, of_warps[i]);
            }
            return result;
        };
        RowValues<BLOCKS> x;
        float amax, unscale = 1.0f;
#pragma unroll 1
        for (int attempt = 0;; ++attempt) {
            if (!exists || attempt == SCALED) {  // 0, or what has taken the input's place
                load_row(x, row);
            } else {
                load_row(x, row, [&](const uint4& words, Pair* y, int vector, int) {
                    unscaled(words, of(vector), y);
                });
            }
            rotate(x);
            amax = largest_of_group(largest(x), attempt);
            if (is_usual(amax) || attempt == SCALED) break;
            if (attempt < CLEANED) {
                for (int vector = row_thread(); vector < VECTORS; vector += ROW_THREADS)
                    row[vector] = finite(row[vector]);
                __syncwarp();
                continue;
            }
            float of_group = amax;
#if IN_BF16
            float of_thread = 0.0f;
            if (exists) for_each_vector(row, [&](const uint4& words, int vector) {
                of_thread = max_or_nan(of_thread, largest_product(words, of(vector)));
            });
            of_group = largest_of_group(of_thread, ATTEMPTS);
#endif
            const float power = power_of(of_group);
            unscale = 1.0f / power;
            if (exists) for_each_vector(row, [&](uint4& words, int vector) {
                Pair y[4];
                scaled(words, of(vector), power, y);
                words = words_of(y);
            });
        }
        if (IN_BF16 && !is_finite(amax)) {  // an FP32 number overflowed
            set_zero(x);
            amax = 0.0f, unscale = __int_as_float(0x7FFFFFFF);
        }
        const Pair inverse = int8_inverse(amax);
        signed char* tile = codes + static_cast<long long>(group / KEY_GROUPS) * (BLOCK_N * HEAD_DIM);
        store_codes(shared.passes[pass], tile, places, group % KEY_GROUPS * GROUP_FLIP, x, inverse);
        if (warp % GROUP_WARPS == 0 && threadIdx.x % 32 == 0) {
            const float group_scale = __fmul_rn(int8_scale(amax, inverse), unscale);
            scale[group] = group_scale;
            // >= 0, so ordered as integers are; a NaN counts as 0, so that the other groups have a limit
            atomicMax(reinterpret_cast<int*>(scale_max), __float_as_int(fmaxf(group_scale, 0.0f)));
        }
        copies.start(shared.passes[pass]);
    }
}

// ---- the kernel --------------------------------------------------------------------------------

// All of a head of V once more, by the statistics of all its keys, because the codes by those of a sample are too large.
// It is rare, so one CTA does it, and a call, because inlined it costs the usual path registers.
static __device__ __noinline__ void requantize_v(Shared& shared, Rows rows, int seq_kv, int num_tiles, Progress& done,
                                                 ChunkStatistics* chunks, float* v_mean, float* v_inverse,
                                                 float* v_scale, unsigned char* codes, unsigned* lost) {
    const Keys keys(seq_kv, false);
    bool special = false;
#pragma unroll 1
    for (int chunk = 0; chunk < keys.chunks; ++chunk) {
        special |= chunk_statistics(rows, keys, chunk, shared.statistics, chunks[chunk]);
        __syncthreads();
    }
    finish_v(chunks, keys, v_mean, v_inverse, v_scale);
    arrive(done.statistics[1], keys.done() + (special ? SPECIAL : 0));
#pragma unroll 1
    for (int part = 0; part < V_CTAS; ++part) {
        quantize_v(shared.v, shared.v_sums, rows, 0, num_tiles, part, done.statistics[1], keys, v_mean, v_inverse, codes,
                   lost);
        __syncthreads();
    }
}

// A KV head of the batch has a CTA for each chunk of its statistics (K, then V); V_CTAS of them for the codes of every
// `cta_tiles` tiles of V, and one for those of K: `kv_tile_ctas` times. In the grid, the statistics of the first `lead`
// heads come first; then, in rounds, the statistics of head `round + lead` and the codes of head `round`; then the codes
// of the last `lead` heads; and last the codes of Q, a CTA for every `cta_tiles` tiles of Q_TILE_ROWS rows, `q_head_ctas` a
// query head. Codes of Q and K are made of the first `early_heads` KV heads: those of the others are late (late_codes.cu),
// and of their `late_tiles` none is there yet.
//
// Strides are in elements. The arrays between `progress` and `v_offset` are those of `_counters` and `_workspace` in
// sagepp/launch.py, which says their shapes; `progress` is 0 at the start, and cleared by the attention kernel; the others
// are not initialised. `group`: query heads a KV head. `by_x` divides by x. CTAs an SM: `ctas_an_sm` of sagepp/schedule.py.
extern "C" __global__ void __launch_bounds__(THREADS, HEAD_DIM > 128 ? 5 : 6) quantize(
    const Half* q, const Half* k, const Half* v, long long q_stride_b, long long q_stride_h,
    long long q_stride_s, long long k_stride_b, long long k_stride_h, long long k_stride_s,
    long long v_stride_b, long long v_stride_h, long long v_stride_s, Progress* progress,
    ChunkStatistics* chunks, float* k_mean, Factor* k_factor, Factor* k_addend, Factor* q_factor, float* v_mean,
    float* v_inverse, float* v_scale, signed char* q_codes, float* q_scale, float* largest_q_scales, float* q_mean_dot,
    signed char* k_codes, float* k_scale, float* k_scale_max, unsigned char* v_codes, unsigned* lost, float* v_offset,
    int num_heads_q, int num_heads_kv, int group, int seq_q, int seq_kv, int head_dim, float softmax_scale, int heads_kv,
    int early_heads, unsigned* late_tiles, int lead, int cta_tiles, int kv_tile_ctas, int q_head_ctas,
    Divisor by_statistics_ctas, Divisor by_code_ctas, Divisor by_round_ctas, Divisor by_q_head_ctas,
    Divisor by_num_heads_kv, Divisor by_num_heads_q, Divisor by_group) {
    __shared__ Shared shared;
    let_next_kernel_start();
    const Keys keys(seq_kv, true);
    const int num_tiles = ceil_div(seq_kv, BLOCK_N);
    const unsigned statistics_ctas = 2 * keys.chunks, v_ctas = kv_tile_ctas * V_CTAS, code_ctas = v_ctas + kv_tile_ctas;
    const unsigned round_ctas = statistics_ctas + code_ctas, rounds = heads_kv - lead;

    // Becomes the number of the CTA among those of its kind of `head`: a KV head or, of Q, a query head.
    unsigned index = blockIdx.x, head = 0;
    const auto divide = [&](Divisor by, unsigned ctas) { head += index / by, index -= index / by * ctas; };
    bool is_statistics = index < lead * statistics_ctas;
    const bool is_q = index >= heads_kv * round_ctas;
    if (is_statistics) {
        divide(by_statistics_ctas, statistics_ctas);
    } else if (is_q) {
        index -= heads_kv * round_ctas;
        divide(by_q_head_ctas, q_head_ctas);
    } else {
        index -= lead * statistics_ctas;
        if (index < rounds * round_ctas) {
            divide(by_round_ctas, round_ctas);
            is_statistics = index < statistics_ctas;
            if (is_statistics) head += lead;
            else index -= statistics_ctas;
        } else {
            index -= rounds * round_ctas, head = rounds;
            divide(by_code_ctas, code_ctas);
        }
    }
    const int b = is_q ? head / by_num_heads_q : head / by_num_heads_kv;
    const int h_q = head - b * num_heads_q, h = is_q ? h_q / by_group : head - b * num_heads_kv;
    const int kv_head = b * num_heads_kv + h;
    const long long channels = static_cast<long long>(kv_head) * HEAD_DIM;
    Progress& done = progress[kv_head];

    if (is_statistics) {
        const bool is_v = index >= keys.chunks;
        const Rows rows = is_v ? Rows(v, b, h, v_stride_b, v_stride_h, v_stride_s, head_dim)
                               : Rows(k, b, h, k_stride_b, k_stride_h, k_stride_s, head_dim);
        const int chunk = is_v ? index - keys.chunks : index;
        chunks += (2LL * kv_head + is_v) * SUM_CHUNKS;
        const bool special = chunk_statistics(rows, keys, chunk, shared.statistics, chunks[chunk]);
        if (arrive(done.statistics[is_v], special ? SPECIAL + 1 : 1) % SPECIAL != keys.chunks - 1) return;
        if (is_v) {
            finish_v(chunks, keys, v_mean + channels, v_inverse + channels, v_scale + channels);
        } else {
            finish_k(chunks, keys, k_mean + channels, k_factor + channels, k_addend + channels, q_factor + channels);
            k_scale_max[kv_head] = 0.0f;
            late_tiles[kv_head] = 0;
        }
        arrive(done.statistics[is_v], 1);
    } else if (is_q) {
        const Rows rows(q, b, h_q, q_stride_b, q_stride_h, q_stride_s, head_dim);
        const int row_blocks = ceil_div(seq_q, BLOCK_M), padded_rows = row_blocks * BLOCK_M;
        const int cta_rows = cta_tiles * Q_TILE_ROWS, first_row = index * cta_rows;
        const long long row = static_cast<long long>(head) * padded_rows;
        largest_q_scales += static_cast<long long>(head) * q_tiles(row_blocks);
        quantize_q(shared, rows, seq_q, first_row, min(first_row + cta_rows, padded_rows), done.statistics[0],
                   keys.done(), k_mean + channels, q_factor + channels, q_codes + row * HEAD_DIM, q_scale + row,
                   largest_q_scales, q_mean_dot + row, softmax_scale);
    } else {
        const bool is_v = index < v_ctas;
        const int part = is_v ? index % V_CTAS : 0;
        const int first_tile = (is_v ? index / V_CTAS : index - v_ctas) * cta_tiles;
        const int end_tile = min(first_tile + cta_tiles, num_tiles);
        const long long head_tile = static_cast<long long>(kv_head) * num_tiles;
        if (is_v) {
            const Rows rows(v, b, h, v_stride_b, v_stride_h, v_stride_s, head_dim);
            v_codes += head_tile * (V_CHUNKS * V_ROWS * 16), lost += head_tile * HEAD_DIM;
            v_mean += channels, v_inverse += channels, v_scale += channels;
            if (quantize_v(shared.v, shared.v_sums, rows, first_tile, end_tile, part, done.statistics[1], keys, v_mean,
                           v_inverse, v_codes, lost))
                done.v_exceeds = 1;
            if (arrive(done.v_tiles, 1) != v_ctas - 1) return;
            if (SAMPLE_KEYS && keys.is_sample() && load_acquire(&done.v_exceeds))
                requantize_v(shared, rows, seq_kv, num_tiles, done, chunks + (2LL * kv_head + 1) * SUM_CHUNKS, v_mean,
                             v_inverse, v_scale, v_codes, lost);
            finish_v_offset(shared.range_sums, lost, num_tiles, seq_kv, v_mean, v_scale,
                            v_offset + (num_tiles + 1) * channels);
        } else {
            if (kv_head >= early_heads) return;
            const Rows rows(k, b, h, k_stride_b, k_stride_h, k_stride_s, head_dim);
            quantize_k(shared, rows, seq_kv, first_tile, end_tile, done.statistics[0], keys.done(), k_factor + channels,
                       k_addend + channels, k_codes + head_tile * (BLOCK_N * HEAD_DIM), k_scale + head_tile * KEY_GROUPS,
                       k_scale_max + kv_head);
        }
    }
}
