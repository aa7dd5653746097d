// What one thread computes: integers, float32, conversions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "cuda/device.h"

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

constexpr u64 kUnset = 0x7fff7fff7fff7fff; // of a register before its first value: NaN of every width

inline float f32(u32 bits) { return jlebm::cuda::bits_float(bits); }
inline u32 bits(float v) { return v != v ? 0x7fffffffu : jlebm::cuda::float_bits(v); } // NaN is canonical

// --- arithmetic on integers
#define JLEBM_PTX_1(name, T, expression)                                                                               \
    template <class D>                                                                                                 \
    inline void name(D& d, T a) {                                                                                      \
        d = D(expression);                                                                                             \
    }
#define JLEBM_PTX_2(name, T, expression)                                                                               \
    template <class D>                                                                                                 \
    inline void name(D& d, T a, T b) {                                                                                 \
        d = D(expression);                                                                                             \
    }
#define JLEBM_PTX_3(name, T, expression)                                                                               \
    template <class D>                                                                                                 \
    inline void name(D& d, T a, T b, T c) {                                                                            \
        d = D(expression);                                                                                             \
    }
#define JLEBM_PTX_INTEGER(bits)                                                                                        \
    JLEBM_PTX_2(add_s##bits, u##bits, a + b)                                                                           \
    JLEBM_PTX_2(add_u##bits, u##bits, a + b)                                                                           \
    JLEBM_PTX_2(sub_s##bits, u##bits, a - b)                                                                           \
    JLEBM_PTX_2(sub_u##bits, u##bits, a - b)                                                                           \
    JLEBM_PTX_2(mul_lo_s##bits, u##bits, u64(a) * u64(b))                                                              \
    JLEBM_PTX_2(mul_lo_u##bits, u##bits, u64(a) * u64(b))                                                              \
    JLEBM_PTX_3(mad_lo_s##bits, u##bits, u64(a) * u64(b) + u64(c))                                                     \
    JLEBM_PTX_3(mad_lo_u##bits, u##bits, u64(a) * u64(b) + u64(c))                                                     \
    JLEBM_PTX_2(min_s##bits, s##bits, a < b ? a : b)                                                                   \
    JLEBM_PTX_2(max_s##bits, s##bits, a > b ? a : b)                                                                   \
    JLEBM_PTX_2(min_u##bits, u##bits, a < b ? a : b)                                                                   \
    JLEBM_PTX_2(max_u##bits, u##bits, a > b ? a : b)                                                                   \
    JLEBM_PTX_2(div_s##bits, s##bits, quotient(a, b))                                                                  \
    JLEBM_PTX_2(div_u##bits, u##bits, quotient(a, b))                                                                  \
    JLEBM_PTX_2(rem_s##bits, s##bits, a - quotient(a, b) * b)                                                          \
    JLEBM_PTX_2(rem_u##bits, u##bits, a - quotient(a, b) * b)                                                          \
    JLEBM_PTX_1(neg_s##bits, u##bits, u##bits(0) - a)                                                                  \
    JLEBM_PTX_1(abs_s##bits, s##bits, a < 0 ? -a : a)                                                                  \
    JLEBM_PTX_1(not_b##bits, u##bits, ~a)                                                                              \
    JLEBM_PTX_2(and_b##bits, u##bits, a& b)                                                                            \
    JLEBM_PTX_2(or_b##bits, u##bits, a | b)                                                                            \
    JLEBM_PTX_2(xor_b##bits, u##bits, a ^ b)                                                                           \
    JLEBM_PTX_COMPARE(b##bits, u##bits)                                                                                \
    JLEBM_PTX_COMPARE(u##bits, u##bits)                                                                                \
    JLEBM_PTX_COMPARE(s##bits, s##bits)                                                                                \
    JLEBM_PTX_MOVE(b##bits, u##bits)                                                                                   \
    JLEBM_PTX_MOVE(u##bits, u##bits)                                                                                   \
    JLEBM_PTX_MOVE(s##bits, u##bits)                                                                                   \
    template <class D>                                                                                                 \
    inline void shl_b##bits(D& d, u##bits a, u32 n) {                                                                  \
        d = D(n < bits ? u##bits(u64(a) << n) : u##bits(0));                                                           \
    }                                                                                                                  \
    template <class D>                                                                                                 \
    inline void shr_u##bits(D& d, u##bits a, u32 n) {                                                                  \
        d = D(n < bits ? u##bits(u64(a) >> n) : u##bits(0));                                                           \
    }                                                                                                                  \
    template <class D>                                                                                                 \
    inline void shr_b##bits(D& d, u##bits a, u32 n) {                                                                  \
        shr_u##bits(d, a, n);                                                                                          \
    }                                                                                                                  \
    template <class D>                                                                                                 \
    inline void shr_s##bits(D& d, s##bits a, u32 n) {                                                                  \
        d = D(u##bits(a >> (n < bits ? n : bits - 1)));                                                                \
    }
#define JLEBM_PTX_COMPARE(type, T)                                                                                     \
    JLEBM_PTX_2(setp_eq_##type, T, a == b)                                                                             \
    JLEBM_PTX_2(setp_ne_##type, T, a != b)                                                                             \
    JLEBM_PTX_2(setp_lt_##type, T, a < b)                                                                              \
    JLEBM_PTX_2(setp_le_##type, T, a <= b)                                                                             \
    JLEBM_PTX_2(setp_gt_##type, T, a > b)                                                                              \
    JLEBM_PTX_2(setp_ge_##type, T, a >= b)
#define JLEBM_PTX_MOVE(type, T)                                                                                        \
    JLEBM_PTX_1(mov_##type, T, a)                                                                                      \
    template <class D>                                                                                                 \
    inline void selp_##type(D& d, T a, T b, bool p) {                                                                  \
        d = D(p ? a : b);                                                                                              \
    }

template <class T>
inline T quotient(T a, T b) {
    if (b == 0) throw std::runtime_error("a division by zero, whose result is not defined");
    if constexpr (std::numeric_limits<T>::is_signed)
        if (b == T(-1)) return T(0) - a;
    return T(a / b);
}

JLEBM_PTX_INTEGER(16)
JLEBM_PTX_INTEGER(32)
JLEBM_PTX_INTEGER(64)
JLEBM_PTX_MOVE(f32, u32)
JLEBM_PTX_MOVE(f64, u64)
JLEBM_PTX_MOVE(pred, bool)
JLEBM_PTX_1(not_pred, bool, !a)
JLEBM_PTX_2(and_pred, bool, a&& b)
JLEBM_PTX_2(or_pred, bool, a || b)
JLEBM_PTX_2(xor_pred, bool, a != b)

#define JLEBM_PTX_WIDE(name, T, W)                                                                                     \
    JLEBM_PTX_2(mul_wide_##name, T, W(a) * W(b))                                                                       \
    template <class D>                                                                                                 \
    inline void mad_wide_##name(D& d, T a, T b, W c) {                                                                 \
        d = D(W(a) * W(b) + c);                                                                                        \
    }
JLEBM_PTX_WIDE(s16, s16, s32)
JLEBM_PTX_WIDE(u16, u16, u32)
JLEBM_PTX_WIDE(s32, s32, s64)
JLEBM_PTX_WIDE(u32, u32, u64)
JLEBM_PTX_2(mul_hi_u32, u32, u64(a) * u64(b) >> 32)
JLEBM_PTX_2(mul_hi_s32, s32, s64(a) * s64(b) >> 32)
JLEBM_PTX_2(mul_hi_u64, u64, (unsigned __int128)(a)*b >> 64)
JLEBM_PTX_2(mul_hi_s64, s64, (__int128)(a)*b >> 64)

inline u32 low_bits(u32 n) { return n >= 32 ? ~0u : (1u << n) - 1; }
inline void bfi_b32(u32& d, u32 a, u32 b, u32 at, u32 n) {
    at &= 255, n &= 255;
    const u32 mask = at >= 32 ? 0 : low_bits(n) << at;
    d = (b & ~mask) | (at >= 32 ? 0 : a << at & mask);
}
inline void bfe_u32(u32& d, u32 a, u32 at, u32 n) {
    at &= 255, n &= 255;
    d = at >= 32 ? 0 : a >> at & low_bits(n);
}
inline void bfe_s32(u32& d, u32 a, u32 at, u32 n) {
    at &= 255, n &= 255;
    const u32 top = at + n > 0 ? std::min(at + n - 1, 31u) : 0u;
    const bool negative = n > 0 && (a >> top & 1);
    d = n == 0 ? 0
               : ((at >= 32 ? 0 : a >> at & low_bits(n)) | (negative ? ~low_bits(top + 1 > at ? top + 1 - at : 0) : 0));
}
inline void lop3_b32(u32& d, u32 a, u32 b, u32 c, u32 table) {
    d = 0;
    for (u32 i = 0; i < 8; ++i)
        if (table >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
}
inline void prmt_b32(u32& d, u32 a, u32 b, u32 selector) {
    const u64 bytes = u64(a) | u64(b) << 32;
    u32 made = 0;
    for (u32 i = 0; i < 4; ++i) {
        const u32 choice = selector >> 4 * i & 15;
        u32 byte = u32(bytes >> 8 * (choice & 7)) & 255;
        if (choice & 8) byte = byte & 128 ? 255 : 0;
        made |= byte << 8 * i;
    }
    d = made;
}
inline void shf_l_wrap_b32(u32& d, u32 a, u32 b, u32 n) { d = u32((u64(b) << 32 | a) << (n & 31) >> 32); }
inline void shf_r_wrap_b32(u32& d, u32 a, u32 b, u32 n) { d = u32((u64(b) << 32 | a) >> (n & 31)); }

// a, b of 16 bits -> d of 32, or of 32 -> 64; the first is the low half
template <class D, class T>
inline void pack(D& d, const T& low, const T& high) {
    static_assert(sizeof(D) == 2 * sizeof(T), "halves");
    d = D(D(low) | D(high) << 8 * sizeof(T));
}
template <class D, class T>
inline void pack(D& d, const T& a, const T& b, const T& c, const T& e) {
    static_assert(sizeof(D) == 4 * sizeof(T), "quarters");
    constexpr int n = 8 * sizeof(T);
    d = D(D(a) | D(b) << n | D(c) << 2 * n | D(e) << 3 * n);
}
template <class D>
inline void pack(D& d, const D& only) {
    d = only;
}
template <class S, class T>
inline void unpack(const S& whole, T& low, T& high) {
    static_assert(sizeof(S) == 2 * sizeof(T), "halves");
    const S copy = whole;
    low = T(copy), high = T(copy >> 8 * sizeof(T));
}
template <class S, class T>
inline void unpack(const S& whole, T& a, T& b, T& c, T& d) {
    static_assert(sizeof(S) == 4 * sizeof(T), "quarters");
    constexpr int n = 8 * sizeof(T);
    const S copy = whole;
    a = T(copy), b = T(copy >> n), c = T(copy >> 2 * n), d = T(copy >> 3 * n);
}

// --- float32: one rounding each; the program is compiled without contraction
#define JLEBM_PTX_FLOAT_1(name, expression) JLEBM_PTX_1(name, u32, expression)
#define JLEBM_PTX_FLOAT_2(name, expression) JLEBM_PTX_2(name, u32, expression)
JLEBM_PTX_FLOAT_2(add_f32, bits(f32(a) + f32(b)))
JLEBM_PTX_FLOAT_2(sub_f32, bits(f32(a) - f32(b)))
JLEBM_PTX_FLOAT_2(mul_f32, bits(f32(a) * f32(b)))
JLEBM_PTX_FLOAT_2(add_rn_f32, bits(f32(a) + f32(b)))
JLEBM_PTX_FLOAT_2(sub_rn_f32, bits(f32(a) - f32(b)))
JLEBM_PTX_FLOAT_2(mul_rn_f32, bits(f32(a) * f32(b)))
JLEBM_PTX_FLOAT_2(div_rn_f32, bits(f32(a) / f32(b)))
JLEBM_PTX_FLOAT_1(sqrt_rn_f32, bits(std::sqrt(f32(a))))
JLEBM_PTX_FLOAT_1(rcp_rn_f32, bits(1.0f / f32(a)))
JLEBM_PTX_3(fma_rn_f32, u32, bits(std::fma(f32(a), f32(b), f32(c))))
JLEBM_PTX_FLOAT_1(neg_f32, a ^ 0x80000000u)
JLEBM_PTX_FLOAT_1(abs_f32, a & 0x7fffffffu)
// of a number and NaN: the number; -0 is below +0
inline u32 smaller(u32 a, u32 b) {
    const float x = f32(a), y = f32(b);
    if (x != x) return bits(y);
    if (y != y) return a;
    return x < y || (x == y && a >> 31) ? a : b;
}
inline u32 larger(u32 a, u32 b) {
    const float x = f32(a), y = f32(b);
    if (x != x) return bits(y);
    if (y != y) return a;
    return x > y || (x == y && !(a >> 31)) ? a : b;
}
JLEBM_PTX_FLOAT_2(min_f32, smaller(a, b))
JLEBM_PTX_FLOAT_2(max_f32, larger(a, b))
#define JLEBM_PTX_ORDERED(word, op)                                                                                    \
    JLEBM_PTX_FLOAT_2(setp_##word##_f32, f32(a) op f32(b))                                                             \
    JLEBM_PTX_FLOAT_2(setp_##word##u_f32, (f32(a) op f32(b)) || unordered(a, b))
inline bool unordered(u32 a, u32 b) { return f32(a) != f32(a) || f32(b) != f32(b); }
JLEBM_PTX_ORDERED(eq, ==)
JLEBM_PTX_ORDERED(lt, <)
JLEBM_PTX_ORDERED(le, <=)
JLEBM_PTX_ORDERED(gt, >)
JLEBM_PTX_ORDERED(ge, >=)
JLEBM_PTX_FLOAT_2(setp_ne_f32, f32(a) != f32(b) && !unordered(a, b))
JLEBM_PTX_FLOAT_2(setp_neu_f32, f32(a) != f32(b))
JLEBM_PTX_FLOAT_2(setp_nan_f32, unordered(a, b))
JLEBM_PTX_FLOAT_2(setp_num_f32, !unordered(a, b))

// Exact, flushed to zero, and then moved by up to `units` units in the last place, by what the bits of the operand say.
inline u32 approximate(double exact, u32 operand, u32 units) {
    u32 result = bits(float(exact));
    const u32 exponent = result >> 23 & 255;
    if (exponent == 0) return result & 0x80000000u;
    if (exponent == 255) return result;
    const u32 mixed = (operand ^ operand >> 15) * 0x9E3779B1u >> 16;
    const u32 moved = result + mixed % (2 * units + 1) - units;
    const u32 now = moved >> 23 & 255;
    return now == 0 || now == 255 ? result : moved;
}
inline u32 flushed_bits(u32 a) { return (a >> 23 & 255) == 0 ? a & 0x80000000u : a; }
inline u32 fused_flushed(u32 a, u32 b, u32 c) {
    return flushed_bits(bits(std::fma(f32(flushed_bits(a)), f32(flushed_bits(b)), f32(flushed_bits(c)))));
}
JLEBM_PTX_3(fma_rn_ftz_f32, u32, fused_flushed(a, b, c))
inline double flushed(u32 a) { return (a >> 23 & 255) == 0 ? std::copysign(0.0, double(f32(a))) : double(f32(a)); }
// where the result is a power of two the chip is exact, and kernels may rely on 2^0 = 1 and the like
inline bool whole(double v) { return v == std::floor(v); }
JLEBM_PTX_FLOAT_1(ex2_approx_ftz_f32, approximate(std::exp2(flushed(a)), a, whole(flushed(a)) ? 0 : 1))
JLEBM_PTX_FLOAT_1(ex2_approx_f32, bits(float(std::exp2(double(f32(a))))))
JLEBM_PTX_FLOAT_1(rcp_approx_ftz_f32, approximate(1.0 / flushed(a), a, 1))
JLEBM_PTX_FLOAT_1(rsqrt_approx_ftz_f32, approximate(1.0 / std::sqrt(flushed(a)), a, 1))
JLEBM_PTX_FLOAT_1(sqrt_approx_ftz_f32, approximate(std::sqrt(flushed(a)), a, 1))
JLEBM_PTX_FLOAT_2(div_full_f32, approximate(double(f32(a)) / double(f32(b)), a ^ b, 2))
JLEBM_PTX_FLOAT_1(lg2_approx_f32, bits(float(std::log2(double(f32(a))))))

// --- conversions
#define JLEBM_PTX_CVT(to, To, from, From)                                                                              \
    template <class D>                                                                                                 \
    inline void cvt_##to##_##from(D& d, From a) {                                                                      \
        d = D(To(a));                                                                                                  \
    }
#define JLEBM_PTX_CVT_FROM(from, From)                                                                                 \
    JLEBM_PTX_CVT(u8, u8, from, From)                                                                                  \
    JLEBM_PTX_CVT(s8, s8, from, From)                                                                                  \
    JLEBM_PTX_CVT(u16, u16, from, From)                                                                                \
    JLEBM_PTX_CVT(s16, s16, from, From)                                                                                \
    JLEBM_PTX_CVT(u32, u32, from, From)                                                                                \
    JLEBM_PTX_CVT(s32, s32, from, From)                                                                                \
    JLEBM_PTX_CVT(u64, u64, from, From)                                                                                \
    JLEBM_PTX_CVT(s64, s64, from, From)                                                                                \
    JLEBM_PTX_1(cvt_rn_f32_##from, From, bits(float(a)))
JLEBM_PTX_CVT_FROM(u8, u8)
JLEBM_PTX_CVT_FROM(s8, s8)
JLEBM_PTX_CVT_FROM(u16, u16)
JLEBM_PTX_CVT_FROM(s16, s16)
JLEBM_PTX_CVT_FROM(u32, u32)
JLEBM_PTX_CVT_FROM(s32, s32)
JLEBM_PTX_CVT_FROM(u64, u64)
JLEBM_PTX_CVT_FROM(s64, s64)
inline void cvt_rna_tf32_f32(u32& d, u32 a) { d = jlebm::cuda::to_tf32(f32(a)); }
inline void cvt_rn_bf16_f32(u16& d, u32 a) { d = jlebm::cuda::to_bf16(f32(a)); }
inline void cvt_rn_bf16x2_f32(u32& d, u32 high, u32 low) { d = jlebm::cuda::pack_bf16(f32(low), f32(high)); }
inline void cvt_f32_bf16(u32& d, u16 a) { d = u32(a) << 16; }

} // namespace ptx
