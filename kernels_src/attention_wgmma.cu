// Attention on Hopper (sm_90a): docs/numerics.md, steps 4 to 8.
//
// A persistent CTA of one producer warpgroup, which fills a ring of K and V tiles by bulk copies, and
// NUM_WARPGROUPS consumer warpgroups of 64 query rows each. While a consumer forms P of tile j, the tensor
// cores multiply P V of tile j - 1; Q K^T of tile j + 1 is issued as soon as the registers of S are free.
//
// Where the work items do not divide into as many equal shares as there are CTAs, some of them are cut in two: a CTA
// does the first tiles of an item, and the next CTA ends with the others (`Schedule`).
//
// CTAs start while the last ones of `quantize` are running: the first item is found before its results are waited for.
// Where heads are late (late_heads.cuh), an item is waited for until its head is there.
//
// Grid at most one CTA an SM, block 128 (NUM_WARPGROUPS + 1), DYNAMIC_SHARED_BYTES of dynamic shared memory.

#include "fragments.cuh"
#include "late_heads.cuh"
#include "output.cuh"
#include "progress.cuh"
#include "q_scales.cuh"
#include "schedule.cuh"
#include "wgmma.cuh"

constexpr int NUM_WARPGROUPS = BLOCK_M / 64;
// Of 96 channels 240 would be more than enough: ptxas then has two places for S, and spills.
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = NUM_WARPGROUPS == 3 ? 160 : CHANNELS == 96 ? 224 : 240;
constexpr int CONSUMER_THREADS = 128 * NUM_WARPGROUPS;
constexpr int V_ROWS = CHANNELS + ROW_SUM_ROWS;  // HEAD_DIM is what is stored of Q and K, CHANNELS what is computed
constexpr int PANEL = HEAD_DIM < 128 ? HEAD_DIM : 128;  // channels that lie together; 128 or 64 bytes of Q and K
constexpr int PANELS = HEAD_DIM / PANEL;
constexpr unsigned LAYOUT_QK = PANEL == 64 ? LAYOUT_SWIZZLE_64 : LAYOUT_SWIZZLE_128;

static_assert(LINEAR, "scores are denormals");
static_assert(ROW_SUM_ROWS == 8, "the row sum is one more group of 8 columns of V");
static_assert(BLOCK_N % 32 == 0, "P V takes 32 keys at a time");
static_assert(BLOCK_M % 64 == 0, "a warpgroup owns 64 rows");
static_assert(NUM_WARPS == 4 * (1 + NUM_WARPGROUPS), "a producer warpgroup beside the consumers");

// Of O a thread's registers hold the first channels, shared memory the others.
constexpr int O_CHANNELS = CHANNELS <= 192 ? CHANNELS : 160, O_SHARED_CHANNELS = CHANNELS - O_CHANNELS;
static_assert(O_CHANNELS % 32 == 0, "32 channels are written at a time");
static_assert(O_SHARED_CHANNELS <= O_CHANNELS, "these are written from the registers of those");

static_assert(UNROLLED % 2 == 0, "the two buffers of P take turns");
static_assert(PROMOTE_EVERY % UNROLLED == 0, "an interval begins where the main loop does");
static_assert(STAGES >= 3, "Q K^T of tile j + 1 is issued before P V of tile j - 1 has ended");

constexpr int Q_BYTES = BLOCK_M * HEAD_DIM;
constexpr int K_BYTES = BLOCK_N * HEAD_DIM;
constexpr int V_BYTES = BLOCK_N * V_ROWS;
constexpr int align_up(int bytes, int to) { return (bytes + to - 1) / to * to; }

// What a consumer needs of a work item beside Q.
struct __align__(16) ItemScales {
    float q_scale[BLOCK_M];
    float q_mean_dot[BLOCK_M];  // only with RETURN_LSE
    float v_scale[HEAD_DIM];
    float v_offset[HEAD_DIM];
    Part part;
    float k_scale_max;
};

