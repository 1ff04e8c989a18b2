// The largest scales of Q, by which the attention kernels know where key groups may be steep.
//
// Compiled with: HEAD_DIM, BLOCK_M.
#pragma once

constexpr int Q_CTA_ROWS = HEAD_DIM > 128 ? 64 : 128;  // of Q, that a CTA of `quantize` takes

// CTAs of a head with that many row blocks.
__host__ __device__ constexpr int q_ctas(int row_blocks) {
    return (row_blocks * BLOCK_M + Q_CTA_ROWS - 1) / Q_CTA_ROWS;
}

// The largest q_scale of a row block, or of some rows more; NaN counts as 0. `of_ctas`: those of all CTAs and heads.
__device__ __forceinline__ float largest_q_scale(const float* of_ctas, int head, int row_blocks, int row_block) {
    of_ctas += static_cast<long long>(head) * q_ctas(row_blocks) + row_block * BLOCK_M / Q_CTA_ROWS;
    float largest = of_ctas[0];
    if (BLOCK_M > Q_CTA_ROWS) largest = fmaxf(largest, of_ctas[1]);
    static_assert(BLOCK_M % Q_CTA_ROWS == 0 ? BLOCK_M <= 2 * Q_CTA_ROWS : BLOCK_M * 2 == Q_CTA_ROWS * 3, "two at most");
    return largest;
}
