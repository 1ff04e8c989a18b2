// Late heads: the KV heads whose codes of Q and K `late_codes.cu` makes while the attention kernel runs. How a CTA of that
// knows which heads are there: it has their number in shared memory, `ready`, and a warp that keeps it up to date.
#pragma once

#include "ptx.cuh"

// What there is to know of them.
struct LateHeads {
    const unsigned* tiles;  // of a KV head: those that are there
    unsigned* begun;        // 0 before the results of `quantize` are there, and again when all CTAs know that they are
    int first, end;         // KV heads
    int head_tiles;         // that a head has

    __device__ bool exist() const { return first < end; }
};

// Keeps `ready` up to date until all heads are there; by a warp. `ctas`: those of the attention kernel.
__device__ __forceinline__ void watch_late_heads(unsigned ready, const LateHeads& late, unsigned ctas) {
    const int lane = threadIdx.x % 32;
    const auto publish = [=](int heads) {
        __syncwarp();
        if (lane == 0) asm volatile("st.release.cta.shared.s32 [%0], %1;" ::"r"(ready), "r"(heads) : "memory");
    };
    if (lane == 0) {
        while (load_acquire(late.begun) == 0) __nanosleep(100);
        if (add_acquire_release(late.begun, 1) == ctas) *late.begun = 0;  // the last one: for the next launch
    }
    publish(late.first);
    for (int head = late.first; head < late.end;) {
        const bool is_there = head + lane < late.end && load_acquire(late.tiles + head + lane) >= late.head_tiles;
        const unsigned missing = ~__ballot_sync(~0u, is_there);
        const int more = missing ? __ffs(missing) - 1 : 32;
        head += more;
        if (more > 0) publish(head);
        else __nanosleep(200);
    }
}

// Waits until the codes of a KV head are there; they may be copied in bulk then.
__device__ __forceinline__ void await_head(unsigned ready, int kv_head) {
    int heads;
    do {
        asm volatile("ld.acquire.cta.shared.s32 %0, [%1];" : "=r"(heads) : "r"(ready) : "memory");
    } while (heads <= kv_head);
    asm volatile("fence.proxy.async.global;" ::: "memory");
}
