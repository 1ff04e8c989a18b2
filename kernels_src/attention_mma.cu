// Attention by mma.sync, ldmatrix and cp.async: docs/numerics.md, steps 4 to 8, on every GPU since sm_80.
//
// A CTA of 4 warps owns 128 query rows of one head and walks over the tiles of 64 keys, which cp.async
// brings in STAGES - 1 tiles ahead. A warp owns 32 rows, two MMA tiles, so that it uses every fragment of K
// and V twice (with 8 warps: 16 rows, once). S never exists as a whole: it is formed a few keys at a time and
// turned into P at once, which leaves the registers for two CTAs an SM at head_dim 128. The bound rarely
// moves; where it does, Q K^T is computed again.
//
// Grid (row blocks, query heads, batch), block NUM_WARPS * 32, DYNAMIC_SHARED_BYTES of dynamic shared memory.

#include "progress.cuh"
#include "ptx.cuh"
#include "q_scales.cuh"
#include "softmax.cuh"

constexpr int THREADS = NUM_WARPS * 32;
constexpr int M_TILES = BLOCK_M / NUM_WARPS / 16;  // of 16 rows, a warp
constexpr int ROWS = 2 * M_TILES;                  // a thread's: 2m + r is row 16m + 8r + g of the warp
constexpr int KEY_BLOCKS = BLOCK_N / 8;            // columns of S that an MMA makes
constexpr int KEY_BLOCKS_AT_ONCE = HEAD_DIM == 64 && !V_F16 ? 2 : 4;
constexpr int CHANNEL_BLOCKS = HEAD_DIM / 8;
constexpr int CHANNEL_BLOCKS_AT_ONCE = 2;
constexpr int CHANNEL_GROUPS = CHANNEL_BLOCKS / CHANNEL_BLOCKS_AT_ONCE;
constexpr int QK_STEPS = HEAD_DIM / 32;
constexpr int V_CHUNKS = BLOCK_N * (V_F16 ? 2 : 1) / 16;  // of 16 bytes, of one channel in a tile
constexpr int PV_STEPS = V_CHUNKS / 2;
constexpr int BLOCKS_PER_WORD = P_PER_WORD / 2;  // of S, in a word of P
constexpr int WORDS = 2 * PV_STEPS;              // of P, a row and thread
constexpr int MIN_CTAS = NUM_WARPS == 8 ? 1 : HEAD_DIM == 64 && !V_F16 ? 3 : 2;
constexpr unsigned ROW_SUM_COLUMN = V_F16 ? 0x3C003C00u : 0x38383838u;  // of ones

static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "one swizzled panel of Q and K");
static_assert(BLOCK_M == NUM_WARPS * M_TILES * 16, "a warp owns whole MMA tiles");
static_assert(KEY_BLOCKS % KEY_BLOCKS_AT_ONCE == 0 && V_CHUNKS % 4 == 0, "four matrices an ldmatrix");
static_assert(ROW_SUM_UNIT == 1.0f && ROW_SUM_ROWS == 0, "the row sum takes a column of ones, kept in a register");
static_assert(!LINEAR && PROMOTE_EVERY == 1 && STAGES >= 2, "not written");

constexpr int Q_BYTES = BLOCK_M * HEAD_DIM, K_BYTES = BLOCK_N * HEAD_DIM;
constexpr int V_BYTES = V_CHUNKS * HEAD_DIM * 16;

struct Stage {
    unsigned char k[K_BYTES];
    unsigned char v[V_BYTES];
};

struct SharedMemory {
    unsigned char q[Q_BYTES];
    Stage stages[STAGES];
    RowState rows[BLOCK_M];  // here, because registers are short and the bound rarely moves
};
static_assert(sizeof(SharedMemory) == DYNAMIC_SHARED_BYTES, "sagepp/launch.py counts the same");
static_assert(sizeof(SharedMemory::q) + sizeof(SharedMemory::stages) >= BLOCK_M * HEAD_DIM * 2,
              "the output is staged there in the end, before `rows`");

