// SIMD lanes through the compiler's vector extensions: one source, one object per target.
//
// A file that includes this is compiled once per target with JLEBM_TARGET set to the target's name and with
// -ffp-contract=off: an operator rounds once, and only fma() fuses. Everything lives in namespace jlebm::JLEBM_TARGET,
// so that objects of different targets never share an inline function.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "common/philox.h"

#ifndef JLEBM_TARGET
#error "compile with -DJLEBM_TARGET=<name>"
#endif
#ifdef __FAST_MATH__
#error "-ffast-math would change the noise, which is the same in every bit everywhere: take it out of CXXFLAGS"
#endif

#define JLEBM_INLINE inline __attribute__((always_inline))

namespace jlebm {
namespace JLEBM_TARGET {

#if defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#elif defined(__ARM_NEON)
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

typedef float F __attribute__((vector_size(kLanes * 4)));
typedef int32_t I __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U __attribute__((vector_size(kLanes * 4)));
typedef uint64_t W __attribute__((vector_size(kLanes * 4))); // half as many 64-bit lanes

JLEBM_INLINE F load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
JLEBM_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }

// c - 0 is c for every c, -0 included, so the compiler keeps only the broadcast
JLEBM_INLINE F splat(float c) { return c - F{}; }

JLEBM_INLINE F as_float(U v) { return (F)v; }
JLEBM_INLINE U as_uint(F v) { return (U)v; }
JLEBM_INLINE U as_uint(I v) { return (U)v; }
JLEBM_INLINE I as_int(U v) { return (I)v; }
JLEBM_INLINE F to_float(I v) { return __builtin_convertvector(v, F); }
JLEBM_INLINE F select(I mask, F a, F b) { return mask ? a : b; }

JLEBM_INLINE F abs(F a) { return as_float(as_uint(a) & 0x7fffffffu); }
#if defined(__AVX512F__) && defined(__AVX512DQ__)
// the smaller (larger) of two; a NaN in the second operand passes
JLEBM_INLINE F min_or_nan(F limit, F a) { return (F)_mm512_min_ps((__m512)limit, (__m512)a); }
JLEBM_INLINE F max_or_nan(F limit, F a) { return (F)_mm512_max_ps((__m512)limit, (__m512)a); }
JLEBM_INLINE F rn_sqrt(F a) { return (F)_mm512_sqrt_ps((__m512)a); }
JLEBM_INLINE F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
JLEBM_INLINE W mul_low32(W a, W b) { return (W)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
JLEBM_INLINE F reciprocal_estimate(F a) { return (F)_mm512_rcp14_ps((__m512)a); }
#elif defined(__AVX2__)
JLEBM_INLINE F min_or_nan(F limit, F a) { return (F)_mm256_min_ps((__m256)limit, (__m256)a); }
JLEBM_INLINE F max_or_nan(F limit, F a) { return (F)_mm256_max_ps((__m256)limit, (__m256)a); }
JLEBM_INLINE F rn_sqrt(F a) { return (F)_mm256_sqrt_ps((__m256)a); }
JLEBM_INLINE F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
JLEBM_INLINE W mul_low32(W a, W b) { return (W)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
JLEBM_INLINE F reciprocal_estimate(F a) { return (F)_mm256_rcp_ps((__m256)a); }
#elif defined(__SSE2__)
JLEBM_INLINE F min_or_nan(F limit, F a) { return (F)_mm_min_ps((__m128)limit, (__m128)a); }
JLEBM_INLINE F max_or_nan(F limit, F a) { return (F)_mm_max_ps((__m128)limit, (__m128)a); }
JLEBM_INLINE F rn_sqrt(F a) { return (F)_mm_sqrt_ps((__m128)a); }
JLEBM_INLINE F fma(F a, F b, F c) { return a * b + c; }
JLEBM_INLINE W mul_low32(W a, W b) { return (W)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#elif defined(__ARM_NEON)
JLEBM_INLINE F min_or_nan(F limit, F a) { return limit < a ? limit : a; }
JLEBM_INLINE F max_or_nan(F limit, F a) { return limit > a ? limit : a; }
JLEBM_INLINE F rn_sqrt(F a) { return (F)vsqrtq_f32((float32x4_t)a); }
JLEBM_INLINE F fma(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
JLEBM_INLINE W mul_low32(W a, W b) { return (W)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b)); }
#else
JLEBM_INLINE F min_or_nan(F limit, F a) { return limit < a ? limit : a; }
JLEBM_INLINE F max_or_nan(F limit, F a) { return limit > a ? limit : a; }
JLEBM_INLINE F rn_sqrt(F a) {
    for (int i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
}
JLEBM_INLINE F fma(F a, F b, F c) { return a * b + c; }
JLEBM_INLINE W mul_low32(W a, W b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
#endif

// Lanes in groups of four (cpu/few_chains.h).
#if defined(__AVX512F__) && defined(__AVX512DQ__)
JLEBM_INLINE F load_four(const float* p) { return (F)_mm512_broadcast_f32x4(_mm_loadu_ps(p)); } // in every group
template <int K>
JLEBM_INLINE F repeat_in_four(F a) { // lane K of each group, in all four
    return (F)_mm512_permute_ps((__m512)a, K * 0x55);
}
JLEBM_INLINE F next_in_four(F a) { // every lane's value in the group's next lane, the last one's in the first
    return (F)_mm512_permute_ps((__m512)a, 0x93);
}
JLEBM_INLINE F permute(F a, I from) { return (F)_mm512_permutexvar_ps((__m512i)from, (__m512)a); }
#elif defined(__AVX2__)
JLEBM_INLINE F load_four(const float* p) { return (F)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }
template <int K>
JLEBM_INLINE F repeat_in_four(F a) {
    return (F)_mm256_permute_ps((__m256)a, K * 0x55);
}
JLEBM_INLINE F next_in_four(F a) { return (F)_mm256_permute_ps((__m256)a, 0x93); }
JLEBM_INLINE F permute(F a, I from) { return (F)_mm256_permutevar8x32_ps((__m256)a, (__m256i)from); }
#else
JLEBM_INLINE F load_four(const float* p) { return load(p); }
template <int K>
JLEBM_INLINE F repeat_in_four(F a) {
    return splat(a[K]);
}
JLEBM_INLINE F next_in_four(F a) { return F{a[3], a[0], a[1], a[2]}; }
JLEBM_INLINE F permute(F a, I from) { return F{a[from[0]], a[from[1]], a[from[2]], a[from[3]]}; }
#endif

// 1 / a to about 1 ulp for normal a; not for the noise, whose arithmetic is exact by contract
JLEBM_INLINE F reciprocal(F a) {
#if defined(__AVX512F__) || defined(__AVX2__)
    const F estimate = reciprocal_estimate(a);
    return fma(fma(-a, estimate, splat(1.0f)), estimate, estimate);
#else
    return 1.0f / a;
#endif
}

// what common/normal.h asks for
struct NormalOps {
    using F = JLEBM_TARGET::F;
    using I = JLEBM_TARGET::I;
    using U = JLEBM_TARGET::U;
    static JLEBM_INLINE F mul(F a, F b) { return a * b; }
    static JLEBM_INLINE F add(F a, F b) { return a + b; }
    static JLEBM_INLINE F sqrt(F a) { return rn_sqrt(a); }
    static JLEBM_INLINE F to_float(I v) { return JLEBM_TARGET::to_float(v); }
    static JLEBM_INLINE F as_float(U v) { return (F)v; }
    static JLEBM_INLINE U as_uint(F v) { return (U)v; }
    static JLEBM_INLINE U as_uint(I v) { return (U)v; }
    static JLEBM_INLINE I as_int(U v) { return (I)v; }
    static JLEBM_INLINE I non_zero(U v) { return (I)(v != U{}); }
    static JLEBM_INLINE F select(I mask, F a, F b) { return mask ? a : b; }
    static // c - 0 is c for every c, -0 included, so the compiler keeps only the broadcast
        JLEBM_INLINE F splat(float c) {
        return c - F{};
    }
};

} // namespace JLEBM_TARGET
} // namespace jlebm
