// Steps 5, 6 and 8 of docs/numerics.md for one row of a tile, as one thread of a quad holds it: the
// scores of its key group, in key order. Nothing here knows the shape of a matrix instruction.
//
// Compiled with: HEAD_DIM, BLOCK_N, V_F16, P_FORM, AIM, ROW_SUM_UNIT, OUT_BF16.
#pragma once

#include "log2.cuh"
#include "ptx.cuh"

// Values of P_FORM. In the linear forms log2 of P is an integer number of steps.
#define EX2 0
#define CODE 1
#define CHORD 2
constexpr bool LINEAR = P_FORM != EX2;
static_assert(!(V_F16 && LINEAR), "the linear forms make E4M3 codes");

// Accumulators of S start here. For the linear forms it is more than the largest |S|: scores arrive positive, and
// read as FP32 they are denormals. Up to 128 channels, the tensor cores make it of 32 pairs of 255.
constexpr bool START_BY_PRODUCT = LINEAR && HEAD_DIM <= 128;
constexpr unsigned SCORE_START = START_BY_PRODUCT ? 32 * 255 * 255 : LINEAR ? 1 << 22 : 0x4B400000;
constexpr float STEPS_PER_OCTAVE = P_FORM == CODE ? 8.0f : 1024.0f;
constexpr float STEPS_AT_BOUND = P_FORM == CODE ? 8 * (AIM + 7) : 1024 * (AIM + 14) - 51;
constexpr int STEPS_AT_LIMIT = P_FORM == CODE ? 112 : 21400;  // the first whose P is E4M3 code 112 or more
constexpr float UNIT = 0x1p-149f;  // a denormal is an integer in this unit
constexpr unsigned FULL_MASK = 0xFFFFFFFFu;
constexpr int P_PER_WORD = V_F16 ? 2 : 4;
constexpr int P_BITS = 32 / P_PER_WORD;
constexpr unsigned LIMIT_BITS = V_F16 ? 0x40004000u : 0x80808080u;  // of `limit_flags`

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xFF800000); }

// The least log2 whose `ex2` is 124 or more: halfway from code 111 to 112, and ties go to even.
constexpr float LIMIT_LOG2 = 6.95419645f;

struct RowState {
    float scale;  // row_scale
    float bound;
};

__device__ __forceinline__ float limited_row_scale(float q_scale, float k_scale_max) {
    float limit = fminf(__fdiv_rn(0x1p90f, k_scale_max), 3.40282347e38f);
    return q_scale > limit ? limit : q_scale;  // a NaN stays
}

// Whether a key group is steep for a row: P is then formed from the differences to the group's largest score.
__device__ __forceinline__ bool is_steep(float row_scale, float k_scale) {
    return __fmul_rn(row_scale, k_scale) > 0.25f;
}

// ---- step 6: P ---------------------------------------------------------------------------------

// Steps of log2 P that SCORE_START stands for, an integer.
__device__ __forceinline__ float start_steps(float row_scale, float k_scale) {
    return rintf(__fmul_rn(__fmul_rn(row_scale, k_scale), STEPS_PER_OCTAVE * SCORE_START));
}

// The factor of the integer score: log2 of P, or steps of it, a unit of S.
__device__ __forceinline__ float score_factor(float row_scale, float k_scale) {
    if (!LINEAR) return __fmul_rn(row_scale, k_scale);
    return __fmul_rn(start_steps(row_scale, k_scale), 1.0f / SCORE_START);
}

// A score without SCORE_START.
__device__ __forceinline__ int integer_score(int arrived) { return arrived - static_cast<int>(SCORE_START); }

// The factor times the score, which the bound is compared with.
__device__ __forceinline__ float scaled_score(int score, float row_scale, float k_scale) {
    return __fmul_ru(__int2float_rn(score), score_factor(row_scale, k_scale));
}

// P of a score s is formed from fma(float(s), a, b); in a steep group, s is `score_below` the largest one.
struct RowMap {
    float a, b;

    RowMap() = default;
    __device__ RowMap(const RowState& row, float k_scale) : a(score_factor(row.scale, k_scale)) {
        if (LINEAR) {
            b = __fsub_rn(__fsub_rn(STEPS_AT_BOUND, row.bound), start_steps(row.scale, k_scale));
            b = __fmul_rn(b, UNIT);
        } else {
            b = __fadd_rd(__fsub_rd(float(AIM), row.bound), -__fmul_ru(12582912.0f, a));
        }
    }

    // Of a steep group.
    __device__ RowMap(const RowState& row, float k_scale, int largest) : a(score_factor(row.scale, k_scale)) {
        b = __fsub_rn(scaled_score(largest, row.scale, k_scale), row.bound);
        b = LINEAR ? __fmul_rn(__fadd_rn(STEPS_AT_BOUND, b), UNIT) : __fadd_rn(float(AIM), b);
    }

    __device__ float operator()(unsigned score) const { return __fmaf_rn(__uint_as_float(score), a, b); }

    // Whether P of the score reaches the limit or is NaN, E4M3 code 112 or above.
    __device__ bool reaches_limit(unsigned score) const {
        float x = (*this)(score);
        return LINEAR ? __float_as_int(x) >= STEPS_AT_LIMIT : !(x < LIMIT_LOG2);
    }
};