struct Problem {
    int num_heads_q, num_heads_kv, seq_q, seq_kv, causal_offset;

    __device__ int num_row_blocks() const { return (seq_q + BLOCK_M - 1) / BLOCK_M; }
    __device__ int num_key_tiles() const { return (seq_kv + BLOCK_N - 1) / BLOCK_N; }
    // The row sees the keys below this.
    __device__ int visible_end(int row) const {
        return CAUSAL ? min(seq_kv, row + causal_offset + 1) : seq_kv;
    }
};

// What this CTA works on. Made anew wherever it is needed, opaque to the compiler, which would otherwise keep
// it in registers all the while. (A tile has at least 4 KiB: their number fits an int.)
struct WorkItem {
    int row_block, first_row;
    int head, kv_head;  // over the whole batch
    int q_tile;         // over all heads

    __device__ explicit WorkItem(const Problem& problem) {
        int x = opaque(blockIdx.x), h = opaque(blockIdx.y), b = opaque(blockIdx.z);
        row_block = CAUSAL ? gridDim.x - 1 - x : x;  // the longest first
        first_row = row_block * BLOCK_M;
        head = b * problem.num_heads_q + h;
        kv_head = b * problem.num_heads_kv + h / (opaque(problem.num_heads_q) / problem.num_heads_kv);
        q_tile = head * problem.num_row_blocks() + row_block;
    }

    __device__ int warp_row() const { return first_row + threadIdx.x / 32 * M_TILES * 16; }
};

// ---- memory ------------------------------------------------------------------------------------

// XOR mask of the byte address of a row: its 16-byte chunks are permuted (swizzle) so that the eight rows
// of an ldmatrix lie in different banks.
__device__ __forceinline__ unsigned row_swizzle(int row) {
    return HEAD_DIM == 64 ? (row >> 1 & 3) << 4 : (row & 7) << 4;
}

// A warp copies a contiguous part, so that its addresses are one register and small offsets.
template <int BYTES> __device__ __forceinline__ void copy_to_shared(unsigned destination, const void* source) {
    static_assert(BYTES % (16 * THREADS) == 0, "every thread copies as much");
    unsigned thread = opaque(threadIdx.x), mine = thread / 32 * (BYTES / NUM_WARPS) + thread % 32 * 16;
    unsigned to = opaque(destination + mine);
    const char* from = opaque(static_cast<const char*>(source) + mine);
#pragma unroll
    for (int i = 0; i < BYTES / NUM_WARPS; i += 512) cp_async_16(to + i, from + i);
}

// Starts the copy of a tile of K and V, counted over all KV heads, to its stage.
__device__ __forceinline__ void load_tile(unsigned stage, const signed char* k_codes,
                                          const unsigned char* v_codes, int tile) {
    copy_to_shared<K_BYTES>(stage, k_codes + tile * static_cast<long long>(K_BYTES));
    copy_to_shared<V_BYTES>(stage + K_BYTES, v_codes + tile * static_cast<long long>(V_BYTES));
}

// ---- one tile ----------------------------------------------------------------------------------

// V of a group of channels and a tile: B fragments, chunk c of channel block i in word[i][c].
struct Fragments {
    unsigned word[CHANNEL_BLOCKS_AT_ONCE][V_CHUNKS];
};

// A branch that is never taken, as `never` is at most 0 and `positive` is not: the compiler schedules what
// stands before it and after it separately, where it would otherwise compute all scores first and only
// then, with the tensor cores idle, P. Every fence needs another value of `never`.
__device__ __forceinline__ void scheduling_fence(int never, int positive) {
    if (opaque(never) >= positive) __trap();
}

// Where a lane's rows of the operands lie in shared memory, for ldmatrix.
struct Operands {
    unsigned q, k, v;  // k and v: of the current stage

