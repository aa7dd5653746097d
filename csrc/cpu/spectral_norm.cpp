// Spectral norm of a small weight, the rule of jlebm_fast/spectral.py:
//
//     v = W^T u, forth = W v, u <- forth / |forth|   until   |W W^T u - |v|^2 u| <= tolerance |W v|
//     sigma = |forth| / |v|,  normalised = W / sigma
//
// A weight that one optimiser step moved converges in a few such power iterations, unless its next singular value lies
// close: what a norm in training makes common. Then Lanczos' iteration (Golub and Van Loan, Matrix Computations,
// chapter 10) finds the best of all u that so many products can make, of which about the square root of the number
// is needed, and the power iterations go on from there. A start that is singular already is held against the first
// products of another vector, since it may have been the first of an earlier weight.
//
// For weights that fit a core's cache: a chain of a hundred steps takes as long as a hundred calls of a matrix library.
// Compiled once: its cost is that of calling it.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/spectral_norm.h"

namespace jlebm {
namespace {

constexpr int kPowerIterations = 6;   // before Lanczos is asked, and after
constexpr int kMostLanczos = 64;      // products of one call: weights of as few rows or columns are solved by it
constexpr int kLanczosLook = 8;       // products between two looks at the residual
constexpr double kRounding = 1e-6;    // relative to the largest eigenvalue: nothing new in another product
constexpr int kProductsOfAnother = 3; // that a start which is singular already is held against
constexpr double kLarger = 1.001;     // of a square, beyond rounding
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

// back = W^T u [n_in], forth = W back [n_out]
void multiply(const SpectralNormParams& p, const float* u, float* back, float* forth) {
    std::memset(back, 0, size_t(p.n_in) * sizeof(float));
    for (int64_t r = 0; r < p.n_out; ++r) {
        const float* row = p.weight + r * p.n_in;
        const float factor = u[r];
        for (int64_t c = 0; c < p.n_in; ++c) back[c] += factor * row[c];
    }
    for (int64_t r = 0; r < p.n_out; ++r) forth[r] = dot(p.weight + r * p.n_in, back, p.n_in);
}

// A symmetric tridiagonal matrix with positive entries beside its diagonal: T[j, j] = diagonal[j], T[j, j + 1] =
// beside[j].
struct Tridiagonal {
    int n = 0;
    double diagonal[kMostLanczos], beside[kMostLanczos];

    // pivots of (bound - T) = L D L^T, all positive if and only if every eigenvalue is below the bound
    bool is_below(double bound, double* pivots) const {
        for (int j = 0; j < n; ++j) {
            pivots[j] = bound - diagonal[j] - (j == 0 ? 0.0 : beside[j - 1] * beside[j - 1] / pivots[j - 1]);
            if (!(pivots[j] > 0.0)) return false;
        }
        return true;
    }

