// Quadruples of coordinates: the unit of one thread in langevin_noise and langevin_step, and of one Philox call.
#pragma once

#include <algorithm>

#include "cuda/normal_quad.h"

namespace jlebm {
namespace cuda {

// 256 threads of at most 64 registers fill a multiprocessor eight times over; memory-bound kernels want nothing else.
constexpr int kRowThreads = 256;
// Several blocks for each that fits at a time even out the end; a thread then goes on in strides of the whole grid.
constexpr int kBlocksPerMultiprocessor = 32;

inline Geometry geometry_of_quads(int64_t n_quads, const CudaLaunch& launch) {
    const int64_t blocks = (n_quads + kRowThreads - 1) / kRowThreads;
    return {std::min<int64_t>(blocks, int64_t(std::max(1, launch.multiprocessors)) * kBlocksPerMultiprocessor),
            kRowThreads, 0};
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

struct Divided {
    int64_t quotient, remainder;
};

// 0 <= a, 0 < b. A 64-bit division costs as much as a quadruple's noise, so it is taken only where needed.
JLEBM_DEVICE Divided divide(int64_t a, int64_t b) {
    if (((a | b) >> 32) == 0) {
        const uint32_t quotient = uint32_t(a) / uint32_t(b);
        return {int64_t(quotient), int64_t(uint32_t(a) - quotient * uint32_t(b))};
    }
    return {a / b, a % b};
}

// coordinates of one quadruple from a row-major array: four at once where rows consist of aligned quadruples
template <bool kWhole>
JLEBM_DEVICE void load_quad(float (&v)[4], const float* at, int count) {
    if constexpr (kWhole) {
        const float4 all = load_readonly(reinterpret_cast<const float4*>(at));
        v[0] = all.x, v[1] = all.y, v[2] = all.z, v[3] = all.w;
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = i < count ? load_readonly(at + i) : 0.0f;
    }
}

template <bool kWhole>
JLEBM_DEVICE void store_quad(float* at, const float (&v)[4], int count) {
    if constexpr (kWhole) {
        *reinterpret_cast<float4*>(at) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < count) at[i] = v[i];
    }
}

} // namespace cuda
} // namespace jlebm