    __device__ void load_v(Fragments& to, int group) const {
#pragma unroll
        for (int i = 0; i < CHANNEL_BLOCKS_AT_ONCE; ++i)
#pragma unroll
            for (int chunk = 0; chunk < V_CHUNKS; chunk += 4) {
                int channel = (group * CHANNEL_BLOCKS_AT_ONCE + i) * 8;
                unsigned m[4];
                ldmatrix_x4(m, v + (chunk * HEAD_DIM + channel) * 16);
#pragma unroll
                for (int c = 0; c < 4; ++c) to.word[i][chunk + c] = m[c];
            }
    }

    // S of COUNT * 8 columns, from column 8 * block on.
    template <int COUNT> __device__ void scores(unsigned (&s)[M_TILES][COUNT][4], int block) const {
#pragma unroll
        for (int step = 0; step < QK_STEPS; ++step) {
            unsigned a[M_TILES][4], b[COUNT / 2][4];
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) ldmatrix_x4(a[m], (q ^ step << 5) + m * 16 * HEAD_DIM);
#pragma unroll
            for (int i = 0; i < COUNT; i += 2)
                ldmatrix_x4(b[i / 2], (k ^ step << 5) + (block + i) * 8 * HEAD_DIM);
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    unsigned b0 = b[i / 2][i % 2 * 2], b1 = b[i / 2][i % 2 * 2 + 1];
                    if (step == 0) mma_s8(s[m][i], a[m], b0, b1, SCORE_START);
                    else mma_s8(s[m][i], a[m], b0, b1);
                }
        }
    }
};

// P of a warp's rows and a tile: the A fragments of P V. Word w of a row and thread holds keys
// w P_PER_WORD, ... of the thread's key group.
struct Weights {
    unsigned fragment[M_TILES][PV_STEPS][4];

    __device__ unsigned& word(int row, int w) { return fragment[row / 2][w / 2][w % 2 * 2 + row % 2]; }
    __device__ const unsigned& word(int row, int w) const {
        return fragment[row / 2][w / 2][w % 2 * 2 + row % 2];
    }

    __device__ unsigned flags(int row) const {
        unsigned any = 0;
#pragma unroll
        for (int w = 0; w < WORDS; ++w) any |= limit_flags(word(row, w));
        return any & LIMIT_BITS;
    }
};

// What a thread keeps from tile to tile, for its rows.
struct State {
    RowState* rows;  // in shared memory, from the thread's first row on: row 2m + r at 16m + 8r
    float l[ROWS] = {};
    float o[M_TILES][CHANNEL_BLOCKS][4] = {};  // channel 8i + 2t, + 1 of rows 2m, 2m + 1

