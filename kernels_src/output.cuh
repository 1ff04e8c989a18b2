// Step 8 of docs/numerics.md on Hopper: from the sums of a thread to rows of the output.
#pragma once

#include "softmax.cuh"

struct Output {
    void* o;
    float* lse;
    long long stride_b, stride_h, stride_s;
    int head_dim;

    // Eight neighbouring channels can be written at once.
    __device__ bool vectors() const {
        return head_dim % 8 == 0 && (stride_b | stride_h | stride_s) % 8 == 0 &&
               reinterpret_cast<unsigned long long>(o) % 16 == 0;
    }
};

__device__ __forceinline__ void load_floats(const float* from, float2 (&to)[4]) {
    float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
    to[0] = make_float2(low.x, low.y), to[1] = make_float2(low.z, low.w);
    to[2] = make_float2(high.x, high.y), to[3] = make_float2(high.z, high.w);
}

// `channels` channels from `first` on of the thread's two rows, whose row sums are l; a null one does not exist. o as
// the accumulators of `wgmma` have it, v_scale and v_offset by channel. The quantiser has V's channels in an order
// (`v_row`) that gives a thread 8 neighbouring ones in every 32.
template <bool VECTORS, int NUMBERS>
__device__ __forceinline__ void write_rows(unsigned short* const (&destination)[2], int head_dim, int first,
                                           int channels, const float (&o)[NUMBERS], const float (&l)[2],
                                           const float* v_scale, const float* v_offset) {
    float reciprocal[2] = {__fdiv_rn(ROW_SUM_UNIT, l[0]), __fdiv_rn(ROW_SUM_UNIT, l[1])};
#pragma unroll
    for (int i = 0; i < channels / 8; i += 4) {
        int channel = first + 8 * i + threadIdx.x % 4 * 8;
        float2 scale[4], offset[4];
        load_floats(v_scale + channel, scale);
        load_floats(v_offset + channel, offset);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            unsigned pair[4];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                pair[j] = l[r] == 0.0f ? 0u  // sees no key
                    : output_pair(o[4 * (i + j) + 2 * r], o[4 * (i + j) + 2 * r + 1], reciprocal[r], scale[j],
                                  offset[j]);
            if (!destination[r]) continue;
            if (VECTORS) {
                if (channel < head_dim)
                    *reinterpret_cast<uint4*>(destination[r] + channel) =
                        make_uint4(pair[0], pair[1], pair[2], pair[3]);
            } else {
#pragma unroll
                for (int c = 0; c < 8; ++c)
                    if (channel + c < head_dim)
                        destination[r][channel + c] = static_cast<unsigned short>(pair[c / 2] >> c % 2 * 16);
            }
        }
    }
}
