// Codes of Q and K of the last heads, on a few SMs, while attention begins with the first ones on the others: section 2 of
// docs/numerics.md, the bits of `quantize.cu`, which leaves these heads out. A warp makes a tile on its own, and waits for
// no other.
//
// Compiled with: HEAD_DIM, BLOCK_M, BLOCK_N, IN_BF16, WITH_MEAN_DOT, and ALIGNED, 1 (`late_defines` in sagepp/launch.py).
// Grid a CTA for each SM that it may have, block LATE_THREADS, LATE_SHARED_BYTES of dynamic shared memory.

#include "divisor.cuh"
#include "int8_rows.cuh"
#include "q_scales.cuh"

// The rows of a key group, or as many of Q, are copied at a time, and worked on in passes.
constexpr int UNIT_ROWS = GROUP_KEYS, UNIT_PASSES = UNIT_ROWS / WARP_ROWS;
constexpr int LATE_WARPS = LATE_THREADS / 32;

static_assert(UNIT_ROWS % WARP_ROWS == 0, "whole passes");
static_assert(BLOCK_M % UNIT_ROWS == 0 && Q_TILE_ROWS % UNIT_ROWS == 0, "whole units");
static_assert(WARP_ROWS % 8 == 0, "rows of codes are swizzled in every pass as in the first");

typedef uint4 UnitRows[UNIT_ROWS][VECTORS];

// Of a warp: what it works on, and what arrives meanwhile.
struct __align__(128) WarpRows {
    UnitRows units[2];
};
static_assert(LATE_WARPS * sizeof(WarpRows) == LATE_SHARED_BYTES, "sagepp/launch.py counts the same");

extern __shared__ __align__(128) unsigned char dynamic_shared[];

// What is made, and of what: arrays as in `quantize.cu`.
struct Late {
    const Half *q, *k;
    long long q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s;
    const Factor *k_factor, *k_addend, *q_factor;
    const float* k_mean;
    signed char *q_codes, *k_codes;
    float *q_scale, *largest_q_scales, *q_mean_dot, *k_scale, *k_scale_max;
    int num_heads_q, num_heads_kv, group, seq_q, seq_kv, head_dim;
    float softmax_scale;
    int early_heads, head_tiles;  // KV heads that are not late; tiles of K and Q that belong to one
    Divisor by_head_tiles, by_q_tiles, by_num_heads_kv, by_num_heads_q;

    __device__ __forceinline__ int row_blocks() const { return ceil_div(seq_q, BLOCK_M); }
    __device__ __forceinline__ int k_tiles() const { return ceil_div(seq_kv, BLOCK_N); }
};

// A tile of K, or Q_TILE_ROWS rows of Q. Of a KV head K's come first, then those of its query heads.
struct Tile {
    bool is_k;
    int kv_head, head, number;  // `head`: the one of Q or K, batch and all

    __device__ __forceinline__ Tile(const Late& late, unsigned index) {
        const int heads = index / late.by_head_tiles, i = index - heads * late.head_tiles, k_tiles = late.k_tiles();
        kv_head = late.early_heads + heads;
        is_k = i < k_tiles;
        const int h = is_k ? 0 : (i - k_tiles) / late.by_q_tiles;
        head = is_k ? kv_head : kv_head * late.group + h;
        number = is_k ? i : i - k_tiles - h * q_tiles(late.row_blocks());
    }
};

// A thread's part in the copies of a tile's rows, unit after unit; rows that do not exist become 0.
struct UnitCopies {
    static constexpr int STEP = 32 / VECTORS;  // rows at a time
    const Half* p;     // of the next unit
    long long stride;  // elements from a row to the next
    int exist;         // rows from the next unit on; 0 or less if none does
    bool is_in_row;    // whether the thread's channels are below head_dim

    __device__ __forceinline__ static int vector() { return threadIdx.x % VECTORS; }
    __device__ __forceinline__ static int first_row() { return threadIdx.x % 32 / VECTORS; }

