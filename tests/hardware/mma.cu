// D = A B + C on the tensor cores, one block an item, 64 x 64 outputs, K as a chain of instructions.
//
// A: (items, 64, k_bytes) row-major; B: (items, 64, k_bytes), a row a column of the product; C and D:
// (items, 64, 64) in the accumulator's format. One instruction takes 32 bytes of K of each operand:
// 32 E4M3 or 16 FP16 values, and their fragments are the same in bytes.
//
// Compiled once for each instruction, with OPERAND (e4m3, f16), ACCUMULATOR (f16, f32),
// INSTRUCTION_K (32, 16), F32_ACCUMULATOR (0, 1) and WGMMA (0, 1).
// Fragments: PTX ISA, "Matrix Fragments for mma.m16n8k32" and "... for wgmma.mma_async.m64nNk32".

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

constexpr int M = 64, N = 64, STEP_BYTES = 32, THREADS = 128;

#if F32_ACCUMULATOR
// Registers of one thread for 8 columns: two of row `lane / 4`, two of the row 8 below.
typedef float Register;
constexpr int COLUMNS_PER_REGISTER = 1;
#define ACCUMULATOR_CONSTRAINT "+f"
#else
typedef unsigned Register;
constexpr int COLUMNS_PER_REGISTER = 2;
#define ACCUMULATOR_CONSTRAINT "+r"
#endif
constexpr int REGISTERS_PER_TILE = 4 / COLUMNS_PER_REGISTER;
constexpr int TILES = N / 8;

// Index of a register of tile `tile` in a row-major 64 x 64 array of Registers.
__device__ int position(int tile, int i) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = warp * 16 + lane / 4 + (i * COLUMNS_PER_REGISTER / 2) * 8;
    const int column = tile * 8 + lane % 4 * 2 + i * COLUMNS_PER_REGISTER % 2;
    return (row * N + column) / COLUMNS_PER_REGISTER;
}

#if WGMMA

constexpr int OPERAND_BYTES = 64 * STEP_BYTES;

// A K-major tile of 64 rows by 32 bytes without swizzle: core matrices of 8 rows by 16 bytes, each
// 128 contiguous bytes; 128 bytes from one group of 8 rows to the next, 1024 from one half of K to
// the other.
constexpr int STRIDE_BYTES = 128, LEADING_BYTES = 1024;

__device__ int tile_offset(int row, int byte) {
    return byte / 16 * LEADING_BYTES + row / 8 * STRIDE_BYTES + row % 8 * 16 + byte % 16;
}

__device__ unsigned long long descriptor(const unsigned char* tile) {
    const unsigned long long address = __cvta_generic_to_shared(tile);
    return (address & 0x3FFFF) >> 4 | (unsigned long long)(LEADING_BYTES >> 4) << 16 |
           (unsigned long long)(STRIDE_BYTES >> 4) << 32;
}

#if INSTRUCTION_K == 32
#define SCALES "p, 1, 1"  // scale-d, scale of A, scale of B
#else
#define SCALES "p, 1, 1, 0, 0"  // and neither is transposed
#endif

#define R4(i) ACCUMULATOR_CONSTRAINT(d[i]), ACCUMULATOR_CONSTRAINT(d[i + 1]), \
              ACCUMULATOR_CONSTRAINT(d[i + 2]), ACCUMULATOR_CONSTRAINT(d[i + 3])

