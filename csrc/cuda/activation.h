// Activations with their derivatives, h = phi(a), d = phi'(a), and the output heads, for one thread.
//
// The formulas are those of cpu/activation_lanes.h; one exponential and one reciprocal each, no branch. NaN stays NaN.
// As there, a factor that grows with a is bounded where what it multiplies has vanished.
#pragma once

#include "cuda/device.h"

namespace jlebm {
namespace cuda {

struct ValueSlope {
    float h, d;
};

// NaN passes, which fminf and fmaxf would drop
JLEBM_DEVICE float at_most(float v, float bound) { return v > bound ? bound : v; }
JLEBM_DEVICE float at_least(float v, float bound) { return v < bound ? bound : v; }

struct ExponentialPair {
    float minus_one, value; // exp(a) - 1 and exp(a), each with its own small relative error
};

JLEBM_DEVICE ExponentialPair expm1_pair(float a) {
    a = at_least(at_most(a, 88.0f), -30.0f);
    const float magic = 12582912.0f; // 1.5 2^23: adding it rounds to an integer that then stands in the low bits
    const float t = fma_rn(a, 1.4426950408889634f, magic);
    const float n = sub_rn(t, magic);
    float r = fma_rn(n, -0.693145751953125f, a); // ln 2 in two pieces, the first with trailing zeros
    r = fma_rn(n, -1.428606765330187e-06f, r);
    float q = 0.0013882522471249104f;
    q = fma_rn(q, r, 0.00836651399731636f);
    q = fma_rn(q, r, 0.04166720062494278f);
    q = fma_rn(q, r, 0.1666654348373413f);
    q = fma_rn(q, r, 0.4999999701976776f);
    const float p = fma_rn(r * r, q, r);
    const float scale = bits_float((float_bits(t) << 23) + 0x3f800000u);
    return {fma_rn(scale, p, scale - 1.0f), fma_rn(scale, p, scale)};
}

// ln(1 + t) for t in [0, 1]: 2 atanh(t / (2 + t))
JLEBM_DEVICE float log1p_unit(float t) {
    const float s = t * reciprocal_few_ulp(t + 2.0f);
    const float y = s * s;
    float p = 0.14089053869247437f;
    p = fma_rn(p, y, 0.1398032307624817f);
    p = fma_rn(p, y, 0.20012454688549042f);
    p = fma_rn(p, y, 0.3333315849304199f);
    p = fma_rn(p, y, 1.0f);
    return (s + s) * p;
}

JLEBM_DEVICE float copy_sign(float magnitude, float sign) {
    return bits_float((float_bits(magnitude) & 0x7fffffffu) | (float_bits(sign) & 0x80000000u));
}

// beyond 80 the sigmoid is 1e-35 or less, and its reciprocal still a normal number
JLEBM_DEVICE float exp_minus(float a) { return exp_few_ulp(at_most(-a, 80.0f)); }
JLEBM_DEVICE float sigmoid(float a) { return reciprocal_few_ulp(1.0f + exp_minus(a)); }

// d = 1 - tanh^2 a without the cancellation: with e = exp(-2 |a|), 4 e / (1 + e)^2
JLEBM_DEVICE ValueSlope tanh_slope(float a) {
    const ExponentialPair e = expm1_pair(fabsf(a) * -2.0f);
    const float q = reciprocal_few_ulp(e.minus_one + 2.0f);
    return {copy_sign(e.minus_one * q, a), e.value * (q + q) * (q + q)};
}

JLEBM_DEVICE float softplus(float a) { return at_least(a, 0.0f) + log1p_unit(exp_few_ulp(-fabsf(a))); }

// Exact-erf GELU: h = a Phi(a), d = Phi(a) + a pdf(a). With t = |a|, E = exp(-t^2 / 2), q = 1 / (1 + p t):
// Phi(-t) = E P(q); both signs of a then need no branch.
//     float32, tf32   the form of Abramowitz and Stegun 7.1.26, coefficients fitted for cpu/activation_lanes.h
//     bf16            Abramowitz and Stegun 7.1.25, |error| of Phi below 1.3e-5, where h is rounded to 8 bits anyway
template <bool kShort>
JLEBM_DEVICE ValueSlope gelu_slope(float a) {
    const float t = fabsf(a);
    const float e = exp2_few_ulp(t * -0.7213475204444817f * t);
    const float q = reciprocal_few_ulp(fma_rn(t, kShort ? 0.33267253f : 0.32f, 1.0f));
    float p;
    if constexpr (kShort) {
        p = fma_rn(fma_rn(0.3739278f, q, -0.0479399f), q, 0.1740121f) * q;
    } else {
        p = -0.12887254357337952f;
        p = fma_rn(p, q, 0.49190276861190796f);
        p = fma_rn(p, q, -0.259475439786911f);
        p = fma_rn(p, q, 0.31022900342941284f);
        p = fma_rn(p, q, 0.08140818029642105f);
        p = fma_rn(p, q, 0.004808004945516586f);
    }
    const float tail = p * e; // Phi(-t)
    if constexpr (kShort) {   // two instructions fewer; what Phi loses where it vanishes is below its own error
        const float half = bits_float(float_bits(0.5f - tail) ^ (float_bits(a) & 0x80000000u));
        const float phi = half + 0.5f;
        return {a * phi, fma_rn(a * e, 0.3989422804014327f, phi)};
    }
    const float h = fma_rn(-t, tail, at_least(a, 0.0f));
    const float g = fma_rn(t * e, 0.3989422804014327f, -tail) + 0.5f; // t pdf(t) - Phi(-t) + 1/2
    return {h, bits_float(float_bits(g) ^ (float_bits(a) & 0x80000000u)) + 0.5f};
}

JLEBM_DEVICE ValueSlope gelu_tanh_slope(float a) {
    // from 6.5 on 1 - tanh^2 is nothing but the residue 4 exp(-30)
    const float c = at_least(at_most(a, 8.0f), -8.0f), a2 = c * c;
    const ValueSlope th = tanh_slope(c * fma_rn(a2, 0.044715f * 0.7978845608028654f, 0.7978845608028654f));
    // left of -8 nothing is left, which a reciprocal of 1 that is a unit off must not bring back: a may be large
    const float half = a < -8.0f ? 0.0f : fma_rn(th.h, 0.5f, 0.5f);
    const float inner = fma_rn(a2, 3.0f * 0.044715f * 0.7978845608028654f, 0.7978845608028654f);
    return {a * half, fma_rn(c * 0.5f, th.d * inner, half)};
}

JLEBM_DEVICE ValueSlope silu_slope(float a) {
    const float low = at_least(a, -80.0f); // there h is -1e-33, and s still a normal number
    const float e = exp_few_ulp(-low);
    const float s = reciprocal_few_ulp(1.0f + e);
    const float h = low * s;
    return {h, fma_rn(h, e * s, s)}; // 1 - s = e s without the cancellation; e is 0 before h is large
}

JLEBM_DEVICE ValueSlope mish_slope(float a) {
    // tanh(ln(1 + e)) = n / (n + 2), n = e (e + 2); beyond 20 it is 1 in float32
    const float c = at_most(a, 20.0f);
    const float e = exp_few_ulp(c);
    const float n = e * (e + 2.0f);
    const float q = reciprocal_few_ulp(n + 2.0f);
    const float th = n * q;
    const float s = e * reciprocal_few_ulp(e + 1.0f);
    return {a * th, fma_rn(c * s, (n + 1.0f) * (q + q) * (q + q), th)}; // 1 - th^2 = 4 (n + 1) / (n + 2)^2
}

JLEBM_DEVICE ValueSlope elu_slope(float a, float alpha) {
    const float e = expm1_pair(at_most(a, 0.0f)).minus_one * alpha;
    return {a > 0.0f ? a : e, a > 0.0f ? 1.0f : e + alpha};
}

// slope of a line broken at 0: identity 1, relu 0
JLEBM_HD bool is_broken_line(Activation activation) {
    return activation == Activation::kIdentity || activation == Activation::kLeakyRelu;
}
JLEBM_DEVICE ValueSlope broken_line_slope(float a, float slope) {
    return {a > 0.0f ? a : a * slope, a > 0.0f ? 1.0f : slope};
}

// every activation but the two popular kinds that the kernel has unrolled
JLEBM_DEVICE ValueSlope other_slope(Activation activation, float a, float param) {
    switch (activation) {
    case Activation::kRelu:
        return {a > 0.0f ? a : (a == a ? 0.0f : a), a > 0.0f ? 1.0f : 0.0f};
    case Activation::kGeluTanh:
        return gelu_tanh_slope(a);
    case Activation::kSilu:
        return silu_slope(a);
    case Activation::kMish:
        return mish_slope(a);
    case Activation::kTanh:
        return tanh_slope(a);
    case Activation::kSoftplus:
        // from 20 on torch's softplus is the identity; a param may be infinite where a is not
        return {a * param > 20.0f ? a : softplus(a * param) * reciprocal_few_ulp(param), sigmoid(a * param)};
    case Activation::kElu:
        return elu_slope(a, param);
    default:
        return {a, 1.0f};
    }
}

// One chain's head: logits[j * stride] -> f, and d f / d logits_j handed to `slope(j, value)`.
template <class Slope>
JLEBM_DEVICE float apply_head(const MlpParams& mlp, const float* logits, int stride, int64_t chosen, Slope slope) {
    const float scale = mlp.out_scale, a = logits[0];
    const int n = mlp.n_logits();
    switch (mlp.head) {
    case Head::kTanh: {
        const ValueSlope th = tanh_slope(a);
        slope(0, th.d * scale);
        return th.h * scale;
    }
    case Head::kSigmoid: {
        const float e = exp_minus(a), s = reciprocal_few_ulp(1.0f + e);
        slope(0, s * (e * s) * scale);
        return s * scale;
    }
    case Head::kSoftplus:
        slope(0, sigmoid(a) * scale);
        return softplus(a) * scale;
    case Head::kLogsumexp: {
        float top = a;
        for (int j = 1; j < n; ++j) {
            const float b = logits[j * stride];
            top = b > top || b != b ? b : top; // a NaN logit stays
        }
        float sum = 0.0f;
        for (int j = 0; j < n; ++j) sum += exp_few_ulp(logits[j * stride] - top);
        const float normalise = scale / sum;
        for (int j = 0; j < n; ++j) slope(j, exp_few_ulp(logits[j * stride] - top) * normalise);
        return (top + logf(sum)) * scale;
    }
    case Head::kLogit: {
        // a number that is no logit's makes its chain NaN: replays of a graph bring numbers that nobody has checked
        const float nan = bits_float(0x7fc00000u);
        const bool there = chosen >= 0 && chosen < n;
        for (int j = 0; j < n; ++j) slope(j, !there ? nan : j == chosen ? scale : 0.0f);
        return there ? logits[chosen * stride] * scale : nan;
    }
    default:
        slope(0, scale);
        return a * scale;
    }
}

} // namespace cuda
} // namespace jlebm