    __device__ __forceinline__ UnitCopies(const Late& late, const Tile& tile)
        : stride(tile.is_k ? late.k_stride_s : late.q_stride_s), is_in_row(8 * vector() < late.head_dim) {
        const int b = tile.is_k ? tile.head / late.by_num_heads_kv : tile.head / late.by_num_heads_q;
        const int h = tile.head - b * (tile.is_k ? late.num_heads_kv : late.num_heads_q);
        const int row = tile.number * (tile.is_k ? BLOCK_N : Q_TILE_ROWS);
        p = (tile.is_k ? late.k : late.q) + b * (tile.is_k ? late.k_stride_b : late.q_stride_b) +
            h * (tile.is_k ? late.k_stride_h : late.q_stride_h) + (row + first_row()) * stride + 8 * vector();
        exist = (tile.is_k ? late.seq_kv : late.seq_q) - row;
    }

    __device__ __forceinline__ void start(UnitRows& to) {
        const auto copy = [&](int i, bool exists) {
            copy_16_bytes(&to[i + first_row()][vector() ^ vector_swizzle(first_row() + i)], p, exists);
            p += STEP * stride;
        };
        if (exist >= UNIT_ROWS) {
#pragma unroll
            for (int i = 0; i < UNIT_ROWS; i += STEP) copy(i, is_in_row);
        } else {
#pragma unroll 1
            for (int i = 0; i < UNIT_ROWS; i += STEP) copy(i, is_in_row && first_row() + i < exist);
        }
        exist -= UNIT_ROWS;
    }
};

// Factors of a thread's share of a row.
template <class Of> struct ShareFactors {
    Of of[BLOCKS][2];
};

__device__ __forceinline__ void load_share(ShareFactors<OfQ>& x, const Factor* factor) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            load_factors(factor + ROTATION * block_of_row(b) + 8 * half, x.of[b][half].factor);
    }
}

__device__ __forceinline__ void load_share(ShareFactors<OfK>& x, const Factor* factor, const Factor* addend) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            load_factors(factor + ROTATION * block_of_row(b) + 8 * half, x.of[b][half].factor);
            load_factors(addend + ROTATION * block_of_row(b) + 8 * half, x.of[b][half].addend);
        }
    }
}

// A thread's share of a row, times its factors, rotated. f(words of the input, number of their vector, their block)
template <class Of, class F>
__device__ __forceinline__ void rotated(RowValues<BLOCKS>& x, const uint4 (&row)[VECTORS],
                                        const ShareFactors<Of>& share, F f) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4& words = row[vector_place(b, half)];
            f(words, 2 * block_of_row(b) + half, b);
            unscaled(words, share.of[b][half], x[b] + 4 * half);
        }
    }
    rotate(x);
}

// A thread's places in a row of codes, number `row` of a tile [panel][row][PANEL] of `rows` rows.
struct SharePlaces {
    signed char* of_block[BLOCKS];

    __device__ __forceinline__ SharePlaces(signed char* tile, int rows, int row) {
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
            const int panel = block_of_row(b) / (PANEL / 16), chunk = block_of_row(b) % (PANEL / 16);
            of_block[b] = tile + (panel * rows + row) * PANEL + 16 * (chunk ^ swizzle(row));
        }
    }
    // So many rows on, a multiple of 8.
    __device__ __forceinline__ void store(int rows, const RowValues<BLOCKS>& x, Pair inverse) const {
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) *reinterpret_cast<uint4*>(of_block[b] + rows * PANEL) = int8_codes(x[b], inverse);
    }
};