// Byte offsets into dynamic shared memory (1024-byte aligned: the swizzle is a function of the address).
// Q and its scales are there twice, where there is room: the next work item's arrive during this one.
constexpr int Q_BUFFERS = PANELS == 1 ? 2 : 1;
// Where they are, a CTA's first item has no tiles and no rows: a rehearsal, by which the code that ends an item comes
// into the instruction caches before the first data arrive.
constexpr bool REHEARSED = Q_BUFFERS > 1;
constexpr int K_OFFSET = Q_BUFFERS * Q_BYTES;  // of stage 0
constexpr int V_OFFSET = K_OFFSET + K_BYTES;
constexpr int STAGE_BYTES = align_up(K_BYTES + V_BYTES, 1024);
constexpr int SCALE_OFFSET = K_OFFSET + STAGES * STAGE_BYTES;  // k_scale: 16 bytes a stage
constexpr int ITEM_OFFSET = SCALE_OFFSET + STAGES * 16;
constexpr int ONES_OFFSET = ITEM_OFFSET + Q_BUFFERS * sizeof(ItemScales);
constexpr int ONES_BYTES = START_BY_PRODUCT ? 32 * BLOCK_N : 0;  // a matrix of 255, for SCORE_START
constexpr int O_OFFSET = ONES_OFFSET + ONES_BYTES;  // [O_SHARED_CHANNELS / 8][thread][row][2]
constexpr int BARRIER_OFFSET = O_OFFSET + CONSUMER_THREADS * O_SHARED_CHANNELS * 2;

// Barriers, 8 bytes each: an item's Q and scales, and a stage's K and V, have arrived or are done with.
enum Barrier { Q_FULL, Q_EMPTY = Q_FULL + Q_BUFFERS, FULL = Q_EMPTY + Q_BUFFERS, EMPTY = FULL + STAGES,
               NUM_BARRIERS = EMPTY + STAGES };
constexpr int READY_OFFSET = BARRIER_OFFSET + NUM_BARRIERS * 8;  // heads that are there, where some are late
static_assert(Q_BYTES % 1024 == 0 && READY_OFFSET + 16 == DYNAMIC_SHARED_BYTES,
              "sagepp/launch.py counts the same");

extern __shared__ __align__(1024) unsigned char dynamic_shared[];

__device__ __forceinline__ ItemScales* item_scales() {
    return reinterpret_cast<ItemScales*>(dynamic_shared + ITEM_OFFSET);
}

__device__ __forceinline__ unsigned barrier(unsigned shared, int which) {
    return shared + BARRIER_OFFSET + 8 * which;
}

// ---- producer ----------------------------------------------------------------------------------