    // Part by part: the scores of the next one are computed while P of this one is formed. Where groups MAY_BE_STEEP,
    // they are computed then, which spares registers.
    template <bool MAY_BE_STEEP, class Visible>
    __device__ void form_weights(Weights& p, const Operands& tile, float k_scale, int head_dim,
                                 const Visible& visible) const {
        constexpr int PARTS = KEY_BLOCKS / KEY_BLOCKS_AT_ONCE;
        RowMap map[ROWS];
        int origin[ROWS] = {};
        if (MAY_BE_STEEP) find_largest(origin, tile, visible);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const RowState row = rows[8 * r];
            if (MAY_BE_STEEP && is_steep(row.scale, k_scale)) {
                map[r] = RowMap(row, k_scale, integer_score(origin[r]));
            } else {
                map[r] = RowMap(row, k_scale);
                origin[r] = 0;
            }
        }
        constexpr int AHEAD = MAY_BE_STEEP ? 0 : 1;
        unsigned s[AHEAD + 1][M_TILES][KEY_BLOCKS_AT_ONCE][4];
        if (AHEAD) tile.scores(s[0], 0);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            scheduling_fence(-part, head_dim);
            const int next = part + AHEAD;
            if (next < PARTS) tile.scores(s[next % (AHEAD + 1)], next * KEY_BLOCKS_AT_ONCE);
#pragma unroll
            for (int i = 0; i < KEY_BLOCKS_AT_ONCE; i += BLOCKS_PER_WORD)
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    unsigned score[P_PER_WORD];
#pragma unroll
                    for (int e = 0; e < P_PER_WORD; ++e) {
                        score[e] = s[part % (AHEAD + 1)][r / 2][i + e / 2][r % 2 * 2 + e % 2];
                        if (MAY_BE_STEEP) score[e] = score_below(score[e], origin[r]);
                    }
                    p.word(r, (part * KEY_BLOCKS_AT_ONCE + i) / BLOCKS_PER_WORD) = form_p(map[r], score);
                }
        }
    }

    // The largest visible scores of the thread's rows, as they arrive; 0, below all of them, where none is visible.
    template <class Visible>
    __device__ static void find_largest(int (&largest)[ROWS], const Operands& tile, const Visible& visible) {
        constexpr int COUNT = 4;
        int count[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) largest[r] = 0, count[r] = visible(r);
#pragma unroll 1
        for (int block = 0; block < KEY_BLOCKS; block += COUNT) {
            unsigned s[M_TILES][COUNT][4];
            tile.scores(s, block);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int e = 0; e < 2 * COUNT; ++e) {
                    int score = s[r / 2][e / 2][r % 2 * 2 + e % 2];
                    if (2 * block + e < count[r]) largest[r] = max(largest[r], score);
                }
        }
    }

    // Moves the bound of the rows whose `moves` is not 0 to their largest visible score, and brings O and l
    // to the new bound.
    template <class Visible>
    __device__ void move_bounds(const unsigned (&moves)[ROWS], const Operands& tile, float k_scale,
                                const Visible& visible) {
        int largest[ROWS];
        find_largest(largest, tile, visible);
        float bound[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            RowState row = rows[8 * r];
            bound[r] = tile_bound(integer_score(largest[r]), largest[r] > 0, row.scale, k_scale);
            if (moves[r]) rescale(r, shrink_factor(row.bound, bound[r]));
        }
        __syncwarp();  // a row's four lanes read its bound before they write it
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            if (moves[r]) rows[8 * r].bound = bound[r];
        __syncwarp();
    }

    __device__ void rescale(int r, float alpha) {
        l[r] = __fmul_rn(l[r], alpha);
#pragma unroll
        for (int i = 0; i < CHANNEL_BLOCKS; ++i)
#pragma unroll
            for (int e = 0; e < 2; ++e) o[r / 2][i][r % 2 * 2 + e] = __fmul_rn(o[r / 2][i][r % 2 * 2 + e], alpha);
    }

    // O = O + T and l = l + l_T, with T = P V of this tile alone.
    __device__ void add_product(const Weights& p, const Operands& tile, int head_dim) {
        Fragments v[2];
        unsigned t[2][CHANNEL_BLOCKS_AT_ONCE][M_TILES][2];
        tile.load_v(v[0], 0);
        tile.load_v(v[1], 1);
        multiply(t[0], p, v[0]);
        add_groups<0>(t, v, p, tile, head_dim);
        unsigned sum[M_TILES][2] = {};
#pragma unroll
        for (int step = 0; step < PV_STEPS; ++step)
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) mma_pv(sum[m], p.fragment[m][step], ROW_SUM_COLUMN, ROW_SUM_COLUMN);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) l[r] = __fadd_rn(l[r], low_half(sum[r / 2][r % 2]));
    }

    // Adds GROUP's channels, in t[GROUP % 2], while the products of the next group run, and so on to the last;
    // padding is left out. (The branch also keeps the compiler from having more groups in flight than there
    // are registers.)
    template <int GROUP>
    __device__ void add_groups(unsigned (&t)[2][CHANNEL_BLOCKS_AT_ONCE][M_TILES][2], Fragments (&v)[2],
                               const Weights& p, const Operands& tile, int head_dim) {
        constexpr int NEXT = GROUP + 1, THIS_SLOT = GROUP % 2, NEXT_SLOT = NEXT % 2;
        if constexpr (NEXT < CHANNEL_GROUPS) {
            if (NEXT * CHANNEL_BLOCKS_AT_ONCE * 8 < head_dim) {
                if (NEXT + 1 < CHANNEL_GROUPS) tile.load_v(v[THIS_SLOT], NEXT + 1);
                multiply(t[NEXT_SLOT], p, v[NEXT_SLOT]);
                add_group(t[THIS_SLOT], GROUP);
                add_groups<NEXT>(t, v, p, tile, head_dim);
                return;
            }
        }
        add_group(t[THIS_SLOT], GROUP);
    }

    __device__ void add_group(const unsigned (&t)[CHANNEL_BLOCKS_AT_ONCE][M_TILES][2], int group) {
#pragma unroll
        for (int i = 0; i < CHANNEL_BLOCKS_AT_ONCE; ++i)
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                float* o_pair = &o[r / 2][group * CHANNEL_BLOCKS_AT_ONCE + i][r % 2 * 2];
                o_pair[0] = __fadd_rn(o_pair[0], low_half(t[i][r / 2][r % 2]));
                o_pair[1] = __fadd_rn(o_pair[1], high_half(t[i][r / 2][r % 2]));
            }
    }

    __device__ static void multiply(unsigned (&t)[CHANNEL_BLOCKS_AT_ONCE][M_TILES][2], const Weights& p,
                                    const Fragments& v) {
#pragma unroll
        for (int step = 0; step < PV_STEPS; ++step)
#pragma unroll
            for (int i = 0; i < CHANNEL_BLOCKS_AT_ONCE; ++i)
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    if (step == 0) t[i][m][0] = t[i][m][1] = 0;
                    mma_pv(t[i][m], p.fragment[m][step], v.word[i][2 * step], v.word[i][2 * step + 1]);
                }
    }

    __device__ static void mma_pv(unsigned (&t)[2], const unsigned (&p)[4], unsigned b0, unsigned b1) {
#if V_F16  // not `if constexpr`: sm_80 cannot even assemble the other one
        mma_f16(t, p, b0, b1);
#else
        mma_e4m3(t, p, b0, b1);
#endif
    }

    // Steps 4 to 7. `visible(r)`: keys of the thread's group that row r sees; all, unless `masked`.
    template <class Visible>
    __device__ void step(const Operands& tile, float k_scale, bool first, bool masked, bool may_be_steep, int head_dim,
                         const Visible& visible) {
        Weights p;
        unsigned moves[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) moves[r] = 1;
        for (bool again = first;; again = true) {
            if (again) move_bounds(moves, tile, k_scale, visible);
            if (may_be_steep) form_weights<true>(p, tile, k_scale, head_dim, visible);
            else form_weights<false>(p, tile, k_scale, head_dim, visible);
            if (masked) {
#pragma unroll
                for (int r = 0; r < ROWS; ++r)
#pragma unroll
                    for (int w = 0; w < WORDS; ++w) p.word(r, w) = mask_p(p.word(r, w), visible(r) - w * P_PER_WORD);
            }
            if (again) break;
            unsigned any = 0;
#pragma unroll
            for (int r = 0; r < ROWS; ++r) any |= p.flags(r);
            if (!__any_sync(FULL_MASK, any)) break;
#pragma unroll
            for (int r = 0; r < ROWS; ++r) moves[r] = quad_or(p.flags(r));
        }
        add_product(p, tile, head_dim);
    }
};