// A unit of Q. row_block: codes; row: of the unit's first one in it; scale, mean_dot: of the warp's row in the first pass.
// Returns the largest scale that the thread has seen.
__device__ __forceinline__ float quantize_unit_of_q(UnitRows& rows, const ShareFactors<OfQ>& share, const Factor* factor,
                                                    const float* k_mean, signed char* row_block, int row, float* scale,
                                                    float* mean_dot, float softmax_scale) {
    const SharePlaces places(row_block, BLOCK_M, row + warp_row());
    float largest_scale = 0.0f;
    const auto finish = [&](const RowValues<BLOCKS>& x, float amax, float unscale, int pass) {
        const Pair inverse = int8_inverse(amax);
        const float row_scale = __fmul_rn(__fmul_rn(int8_scale(amax, inverse), unscale), softmax_scale);
        largest_scale = fmaxf(largest_scale, row_scale);
        places.store(pass * WARP_ROWS, x, inverse);
        if (row_thread() == 0) scale[pass * WARP_ROWS] = row_scale;
    };
    constexpr int TOGETHER = UNIT_PASSES < 2 ? UNIT_PASSES : 2;
#pragma unroll 1
    for (int pass = 0; pass < UNIT_PASSES; pass += TOGETHER) {
        RowValues<BLOCKS> x[TOGETHER];
        float amax[TOGETHER], dot[TOGETHER][BLOCKS] = {};
        bool usual = true;
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            rotated(x[i], rows[(pass + i) * WARP_ROWS + warp_row()], share, [&](const uint4& words, int vector, int b) {
                if (WITH_MEAN_DOT) {
                    float mean[8];
                    load_floats(k_mean + 8 * vector, mean);
                    add_products(words, mean, dot[i][b]);
                }
            });
            amax[i] = largest_of_lanes(largest(x[i]), ROW_THREADS);
            usual = usual && is_usual(amax[i]);
            if (WITH_MEAN_DOT) {
                const float sum = add_dots(dot[i]);
                if (row_thread() == 0) mean_dot[(pass + i) * WARP_ROWS] = sum;
            }
        }
        if (__all_sync(~0u, usual)) {
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) finish(x[i], amax[i], 1.0f, pass + i);
        } else {
            const auto of = [&](int vector) {
                OfQ x;
                load_factors(factor + 8 * vector, x.factor);
                return x;
            };
#pragma unroll 1
            for (int i = 0; i < TOGETHER; ++i) {
                float unscale;
                const float amax = rotated_q(x[0], rows[(pass + i) * WARP_ROWS + warp_row()], unscale, of,
                                             [](const uint4&, int, int) {});
                finish(x[0], amax, unscale, pass + i);
            }
        }
    }
    return largest_scale;
}