// `part`s are written to shared memory and read from there: a producer thread has few registers.
__device__ __forceinline__ void produce(unsigned shared, const signed char* q_codes, const float* q_scale,
                                        const float* largest_q_scales, const float* q_mean_dot,
                                        const signed char* k_codes, const float* k_scale, const float* k_scale_max,
                                        const unsigned char* v_codes, const float* v_scale, const float* v_offset,
                                        const Problem& problem, unsigned* ticket, unsigned* arrivals, bool some_late) {
    RingPosition<STAGES> ring;
    for (int n = 0;; ++n) {
        const int buffer = n % Q_BUFFERS;
        const unsigned q_full = barrier(shared, Q_FULL + buffer);
        if (n >= Q_BUFFERS) mbarrier_wait(barrier(shared, Q_EMPTY + buffer), (n / Q_BUFFERS - 1) & 1);
        ItemScales& destination = item_scales()[buffer];
        Part& part = destination.part;
        if (REHEARSED && n == 0) {
            part.item.head = 0, part.item.row_block = problem.num_row_blocks();  // beyond the last
            part.begin = part.end = part.item.num_tiles = 0;
            mbarrier_arrive(q_full);
            continue;
        }
        if (!Schedule{problem}.part(n - REHEARSED, part, ticket)) {
            part.item.head = -1;
            mbarrier_arrive(q_full);
            return;
        }
        if (part.continues()) {
            unsigned& before = arrivals[blockIdx.x - 1];
            while (load_acquire(&before) < CONSUMER_THREADS / 32) {}
            before = 0;  // for the next launch
        }
        const int key_tiles = problem.num_key_tiles();
        const long long kv_head = part.item.kv_head, q_head = part.item.head;
        if (some_late)
            await_head(shared + READY_OFFSET, kv_head);
        else
            wait_for_previous_kernel();
        destination.k_scale_max = k_scale_max[kv_head];
        const int row_blocks = problem.num_row_blocks();
        const float row_scale = largest_q_scale(largest_q_scales, q_head, row_blocks, part.item.row_block);
        part.item.num_unrolled_tiles = is_steep(row_scale, k_scale_max[kv_head]) ? 0 : part.item.num_plain_tiles;
        mbarrier_arrive_expect_bytes(q_full, Q_BYTES + 4 * ((1 + RETURN_LSE) * BLOCK_M + 2 * HEAD_DIM));
        const long long q_tile = q_head * row_blocks + part.item.row_block;
        if (RETURN_LSE)
            bulk_copy(shared_address(destination.q_mean_dot), q_mean_dot + q_tile * BLOCK_M, 4 * BLOCK_M, q_full);
        bulk_copy(shared + buffer * Q_BYTES, q_codes + q_tile * Q_BYTES, Q_BYTES, q_full);
        bulk_copy(shared_address(destination.q_scale), q_scale + q_tile * BLOCK_M, 4 * BLOCK_M, q_full);
        bulk_copy(shared_address(destination.v_scale), v_scale + kv_head * HEAD_DIM, 4 * HEAD_DIM, q_full);
        const long long offset = kv_head * (key_tiles + 1) + part.item.num_full_tiles;
        bulk_copy(shared_address(destination.v_offset), v_offset + offset * HEAD_DIM, 4 * HEAD_DIM, q_full);
        const long long first = kv_head * key_tiles + part.begin;
        const signed char* k = k_codes + first * K_BYTES;
        const unsigned char* v = v_codes + first * V_BYTES;
        const float* scale = k_scale + first * 4;
#pragma unroll 2
        for (int tiles = part.end - part.begin; tiles > 0; --tiles, ring.advance()) {
            const unsigned full = barrier(shared, FULL + ring.stage), stage = shared + ring.stage * STAGE_BYTES;
            mbarrier_wait(barrier(shared, EMPTY + ring.stage), ring.parity ^ 1);
            mbarrier_arrive_expect_bytes(full, K_BYTES + 16 + V_BYTES);
            bulk_copy(stage + K_OFFSET, k, K_BYTES, full);
            bulk_copy(shared + SCALE_OFFSET + 16 * ring.stage, scale, 16, full);
            bulk_copy(stage + V_OFFSET, v, V_BYTES, full);
            k += K_BYTES, scale += 4, v += V_BYTES;
        }
    }
}

// ---- consumer ----------------------------------------------------------------------------------

// The first of the thread's two rows, 8 apart; computed where it is needed, because registers are scarce.
__device__ __forceinline__ int row_in_block() {
    int thread = thread_index() - 128;
    return thread / 32 * 16 + thread % 32 / 4;
}

// Keys of a tile that a row sees, counted from the first key of the thread's group.
__device__ __forceinline__ int visible_keys(const Problem& problem, int row, int tile, int group) {
    int end = problem.seq_kv;
    if (CAUSAL) end = min(end, row + problem.causal_offset + 1);
    return end - tile * BLOCK_N - group * (BLOCK_N / 4);
}

// q, k, ones, v: low words of the descriptors of the warpgroup's Q, of the tile's K, of the ones and of the tile's V.
__device__ __forceinline__ void issue_qk(unsigned (&s)[BLOCK_N / 2], unsigned q, unsigned k, unsigned ones) {
    constexpr unsigned HIGH = descriptor_high(8 * PANEL, LAYOUT_QK);
    if (!START_BY_PRODUCT) {
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; ++i) s[i] = SCORE_START;
    }
    wgmma_fence();
    if (START_BY_PRODUCT) wgmma_u8<descriptor_high(256, LAYOUT_PLAIN)>(s, ones);
