// Two of something, computed side by side: instruction-level parallelism that the source states.
//
// One Philox or Box-Muller chain is a long dependent sequence; a core's scheduler is too short to find the next
// independent one by itself. Twin<Twin<F>> walks four of them in step.
#pragma once

#include "cpu/simd.h"

namespace jlebm {
namespace JLEBM_TARGET {

template <class T>
struct Twin {
    T a, b;

#define JLEBM_TWIN_OPERATOR(op)                                                                                        \
    friend JLEBM_INLINE Twin operator op(const Twin& x, const Twin& y) { return {x.a op y.a, x.b op y.b}; }            \
    template <class S>                                                                                                 \
    friend JLEBM_INLINE Twin operator op(const Twin& x, S s) {                                                         \
        return {x.a op s, x.b op s};                                                                                   \
    }
    JLEBM_TWIN_OPERATOR(+)
    JLEBM_TWIN_OPERATOR(-)
    JLEBM_TWIN_OPERATOR(&)
    JLEBM_TWIN_OPERATOR(|)
    JLEBM_TWIN_OPERATOR(^)
    JLEBM_TWIN_OPERATOR(>>)
#undef JLEBM_TWIN_OPERATOR
};

// the operations that common/normal.h asks for, on twins of Base's types
template <class Base>
struct TwinOps {
    using F = Twin<typename Base::F>;
    using I = Twin<typename Base::I>;
    using U = Twin<typename Base::U>;
    static JLEBM_INLINE F mul(F x, F y) { return {Base::mul(x.a, y.a), Base::mul(x.b, y.b)}; }
    static JLEBM_INLINE F add(F x, F y) { return {Base::add(x.a, y.a), Base::add(x.b, y.b)}; }
    static JLEBM_INLINE F sqrt(F x) { return {Base::sqrt(x.a), Base::sqrt(x.b)}; }
    static JLEBM_INLINE F to_float(I x) { return {Base::to_float(x.a), Base::to_float(x.b)}; }
    static JLEBM_INLINE F as_float(U x) { return {Base::as_float(x.a), Base::as_float(x.b)}; }
    template <class T>
    static JLEBM_INLINE U as_uint(T x) {
        return {Base::as_uint(x.a), Base::as_uint(x.b)};
    }
    static JLEBM_INLINE I as_int(U x) { return {Base::as_int(x.a), Base::as_int(x.b)}; }
    static JLEBM_INLINE auto non_zero(U x) -> Twin<decltype(Base::non_zero(x.a))> {
        return {Base::non_zero(x.a), Base::non_zero(x.b)};
    }
    template <class M>
    static JLEBM_INLINE F select(M mask, F x, F y) {
        return {Base::select(mask.a, x.a, y.a), Base::select(mask.b, x.b, y.b)};
    }
    static JLEBM_INLINE F splat(float c) { return {Base::splat(c), Base::splat(c)}; }
};

JLEBM_INLINE W mul_low32_each(W x, W m) { return mul_low32(x, m); }
template <class T>
JLEBM_INLINE Twin<T> mul_low32_each(const Twin<T>& x, W m) {
    return {mul_low32_each(x.a, m), mul_low32_each(x.b, m)};
}

} // namespace JLEBM_TARGET
} // namespace jlebm
