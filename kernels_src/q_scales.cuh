// The largest scales of Q, by which the attention kernels know where key groups may be steep.
//
// Compiled with: HEAD_DIM, BLOCK_M.
#pragma once

constexpr int Q_TILE_ROWS = HEAD_DIM > 128 ? 64 : 128;  // of Q, that `quantize` has in shared memory

// Tiles of a head with that many row blocks.
__host__ __device__ constexpr int q_tiles(int row_blocks) {
    return (row_blocks * BLOCK_M + Q_TILE_ROWS - 1) / Q_TILE_ROWS;
}

// The largest q_scale of a row block, or of some rows more; NaN counts as 0. `of_tiles`: those of all tiles and heads.
__device__ __forceinline__ float largest_q_scale(const float* of_tiles, int head, int row_blocks, int row_block) {
    of_tiles += static_cast<long long>(head) * q_tiles(row_blocks) + row_block * BLOCK_M / Q_TILE_ROWS;
    float largest = of_tiles[0];
    if (BLOCK_M > Q_TILE_ROWS) largest = fmaxf(largest, of_tiles[1]);
    static_assert(BLOCK_M % Q_TILE_ROWS == 0 ? BLOCK_M <= 2 * Q_TILE_ROWS : BLOCK_M * 2 == Q_TILE_ROWS * 3, "two at most");
    return largest;
}
