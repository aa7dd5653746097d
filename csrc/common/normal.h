// Normals of the noise contract: two 32-bit words -> two independent N(0, 1), identical bit for bit everywhere.
//
//     u0 = (w0 >> 9) 2^-23 + 2^-24      u1 = (w1 >> 9) 2^-23 + 2^-24      exact in float32, in (0, 1)
//     r  = sqrt(-2 ln u0)               n0 = r cos(2 pi u1)               n1 = r sin(2 pi u1)
//
// ln, cos and sin are the polynomials below. Every multiplication and addition rounds on its own: mul and add
// are plain operators in a file compiled without contraction (-ffp-contract=off) and __fmul_rn / __fadd_rn on the GPU.
// sqrt is correctly rounded. The torch statement of the same arithmetic is jlebm_fast/backends/eager_noise.py.
//
// One source serves scalars and SIMD vectors. The caller's Ops names the types F, I, U (float32, int32, uint32 lanes)
// and has, as static functions: mul, add, sqrt, to_float(I), as_float(U), as_uint(F or I), as_int(U),
// non_zero(U) -> mask, select(mask, F, F), splat(float).
#pragma once

#include "philox.h"

#if defined(__CUDACC__)
// nvcc knows a constexpr array in device code only by this, and then only there
#define JLEBM_TABLE __device__ constexpr
#define JLEBM_LANES __device__ __forceinline__
#else
#define JLEBM_TABLE constexpr
#define JLEBM_LANES inline
#endif

namespace jlebm {

// ln(1 + f) = f Q(f) on [sqrt(1/2) - 1, sqrt(2) - 1], relative error 2.6e-8
JLEBM_TABLE float kLogQ[9] = {1.0f,
                              -0.4999997913837433f,
                              0.3333415985107422f,
                              -0.25002944469451904f,
                              0.19958415627479553f,
                              -0.1654374599456787f,
                              0.14917394518852234f,
                              -0.14482136070728302f,
                              0.08959802985191345f};
constexpr int32_t kSqrtHalfBits = 0x3f3504f3;
constexpr float kLn2 = 0.6931471805599453f;
// sin(2 pi x) = x S(x^2), cos(2 pi x) = 1 + x^2 C(x^2) on |x| <= 1/8, errors 3e-9 and 2e-10
JLEBM_TABLE float kSinS[4] = {6.2831854820251465f, -41.3416633605957f, 81.5925521850586f, -75.40206909179688f};
JLEBM_TABLE float kCosC[4] = {-19.739208221435547f, 64.93936920166016f, -85.44882202148438f, 59.42434310913086f};

template <class F>
struct NormalPair {
    F cosine, sine;
};

template <class Ops>
JLEBM_LANES NormalPair<typename Ops::F> box_muller(typename Ops::U word0, typename Ops::U word1) {
    using F = typename Ops::F;
    using I = typename Ops::I;
    using U = typename Ops::U;
    // -2 ln u0: u0 = 2^e m, m in [sqrt(1/2), sqrt(2)). 2 (w0 >> 9) + 1 is an odd integer below 2^24, exact as a float;
    // it is u0 2^24, so 24 is taken off the exponent. The factor -2 stands in the constants: scaling by it is exact.
    const I bits = Ops::as_int(Ops::as_uint(Ops::to_float(Ops::as_int((word0 >> 8) | 1u))));
    const I shifted = bits - (kSqrtHalfBits + (24 << 23));
    const I exponent = shifted >> 23; // arithmetic
    const F m = Ops::as_float(Ops::as_uint((shifted & 0x7fffff) + kSqrtHalfBits));
    const F f = Ops::add(m, Ops::splat(-1.0f));
    F q = Ops::splat(-2.0f * kLogQ[8]);
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#pragma GCC unroll 8
#endif
    for (int i = 7; i >= 0; --i) q = Ops::add(Ops::mul(q, f), Ops::splat(-2.0f * kLogQ[i]));
    const F r = Ops::sqrt(Ops::add(Ops::mul(Ops::to_float(exponent), Ops::splat(-2.0f * kLn2)), Ops::mul(f, q)));

    // 2 pi u1 = (pi / 2) quadrant + 2 pi x with x in (-1/8, 1/8). Adding 1/8 to u1 (mod 1) puts the quadrant into the
    // two top bits; the 21 bits below them, with the half unit of the contract, are the mantissa of x + 3/8 in [1/4,
    // 1/2).
    const U turned = word1 + (1u << 29);
    const F x = Ops::add(Ops::as_float(((turned >> 7) & 0x7ffffcu) | 0x3e800002u), Ops::splat(-0.375f));
    const F y = Ops::mul(x, x);
    F s = Ops::splat(kSinS[3]);
    F c = Ops::splat(kCosC[3]);
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#pragma GCC unroll 3
#endif
    for (int i = 2; i >= 0; --i) {
        s = Ops::add(Ops::mul(s, y), Ops::splat(kSinS[i]));
        c = Ops::add(Ops::mul(c, y), Ops::splat(kCosC[i]));
    }
    s = Ops::mul(s, x);
    c = Ops::add(Ops::mul(c, y), Ops::splat(1.0f));
    const auto odd_quadrant = Ops::non_zero(turned & 0x40000000u);
    const F cosine = Ops::select(odd_quadrant, s, c);
    const F sine = Ops::select(odd_quadrant, c, s);
    // cosine is negative in quadrants 1 and 2, sine in 2 and 3
    const F signed_cosine = Ops::as_float(Ops::as_uint(cosine) ^ ((turned + 0x40000000u) & 0x80000000u));
    const F signed_sine = Ops::as_float(Ops::as_uint(sine) ^ (turned & 0x80000000u));
    return {Ops::mul(r, signed_cosine), Ops::mul(r, signed_sine)};
}

} // namespace jlebm
