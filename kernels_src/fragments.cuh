// S and P of a tile as a thread of a consumer warpgroup holds them: two rows (r = 0, 1), and of each the keys of one group.
// S is the accumulator of Q K^T, P the A fragments of P V.
//
// Compiled with: BLOCK_N, and what softmax.cuh is.
#pragma once

#include "softmax.cuh"

constexpr int WORDS = BLOCK_N / 16;  // of P a row and thread: codes of keys 4i .. 4i + 3 of the group

// Word i of a row is register 4 (i / 2) + 2 (i % 2) + r of the A fragments; its scores are s[8i + 2r],
// s[8i + 2r + 1], s[8i + 4 + 2r], s[8i + 5 + 2r].
__device__ __forceinline__ constexpr int word_index(int i, int r) { return 4 * (i / 2) + 2 * (i % 2) + r; }
__device__ __forceinline__ constexpr int score_index(int i, int r, int e) {
    return 8 * i + 2 * r + e % 2 + e / 2 * 4;
}

// The thread's largest score of a row.
__device__ __forceinline__ int largest_score(const unsigned (&s)[8 * WORDS], int r) {
    constexpr int CHAINS = 2;
    int largest[CHAINS] = {};  // below every score as it arrives
#pragma unroll
    for (int i = 0; i < WORDS; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            largest[i % CHAINS] = max(largest[i % CHAINS], static_cast<int>(s[score_index(i, r, e)]));
    return max(largest[0], largest[1]);
}

// Scores of a row less `origin`.
__device__ __forceinline__ void subtract_scores(unsigned (&s)[8 * WORDS], int r, unsigned origin) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[score_index(i, r, e)] = score_below(s[score_index(i, r, e)], origin);
}

// P of one row.
__device__ __forceinline__ void form_row(unsigned (&p)[2 * WORDS], const RowMap& map,
                                         const unsigned (&s)[8 * WORDS], int r) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        unsigned scores[4] = {s[score_index(i, r, 0)], s[score_index(i, r, 1)], s[score_index(i, r, 2)],
                              s[score_index(i, r, 3)]};
        p[word_index(i, r)] = form_p(map, scores);
    }
}