#pragma unroll
    for (int d = 0; d < CHANNELS; d += 32) {
        int panel = d / PANEL, column = d % PANEL;
        wgmma_s8<HIGH>(s, q + (panel * BLOCK_M * PANEL + column) / 16, k + (panel * BLOCK_N * PANEL + column) / 16);
    }
    wgmma_commit();
}

__device__ __forceinline__ void issue_pv(unsigned (&t)[V_ROWS / 4], const unsigned (&p)[2 * WORDS],
                                         unsigned v, bool accumulate) {
    constexpr unsigned HIGH = descriptor_high(128, LAYOUT_PLAIN);
    wgmma_fence();
#pragma unroll
    for (int key = 0; key < BLOCK_N; key += 32) {
        bool add = key > 0 || accumulate;
        unsigned v_keys = v + key * V_ROWS / 16;
        constexpr int FIRST = (PANELS - 1) * PANEL, LAST = V_ROWS - FIRST;  // the last panel's, and the row sum
        if constexpr (FIRST == 128) wgmma_e4m3_n128<HIGH>(t, p + key / 8, v_keys, add);
        if constexpr (LAST == 72) wgmma_e4m3_n72<HIGH>(t + FIRST / 4, p + key / 8, v_keys + FIRST, add);
        if constexpr (LAST == 104) wgmma_e4m3_n104<HIGH>(t + FIRST / 4, p + key / 8, v_keys + FIRST, add);
        if constexpr (LAST == 136) wgmma_e4m3_n136<HIGH>(t + FIRST / 4, p + key / 8, v_keys + FIRST, add);
        static_assert(LAST == 72 || LAST == 104 || LAST == 136, "there is a product for it");
    }
    wgmma_commit();
}

// Whether P V of a tile begins a promotion interval.
__device__ __forceinline__ bool begins_interval(int tile) { return (tile + 1) % PROMOTE_EVERY == 0; }

struct Row : RowState {
    float l;
};

struct Consumer {
    const Problem& problem;
    const unsigned shared;
    unsigned q;         // descriptor of the warpgroup's rows of Q
    RingPosition<STAGES> ring;  // of the next tile whose Q K^T will be issued
    float k_scale;      // of the latest one
    bool moved;         // whether a bound of the warp has moved in the latest tile, after others
    float alpha[2];     // if so, the factor of what was summed before, a row
    Row row[2];
    unsigned s[BLOCK_N / 2];  // S: integer scores as they arrive (step 6)
    unsigned p[2 * WORDS];    // P: E4M3 codes, the A fragments of P V
    unsigned t[V_ROWS / 4];   // T of a promotion interval, FP16 pairs; the last group is the row sum
    float o[O_CHANNELS / 2];  // O: o[4i + 2r + e] has the channel of half e of t[2i + r]

    // What follows after o[], in shared memory: four numbers, every CONSUMER_THREADS float4.
    __device__ float4* o_shared() {
        return reinterpret_cast<float4*>(dynamic_shared + O_OFFSET) + thread_index() - 128;
    }

    // f(o, i) of o[4i] .. o[4i + 3], which it may change, for the whole of O.
    template <class F> __device__ void update_o(F f) {
#pragma unroll
        for (int i = 0; i < O_CHANNELS / 8; ++i) f(o + 4 * i, i);
#pragma unroll
        for (int i = 0; i < O_SHARED_CHANNELS / 8; ++i) {
            float4* group = o_shared() + i * CONSUMER_THREADS;
            float x[4] = {group->x, group->y, group->z, group->w};
            f(x, O_CHANNELS / 8 + i);
            *group = make_float4(x[0], x[1], x[2], x[3]);
        }
    }

    // What is in shared memory to the first registers.
    __device__ void load_o() {
#pragma unroll
        for (int i = 0; i < O_SHARED_CHANNELS / 8; ++i) {
            float4 x = o_shared()[i * CONSUMER_THREADS];
            o[4 * i] = x.x, o[4 * i + 1] = x.y, o[4 * i + 2] = x.z, o[4 * i + 3] = x.w;
        }
    }

