// The noise contract for one GPU thread: the four normals of one Philox call.
#pragma once

#include "common/normal.h"
#include "cuda/device.h"

namespace jlebm {
namespace cuda {

struct ThreadOps {
    using F = float;
    using I = int32_t;
    using U = uint32_t;
    JLEBM_DEVICE static F mul(F a, F b) { return mul_rn(a, b); }
    JLEBM_DEVICE static F add(F a, F b) { return add_rn(a, b); }
    // -2 ln u of a uniform number u is between 1.1e-7 and 34
    JLEBM_DEVICE static F sqrt(F a) { return sqrt_rn_normal(a); }
    JLEBM_DEVICE static F to_float(I i) { return float(i); }
    JLEBM_DEVICE static F as_float(U u) { return bits_float(u); }
    JLEBM_DEVICE static U as_uint(F a) { return float_bits(a); }
    JLEBM_DEVICE static U as_uint(I i) { return U(i); }
    JLEBM_DEVICE static I as_int(U u) { return I(u); }
    JLEBM_DEVICE static bool non_zero(U u) { return u != 0; }
    JLEBM_DEVICE static F select(bool mask, F a, F b) { return mask ? a : b; }
    JLEBM_DEVICE static F splat(float v) { return v; }
};

// eps of coordinates 4 quad … 4 quad + 3
JLEBM_DEVICE void normal_quad(float (&eps)[4], uint32_t quad, uint32_t chain, uint32_t step, uint32_t stream,
                              uint64_t key) {
    const PhiloxWords words = philox4x32<>({{quad, chain, step, stream}}, uint32_t(key), uint32_t(key >> 32));
    const NormalPair<float> low = box_muller<ThreadOps>(words.w[0], words.w[1]);
    const NormalPair<float> high = box_muller<ThreadOps>(words.w[2], words.w[3]);
    eps[0] = low.cosine, eps[1] = low.sine, eps[2] = high.cosine, eps[3] = high.sine;
}

} // namespace cuda
} // namespace jlebm