// Key group `group` of a tile of K, of which `exist` keys exist. Returns its scale.
__device__ __forceinline__ float quantize_unit_of_k(UnitRows& rows, int exist, const ShareFactors<OfK>& share,
                                                    const Factor* factor, const Factor* addend, signed char* tile,
                                                    int group) {
    // Section 2, "Position of a key"; a row of a pass is four rows of codes.
    const SharePlaces places(tile, BLOCK_N, warp_row() / 2 * 8 + 2 * group + warp_row() % 2);
    RowValues<BLOCKS> x[UNIT_PASSES];
    float of_thread = 0.0f;
#pragma unroll
    for (int pass = 0; pass < UNIT_PASSES; ++pass) {
        rotated(x[pass], rows[pass * WARP_ROWS + warp_row()], share, [](const uint4&, int, int) {});
        of_thread = max_or_nan(of_thread, largest(x[pass]));
    }
    float amax = largest_of_warp(of_thread);
    if (exist >= UNIT_ROWS && is_usual(amax)) {
        const Pair inverse = int8_inverse(amax);
#pragma unroll
        for (int pass = 0; pass < UNIT_PASSES; ++pass) places.store(4 * pass * WARP_ROWS, x[pass], inverse);
        return int8_scale(amax, inverse);
    }
    // As `quantize_k`: without the elements that are not finite, then scaled as well. Pass after pass, each twice.
    const auto of = [&](int vector) {
        OfK x;
        load_factors(factor + 8 * vector, x.factor);
        load_factors(addend + 8 * vector, x.addend);
        return x;
    };
    // f(the warp's row of a pass, whether it exists, number of the pass)
    const auto for_each_pass = [&](auto f) {
#pragma unroll 1
        for (int pass = 0; pass < UNIT_PASSES; ++pass) {
            const int row = pass * WARP_ROWS + warp_row();
            f(rows[row], row < exist, pass);
        }
    };
    bool is_scaled = false;
    const auto load = [&](const uint4 (&row)[VECTORS], bool exists) {
        if (!exists || is_scaled)
            load_row(x[0], row);
        else
            load_row(x[0], row, [&](const uint4& words, Pair* y, int vector, int) { unscaled(words, of(vector), y); });
        rotate(x[0]);
    };
    const auto largest_of_group = [&] {
        float of_thread = 0.0f;
        for_each_pass([&](const uint4 (&row)[VECTORS], bool exists, int) {
            load(row, exists);
            of_thread = max_or_nan(of_thread, largest(x[0]));
        });
        return largest_of_warp(of_thread);
    };
    float unscale = 1.0f;
    for_each_pass([&](uint4 (&row)[VECTORS], bool, int) {
        for_each_vector(row, [](uint4& words, int) { words = finite(words); });
    });
    amax = largest_of_group();
    if (!is_usual(amax)) {
        float of_group = amax;
#if IN_BF16
        float of_thread = 0.0f;
        for_each_pass([&](uint4 (&row)[VECTORS], bool exists, int) {
            if (exists) for_each_vector(row, [&](const uint4& words, int vector) {
                of_thread = max_or_nan(of_thread, largest_product(words, of(vector)));
            });
        });
        of_group = largest_of_warp(of_thread);
#endif
        const float power = power_of(of_group);
        unscale = 1.0f / power;
        for_each_pass([&](uint4 (&row)[VECTORS], bool exists, int) {
            if (exists) for_each_vector(row, [&](uint4& words, int vector) {
                Pair y[4];
                scaled(words, of(vector), power, y);
                words = words_of(y);
            });
        });
        is_scaled = true;
        amax = largest_of_group();
    }
    const bool is_lost = IN_BF16 && !is_finite(amax);  // an FP32 number overflowed
    if (is_lost) amax = 0.0f, unscale = __int_as_float(0x7FFFFFFF);
    const Pair inverse = int8_inverse(amax);
    for_each_pass([&](const uint4 (&row)[VECTORS], bool exists, int pass) {
        load(row, exists);
        if (is_lost) set_zero(x[0]);
        places.store(4 * pass * WARP_ROWS, x[0], inverse);
    });
    return __fmul_rn(int8_scale(amax, inverse), unscale);
}