    // Step 7: O = O + T and l = l + l_T.
    __device__ void promote() {
        update_o([&](float* o, int i) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                o[2 * r] = __fadd_rn(o[2 * r], low_half(t[2 * i + r]));
                o[2 * r + 1] = __fadd_rn(o[2 * r + 1], high_half(t[2 * i + r]));
            }
        });
#pragma unroll
        for (int r = 0; r < 2; ++r) row[r].l = __fadd_rn(row[r].l, low_half(t[CHANNELS / 4 + r]));
    }

    __device__ void release(int which) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier(shared, which));
    }

    // Waits for the tile at `ring`. In fours before the softmax of the tile before: a wait ends a basic block, and one
    // directly before Q K^T kept the warp from Q K^T when its registers were free (docs/performance.md).
    __device__ void await_tile() { mbarrier_wait(barrier(shared, FULL + ring.stage), ring.parity); }

    // Q K^T of the tile at `ring`, which has arrived. Returns its stage.
    __device__ int start_scores() {
        int stage = ring.stage;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(k_scale)
                     : "r"(shared + SCALE_OFFSET + 16 * stage + threadIdx.x % 4 * 4) : "memory");
        issue_qk(s, q, descriptor_low(shared + stage * STAGE_BYTES + K_OFFSET, 16),
                 descriptor_low(shared + ONES_OFFSET, 128));
        ring.advance();
        return stage;
    }

    // P V of the tile in `stage`, added to T or not.
    __device__ void add_values(const unsigned (&p)[2 * WORDS], int stage, bool accumulate) {
        issue_pv(t, p, descriptor_low(shared + stage * STAGE_BYTES + V_OFFSET, V_ROWS * 16), accumulate);
    }

    // Steps 5 and 6 for `tile`. `sees[r]`: row r sees keys of the thread's group. Where a bound moves, what was summed
    // before it follows by `follow_bounds`, after a wait that all warps share: P V of the tile before is still under way,
    // and no instruction of `wgmma`, a wait neither, may be where one warp comes alone (the PTX ISA leaves it undefined).
    template <bool MAY_BE_STEEP>
    __device__ void softmax(unsigned (&p)[2 * WORDS], int tile, const bool (&sees)[2]) {
        RowMap map[2] = {RowMap(row[0], k_scale), RowMap(row[1], k_scale)};
        int largest[2];
        bool moves[2], steep[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            largest[r] = largest_score(s, r);
            moves[r] = sees[r] && map[r].reaches_limit(largest[r]);
            steep[r] = MAY_BE_STEEP && is_steep(row[r].scale, k_scale);
        }
        moved = __any_sync(FULL_MASK, moves[0] || moves[1] || steep[0] || steep[1]);
        if (__builtin_expect(moved, 0)) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int score = integer_score(largest[r]);
                if (steep[r]) {
                    map[r] = RowMap(row[r], k_scale, score);
                    moves[r] = sees[r] && map[r].reaches_limit(0);
                }
                float bound = tile_bound(score, sees[r], row[r].scale, k_scale);
                alpha[r] = 1.0f;
                if (quad_or(moves[r])) {
                    alpha[r] = shrink_factor(row[r].bound, bound);
                    row[r].bound = bound;
                    map[r] = steep[r] ? RowMap(row[r], k_scale, score) : RowMap(row[r], k_scale);
                }
                if (MAY_BE_STEEP && __any_sync(FULL_MASK, steep[r])) subtract_scores(s, r, steep[r] ? largest[r] : 0);
            }
            moved = tile > 0;
        }
        form_row(p, map[0], s, 0);
        form_row(p, map[1], s, 1);
    }

    // What was summed before the bounds of the latest tile.
    __device__ void follow_bounds() {
        if (__builtin_expect(moved, 0)) {
            update_o([&](float* o, int) {
#pragma unroll
                for (int i = 0; i < 4; ++i) o[i] = __fmul_rn(o[i], alpha[i / 2]);
            });
#pragma unroll
            for (int r = 0; r < 2; ++r) row[r].l = __fmul_rn(row[r].l, alpha[r]);
            const unsigned alphas[2] = {cvt_f16x2(alpha[0], alpha[0]), cvt_f16x2(alpha[1], alpha[1])};
#pragma unroll
            for (int i = 0; i < V_ROWS / 4; ++i) t[i] = mul_f16x2(t[i], alphas[i % 2]);
        }
    }

    // Steps 5 and 6 for a tile that the mask may hide in part: hidden scores are below all others, their P is 0.
    __device__ void softmax(unsigned (&p)[2 * WORDS], const WorkItem& item, int tile) {
        const bool masked = tile >= item.num_plain_tiles;
        int visible[2] = {BLOCK_N, BLOCK_N};
        if (masked) {
            int row = item.row_block * BLOCK_M + row_in_block(), group = thread_index() % 4;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                visible[r] = visible_keys(problem, row + 8 * r, tile, group);
#pragma unroll
                for (int i = 0; i < 4 * WORDS; ++i)
                    if (i >= visible[r]) s[score_index(i / 4, r, i % 4)] = 0;
            }
        }
        softmax<true>(p, tile, {visible[0] > 0, visible[1] > 0});
        if (!masked) return;
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int i = 0; i < WORDS; ++i) p[word_index(i, r)] = mask_p(p[word_index(i, r)], visible[r] - 4 * i);
    }

    // P V of the tile before `tile`, whose P is `p`, added to T; to nothing where it begins an interval, and T goes
    // into O before. Of the first tile of a part, `fresh`, nothing is before: P is 0.
    __device__ void continue_values(const unsigned (&p)[2 * WORDS], int stage, int tile, bool fresh) {
        const bool begins = !fresh && begins_interval(tile - 1);
        if (begins) promote();
        add_values(p, stage, !begins);
    }

    // Tile `first + I` of UNROLLED unmasked ones, whose Q K^T is under way: P V of the tile before it, in stage
    // `last`, under its softmax, then the next one's Q K^T and so on. Not a loop: ptxas serialises products that are
    // under way at the end of a loop's body (C7514). Returns the stage of the last tile.
    template <int I>
    __device__ int step(unsigned (&p)[2 * WORDS], unsigned (&next_p)[2 * WORDS], int begin, int first, int last,
                        int current) {
        const bool fresh = I == 0 && first == begin;
        if constexpr (I == 0)
            continue_values(p, last, first, fresh);
        else
            add_values(p, last, true);
        wgmma_wait<1>();
        if (I + 1 < UNROLLED) await_tile();
        softmax<false>(next_p, first + I, {true, true});
        if constexpr (I + 1 < UNROLLED) {
            int next = start_scores();
            wgmma_wait<1>();
            follow_bounds();
            if (!fresh) release(EMPTY + last);
            return step<I + 1>(next_p, p, begin, first, current, next);
        } else {
            wgmma_wait<0>();
            follow_bounds();
            release(EMPTY + last);
            return current;
        }
    }

    // Tiles `begin` to `end` - 1 of an item, at least one; afterwards T is still to be promoted. P of the tile before
    // them is 0, and its P V takes V of the first.
    __device__ void attend(const Part& part) {
        const int begin = part.begin, end = part.end;
        const int unrolled_end = min(end, part.item.num_unrolled_tiles) - UNROLLED;
#pragma unroll
        for (int i = 0; i < 2 * WORDS; ++i) p[i] = 0;
        wgmma_wait<0>();  // there is none, which ptxas cannot know (C7517)
        int tile = begin, last = ring.stage;
        for (; tile <= unrolled_end; tile += UNROLLED) {
            unsigned next_p[2 * WORDS];
            await_tile();
            int current = start_scores();
            last = step<0>(p, next_p, begin, tile, last, current);
        }
        for (; tile < end; ++tile) {
            unsigned next_p[2 * WORDS];
            await_tile();
            int current = start_scores();
            continue_values(p, last, tile, tile == begin);
            wgmma_wait<1>();
            softmax(next_p, part.item, tile);
            wgmma_wait<0>();
            follow_bounds();
            if (tile > begin) release(EMPTY + last);
            last = current;
#pragma unroll
            for (int i = 0; i < 2 * WORDS; ++i) p[i] = next_p[i] ^ (problem.seq_q >> 31);  // not a move: C7513
        }
        continue_values(p, last, tile, false);
        wgmma_wait<0>();
        release(EMPTY + last);
    }

    // What a part starts from: no sums.
    __device__ void clear() {
        update_o([](float* o, int) { o[0] = o[1] = o[2] = o[3] = 0.0f; });
#pragma unroll
        for (int i = 0; i < V_ROWS / 4; ++i) t[i] = 0;
    }

    // What one CTA has summed of an item, and another one continues, thread by thread: f(number, its place), which are
    // CONSUMER_THREADS apart.
    template <class F> __device__ void for_each_sum(F f) {
        update_o([&](float* o, int i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) f(o[e], (4 * i + e) * CONSUMER_THREADS);
        });
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            f(row[r].l, (CHANNELS / 2 + r) * CONSUMER_THREADS);
            f(row[r].bound, (CHANNELS / 2 + 2 + r) * CONSUMER_THREADS);
        }
