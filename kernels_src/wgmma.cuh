// Hopper: asynchronous warpgroup products, bulk copies and the barriers that order them.
// One PTX instruction a wrapper (PTX ISA 9.7.15 "wgmma", 9.7.9.27 "cp.async.bulk", 9.7.13 "mbarrier").
#pragma once

#include "ptx.cuh"

// ---- mbarrier and bulk copy --------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(unsigned barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_bytes(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void mbarrier_wait(unsigned barrier, unsigned parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "RETRY:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra RETRY;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

// What threads wrote to shared memory before, asynchronous products and copies see.
__device__ __forceinline__ void async_proxy_fence() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_fence_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Both addresses and `bytes` are multiples of 16; the bytes arrive on `barrier`.
__device__ __forceinline__ void bulk_copy(unsigned destination, const void* source, unsigned bytes,
                                          unsigned barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(destination), "l"(source), "r"(bytes), "r"(barrier) : "memory");
}

// Position in a ring of stages: the index, and the parity of its barriers' current phase.
template <int COUNT> struct RingPosition {
    int stage = 0;
    unsigned parity = 0;
    __device__ void advance() {
        if (++stage == COUNT) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// ---- roles -------------------------------------------------------------------------------------

// Whether this thread is the one of its warp that is elected. What one thread does alone, ptxas can do in uniform
// registers; behind a comparison of threadIdx.x it does not know that there is one, and loops around every bulk copy.
__device__ __forceinline__ bool elect_one() {
    unsigned elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected;
}

template <int REGISTERS> __device__ __forceinline__ void registers_raise() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS> __device__ __forceinline__ void registers_lower() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- wgmma -------------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// A shared-memory matrix descriptor in two words. The low one holds the address and the leading offset,
// the high one the stride offset and the layout (0 none, 1 128-byte swizzle, 2 64-byte swizzle); all in
// units of 16 bytes. Stepping through a matrix adds to the low word.
constexpr unsigned LAYOUT_PLAIN = 0, LAYOUT_SWIZZLE_128 = 1, LAYOUT_SWIZZLE_64 = 2;

__device__ __forceinline__ constexpr unsigned descriptor_low(unsigned address, unsigned leading_bytes) {
    return address >> 4 | leading_bytes >> 4 << 16;
}

__device__ __forceinline__ constexpr unsigned descriptor_high(unsigned stride_bytes, unsigned layout) {
    return stride_bytes >> 4 | layout << 30;
}

// Operand lists: inline assembly wants them spelled out, eight registers a line.
#define P8_0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define P8_1 P8_0 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define P8_2 P8_1 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define P8_3 P8_2 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define P8_4 P8_3 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define P8_5 P8_4 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define P8_6 P8_5 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define P8_7 P8_6 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define P8_8 P8_7 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define P8_9 P8_8 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define P8_10 P8_9 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define P8_11 P8_10 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define R2(access, x, i) access(x[i]), access(x[i + 1])
#define R8(access, x, i) R2(access, x, i), R2(access, x, i + 2), R2(access, x, i + 4), R2(access, x, i + 6)
#define R16(access, x, i) R8(access, x, i), R8(access, x, i + 8)
#define R32(access, x, i) R16(access, x, i), R16(access, x, i + 16)
#define R64(access, x, i) R32(access, x, i), R32(access, x, i + 32)

// S (64 x N, INT32). Thread t of a quad (lane = 4g + t) holds, for i = 0 .. N/8 - 1: s[4i], s[4i + 1]: row g,
// columns 8i + 2t, + 1; s[4i + 2], s[4i + 3]: row g + 8. Two products:
// - wgmma_s8: S += Q (64 x 32) K^T (32 x N), both INT8 in shared memory, described by their low words and a
//   common high word.
// - wgmma_u8: S = A B^T of unsigned bytes, A (64 x 32) and B (N x 32) at the same place.
#define DEFINE_WGMMA_S8(N, OPERANDS, Q, K, HIGH)                                                     \
    template <unsigned DESCRIPTOR_HIGH>                                                              \
    __device__ __forceinline__ void wgmma_s8(unsigned (&s)[N / 2], unsigned q, unsigned k) {         \
        asm volatile("{\n.reg .pred accumulate;\n.reg .b64 q, k;\nsetp.eq.b32 accumulate, 0, 0;\n"   \
                     "mov.b64 q, {" Q ", " HIGH "};\nmov.b64 k, {" K ", " HIGH "};\n"                \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" OPERANDS "}, "         \
                     "q, k, accumulate;\n}"                                                          \
                     : S_REGISTERS_##N("+r")                                                         \
                     : "r"(q), "r"(k), "n"(DESCRIPTOR_HIGH));                                        \
    }                                                                                                \
    template <unsigned DESCRIPTOR_HIGH>                                                              \
    __device__ __forceinline__ void wgmma_u8(unsigned (&s)[N / 2], unsigned a) {                     \
        asm volatile("{\n.reg .pred accumulate;\n.reg .b64 a;\nsetp.ne.b32 accumulate, 0, 0;\n"      \
                     "mov.b64 a, {" Q ", " K "};\n"                                                  \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.u8.u8 {" OPERANDS "}, "         \
                     "a, a, accumulate;\n}"                                                          \
                     : S_REGISTERS_##N("=r")                                                         \
                     : "r"(a), "n"(DESCRIPTOR_HIGH));                                                \
    }
#define S_REGISTERS_64(access) R32(access, s, 0)
#define S_REGISTERS_96(access) R32(access, s, 0), R16(access, s, 32)
#define S_REGISTERS_128(access) R64(access, s, 0)
#define S_REGISTERS_192(access) R64(access, s, 0), R32(access, s, 64)
DEFINE_WGMMA_S8(64, P8_3, "%32", "%33", "%34")
DEFINE_WGMMA_S8(96, P8_5, "%48", "%49", "%50")
DEFINE_WGMMA_S8(128, P8_7, "%64", "%65", "%66")
DEFINE_WGMMA_S8(192, P8_11, "%96", "%97", "%98")

// T (64 x N, FP16) = P (64 x 32, E4M3 in registers) V (32 x N, E4M3, V^T in shared memory), + T if
// `accumulate`. Of N / 4 registers, t[2i]: row g, columns 8i + 2t, + 1 as a pair; t[2i + 1]: row g + 8.
#define DEFINE_WGMMA_E4M3(N, OPERANDS, P, V, HIGH, ACCUMULATE, ...)                                  \
    template <unsigned DESCRIPTOR_HIGH>                                                              \
    __device__ __forceinline__ void wgmma_e4m3_n##N(unsigned* t, const unsigned* p, unsigned v,      \
                                                    bool accumulate) {                               \
        asm volatile("{\n.reg .pred accumulate;\n.reg .b64 v;\n"                                     \
                     "setp.ne.b32 accumulate, " ACCUMULATE ", 0;\nmov.b64 v, {" V ", " HIGH "};\n"   \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k32.f16.e4m3.e4m3 {" OPERANDS "}, {" P  \
                     "}, v, accumulate, 1, 1;\n}"                                                    \
                     : __VA_ARGS__                                                                   \
                     : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "r"(v), "n"(DESCRIPTOR_HIGH),     \
                       "r"(int(accumulate)));                                                        \
    }
DEFINE_WGMMA_E4M3(72, P8_1 ",%16,%17", "%18,%19,%20,%21", "%22", "%23", "%24", R16("+r", t, 0), R2("+r", t, 16))
DEFINE_WGMMA_E4M3(104, P8_2 ",%24,%25", "%26,%27,%28,%29", "%30", "%31", "%32", R16("+r", t, 0), R8("+r", t, 16),
                  R2("+r", t, 24))
DEFINE_WGMMA_E4M3(128, P8_3, "%32,%33,%34,%35", "%36", "%37", "%38", R32("+r", t, 0))
DEFINE_WGMMA_E4M3(136, P8_3 ",%32,%33", "%34,%35,%36,%37", "%38", "%39", "%40", R32("+r", t, 0), R2("+r", t, 32))
