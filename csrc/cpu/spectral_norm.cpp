// Spectral norm of a weight by power iteration, the rule of jlebm_fast/spectral.py:
//
//     v = W^T u, forth = W v, u <- forth / |forth|   until   |W W^T u - |v|^2 u| <= tolerance |W v|
//     sigma = |forth| / |v|,  normalised = W / sigma
//
// For weights that fit a core's cache: a chain of a hundred steps takes as long as a hundred calls of a matrix library.
// Compiled once: its cost is that of calling it.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/spectral_norm.h"

namespace jlebm {
namespace {

constexpr int kPartialSums = 16; // independent sums, so that the compiler may use its vectors without reordering one

float dot(const float* a, const float* b, int64_t n) {
    float sums[kPartialSums] = {};
    int64_t i = 0;
    for (; i + kPartialSums <= n; i += kPartialSums)
        for (int k = 0; k < kPartialSums; ++k) sums[k] += a[i + k] * b[i + k];
    float sum = 0.0f;
    for (; i < n; ++i) sum += a[i] * b[i];
    for (float s : sums) sum += s;
    return sum;
}

} // namespace

double spectral_norm(const SpectralNormParams& p) {
    std::vector<float> memory(size_t(p.n_out + p.n_in));
    float *forth = memory.data(), *back = forth + p.n_out;
    std::memmove(p.u, p.start, size_t(p.n_out) * sizeof(float));
    for (int iteration = 0; iteration < p.max_iterations; ++iteration) {
        std::memset(back, 0, size_t(p.n_in) * sizeof(float));
        for (int64_t r = 0; r < p.n_out; ++r) {
            const float* row = p.weight + r * p.n_in;
            const float factor = p.u[r];
            for (int64_t c = 0; c < p.n_in; ++c) back[c] += factor * row[c];
        }
        for (int64_t r = 0; r < p.n_out; ++r) forth[r] = dot(p.weight + r * p.n_in, back, p.n_in);
        const double square_back = dot(back, back, p.n_in), square_forth = dot(forth, forth, p.n_out);
        if (!std::isfinite(square_forth)) {
            std::memcpy(p.v, back, size_t(p.n_in) * sizeof(float));
            if (p.normalised)
                for (int64_t i = 0; i < p.n_out * p.n_in; ++i)
                    p.normalised[i] = std::numeric_limits<float>::quiet_NaN();
            return std::numeric_limits<double>::quiet_NaN();
        }
        if (square_forth == 0.0) break;
        // u is an eigenvector of W W^T, with eigenvalue |W^T u|^2, once this vanishes
        double residual = 0.0;
        for (int64_t r = 0; r < p.n_out; ++r) {
            const double d = double(forth[r]) - square_back * double(p.u[r]);
            residual += d * d;
        }
        const float length = float(std::sqrt(square_forth));
        for (int64_t r = 0; r < p.n_out; ++r) p.u[r] = forth[r] / length;
        if (residual <= p.tolerance * p.tolerance * square_forth) {
            const double sigma = std::sqrt(square_forth / square_back);
            const float back_length = float(std::sqrt(square_back)), divisor = float(sigma);
            for (int64_t c = 0; c < p.n_in; ++c) p.v[c] = back[c] / back_length;
            if (p.normalised)
                for (int64_t i = 0; i < p.n_out * p.n_in; ++i) p.normalised[i] = p.weight[i] / divisor;
            return sigma;
        }
    }
    return kNotConverged;
}

} // namespace jlebm
