// Results below 2^-126 become 0 for as long as one of these lives, in the thread that made it.
//
// Saturated activations give such numbers (softplus, GELU and their derivatives at -90), and arithmetic on them is
// slow. Worker threads have a mode of their own, of which torch.set_flush_denormal changes only the calling one's, and
// what a chain becomes must not depend on who computes it. Operands are taken as they are: a caller's 1e-39 is
// positive.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace jlebm {

class FlushDenormals {
public:
#if defined(__SSE2__)
    FlushDenormals() : before_(_mm_getcsr()) {
        constexpr uint32_t results = 0x8000, operands = 0x0040;
        _mm_setcsr((before_ | results) & ~operands);
    }
    ~FlushDenormals() { _mm_setcsr(before_); }
#else
    FlushDenormals() = default; // other processors have no mode for results alone, and less need of one
    ~FlushDenormals() {}
#endif
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;

private:
    [[maybe_unused]] uint32_t before_ = 0;
};

} // namespace jlebm