// The tiles with numbers `first`, `first + step`, ... before `end`, one after the other, by a warp.
__device__ __forceinline__ void quantize_tiles(const Late& late, int first, int step, int end, unsigned* tiles_there) {
    if (first >= end) return;
    WarpRows& shared = reinterpret_cast<WarpRows*>(dynamic_shared)[threadIdx.x / 32];
    const bool is_first_lane = threadIdx.x % 32 == 0;
    const int row_blocks = late.row_blocks();
    Tile next(late, first);
    UnitCopies copies(late, next);
    copies.start(shared.units[0]);
    cp_async_commit();
    int buffer = 0;
#pragma unroll 1
    for (int index = first; index < end; index += step) {
        const Tile tile = next;
        const bool is_last = index + step >= end;
        int exist = copies.exist + UNIT_ROWS;  // from the unit on
        // f(number of a unit, its rows) for the tile's units, while the rows of the next one are copied
        const auto for_each_unit = [&](int units, auto f) {
#pragma unroll 1
            for (int unit = 0; unit < units; ++unit, exist -= UNIT_ROWS) {
                if (unit + 1 == units && !is_last) {
                    next = Tile(late, index + step);
                    copies = UnitCopies(late, next);
                }
                if (unit + 1 < units || !is_last) copies.start(shared.units[buffer ^ 1]);
                cp_async_commit();
                cp_async_wait<1>();
                __syncwarp();
                f(unit, shared.units[buffer]);
                __syncwarp();
                buffer ^= 1;
            }
        };
        const long long channels = static_cast<long long>(tile.kv_head) * HEAD_DIM;
        float largest = 0.0f;
        if (tile.is_k) {
            const long long number = static_cast<long long>(tile.head) * late.k_tiles() + tile.number;
            const Factor *factor = late.k_factor + channels, *addend = late.k_addend + channels;
            ShareFactors<OfK> share;
            load_share(share, factor, addend);
            for_each_unit(KEY_GROUPS, [&](int group, UnitRows& rows) {
                const float scale = quantize_unit_of_k(rows, exist, share, factor, addend,
                                                       late.k_codes + number * (BLOCK_N * HEAD_DIM), group);
                if (is_first_lane) late.k_scale[number * KEY_GROUPS + group] = scale;
                largest = fmaxf(largest, scale);  // a NaN counts as 0
            });
            if (is_first_lane) atomicMax(reinterpret_cast<int*>(late.k_scale_max + tile.head), __float_as_int(largest));
        } else {
            const int first_row = tile.number * Q_TILE_ROWS, rows_of_head = row_blocks * BLOCK_M;
            const long long head_row = static_cast<long long>(tile.head) * rows_of_head;
            const Factor* factor = late.q_factor + channels;
            ShareFactors<OfQ> share;
            load_share(share, factor);
            for_each_unit(min(Q_TILE_ROWS, rows_of_head - first_row) / UNIT_ROWS, [&](int unit, UnitRows& rows) {
                const int row = first_row + unit * UNIT_ROWS;
                const long long scale_place = head_row + row + warp_row();
                largest = fmaxf(largest, quantize_unit_of_q(
                    rows, share, factor, late.k_mean + channels,
                    late.q_codes + (head_row + row / BLOCK_M * BLOCK_M) * HEAD_DIM, row % BLOCK_M,
                    late.q_scale + scale_place, late.q_mean_dot + scale_place, late.softmax_scale));
            });
            largest = largest_of_warp(largest);
            if (is_first_lane)
                late.largest_q_scales[static_cast<long long>(tile.head) * q_tiles(row_blocks) + tile.number] = largest;
        }
        __syncwarp();
        if (is_first_lane) add_release(tiles_there + tile.kv_head, 1);
    }
}

// `late_tiles`: of a KV head, those that are there, for `watch_late_heads`; 0 at the start. `late_begun` becomes 1 when
// the results of `quantize` are there. Other arrays, strides and divisors as in `quantize.cu`; `num_late_tiles` in all.
extern "C" __global__ void __launch_bounds__(LATE_THREADS, 1) late_codes(
    const Half* q, const Half* k, long long q_stride_b, long long q_stride_h, long long q_stride_s, long long k_stride_b,
    long long k_stride_h, long long k_stride_s, const Factor* k_factor, const Factor* k_addend, const Factor* q_factor,
    const float* k_mean, signed char* q_codes, signed char* k_codes, float* q_scale, float* largest_q_scales,
    float* q_mean_dot, float* k_scale, float* k_scale_max, int num_heads_q, int num_heads_kv, int group, int seq_q,
    int seq_kv, int head_dim, float softmax_scale, int early_heads, int head_tiles, Divisor by_head_tiles,
    Divisor by_q_tiles, Divisor by_num_heads_kv, Divisor by_num_heads_q, int num_late_tiles, unsigned* late_tiles,
    unsigned* late_begun) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    if (blockIdx.x == 0 && threadIdx.x == 0) add_release(late_begun, 1);
    const Late late{q, k, q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, k_factor, k_addend,
                    q_factor, k_mean, q_codes, k_codes, q_scale, largest_q_scales, q_mean_dot, k_scale, k_scale_max,
                    num_heads_q, num_heads_kv, group, seq_q, seq_kv, head_dim, softmax_scale, early_heads, head_tiles,
                    by_head_tiles, by_q_tiles, by_num_heads_kv, by_num_heads_q};
    const int ctas = gridDim.x;  // the tiles that come first are spread over the SMs
    quantize_tiles(late, threadIdx.x / 32 * ctas + blockIdx.x, LATE_WARPS * ctas, num_late_tiles, late_tiles);
}
