// How far the CTAs of a launch have come with a KV head, so that they can hand work to each other.
#pragma once

#include "ptx.cuh"

// Of a KV head: counters of the CTAs that have arrived, all 0 before the launch. The attention kernel clears them.
struct Progress {
    unsigned statistics[2];  // of K, of V: `Keys::done` in the end, and SPECIAL for each special chunk
    unsigned v_tiles;
    unsigned v_exceeds;  // not 0 where V does not fit the scale of a sample
};

// Clears those of `count` heads: thread number `thread`, of `threads`, its part of them.
__device__ __forceinline__ void clear(Progress* progress, int count, int thread, int threads) {
    for (int i = thread; i < count; i += threads) progress[i] = Progress{};
}

constexpr unsigned SPECIAL = 0x10000;  // counts chunks with a NaN or an infinity, above the arrivals

// Adds `count` to the counter; all threads call it. Returns what had arrived before. What the threads have written
// is visible to every CTA that arrives, or waits, later: barrier, release; acquire, barrier (PTX ISA, "Memory Consistency
// Model: Release and Acquire Patterns").
__device__ __forceinline__ unsigned arrive(unsigned& counter, unsigned count) {
    __shared__ unsigned before;
    __syncthreads();
    if (threadIdx.x == 0) before = add_acquire_release(&counter, count);
    __syncthreads();
    return before;
}

// Waits until `count` have arrived; all threads call it. Returns whether one was special.
// They do arrive, as nobody waits for a later CTA and GPUs start CTAs in the order of blockIdx.x (which the CUDA
// programming model does not promise).
__device__ __forceinline__ bool wait(const unsigned& counter, unsigned count) {
    unsigned arrived = 0;
    if (threadIdx.x == 0) {
        while (true) {
            arrived = load_acquire(&counter);
            if (arrived % SPECIAL >= count) break;
            __nanosleep(100);
        }
    }
    return __syncthreads_or(arrived >= SPECIAL);
}