// A score as it arrives, less `origin`: the largest one, or 0. Exact.
__device__ __forceinline__ unsigned score_below(unsigned score, unsigned origin) {
    return __float_as_uint(__fsub_rn(__uint_as_float(score), __uint_as_float(origin)));
}

// Of two scores, as halves of a word.
__device__ __forceinline__ unsigned steps_pair(const RowMap& map, unsigned s0, unsigned s1) {
    return cvt_u16x2(__float_as_int(map(s0)), __float_as_int(map(s1)));
}

// 2**x, nearly, of x in steps: read as FP16, the integer itself is the chord of 2**x between whole octaves; half an
// octave on, weighted, it bends that chord in the middle.
__device__ __forceinline__ unsigned exp2_chord(unsigned steps) {
    return fma_f16x2(steps + 0x02000200u, 0x39A839A8u, steps);
}

// A word of P from the scores of consecutive keys, s[0] .. s[P_PER_WORD - 1].
__device__ __forceinline__ unsigned form_p(const RowMap& map, const unsigned (&s)[P_PER_WORD]) {
    if constexpr (V_F16)
        return cvt_f16x2(ex2(map(s[0])), ex2(map(s[1])));
    else if constexpr (P_FORM == CHORD)
        return cvt_e4m3x4(exp2_chord(steps_pair(map, s[0], s[1])), exp2_chord(steps_pair(map, s[2], s[3])));
    else if constexpr (P_FORM == CODE)
        return cvt_u8x4(__float_as_int(map(s[0])), __float_as_int(map(s[1])), __float_as_int(map(s[2])),
                        __float_as_int(map(s[3])));
    else
        return cvt_e4m3x4(ex2(map(s[0])), ex2(map(s[1])), ex2(map(s[2])), ex2(map(s[3])));
}

// P = 0 for the keys that the row does not see: it sees the first `visible` of the word's (any integer).
__device__ __forceinline__ unsigned mask_p(unsigned word, int visible) {
    unsigned keep = visible >= P_PER_WORD ? ~0u : visible <= 0 ? 0u : (1u << visible * P_BITS) - 1;
    return word & keep;
}

// ---- step 5: the bound -------------------------------------------------------------------------

// Has one of LIMIT_BITS set if a P of the word reached the limit or is NaN. Flags of several words may
// be or-ed first.
__device__ __forceinline__ unsigned limit_flags(unsigned word) {
    if (V_F16) return word;  // 2.0 is 0x4000
    return word + 0x10101010u;  // code 112 becomes 0x80; `ex2` makes none above 127
}

__device__ __forceinline__ unsigned quad_or(unsigned x) {
    x |= __shfl_xor_sync(FULL_MASK, x, 1);
    return x | __shfl_xor_sync(FULL_MASK, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 2));
}

// The bound that a tile asks for: `largest` is the thread's largest visible score, if it sees any. All four
// threads of the quad call this.
__device__ __forceinline__ float tile_bound(int largest, bool any_visible, float row_scale, float k_scale) {
    float bound = fmaxf(minus_infinity(), scaled_score(largest, row_scale, k_scale));  // drops NaN
    bound = quad_max(any_visible ? bound : minus_infinity());
    return LINEAR ? ceilf(bound) : bound;
}

// alpha: what O, T and l shrink by when the bound moves.
__device__ __forceinline__ float shrink_factor(float bound, float new_bound) {
    float change = __fsub_rn(bound, new_bound);
    return bound == minus_infinity() ? 0.0f : ex2(LINEAR ? __fmul_rn(change, 1 / STEPS_PER_OCTAVE) : change);
}

// ---- step 8: the result ------------------------------------------------------------------------

// Two neighbouring channels, rounded and packed. `reciprocal` is div(ROW_SUM_UNIT, l).
__device__ __forceinline__ unsigned output_pair(float o0, float o1, float reciprocal, float2 v_scale,
                                                float2 v_offset) {
    o0 = __fmaf_rn(__fmul_rn(o0, reciprocal), v_scale.x, v_offset.x);
    o1 = __fmaf_rn(__fmul_rn(o1, reciprocal), v_scale.y, v_offset.y);
    return OUT_BF16 ? cvt_bf16x2(o0, o1) : cvt_f16x2(o0, o1);
}

// Natural-log LSE of the unsmoothed scores; -inf for a row that sees no key.
__device__ __forceinline__ float row_lse(float bound, float l, float sm_scale, float q_mean_dot) {
    const float LN2 = 0.693147180559945309f;
    // log2 of the mean error
    const double BIAS = P_FORM == CODE ? 0.05753274588979519 : P_FORM == CHORD ? 0.007651003989246341 : 0;
    const float LOG2_P = static_cast<float>(AIM + BIAS);  // mean, at the bound
    if (!(l > 0.0f)) return l == 0.0f ? minus_infinity() : l;
    float base = __fsub_rn(LINEAR ? __fmul_rn(bound, 1 / STEPS_PER_OCTAVE) : bound, LOG2_P);
    float log2_sum = log2_rn(__fdiv_rn(l, ROW_SUM_UNIT));
    return __fmaf_rn(__fadd_rn(base, log2_sum), LN2, __fmul_rn(sm_scale, q_mean_dot));
}
