// Activations and their derivatives in SIMD lanes: h = phi(a), d = phi'(a).
//
// Errors stated are against float64 on float32 inputs, measured by tests/cpu. NaN in, NaN out, in its own lane. A
// factor that grows with a is bounded where what it multiplies has vanished: a residue of rounding times 1e30 is no
// zero.
#pragma once

#include "common/normal.h"
#include "cpu/gelu_table.h"
#include "cpu/simd.h"
#include "params.h"

namespace jlebm {
namespace JLEBM_TARGET {

struct ValueSlope {
    F h, d;
};

struct ExponentFraction {
    F fraction;   // in [-1/2, 1/2]
    I exponent23; // exponent << 23
};

// u = exponent + fraction; adding 1.5 * 2^23 rounds to an integer that then stands in the low bits
JLEBM_INLINE ExponentFraction split_exponent(F u) {
    const F magic = splat(12582912.0f);
    const F t = u + magic;
    return {u - (t - magic), as_int(as_uint(t) << 23)};
}

// 2^u for u in [-126, 0], relative error 1.3e-7
JLEBM_INLINE F exp2_of_negative(F u) {
    const ExponentFraction s = split_exponent(u);
    F p = splat(0.001327647129073739f);
    p = fma(p, s.fraction, splat(0.009675540961325169f));
    p = fma(p, s.fraction, splat(0.05550713092088699f));
    p = fma(p, s.fraction, splat(0.24022120237350464f));
    p = fma(p, s.fraction, splat(0.6931469440460205f));
    p = fma(p, s.fraction, splat(1.0000001192092896f));
    return as_float(as_uint(p) + as_uint(s.exponent23));
}

// exp(a) for |a| <= 87, where nothing needs to be bounded
JLEBM_INLINE F exp_in_range(F a) {
    const F head = a * 1.4426950216293335f; // in two pieces, as below
    const F tail = fma(a, splat(1.4426950216293335f), -head) + a * 1.9259629911e-08f;
    const ExponentFraction s = split_exponent(head);
    const F fraction = s.fraction + tail;
    F p = splat(0.001327647129073739f);
    p = fma(p, fraction, splat(0.009675540961325169f));
    p = fma(p, fraction, splat(0.05550713092088699f));
    p = fma(p, fraction, splat(0.24022120237350464f));
    p = fma(p, fraction, splat(0.6931469440460205f));
    p = fma(p, fraction, splat(1.0000001192092896f));
    return as_float(as_uint(p) + as_uint(s.exponent23));
}

JLEBM_INLINE F exp_lanes(F a) {
    // a log2(e) in two pieces: the product's rounding error would otherwise grow with |a|
    const F head = a * 1.4426950216293335f;
    const F tail = fma(a, splat(1.4426950216293335f), -head) + a * 1.9259629911e-08f;
    const F clamped = max_or_nan(splat(-126.0f), min_or_nan(splat(127.9f), head));
    const ExponentFraction s = split_exponent(clamped);
    const F fraction = s.fraction + (clamped == head ? tail : splat(0.0f));
    F p = splat(0.001327647129073739f);
    p = fma(p, fraction, splat(0.009675540961325169f));
    p = fma(p, fraction, splat(0.05550713092088699f));
    p = fma(p, fraction, splat(0.24022120237350464f));
    p = fma(p, fraction, splat(0.6931469440460205f));
    p = fma(p, fraction, splat(1.0000001192092896f));
    return as_float(as_uint(p) + as_uint(s.exponent23));
}

struct ExponentialPair {
    F minus_one, value; // exp(a) - 1 and exp(a), each with its own small relative error
};

JLEBM_INLINE ExponentialPair expm1_lanes(F a) {
    a = max_or_nan(splat(-30.0f), min_or_nan(splat(88.0f), a));
    const F magic = splat(12582912.0f);
    const F t = fma(a, splat(1.4426950408889634f), magic);
    const F n = t - magic;
    F r = fma(n, splat(-0.693145751953125f), a); // ln 2 in two pieces, the first with trailing zeros
    r = fma(n, splat(-1.428606765330187e-06f), r);
    F q = splat(0.0013882522471249104f);
    q = fma(q, r, splat(0.00836651399731636f));
    q = fma(q, r, splat(0.04166720062494278f));
    q = fma(q, r, splat(0.1666654348373413f));
    q = fma(q, r, splat(0.4999999701976776f));
    const F p = fma(r * r, q, r);
    const F scale = as_float((as_uint(t) << 23) + 0x3f800000u);
    return {fma(scale, p, scale - 1.0f), fma(scale, p, scale)};
}

// ln(1 + t) for t in [0, 1]: 2 atanh(t / (2 + t))
JLEBM_INLINE F log1p_unit(F t) {
    const F s = t / (t + 2.0f);
    const F y = s * s;
    F p = splat(0.14089053869247437f);
    p = fma(p, y, splat(0.1398032307624817f));
    p = fma(p, y, splat(0.20012454688549042f));
    p = fma(p, y, splat(0.3333315849304199f));
    p = fma(p, y, splat(1.0f));
    return (s + s) * p;
}

// ln of a positive normal number, by the range reduction of common/normal.h
JLEBM_INLINE F log_lanes(F a) {
    const I shifted = as_int(as_uint(a)) - 0x3f3504f3;
    const I exponent = shifted >> 23;
    const F f = as_float(as_uint(as_int(as_uint(a)) - (exponent << 23))) - 1.0f;
    F q = splat(kLogQ[8]);
#pragma GCC unroll 8
    for (int i = 7; i >= 0; --i) q = fma(q, f, splat(kLogQ[i]));
    const F ln = fma(to_float(exponent), splat(kLn2), f * q);
    return a == a ? ln : a;
}

JLEBM_INLINE F sigmoid_lanes(F a) { return 1.0f / (1.0f + exp_lanes(-a)); }

JLEBM_INLINE F copysign_lanes(F magnitude, F sign) {
    return as_float((as_uint(magnitude) & 0x7fffffffu) | (as_uint(sign) & 0x80000000u));
}

// h = tanh a, d = 1 - tanh^2 a without the cancellation: with e = exp(-2 |a|), 4 e / (1 + e)^2
JLEBM_INLINE ValueSlope tanh_lanes(F a) {
    const ExponentialPair e = expm1_lanes(abs(a) * -2.0f);
    const F q = 1.0f / (e.minus_one + 2.0f);
    return {copysign_lanes(e.minus_one * q, a), e.value * (q + q) * (q + q)};
}

JLEBM_INLINE F softplus_lanes(F a) { // beta = 1
    return max_or_nan(splat(0.0f), a) + log1p_unit(exp_lanes(-abs(a)));
}

// Exact-erf GELU: h = a Phi(a), d = Phi(a) + a pdf(a).
#if defined(__AVX512F__) && defined(__AVX512DQ__)
// With t = |a|: h = max(a, 0) - t Phi(-t) and d = 1/2 +- (phi'(t) - 1/2), two piecewise polynomials of one segment.
JLEBM_INLINE F gelu_piece(const float (*table)[kGeluSegments], I segment, F r) {
    const auto coefficient = [&](int i) {
        return (F)_mm512_permutex2var_ps((__m512)load(table[i]), (__m512i)segment, (__m512)load(table[i] + kLanes));
    };
    F p = coefficient(kGeluDegree);
#pragma GCC unroll 4
    for (int i = kGeluDegree - 1; i >= 0; --i) p = fma(p, r, coefficient(i));
    return p;
}

JLEBM_INLINE ValueSlope gelu_lanes(F a) {
    const F magic = splat(12582912.0f), per_segment = splat(1.0f / kGeluSegment);
    const F t = abs(a);
    const F clamped = min_or_nan(splat((kGeluSegments - 1) * kGeluSegment), t);
    const F u = fma(clamped, per_segment, magic); // the nearest segment stands in the low bits; the lookup reads five
    const F r = fma(clamped, per_segment, magic - u);
    const F h = fma(-clamped, gelu_piece(kGeluTail, as_int(as_uint(u)), r), max_or_nan(splat(0.0f), a));
    const F g = gelu_piece(kGeluSlope, as_int(as_uint(u)), r);
    return {h, as_float(as_uint(g) ^ (as_uint(a) & 0x80000000u)) + 0.5f};
}
#else
// With t = |a|, E = exp(-t^2 / 2), q = 1 / (1 + 0.32 t):  Phi(-t) = E P(q), |error| <= 3.1e-8 / max(t, 1) (the form of
// Abramowitz and Stegun 7.1.26, coefficients fitted here); both signs of a then need no branch.
JLEBM_INLINE ValueSlope gelu_lanes(F a) {
    const F t = min_or_nan(splat(13.2f), abs(a)); // there E is 1e-38, the smallest normal number
    const F e = exp2_of_negative((t * -0.7213475204444817f) * t);
    const F q = reciprocal(fma(t, splat(0.32f), splat(1.0f)));
    F p = splat(-0.12887254357337952f);
    p = fma(p, q, splat(0.49190276861190796f));
    p = fma(p, q, splat(-0.259475439786911f));
    p = fma(p, q, splat(0.31022900342941284f));
    p = fma(p, q, splat(0.08140818029642105f));
    p = fma(p, q, splat(0.004808004945516586f));
    const F tail = p * e; // Phi(-t)
    const F h = fma(-t, tail, max_or_nan(splat(0.0f), a));
    const F g = fma(t * e, splat(0.3989422804014327f), -tail) + 0.5f; // t pdf(t) - Phi(-t) + 1/2
    return {h, as_float(as_uint(g) ^ (as_uint(a) & 0x80000000u)) + 0.5f};
}
#endif

template <Activation kActivation>
JLEBM_INLINE ValueSlope activate(F a, F param) {
    if constexpr (kActivation == Activation::kIdentity) {
        return {a, splat(1.0f)};
    } else if constexpr (kActivation == Activation::kRelu) {
        return {a > 0.0f ? a : (a == a ? splat(0.0f) : a), a > 0.0f ? splat(1.0f) : splat(0.0f)};
    } else if constexpr (kActivation == Activation::kLeakyRelu) {
        return {a > 0.0f ? a : a * param, a > 0.0f ? splat(1.0f) : param};
    } else if constexpr (kActivation == Activation::kGelu) {
        return gelu_lanes(a);
    } else if constexpr (kActivation == Activation::kGeluTanh) {
        // from 6.5 on 1 - tanh^2 is nothing but the residue 4 exp(-30)
        const F c = max_or_nan(splat(-8.0f), min_or_nan(splat(8.0f), a));
        const F a2 = c * c;
        const ValueSlope th =
            tanh_lanes(c * fma(a2, splat(0.044715f * 0.7978845608028654f), splat(0.7978845608028654f)));
        const F half = fma(th.h, splat(0.5f), splat(0.5f));
        const F inner = fma(a2, splat(3.0f * 0.044715f * 0.7978845608028654f), splat(0.7978845608028654f));
        const F slope = th.d * inner;
        return {a * half, fma(c * 0.5f, slope, half)};
    } else if constexpr (kActivation == Activation::kSilu) {
        const F low = max_or_nan(splat(-87.0f), a); // there h is -1e-36, and s still a normal number
        const F c = min_or_nan(splat(87.0f), low);
        const F e = exp_in_range(-c);
        const F s = 1.0f / (1.0f + e);
        return {low * s, fma(c * s, e * s, s)}; // 1 - s = e s without the cancellation
    } else if constexpr (kActivation == Activation::kMish) {
        // tanh(ln(1 + e)) = n / (n + 2), n = e (e + 2); beyond 20 it is 1 in float32
        const F low = max_or_nan(splat(-87.0f), a); // there h is -1e-36
        const F c = min_or_nan(splat(20.0f), low);
        const F e = exp_in_range(c);
        const F n = e * (e + 2.0f);
        const F q = 1.0f / (n + 2.0f);
        const F th = n * q;
        const F s = e / (e + 1.0f);
        return {low * th, fma(c * s, (n + 1.0f) * (q + q) * (q + q), th)}; // 1 - th^2 = 4 (n + 1) / (n + 2)^2
    } else if constexpr (kActivation == Activation::kTanh) {
        return tanh_lanes(a);
    } else if constexpr (kActivation == Activation::kSoftplus) {
        const F y = a * param;
        // from 20 on torch's softplus is the identity; y may be infinite where a is not
        return {y > 20.0f ? a : softplus_lanes(y) / param, sigmoid_lanes(y)};
    } else {
        static_assert(kActivation == Activation::kElu);
        const F e = expm1_lanes(min_or_nan(splat(0.0f), a)).minus_one * param;
        return {a > 0.0f ? a : e, a > 0.0f ? splat(1.0f) : e + param};
    }
}

// pre-activations `a` -> h and d, all [n_vectors] vectors of kLanes floats; h may be `a` or null (not needed)
template <Activation kActivation>
inline void activate_rows(const float* a, float param, float* h, float* d, int64_t n_vectors) {
    const F p = splat(param);
    if (h == nullptr) {
        for (int64_t i = 0; i < n_vectors; ++i) store(d + i * kLanes, activate<kActivation>(load(a + i * kLanes), p).d);
        return;
    }
    for (int64_t i = 0; i < n_vectors; ++i) {
        const ValueSlope v = activate<kActivation>(load(a + i * kLanes), p);
        store(h + i * kLanes, v.h);
        store(d + i * kLanes, v.d);
    }
}

using ActivateRows = void (*)(const float*, float, float*, float*, int64_t);

inline ActivateRows activate_rows_of(Activation activation) {
    static constexpr ActivateRows kTable[] = {
        activate_rows<Activation::kIdentity>, activate_rows<Activation::kLeakyRelu>,
        activate_rows<Activation::kRelu>,     activate_rows<Activation::kGelu>,
        activate_rows<Activation::kGeluTanh>, activate_rows<Activation::kSilu>,
        activate_rows<Activation::kMish>,     activate_rows<Activation::kTanh>,
        activate_rows<Activation::kSoftplus>, activate_rows<Activation::kElu>};
    static_assert(sizeof(kTable) / sizeof(kTable[0]) == size_t(Activation::kCount), "one row per activation");
    return kTable[int(activation)];
}

} // namespace JLEBM_TARGET
} // namespace jlebm
