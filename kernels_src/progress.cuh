// How far the CTAs of a launch have come with a KV head, so that they can hand work to each other.
#pragma once

// One counter of arrivals each; all 0 before the launch.
struct Progress {
    unsigned statistics[2];  // of K, of V: `SPECIAL` is added for each chunk with a NaN or an infinity
    unsigned v_tiles;
    unsigned unused;
};

constexpr unsigned SPECIAL = 0x10000;

// Counts this CTA, and makes what its threads have written visible to the CTA that arrives last.
// All threads call it; returns what had arrived before.
__device__ __forceinline__ unsigned arrive(unsigned& counter, unsigned count) {
    __shared__ unsigned before;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        before = atomicAdd(&counter, count);
        __threadfence();
    }
    __syncthreads();
    return before;
}

// Waits until `count` have arrived; all threads call it. Returns whether one was special.
// They do arrive: CTAs start in the order of blockIdx.x, and nobody waits for a later one.
__device__ __forceinline__ bool wait(const unsigned& counter, unsigned count) {
    unsigned arrived = 0;
    if (threadIdx.x == 0) {
        while (true) {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(&counter) : "memory");
            if (arrived % SPECIAL >= count) break;
            __nanosleep(100);
        }
    }
    return __syncthreads_or(arrived >= SPECIAL);
}
