// What the persistent CTAs of attention_wgmma.cu do: work items, and how they are dealt out.
//
// Compiled with: BLOCK_M, BLOCK_N, PROMOTE_EVERY, CAUSAL.
#pragma once

// Tiles of the main loop; items are cut between such groups.
constexpr int UNROLLED = PROMOTE_EVERY < 4 ? PROMOTE_EVERY : 4;

struct Problem {
    int num_heads_q, num_heads_kv, seq_q, seq_kv, causal_offset;
    int num_heads;     // batch * num_heads_q
    int shared_items;  // of `Schedule`

    __device__ int num_row_blocks() const { return (seq_q + BLOCK_M - 1) / BLOCK_M; }
    // Heads whose causal items come last, and mixed: four items a CTA, or a few more.
    __device__ int last_heads() const { return min(num_heads, 4 * static_cast<int>(gridDim.x) / num_row_blocks() + 1); }
    __device__ int num_key_tiles() const { return (seq_kv + BLOCK_N - 1) / BLOCK_N; }
};

// A block of query rows of one head, and the key tiles that it sees.
struct WorkItem {
    int head;       // batch * num_heads_q + head
    int kv_head;    // batch * num_heads_kv + KV head
    int row_block;
    int num_tiles;       // tiles that some row sees
    int num_full_tiles;  // tiles that every row sees, as far as they go
    int num_plain_tiles;  // of those, the ones without absent keys: nothing to mask
    int num_unrolled_tiles;  // of those, what the main loop may take: none where key groups may be steep

    WorkItem() = default;
    __device__ WorkItem(const Problem& problem, unsigned index) {
        const unsigned row_blocks = problem.num_row_blocks();
        head = index / row_blocks, row_block = index % row_blocks;
        if (CAUSAL) {
            const unsigned heads = problem.last_heads(), first = problem.num_heads - heads;
            if (head >= static_cast<int>(first)) {
                index -= first * row_blocks;
                head = first + index % heads, row_block = index / heads;
            }
            row_block = row_blocks - 1 - row_block;  // the longest first
        }
        int b = head / problem.num_heads_q, h = head % problem.num_heads_q;
        kv_head = b * problem.num_heads_kv + h / (problem.num_heads_q / problem.num_heads_kv);
        num_tiles = num_full_tiles = problem.num_key_tiles();
        if (CAUSAL) {
            int first = row_block * BLOCK_M + problem.causal_offset + 1;  // keys that the first row sees
            int last = min(row_block * BLOCK_M + BLOCK_M, problem.seq_q) + problem.causal_offset;
            if (first < problem.seq_kv) num_full_tiles = max(first, 0) / BLOCK_N;
            num_tiles = min(num_tiles, (max(last, 0) + BLOCK_N - 1) / BLOCK_N);
        }
        num_plain_tiles = min(num_full_tiles, problem.seq_kv / BLOCK_N);
    }
};

// A work item, or the tiles of it from `begin` on and before `end`: multiples of UNROLLED, but for an item's end.
struct Part {
    WorkItem item;
    int begin, end;

    __device__ bool continues() const { return begin > 0; }  // what another CTA has begun
    __device__ bool is_last() const { return end == item.num_tiles; }
};

// What this CTA does, and in which order.
//
// A CTA takes the next item when it is done. They come head after head, so that few K and V are in use at once. Causal
// items differ in length, and of a head the longest come first; but those of the last heads are mixed: the shortest of
// these heads are left for the end.
//
// Where it pays, items of one length, which are those without a causal mask, are dealt out beforehand. The last
// `shared_items` of them, less than two a CTA, stand in a line that is cut into equal shares (McNaughton's wrap-around
// rule): a share ends with the first tiles of an item, which are done before the rest of the share, so that the next
// CTA, which does the rest of that item last, need not wait for them. If it does, it is for a CTA that has started
// before (`wait` in progress.cuh), and that waits for nobody until then.
struct Schedule {
    const Problem& problem;

    // Where the share of CTA number `cta` begins: item of the line, and tile of it.
    __device__ int2 share(unsigned cta) const {
        const unsigned num_tiles = problem.num_key_tiles(), tiles = problem.shared_items * num_tiles;
        const unsigned tile = tiles / gridDim.x * cta + min(cta, tiles % gridDim.x);
        return make_int2(tile / num_tiles, tile % num_tiles / UNROLLED * UNROLLED);
    }

    // The n-th part, if there is one; n = 0, 1, ... in turn. `ticket`: the next item that is not dealt out.
    __device__ bool part(int n, Part& part, unsigned* ticket) const {
        const int cta = blockIdx.x, ctas = gridDim.x, num_items = problem.num_heads * problem.num_row_blocks();
        if (CAUSAL || problem.shared_items == 0) {
            const int index = atomicAdd(ticket, 1);
            if (index == num_items + ctas - 1) *ticket = 0;  // nobody asks after this: for the next launch
            return index < num_items && whole(index, part);
        }
        const int line = num_items - problem.shared_items, rounds = line / ctas;
        if (n < rounds) return whole(n * ctas + cta, part);
        n -= rounds;
        const int2 first = share(cta), last = share(cta + 1);
        if (last.y > 0 && n-- == 0) return piece(line + last.x, 0, last.y, part);
        const int index = first.x + (first.y > 0) + n;
        if (index < last.x) return whole(line + index, part);
        return index == last.x && first.y > 0 && piece(line + first.x, first.y, problem.num_key_tiles(), part);
    }

    __device__ bool piece(int index, int begin, int end, Part& part) const {
        part = Part{WorkItem(problem, index), begin, end};
        return true;
    }
    __device__ bool whole(int index, Part& part) const {
        part.item = WorkItem(problem, index);
        part.begin = 0, part.end = part.item.num_tiles;
        return true;
    }
};