// The loop over the key tiles that the CTA sees.
__device__ __forceinline__ void add_tiles(State& state, SharedMemory& memory, unsigned shared,
                                          const Problem& problem, const signed char* q_codes,
                                          const float* q_scale, const float* largest_q_scales,
                                          const signed char* k_codes, const float* k_scale, const float* k_scale_max,
                                          const unsigned char* v_codes, int head_dim) {
    const WorkItem item(problem);
    const int lane = threadIdx.x % 32, kv_tile = item.kv_head * problem.num_key_tiles();
    const int last_row = min(item.first_row + BLOCK_M, problem.seq_q) - 1;
    const int num_tiles = (max(problem.visible_end(last_row), 0) + BLOCK_N - 1) / BLOCK_N;  // that a row sees

    auto stage_of = [&](int tile) {
        return shared + Q_BYTES + tile % STAGES * static_cast<unsigned>(sizeof(Stage));
    };
    auto load = [&](int tile) {
        if (tile < num_tiles) load_tile(stage_of(tile), k_codes, v_codes, kv_tile + tile);
        cp_async_commit();  // an empty group behind the last tile: the count of groups must not depend on it
    };
    copy_to_shared<Q_BYTES>(shared, q_codes + item.q_tile * static_cast<long long>(Q_BYTES));
    for (int tile = 0; tile < STAGES - 1; ++tile) load(tile);
    const float largest_k_scale = k_scale_max[item.kv_head];
    const float q_scale_max = largest_q_scale(largest_q_scales, item.head, problem.num_row_blocks(), item.row_block);
    const bool may_be_steep = is_steep(q_scale_max, largest_k_scale);
    for (int i = threadIdx.x; i < BLOCK_M; i += THREADS) {
        long long row = item.q_tile * static_cast<long long>(BLOCK_M) + i;
        float scale = item.first_row + i < problem.seq_q ? q_scale[row] : 0.0f;
        memory.rows[i] = {limited_row_scale(scale, largest_k_scale), minus_infinity()};
    }

    // ldmatrix: matrix lane / 8, row lane % 8. Q: rows 0-7, 8-15 of two chunks; K: two chunks of two key
    // blocks; V: four chunks of a channel block.
    const unsigned q_lane =
        (threadIdx.x / 32 * M_TILES * 16 + lane % 16) * HEAD_DIM | (lane / 16 * 16 ^ row_swizzle(lane));
    const unsigned k_lane =
        (lane / 16 * 8 + lane % 8) * HEAD_DIM | (lane / 8 % 2 * 16 ^ row_swizzle(lane));
    const unsigned v_lane = (lane / 8 * HEAD_DIM + lane % 8) * 16;
    for (int tile = 0; tile < num_tiles; ++tile) {
        const float group_scale = k_scale[(kv_tile + tile) * 4LL + lane % 4];
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // the tile is there, and all warps are done with the one that makes way
        load(tile + STAGES - 1);
        const WorkItem here(problem);
        const bool masked = (tile + 1) * BLOCK_N > problem.visible_end(here.first_row);
        if (masked && tile * BLOCK_N >= problem.visible_end(here.warp_row() + M_TILES * 16 - 1)) continue;
        const unsigned stage = stage_of(tile);
        state.step({opaque(shared + q_lane), opaque(stage + k_lane), opaque(stage + K_BYTES + v_lane)},
                   group_scale, tile == 0, masked, may_be_steep, head_dim, [&](int r) {
                       int end = problem.visible_end(WorkItem(problem).warp_row() + 8 * r + lane / 4);
                       return end - tile * BLOCK_N - lane % 4 * (BLOCK_N / 4);
                   });
    }
}

