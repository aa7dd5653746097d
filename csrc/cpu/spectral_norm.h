// Spectral norm of a small weight (cpu/spectral_norm.cpp).
#pragma once

#include <cstdint>

namespace jlebm {

struct SpectralNormParams {
    int64_t n_out = 0, n_in = 0;
    const float* weight = nullptr; // [n_out, n_in]
    const float* start = nullptr;  // [n_out], of length 1
    double tolerance = 0.0;
    int most_products = 0;       // of W W^T and a vector, give or take one call of Lanczos' iteration
    float* u = nullptr;          // [n_out]; may be start
    float* v = nullptr;          // [n_in]
    float* normalised = nullptr; // [n_out, n_in] W / sigma, or null
};

constexpr double kNotConverged = -1.0;

// sigma; NaN where the weight is not finite, and normalised is NaN then; kNotConverged leaves v and normalised unset
double spectral_norm(const SpectralNormParams& p);

} // namespace jlebm