    // eigenvector of the largest eigenvalue, of length 1; its entries are all positive (Perron and Frobenius)
    void top_vector(double* vector) const {
        double least = 0.0, above = 0.0, pivots[kMostLanczos];
        for (int j = 0; j < n; ++j) {
            least = std::max(least, diagonal[j]);
            above = std::max(above, diagonal[j] + (j > 0 ? beside[j - 1] : 0.0) + (j + 1 < n ? beside[j] : 0.0));
        }
        above += 1e-12 * above; // Gershgorin's bound itself may be the eigenvalue
        while (above - least > 1e-11 * above) {
            const double middle = 0.5 * (least + above);
            (is_below(middle, pivots) ? above : least) = middle;
        }
        is_below(above, pivots);
        std::fill_n(vector, n, 1.0);
        for (int repeat = 0; repeat < 3; ++repeat) { // inverse iteration with above - T, whose solution is positive
            for (int j = 1; j < n; ++j) vector[j] += vector[j - 1] * beside[j - 1] / pivots[j - 1];
            vector[n - 1] /= pivots[n - 1];
            for (int j = n - 2; j >= 0; --j) vector[j] = (vector[j] + beside[j] * vector[j + 1]) / pivots[j];
            double square = 0.0;
            for (int j = 0; j < n; ++j) square += vector[j] * vector[j];
            for (int j = 0; j < n; ++j) vector[j] /= std::sqrt(square);
        }
    }
};

// u, of length 1, <- the vector with the largest |W^T u| among all combinations of u, A u, A^2 u, ..., A = W W^T; the
// number of products
int lanczos(const SpectralNormParams& p, float* back, float* forth) {
    const int most = int(std::min<int64_t>(kMostLanczos, std::min(p.n_out, p.n_in)));
    std::vector<float> basis(size_t(most) * size_t(p.n_out));
    const auto vector = [&](int j) { return basis.data() + size_t(j) * size_t(p.n_out); };
    std::copy_n(p.u, p.n_out, vector(0));
    Tridiagonal t;
    double top[kMostLanczos];
    for (;;) {
        multiply(p, vector(t.n), back, forth);
        for (int j = t.n; j >= 0; --j) { // against all of them: rounding would bring the first ones back
            const float along = dot(forth, vector(j), p.n_out);
            if (j == t.n) t.diagonal[t.n] = along;
            for (int64_t r = 0; r < p.n_out; ++r) forth[r] -= along * vector(j)[r];
        }
        const double length = std::sqrt(double(dot(forth, forth, p.n_out)));
        t.beside[t.n++] = length;
        const double largest = *std::max_element(t.diagonal, t.diagonal + t.n);
        bool last = t.n == most || !(length > kRounding * largest);
        if (last || t.n % kLanczosLook == 0) {
            t.top_vector(top);
            // |A u - theta u| of the combination is what the last vector would add
            last = last || length * top[t.n - 1] <= 0.5 * p.tolerance * largest;
        }
        if (last) break;
        for (int64_t r = 0; r < p.n_out; ++r) vector(t.n)[r] = float(forth[r] / length);
    }
    std::fill_n(p.u, p.n_out, 0.0f);
    for (int j = 0; j < t.n; ++j)
        for (int64_t r = 0; r < p.n_out; ++r) p.u[r] += float(top[j]) * vector(j)[r];
    const float length = std::sqrt(dot(p.u, p.u, p.n_out));
    for (int64_t r = 0; r < p.n_out; ++r) p.u[r] /= length;
    return t.n;
}

// p.u, a singular vector of sigma^2 = square, <- a start towards a larger one, if the first products of some other
// vector show that there is one. A vector that is exactly singular stays what it is under products, however much larger
// another singular value has become since it was the first.
bool leaves_a_lesser_one(const SpectralNormParams& p, double square, float* back, float* forth) {
    std::vector<float> other(size_t(p.n_out));
    uint32_t state = 0x9e3779b9u; // any fixed sequence without the weight's own structure
    for (float& x : other) {
        state = state * 1664525u + 1013904223u;
        x = float(int32_t(state)) * 0x1p-31f;
    }
    for (int product = 0; product < kProductsOfAnother; ++product) {
        const float along = dot(other.data(), p.u, p.n_out);
        for (int64_t r = 0; r < p.n_out; ++r) other[size_t(r)] -= along * p.u[r];
        const float length = std::sqrt(dot(other.data(), other.data(), p.n_out));
        if (!(length > 0.0f)) return false; // a single row
        for (float& x : other) x /= length;
        multiply(p, other.data(), back, forth);
        if (double(dot(back, back, p.n_in)) > kLarger * square) {
            std::copy(other.begin(), other.end(), p.u);
            return true;
        }
        std::copy_n(forth, p.n_out, other.begin());
    }
    return false;
}

} // namespace

double spectral_norm(const SpectralNormParams& p) {
    std::vector<float> memory(size_t(p.n_out + p.n_in));
    float *forth = memory.data(), *back = forth + p.n_out;
    std::memmove(p.u, p.start, size_t(p.n_out) * sizeof(float));
    for (int products = 0, iteration = 0; products < p.most_products; ++products, ++iteration) {
        if (iteration == kPowerIterations) {
            products += lanczos(p, back, forth);
            iteration = 0;
        }
        multiply(p, p.u, back, forth);
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
            if (products == 0) {
                if (leaves_a_lesser_one(p, square_back, back, forth)) continue;
                multiply(p, p.u, back, forth); // what the other vector's products have overwritten
            }
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