#pragma unroll
        for (int i = 0; i < V_ROWS / 4; ++i) {
            float pair = __uint_as_float(t[i]);
            f(pair, (CHANNELS / 2 + 4 + i) * CONSUMER_THREADS);
            t[i] = __float_as_uint(pair);
        }
    }

    __device__ void give(float* to, unsigned* arrivals) {
        for_each_sum([=](float& x, int place) { to[place] = x; });
        __syncwarp();
        if (threadIdx.x % 32 == 0) add_release(arrivals, 1);
    }

    // Past L1: the producer has waited for it.
    __device__ void take(const float* from) {
        for_each_sum([=](float& x, int place) { x = __ldcg(from + place); });
    }
};

// Sums that a CTA passes to the next one.
struct Handover {
    float sums[CHANNELS / 2 + 4 + V_ROWS / 4][CONSUMER_THREADS];
};

__device__ __forceinline__ void consume(unsigned shared, const Output& out, const Problem& problem, Handover* handovers,
                                        unsigned* arrivals, float sm_scale) {
    int warpgroup = __shfl_sync(FULL_MASK, threadIdx.x / 128, 0) - 1;
    Consumer consumer{problem, shared};
    for (int n = 0;; ++n) {
        int buffer = n % Q_BUFFERS;
        const ItemScales& scales = item_scales()[buffer];
        const Part& part = scales.part;
        const WorkItem& item = part.item;
        consumer.q = descriptor_low(shared + buffer * Q_BYTES + warpgroup * 64 * PANEL, 16);
        mbarrier_wait(barrier(shared, Q_FULL + buffer), n / Q_BUFFERS & 1);
        if (item.head < 0) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float q_scale = scales.q_scale[row_in_block() + 8 * r];
            consumer.row[r] = Row{{limited_row_scale(q_scale, scales.k_scale_max), minus_infinity()}, 0.0f};
        }
        const auto sums = [&](int cta) { return &handovers[cta].sums[0][thread_index() - 128]; };
        if (part.continues())
            consumer.take(sums(blockIdx.x - 1));
        else
            consumer.clear();
        if (part.end > part.begin) consumer.attend(part);
        if (!part.is_last()) {
            consumer.give(sums(blockIdx.x), arrivals + blockIdx.x);
            consumer.release(Q_EMPTY + buffer);
            continue;
        }
        consumer.promote();

        const int item_head = *const_cast<volatile const int*>(&item.head);  // read again: kept, it would be spilled
        int b = item_head / problem.num_heads_q, h = item_head % problem.num_heads_q;
        unsigned short* head = static_cast<unsigned short*>(out.o) + b * out.stride_b + h * out.stride_h;
        unsigned short* destination[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int row_of_block = row_in_block() + 8 * r, row = item.row_block * BLOCK_M + row_of_block;
            destination[r] = row < problem.seq_q ? head + row * out.stride_s : nullptr;
            if (RETURN_LSE && destination[r] && thread_index() % 4 == 0)
                out.lse[static_cast<long long>(item_head) * problem.seq_q + row] = row_lse(
                    consumer.row[r].bound, consumer.row[r].l, sm_scale, scales.q_mean_dot[row_of_block]);
        }
        const auto write = [&](int first, int channels) {
            const float l[2] = {consumer.row[0].l, consumer.row[1].l};
            const float *scale = scales.v_scale, *offset = scales.v_offset;
            if (out.vectors())
                write_rows<true>(destination, out.head_dim, first, channels, consumer.o, l, scale, offset);
            else
                write_rows<false>(destination, out.head_dim, first, channels, consumer.o, l, scale, offset);
        };
        write(0, O_CHANNELS);
        if (O_SHARED_CHANNELS > 0) {
            consumer.load_o();
            write(O_CHANNELS, O_SHARED_CHANNELS);
        }
        consumer.release(Q_EMPTY + buffer);
    }
}

