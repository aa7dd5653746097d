// The instructions that the AVX-512 target names, in plain C++: its sources, sixteen lanes and all, then run on any
// x86_64 with AVX2. Handed to the compiler with -include, before everything else. What csrc/cpu uses is here and
// nothing more: an intrinsic that is missing is the compiler's error. 1 / a is rounded to 14 bits, which is all that
// the instruction promises.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512DQ__ 1

namespace avx512_emulated {
typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint64_t W __attribute__((vector_size(64)));

#define EMULATED static inline __attribute__((always_inline))

EMULATED F min_ps(F a, F b) { return a < b ? a : b; } // the second operand where one is NaN, as the instruction
EMULATED F max_ps(F a, F b) { return a > b ? a : b; }
// in halves of eight lanes, each an instruction of AVX2
typedef float Half __attribute__((vector_size(32)));
EMULATED Half low(F a) { return __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7); }
EMULATED Half high(F a) { return __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15); }
EMULATED F both(Half a, Half b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
EMULATED F sqrt_ps(F a) { return both(_mm256_sqrt_ps(low(a)), _mm256_sqrt_ps(high(a))); }
EMULATED F fmadd_ps(F a, F b, F c) {
    return both(_mm256_fmadd_ps(low(a), low(b), low(c)), _mm256_fmadd_ps(high(a), high(b), high(c)));
}
EMULATED F rcp14_ps(F a) {
    const F exact = 1.0f / a;
    const F rounded = (F)(((I)exact + (1 << 9)) & ~((1 << 10) - 1));
    return (F{} + 0x1p127f >= exact) & (exact >= F{} - 0x1p127f) ? rounded : exact;
}
EMULATED W mul_epu32(W a, W b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
EMULATED F broadcast_f32x4(__m128 a) {
    const Half half = _mm256_set_m128(a, a);
    return both(half, half);
}
EMULATED F permute_ps(F a, int control) {
    const I four = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
    const int c0 = control & 3, c1 = control >> 2 & 3, c2 = control >> 4 & 3, c3 = control >> 6 & 3;
    return __builtin_shuffle(a, four + I{c0, c1, c2, c3, c0, c1, c2, c3, c0, c1, c2, c3, c0, c1, c2, c3});
}
EMULATED F permutexvar_ps(I from, F a) { return __builtin_shuffle(a, from); }
EMULATED F permutex2var_ps(F a, I from, F b) { return __builtin_shuffle(a, b, from); }
} // namespace avx512_emulated

#define __m512 avx512_emulated::F
#define __m512i avx512_emulated::I
#define _mm512_min_ps avx512_emulated::min_ps
#define _mm512_max_ps avx512_emulated::max_ps
#define _mm512_sqrt_ps avx512_emulated::sqrt_ps
#define _mm512_fmadd_ps avx512_emulated::fmadd_ps
#define _mm512_rcp14_ps avx512_emulated::rcp14_ps
#define _mm512_mul_epu32(a, b) avx512_emulated::mul_epu32((avx512_emulated::W)(a), (avx512_emulated::W)(b))
#define _mm512_broadcast_f32x4 avx512_emulated::broadcast_f32x4
#undef _mm512_permute_ps // a macro itself where nothing is optimised
#define _mm512_permute_ps avx512_emulated::permute_ps
#define _mm512_permutexvar_ps avx512_emulated::permutexvar_ps
#define _mm512_permutex2var_ps avx512_emulated::permutex2var_ps
