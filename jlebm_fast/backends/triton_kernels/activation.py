"""Activations with their slopes, and the output heads, on float32 tiles.

    h = phi(a), d = phi'(a)                    f = out_scale * head(logits), df/dlogits

NaN in, NaN out; right for every finite number: a factor that grows with a is bounded where what it multiplies has
vanished, since 0 times an overflow is no zero. Exponentials are `tl.exp`, everything else multiplications and
additions; fused ones are `tl.fma` (fusion is off in these kernels, see noise.py). Nothing here comes from a device
library, so that Triton's interpreter runs every line of it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh_and_slope(a):
    """tanh a and 1 - tanh^2 a, the latter without the cancellation: with e = exp(-2 |a|), 4 e / (1 + e)^2."""
    e = tl.exp(-2.0 * tl.abs(a))
    q = 1.0 / (1.0 + e)
    magnitude = (1.0 - e) * q
    return tl.where(a < 0, -magnitude, magnitude), 4.0 * e * q * q


@triton.jit
def softplus_and_slope(a):
    """ln(1 + exp a) and its slope, the sigmoid."""
    e = tl.exp(-tl.abs(a))
    q = 1.0 / (1.0 + e)
    return tl.maximum(a, 0.0) + tl.log(1.0 + e), tl.where(a < 0, e * q, q)


@triton.jit
def sigmoid_and_complement(a):
    """s and 1 - s, the latter without the cancellation: with e = exp(-a), e s. Left of -80 s is below 2e-35."""
    e = tl.exp(-tl.where(a < -80.0, -80.0, a))
    s = 1.0 / (1.0 + e)
    return s, e * s


@triton.jit
def gelu_and_slope(a):
    """a Phi(a) and Phi(a) + a pdf(a), exact GELU.

    With t = |a|, E = exp(-t^2 / 2), q = 1 / (1 + 0.32 t): Phi(-t) = E P(q), the form of Abramowitz and Stegun 7.1.26
    with the coefficients of csrc/cpu/activation_lanes.h, |error| <= 3.1e-8 / max(t, 1).
    """
    t = tl.abs(a)
    e = tl.exp2(t * -0.7213475204444817 * t)
    q = 1.0 / tl.fma(t, 0.32, 1.0)
    p = tl.fma(q, -0.12887254357337952, 0.49190276861190796)
    p = tl.fma(p, q, -0.259475439786911)
    p = tl.fma(p, q, 0.31022900342941284)
    p = tl.fma(p, q, 0.08140818029642105)
    p = tl.fma(p, q, 0.004808004945516586)
    tail = p * e  # Phi(-t)
    h = tl.fma(-t, tail, tl.where(a < 0, 0.0, a))
    g = tl.fma(t * e, 0.3989422804014327, 0.5 - tail)  # t pdf(t) - Phi(-t) + 1/2
    return h, tl.where(a < 0, -g, g) + 0.5


@triton.jit
def gelu_tanh_and_slope(a):
    c = tl.where(a > 8.0, 8.0, tl.where(a < -8.0, -8.0, a))  # there 1 - t^2 is 1e-21
    square = c * c
    t, t_slope = tanh_and_slope(0.7978845608028654 * tl.fma(0.044715 * square, c, c))
    inner_slope = 0.7978845608028654 * tl.fma(square, 0.134145, 1.0)
    # left of -8 nothing is left, which a quotient that is a unit off must not bring back: a may be large
    half = tl.where(a < -8.0, 0.0, tl.fma(t, 0.5, 0.5))
    return a * half, tl.fma(0.5 * c * t_slope, inner_slope, half)


@triton.jit
def mish_and_slope(a):
    """a t and t + a sigmoid(a) (1 - t^2), t = tanh(softplus a) = n / (n + 2) with u = exp a, n = u (u + 2)."""
    c = tl.where(a > 20.0, 20.0, a)  # from 20 on t is 1 in float32
    u = tl.exp(c)
    n = u * (u + 2.0)
    q = 1.0 / (n + 2.0)
    t = n * q
    return a * t, tl.fma(c * (u / (1.0 + u)), 2.0 * q * (1.0 + t), t)


@triton.jit
def activate(a, KIND: tl.constexpr, parameter):
    """phi(a) and phi'(a); at a kink the slope from the left, as torch's autograd takes it."""
    if KIND == "identity":
        h, d = a, tl.full(a.shape, 1.0, tl.float32)
    elif KIND == "leaky_relu":
        d = tl.where(a > 0, 1.0, parameter)
        h = a * d
    elif KIND == "relu":
        h, d = tl.where(a <= 0, 0.0, a), tl.where(a > 0, 1.0, 0.0)
    elif KIND == "gelu":
        h, d = gelu_and_slope(a)
    elif KIND == "gelu_tanh":
        h, d = gelu_tanh_and_slope(a)
    elif KIND == "silu":
        gate, complement = sigmoid_and_complement(a)
        h = tl.where(a < -80.0, -80.0, a) * gate
        d = tl.fma(h, complement, gate)  # the complement is 0 before h is large
    elif KIND == "mish":
        h, d = mish_and_slope(a)
    elif KIND == "tanh":
        h, d = tanh_and_slope(a)
    elif KIND == "softplus":
        scaled = a * parameter
        h, d = softplus_and_slope(scaled)
        # from 20 on torch's softplus is the identity
        h, d = tl.where(scaled > 20.0, a, h / parameter), tl.where(scaled > 20.0, 1.0, d)
    else:
        tl.static_assert(KIND == "elu", "an activation of problem.ACTIVATIONS that this file has not got")
        e = tl.exp(tl.where(a > 0, 0.0, a))
        h, d = tl.where(a > 0, a, parameter * (e - 1.0)), tl.where(a > 0, 1.0, parameter * e)
    return h, d


@triton.jit
def one_logit_head(logit, KIND: tl.constexpr):
    """head(logit) and its slope, of one logit per chain [chains]."""
    if KIND == "tanh":
        value, slope = tanh_and_slope(logit)
    elif KIND == "sigmoid":
        value, complement = sigmoid_and_complement(logit)
        slope = value * complement
    elif KIND == "softplus":
        value, slope = softplus_and_slope(logit)
        value = tl.where(logit > 20.0, logit, value)
    else:
        # one logit: its logsumexp is itself, and a chosen one is this one
        value, slope = logit, tl.full(logit.shape, 1.0, tl.float32)
    return value, slope


@triton.jit
def many_logits_head(logits, chosen, KIND: tl.constexpr, N_LOGITS: tl.constexpr):
    """head(logits) [chains] and its slope [rows, chains]; rows from N_LOGITS on are padding. chosen: int64 [chains]."""
    row = tl.arange(0, logits.shape[0])[:, None]
    if KIND == "logsumexp":
        real = row < N_LOGITS
        top = tl.max(tl.where(real, logits, float("-inf")), axis=0)
        # an infinite top would give inf - inf
        shift = tl.where(tl.abs(top) < float("inf"), top, 0.0)
        e = tl.where(real, tl.exp(logits - shift[None, :]), 0.0)
        total = tl.sum(e, axis=0)
        value, slope = shift + tl.log(total), e / total[None, :]
    else:
        tl.static_assert(KIND == "logit", "a head of problem.HEADS that this file has not got")
        followed = row == chosen[None, :]
        # a number that is no logit's makes its chain NaN
        there = (chosen >= 0) & (chosen < N_LOGITS)
        slope = tl.where(there[None, :], tl.where(followed, 1.0, 0.0), float("nan"))
        value = tl.where(there, tl.sum(tl.where(followed, logits, 0.0), axis=0), float("nan"))
    return value, slope