// ---- the result --------------------------------------------------------------------------------

struct Output {
    unsigned short* o;  // of this head
    long long stride_s;
    int head_dim, seq_q;

    // The warp's rows from its part of shared memory, rows of HEAD_DIM * 2 bytes in swizzled chunks.
    __device__ void write_rows(const unsigned char* staged, int first_row) const {
        constexpr int CHUNKS = HEAD_DIM / 8;
        bool chunks = (reinterpret_cast<unsigned long long>(o) | stride_s * 2 | head_dim * 2) % 16 == 0;
        for (int i = threadIdx.x % 32; i < M_TILES * 16 * CHUNKS; i += 32) {
            int row = i / CHUNKS, channel = i % CHUNKS * 8;
            if (first_row + row >= seq_q || channel >= head_dim) continue;
            const uint4* source = reinterpret_cast<const uint4*>(staged) + (i ^ (row & 7));
            unsigned short* destination = o + (first_row + row) * stride_s + channel;
            if (chunks) {
                *reinterpret_cast<uint4*>(destination) = *source;
            } else {
                const unsigned short* values = reinterpret_cast<const unsigned short*>(source);
                for (int e = 0; e < min(8, head_dim - channel); ++e) destination[e] = values[e];
            }
        }
    }
};

// Step 8 for the warp's rows; `staged` is the warp's own part of shared memory.
__device__ __forceinline__ void write_output(const State& state, const Output& out, unsigned char* staged,
                                             int first_row, const float* v_scale, const float* v_offset) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float reciprocal[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) reciprocal[r] = __fdiv_rn(ROW_SUM_UNIT, state.l[r]);
