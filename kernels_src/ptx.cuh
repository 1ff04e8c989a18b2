// One PTX instruction a wrapper, for every architecture (PTX ISA 8.7, chapter 9.7). No headers: FP16
// and E4M3 values are bits in an `unsigned`, two or four to a word, the first in the low bits.
#pragma once

// ---- warps -------------------------------------------------------------------------------------

// The largest x of the warp's lanes.
__device__ __forceinline__ unsigned warp_max(unsigned x) {
    unsigned y;
    asm volatile("redux.sync.max.u32 %0, %1, 0xFFFFFFFF;" : "=r"(y) : "r"(x));
    return y;
}

// Barrier of THREADS threads, whole warps, of which there are COUNT such groups: `group` is the thread's. The numbers
// are constants (0 is that of __syncthreads), because a kernel for which they are not has all 16 barriers of a CTA, and
// an SM has 64.
template <int COUNT, int THREADS> __device__ __forceinline__ void sync_group(int group) {
    if constexpr (COUNT > 1) {
        if (group < COUNT - 1) return sync_group<COUNT - 1, THREADS>(group);
    }
    asm volatile("bar.sync %0, %1;" ::"n"(COUNT), "n"(THREADS) : "memory");
}

// ---- shared memory and asynchronous copies -----------------------------------------------------

__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// x, but the compiler cannot see how it was computed: what is added to it later stays an immediate offset of
// the load, instead of being folded into the computation of every address.
template <class T> __device__ __forceinline__ T opaque(T x) {
    if constexpr (sizeof(T) == 8) asm volatile("" : "+l"(x));
    else asm volatile("" : "+r"(x));
    return x;
}

// threadIdx.x, read again at every call: nothing that is computed from it stays in a register.
__device__ __forceinline__ int thread_index() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

// 16 bytes, past L1; both addresses are multiples of 16.
__device__ __forceinline__ void cp_async_16(unsigned destination, const void* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(destination), "l"(source) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, and gets
// of matrix i, in m[i], the 4 bytes at 4 (l % 4) of row l / 4.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&m)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(address) : "memory");
}

// ---- global memory between CTAs ----------------------------------------------------------------

__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
    unsigned x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

__device__ __forceinline__ void add_release(unsigned* p, unsigned x) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

// Returns what was there before.
__device__ __forceinline__ unsigned add_acquire_release(unsigned* p, unsigned x) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(x) : "memory");
    return before;
}

// ---- launches ----------------------------------------------------------------------------------

// What is launched behind this kernel may start, where it was asked to (`early` in sagepp/driver.py), when all CTAs
// have called this or ended.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel before this one has ended, where it may not have; what it has written is visible then.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- products ----------------------------------------------------------------------------------
// Lane 4g + t. A: a[0] row g, a[1] row g + 8, both of the first half of k; a[2], a[3] of the second half
// (word t of each half). B: b0, b1 column g, first and second half of k. D: row g, columns 2t and
// 2t + 1, then row g + 8.

// D (16 x 8, INT32) = A (16 x 32) B (32 x 8) + C, with every element of C equal to `c`.
__device__ __forceinline__ void mma_s8(unsigned (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                       unsigned c) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c));
}

// D += A B, as above.
__device__ __forceinline__ void mma_s8(unsigned (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// D (16 x 8, FP16, a row a word) += A (16 x 16, FP16) B (16 x 8).
__device__ __forceinline__ void mma_f16(unsigned (&d)[2], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
        : "+r"(d[0]), "+r"(d[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// D (16 x 8, FP16) += A (16 x 32, E4M3) B (32 x 8). PTX ISA 8.7, NVRTC 12.8.
__device__ __forceinline__ void mma_e4m3(unsigned (&d)[2], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.f16.e4m3.e4m3.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
        : "+r"(d[0]), "+r"(d[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- arithmetic and conversions ----------------------------------------------------------------

__device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, off by one ulp at most; infinity for 0.
__device__ __forceinline__ float rcp(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Four E4M3 codes; above 448 saturates, NaN is 0x7F.
__device__ __forceinline__ unsigned cvt_e4m3x4(float x0, float x1, float x2, float x3) {
    unsigned word;
    asm("{\n.reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}"
        : "=r"(word) : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
    return word;
}

// Four E4M3 codes of two pairs of FP16.
__device__ __forceinline__ unsigned cvt_e4m3x4(unsigned pair0, unsigned pair1) {
    unsigned word;
    asm("{\n.reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f16x2 low, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f16x2 high, %2;\n"
        "mov.b32 %0, {low, high};\n}"
        : "=r"(word) : "r"(pair0), "r"(pair1));
    return word;
}

// Two integers, clamped to 0 .. 65535.
__device__ __forceinline__ unsigned cvt_u16x2(int x0, int x1) {
    unsigned word;
    asm("cvt.pack.sat.u16.s32 %0, %2, %1;" : "=r"(word) : "r"(x0), "r"(x1));
    return word;
}

// Four integers, clamped to 0 .. 255.
__device__ __forceinline__ unsigned cvt_u8x4(int x0, int x1, int x2, int x3) {
    unsigned word;
    asm("{\n.reg .b32 high;\n"
        "cvt.pack.sat.u8.s32.b32 high, %4, %3, 0;\n"
        "cvt.pack.sat.u8.s32.b32 %0, %2, %1, high;\n}"
        : "=r"(word) : "r"(x0), "r"(x1), "r"(x2), "r"(x3));
    return word;
}

// a * b + c of two FP16, each rounded once.
__device__ __forceinline__ unsigned fma_f16x2(unsigned a, unsigned b, unsigned c) {
    unsigned d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// a * b of two FP16.
__device__ __forceinline__ unsigned mul_f16x2(unsigned a, unsigned b) {
    unsigned d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ unsigned cvt_f16x2(float low, float high) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ unsigned cvt_bf16x2(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ float low_half(unsigned pair) {
    float x;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, low;\n}" : "=f"(x) : "r"(pair));
    return x;
}

__device__ __forceinline__ float high_half(unsigned pair) {
    float x;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, high;\n}" : "=f"(x) : "r"(pair));
    return x;
}