extern "C" __global__ void __launch_bounds__(128 + CONSUMER_THREADS, 1)
attention(const signed char* q_codes, const float* q_scale, const float* largest_q_scales, const float* q_mean_dot,
          const signed char* k_codes, const float* k_scale, const float* k_scale_max, const unsigned char* v_codes,
          const float* v_scale, const float* v_offset, void* o, float* lse, long long o_stride_b, long long o_stride_h,
          long long o_stride_s, int batch, int num_heads_q, int num_heads_kv, int seq_q, int seq_kv,
          int head_dim, int causal_offset, float sm_scale, Progress* progress, unsigned* ticket, Handover* handovers,
          unsigned* arrivals, int shared_items, const unsigned* late_tiles, unsigned* late_begun, int early_heads,
          int head_tiles) {
    unsigned shared = shared_address(dynamic_shared);
    Problem problem{num_heads_q, num_heads_kv, seq_q, seq_kv, causal_offset, batch * num_heads_q, shared_items};
    const LateHeads late{late_tiles, late_begun, early_heads, batch * num_heads_kv, head_tiles};
    if (threadIdx.x == 0) {
        for (int buffer = 0; buffer < Q_BUFFERS; ++buffer) {
            mbarrier_init(barrier(shared, Q_FULL + buffer), 1);
            mbarrier_init(barrier(shared, Q_EMPTY + buffer), CONSUMER_THREADS / 32);
        }
        for (int stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(barrier(shared, FULL + stage), 1);
            mbarrier_init(barrier(shared, EMPTY + stage), CONSUMER_THREADS / 32);
        }
        mbarrier_fence_init();
    }
    if (static_cast<int>(threadIdx.x) < ONES_BYTES / 16)
        reinterpret_cast<uint4*>(dynamic_shared + ONES_OFFSET)[threadIdx.x] = make_uint4(~0u, ~0u, ~0u, ~0u);
    if (threadIdx.x == 0) *reinterpret_cast<int*>(dynamic_shared + READY_OFFSET) = 0;
    async_proxy_fence();
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_lower<PRODUCER_REGISTERS>();
        if (blockIdx.x == 0 && threadIdx.x >= 64) {
            wait_for_previous_kernel();
            clear(progress, batch * num_heads_kv, threadIdx.x - 64, 64);
        }
        if (late.exist() && threadIdx.x / 32 == 1) watch_late_heads(shared + READY_OFFSET, late, gridDim.x);
        if (threadIdx.x < 32 && elect_one())
            produce(shared, q_codes, q_scale, largest_q_scales, q_mean_dot, k_codes, k_scale, k_scale_max, v_codes,
                    v_scale, v_offset, problem, ticket, arrivals, late.exist());
    } else {
        registers_raise<CONSUMER_REGISTERS>();
        Output out{o, lse, o_stride_b, o_stride_h, o_stride_s, head_dim};
        consume(shared, out, problem, handovers, arrivals, sm_scale);
    }
}