#pragma unroll
    for (int i = 0; i < CHANNEL_BLOCKS; ++i) {
        float2 scale = *reinterpret_cast<const float2*>(v_scale + 8 * i + 2 * t);
        float2 offset = *reinterpret_cast<const float2*>(v_offset + 8 * i + 2 * t);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float* o_pair = &state.o[r / 2][i][r % 2 * 2];
            unsigned pair = output_pair(o_pair[0], o_pair[1], reciprocal[r], scale, offset);
            if (state.l[r] == 0.0f) pair = 0;  // sees no key
            unsigned byte = (8 * r + g) * HEAD_DIM * 2 + ((i ^ g) * 16 | t * 4);
            *reinterpret_cast<unsigned*>(staged + byte) = pair;
        }
    }
    __syncwarp();
    out.write_rows(staged, first_row);
}

// ---- the kernel --------------------------------------------------------------------------------

// o: (batch, num_heads_q, seq_q, head_dim) by strides in elements; lse: contiguous. The other buffers are
// the quantiser's. Row i sees the keys up to i + causal_offset.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS)
attention(const signed char* q_codes, const float* q_scale, const float* largest_q_scales,
          const float* q_mean_dot, const signed char* k_codes, const float* k_scale, const float* k_scale_max,
          const unsigned char* v_codes, const float* v_scale, const float* v_offset, void* o, float* lse,
          long long o_stride_b, long long o_stride_h, long long o_stride_s, int batch, int num_heads_q,
          int num_heads_kv, int seq_q, int seq_kv, int head_dim, int causal_offset, float sm_scale,
          Progress* progress) {
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    SharedMemory& memory = *reinterpret_cast<SharedMemory*>(dynamic_shared);
    const unsigned shared = shared_address(dynamic_shared);
    const Problem problem{num_heads_q, num_heads_kv, seq_q, seq_kv, causal_offset};
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0)
        clear(progress, batch * num_heads_kv, threadIdx.x, THREADS);
    State state{memory.rows + warp * M_TILES * 16 + lane / 4};
    add_tiles(state, memory, shared, problem, q_codes, q_scale, largest_q_scales, k_codes, k_scale, k_scale_max,
              v_codes, head_dim);
    __syncthreads();  // the operands make way for the output

    const WorkItem item(problem);
    const int row = item.warp_row() + lane / 4, end = problem.visible_end(item.first_row);
    const int full_tiles = end == seq_kv ? problem.num_key_tiles() : max(end, 0) / BLOCK_N;
    if (RETURN_LSE && lane % 4 == 0) {
        const float* mean_dot = q_mean_dot + item.q_tile * static_cast<long long>(BLOCK_M) - item.first_row;
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            if (row + 8 * r < seq_q)
                lse[static_cast<long long>(item.head) * seq_q + row + 8 * r] =
                    row_lse(state.rows[8 * r].bound, state.l[r], sm_scale, mean_dot[row + 8 * r]);
    }
    const Output out{static_cast<unsigned short*>(o) + blockIdx.z * o_stride_b + blockIdx.y * o_stride_h,
                     o_stride_s, head_dim, seq_q};
    write_output(state, out, dynamic_shared + warp * M_TILES * 16 * HEAD_DIM * 2, item.warp_row(),
                 v_scale + item.kv_head * static_cast<long long>(HEAD_DIM),
                 v_offset + (item.kv_head * (problem.num_key_tiles() + 1LL) + full_tiles) * HEAD_DIM);
}