__device__ void multiply(Register (&d)[TILES * REGISTERS_PER_TILE], unsigned long long a,
                         unsigned long long b) {
#define WGMMA_AROUND(registers, a, b)                                                              \
    "{\n"                                                                                          \
    ".reg .pred p;\n"                                                                              \
    "setp.eq.u32 p, 0, 0;\n"                                                                       \
    "wgmma.fence.sync.aligned;\n"                                                                  \
    "wgmma.mma_async.sync.aligned.m64n64k" TEXT(INSTRUCTION_K) "." TEXT(ACCUMULATOR) "."           \
    TEXT(OPERAND) "." TEXT(OPERAND) " {" registers "}, " a ", " b ", " SCALES ";\n"                \
    "wgmma.commit_group.sync.aligned;\n"                                                           \
    "wgmma.wait_group.sync.aligned 0;\n"                                                           \
    "}"
#define FIRST_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#if F32_ACCUMULATOR
    asm volatile(WGMMA_AROUND(FIRST_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "
                              "%28, %29, %30, %31", "%32", "%33")
                 : R4(0), R4(4), R4(8), R4(12), R4(16), R4(20), R4(24), R4(28)
                 : "l"(a), "l"(b) : "memory");
#else
    asm volatile(WGMMA_AROUND(FIRST_16, "%16", "%17")
                 : R4(0), R4(4), R4(8), R4(12) : "l"(a), "l"(b) : "memory");
#endif
}

__device__ void multiply_step(Register (&d)[TILES * REGISTERS_PER_TILE], const unsigned char* a,
                              const unsigned char* b, int k_bytes) {
    __shared__ alignas(1024) unsigned char a_tile[OPERAND_BYTES], b_tile[OPERAND_BYTES];
    __syncthreads();  // the previous step has read the tiles
    for (int i = threadIdx.x * 4; i < OPERAND_BYTES; i += THREADS * 4) {
        const int row = i / STEP_BYTES, byte = i % STEP_BYTES;
        *(unsigned*)(a_tile + tile_offset(row, byte)) = *(const unsigned*)(a + row * k_bytes + byte);
        *(unsigned*)(b_tile + tile_offset(row, byte)) = *(const unsigned*)(b + row * k_bytes + byte);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    multiply(d, descriptor(a_tile), descriptor(b_tile));
}

#else  // mma.sync

__device__ void multiply(Register* d, const unsigned (&a)[4], const unsigned (&b)[2]) {
#define INSTRUCTION "mma.sync.aligned.m16n8k" TEXT(INSTRUCTION_K) ".row.col." TEXT(ACCUMULATOR) "." \
    TEXT(OPERAND) "." TEXT(OPERAND) "." TEXT(ACCUMULATOR) " "
#if F32_ACCUMULATOR
    asm volatile(INSTRUCTION "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    asm volatile(INSTRUCTION "{%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
                 : "+r"(d[0]), "+r"(d[1])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ void multiply_step(Register (&d)[TILES * REGISTERS_PER_TILE], const unsigned char* a,
                              const unsigned char* b, int k_bytes) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned char* a_row = a + (warp * 16 + lane / 4) * k_bytes + lane % 4 * 4;
    const unsigned a_fragment[4] = {
        *(const unsigned*)a_row, *(const unsigned*)(a_row + 8 * k_bytes),
        *(const unsigned*)(a_row + 16), *(const unsigned*)(a_row + 8 * k_bytes + 16)};
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const unsigned char* b_row = b + (tile * 8 + lane / 4) * k_bytes + lane % 4 * 4;
        const unsigned b_fragment[2] = {*(const unsigned*)b_row, *(const unsigned*)(b_row + 16)};
        multiply(d + tile * REGISTERS_PER_TILE, a_fragment, b_fragment);
    }
}

#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    mma(const unsigned char* a, const unsigned char* b, const Register* c, Register* d, int k_bytes) {
    const long long item = blockIdx.x;
    a += item * M * k_bytes;
    b += item * N * k_bytes;
    c += item * (M * N / COLUMNS_PER_REGISTER);
    d += item * (M * N / COLUMNS_PER_REGISTER);

    Register sums[TILES * REGISTERS_PER_TILE];
#pragma unroll
    for (int i = 0; i < TILES * REGISTERS_PER_TILE; ++i)
        sums[i] = c[position(i / REGISTERS_PER_TILE, i % REGISTERS_PER_TILE)];
    for (int k = 0; k < k_bytes; k += STEP_BYTES) multiply_step(sums, a + k, b + k, k_bytes);
#pragma unroll
    for (int i = 0; i < TILES * REGISTERS_PER_TILE; ++i)
        d[position(i / REGISTERS_PER_TILE, i % REGISTERS_PER_TILE)] = sums[i];
}
