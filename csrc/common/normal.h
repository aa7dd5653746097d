// Normals of the noise contract: two 32-bit words -> two independent N(0, 1), identical bit for bit everywhere.
//
//     u0 = (w0 >> 9) 2^-23 + 2^-24      u1 = (w1 >> 9) 2^-23 + 2^-24      exact in float32, in (0, 1)
//     r  = sqrt(-2 ln u0)               n0 = r cos(2 pi u1)               n1 = r sin(2 pi u1)
//
// ln, cos and sin are the polynomials below. Every multiplication and addition rounds on its own: rn_mul and rn_add
// are plain operators in a file compiled without contraction (-ffp-contract=off) and __fmul_rn / __fadd_rn on the GPU.
// rn_sqrt is correctly rounded. The torch statement of the same arithmetic is jlebm_fast/backends/eager_noise.py.
//
// One source serves scalars (float, int32_t, uint32_t) and SIMD vectors: the caller provides, for its types,
// rn_mul, rn_add, rn_sqrt, to_float(int), as_float(uint), as_int(uint), select(mask, a, b), splat<F>(float).
#pragma once

#include "philox.h"

namespace jlebm {

// ln(1 + f) = f Q(f) on [sqrt(1/2) - 1, sqrt(2) - 1], relative error 2.6e-8
constexpr float kLogQ[9] = {1.0f,
                            -0.4999997913837433f,
                            0.3333415985107422f,
                            -0.25002944469451904f,
                            0.19958415627479553f,
                            -0.1654374599456787f,
                            0.14917394518852234f,
                            -0.14482136070728302f,
                            0.08959802985191345f};
constexpr float kLn2 = 0.6931471805599453f;
// sin(2 pi x) = x S(x^2), cos(2 pi x) = 1 + x^2 C(x^2) on |x| <= 1/8, errors 3e-9 and 2e-10
constexpr float kSinS[4] = {6.2831854820251465f, -41.3416633605957f, 81.5925521850586f, -75.40206909179688f};
constexpr float kCosC[4] = {-19.739208221435547f, 64.93936920166016f, -85.44882202148438f, 59.42434310913086f};

template <class F>
struct NormalPair {
    F cosine, sine;
};

// F float32 lanes, I int32 lanes, U uint32 lanes
template <class F, class I, class U>
JLEBM_HD NormalPair<F> box_muller(U word0, U word1) {
    // ln u0: u0 = 2^e m with m in [sqrt(1/2), sqrt(2)); 2 (w0 >> 9) + 1 is an odd integer below 2^24, exact as a float
    const U odd = ((word0 >> 9) << 1) + 1u;
    const F scaled = to_float(as_int(odd));  // u0 * 2^24
    const U bits = as_uint(scaled);
    const I shifted = as_int(bits) - 0x3f3504f3;  // bits of sqrt(1/2)
    const I exponent = shifted >> 23;             // of m, arithmetic shift
    const F f = rn_add(as_float(as_uint(as_int(bits) - (exponent << 23))), splat<F>(-1.0f));
    F q = splat<F>(kLogQ[8]);
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#pragma GCC unroll 8
#endif
    for (int i = 7; i >= 0; --i) q = rn_add(rn_mul(q, f), splat<F>(kLogQ[i]));
    const F ln = rn_add(rn_mul(to_float(exponent - 24), splat<F>(kLn2)), rn_mul(f, q));
    const F r = rn_sqrt(rn_mul(ln, splat<F>(-2.0f)));

    // 2 pi u1 = (pi / 2) quadrant + 2 pi x, |x| <= 1/8; in units of 2^-24 all of this is integer arithmetic
    const U k = word1 >> 9;
    const U quadrant = (k + (1u << 20)) >> 21;
    const I offset = as_int((k << 1) + 1u) - as_int(quadrant << 22);
    const F x = rn_mul(to_float(offset), splat<F>(5.9604644775390625e-08f));
    const F y = rn_mul(x, x);
    F s = splat<F>(kSinS[3]);
    F c = splat<F>(kCosC[3]);
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#pragma GCC unroll 3
#endif
    for (int i = 2; i >= 0; --i) {
        s = rn_add(rn_mul(s, y), splat<F>(kSinS[i]));
        c = rn_add(rn_mul(c, y), splat<F>(kCosC[i]));
    }
    s = rn_mul(s, x);
    c = rn_add(rn_mul(c, y), splat<F>(1.0f));
    const auto swap = (quadrant & 1u) != 0u;
    const U cosine_sign = ((quadrant + 1u) << 30) & 0x80000000u;
    const U sine_sign = (quadrant << 30) & 0x80000000u;
    const F cosine = as_float(as_uint(select(swap, s, c)) ^ cosine_sign);
    const F sine = as_float(as_uint(select(swap, c, s)) ^ sine_sign);
    return {rn_mul(r, cosine), rn_mul(r, sine)};
}

}  // namespace jlebm
