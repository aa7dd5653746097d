// One target's kernels in a program of their own, against plain scalar loops in double: for sanitizers, for compilers
// other than the one that built the module, and for processors that are only emulated.
//
// tests/cpu/test_native.py holds the command.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "common/normal.h"
#include "cpu/kernels_target.h"
#include "cpu/simd.h"
#include "cpu/spectral_norm.h"

using namespace jlebm;
namespace kernels = jlebm::JLEBM_TARGET;

namespace {

struct ScalarOps {
    using F = float;
    using I = int32_t;
    using U = uint32_t;
    static F mul(F a, F b) { return a * b; }
    static F add(F a, F b) { return a + b; }
    static F sqrt(F a) { return std::sqrt(a); }
    static F to_float(I v) { return float(v); }
    template <class To, class From>
    static To bits(From v) {
        To to;
        std::memcpy(&to, &v, sizeof to);
        return to;
    }
    static F as_float(U v) { return bits<F>(v); }
    static U as_uint(F v) { return bits<U>(v); }
    static U as_uint(I v) { return U(v); }
    static I as_int(U v) { return I(v); }
    static bool non_zero(U v) { return v != 0; }
    static F select(bool mask, F a, F b) { return mask ? a : b; }
    static F splat(float c) { return c; }
};

int failures = 0;

void check(bool ok, const char* what, double value) {
    if (ok) return;
    std::printf("FAILED %s: %g\n", what, value);
    ++failures;
}

float scalar_normal(uint64_t key, uint32_t step, uint32_t chain, uint32_t dim, uint32_t stream) {
    const PhiloxWords w = philox4x32<>({{dim / 4, chain, step, stream}}, uint32_t(key), uint32_t(key >> 32));
    const auto pair = dim % 4 < 2 ? box_muller<ScalarOps>(w.w[0], w.w[1]) : box_muller<ScalarOps>(w.w[2], w.w[3]);
    return dim % 2 ? pair.sine : pair.cosine;
}

void check_noise(int64_t chains, int64_t dim) {
    LangevinNoiseParams p;
    p.noise_key = 0x123456789abcdefull, p.first_step = 4, p.first_chain = 77, p.stream = 1;
    p.n_steps = 3, p.chains = chains, p.dim = dim;
    std::vector<float> eps(size_t(p.n_steps * chains * dim));
    p.out = eps.data();
    kernels::langevin_noise(p, 3);
    for (int64_t s = 0, i = 0; s < p.n_steps; ++s)
        for (int64_t c = 0; c < chains; ++c)
            for (int64_t d = 0; d < dim; ++d, ++i)
                check(eps[size_t(i)] == scalar_normal(p.noise_key, 4 + uint32_t(s), 77 + uint32_t(c), uint32_t(d), 1),
                      "noise differs from the scalar contract", eps[size_t(i)]);
}

struct Problem {
    MlpParams mlp;
    std::vector<std::vector<float>> weights, biases;

    explicit Problem(std::vector<int> widths) {
        std::mt19937 g(3);
        std::normal_distribution<float> normal;
        mlp.n_hidden = int(widths.size()) - 2;
        for (size_t i = 0; i < widths.size(); ++i) mlp.widths[i] = widths[i];
        for (size_t l = 0; l + 1 < widths.size(); ++l) {
            weights.emplace_back(size_t(widths[l]) * widths[l + 1]);
            biases.emplace_back(size_t(widths[l + 1]));
            for (float& w : weights.back()) w = normal(g) / std::sqrt(float(widths[l]));
            for (float& b : biases.back()) b = 0.2f * normal(g);
        }
        for (size_t l = 0; l < weights.size(); ++l)
            mlp.weights[l] = weights[l].data(), mlp.biases[l] = biases[l].data();
        for (int l = 0; l < mlp.n_hidden; ++l) {
            mlp.activations[l] = l % 2 ? Activation::kGelu : Activation::kLeakyRelu;
            mlp.activation_params[l] = 0.2f;
        }
    }

    // grad f in double; returns f
    double energy_grad(const std::vector<double>& z, std::vector<double>& grad) const {
        std::vector<std::vector<double>> slopes;
        std::vector<double> h = z;
        for (int l = 0; l <= mlp.n_hidden; ++l) {
            const int n_in = mlp.widths[l], n_out = mlp.widths[l + 1];
            std::vector<double> a(size_t(n_out), 0.0), d(size_t(n_out), 1.0);
            for (int j = 0; j < n_out; ++j) {
                a[size_t(j)] = biases[size_t(l)][size_t(j)];
                for (int k = 0; k < n_in; ++k)
                    a[size_t(j)] += double(weights[size_t(l)][size_t(j) * n_in + k]) * h[size_t(k)];
                double& v = a[size_t(j)];
                if (l == mlp.n_hidden) continue;
                if (mlp.activations[l] == Activation::kGelu) {
                    const double cdf = 0.5 * std::erfc(-v * std::sqrt(0.5));
                    d[size_t(j)] = cdf + v * std::exp(-0.5 * v * v) / std::sqrt(2 * M_PI);
                    v *= cdf;
                } else if (v <= 0) {
                    d[size_t(j)] = 0.2f;
                    v *= 0.2f;
                }
            }
            slopes.push_back(d);
            h = a;
        }
        std::vector<double> delta(1, 1.0);
        for (int l = mlp.n_hidden; l >= 0; --l) {
            std::vector<double> back(size_t(mlp.widths[l]), 0.0);
            for (int j = 0; j < mlp.widths[l + 1]; ++j)
                for (int k = 0; k < mlp.widths[l]; ++k)
                    back[size_t(k)] += delta[size_t(j)] * weights[size_t(l)][size_t(j) * mlp.widths[l] + k] *
                                       (l > 0 ? slopes[size_t(l) - 1][size_t(k)] : 1.0);
            delta = back;
        }
        grad = delta;
        return h[0];
    }
};

void check_chain(std::vector<int> widths, int64_t chains, int threads) {
    const Problem problem(widths);
    const int dim = widths[0];
    const int64_t n_steps = 9;
    std::vector<float> z(size_t(chains * dim)), out(z.size()), coefficients, precision(size_t(dim), 1.0f);
    for (size_t i = 0; i < z.size(); ++i) z[i] = float(int(i * 37 % 101) - 50) / 40;
    for (int s = 0; s < n_steps; ++s) coefficients.insert(coefficients.end(), {0.04f, 0.045f, 0.3f});
    std::vector<float> energy(size_t(n_steps * chains)), norm(energy), moved(energy), path(size_t(n_steps) * z.size());
    std::vector<int64_t> bad(size_t(chains), 0);
    MlpLangevinChainParams p;
    p.chains = chains, p.n_steps = n_steps, p.z = z.data(), p.out = out.data(), p.mlp = problem.mlp;
    p.update.step_coefficients = coefficients.data(), p.update.prior_precision = precision.data();
    p.update.noise_key = 99;
    p.record = {1, energy.data(), norm.data(), moved.data(), bad.data(), path.data()};
    kernels::mlp_langevin_chain(p, threads);
    double worst = 0;
    for (int64_t c = 0; c < chains; ++c) {
        std::vector<double> at(z.begin() + c * dim, z.begin() + (c + 1) * dim), grad;
        for (int64_t s = 0; s < n_steps; ++s) {
            const double f = problem.energy_grad(at, grad);
            worst = std::fmax(worst, std::fabs(f - energy[size_t(s * chains + c)]));
            for (int d = 0; d < dim; ++d)
                at[size_t(d)] += double(0.04f) * grad[size_t(d)] - double(0.045f) * at[size_t(d)] +
                                 double(0.3f) * scalar_normal(99, uint32_t(s), uint32_t(c), uint32_t(d), 0);
        }
        for (int d = 0; d < dim; ++d) worst = std::fmax(worst, std::fabs(at[size_t(d)] - out[size_t(c * dim + d)]));
        check(bad[size_t(c)] == -1, "first bad step", double(bad[size_t(c)]));
    }
    check(worst < 2e-5, "chain differs from the scalar loop", worst);
}

// sums over chains by mlp_weight_grads, of rows that stand alone in memory
void check_weight_grads(std::vector<int> widths, int64_t chains, int threads) {
    const Problem problem(widths);
    MlpWeightGradsParams p;
    p.chains = chains, p.mlp = problem.mlp;
    int64_t hidden_rows = 0;
    for (int l = 1; l <= p.mlp.n_hidden; ++l) hidden_rows += widths[size_t(l)];
    const auto numbers = [](int64_t n, int factor) {
        std::vector<float> v(static_cast<size_t>(n));
        for (size_t i = 0; i < v.size(); ++i) v[i] = float(int(i * size_t(factor) % 101) - 50) / 40;
        return v;
    };
    const auto z = numbers(chains * widths[0], 37), hidden = numbers(hidden_rows * chains, 29);
    const auto delta = numbers((hidden_rows + widths.back()) * chains, 53), g = numbers(chains, 11);
    p.z = z.data(), p.hidden = hidden.data(), p.delta = delta.data(), p.cotangent = g.data();
    std::vector<std::vector<float>> of_weights, of_biases;
    for (int l = 0; l <= p.mlp.n_hidden; ++l) {
        of_weights.emplace_back(size_t(widths[size_t(l)]) * widths[size_t(l) + 1], -1.0f);
        of_biases.emplace_back(size_t(widths[size_t(l) + 1]), -1.0f);
    }
    for (int l = 0; l <= p.mlp.n_hidden; ++l) // every third of them is not asked for
        p.weight_grads[l] = l % 3 == 2 ? nullptr : of_weights[size_t(l)].data(),
        p.bias_grads[l] = l % 3 == 1 ? nullptr : of_biases[size_t(l)].data();
    kernels::mlp_weight_grads(p, threads);
    double worst = 0;
    const float *h = nullptr, *d = delta.data();
    for (int l = 0; l <= p.mlp.n_hidden; ++l) {
        const int n_in = widths[size_t(l)], n_out = widths[size_t(l) + 1];
        for (int j = 0; j < n_out; ++j) {
            double of_bias = 0;
            for (int64_t c = 0; c < chains; ++c) of_bias += double(g[size_t(c)]) * d[j * chains + c];
            if (p.bias_grads[l]) worst = std::fmax(worst, std::fabs(of_bias - p.bias_grads[l][j]));
            for (int k = 0; k < n_in && p.weight_grads[l]; ++k) {
                double sum = 0;
                for (int64_t c = 0; c < chains; ++c)
                    sum += double(g[size_t(c)]) * d[j * chains + c] * (l ? h[k * chains + c] : z[size_t(c * n_in + k)]);
                worst = std::fmax(worst, std::fabs(sum - p.weight_grads[l][j * n_in + k]));
            }
        }
        h = l ? h + n_in * chains : hidden.data(), d += n_out * chains;
    }
    check(worst < 2e-6 * double(chains + 1), "gradients in the parameters", worst);
}

// what mlp_energy_layers tells of h_l and df/da_l against what mlp_energy_grad makes of the same net: f, and the
// gradient in z as the first layer's delta times its weights
void check_layers(std::vector<int> widths, int64_t chains, int threads) {
    const Problem problem(widths);
    MlpEnergyLayersParams p;
    p.chains = chains, p.mlp = problem.mlp;
    int64_t rows = 0;
    for (int l = 1; l <= p.mlp.n_hidden; ++l) rows += widths[size_t(l)];
    std::vector<float> z(size_t(chains * widths[0])), energy(static_cast<size_t>(chains), -1.0f), grad(z),
        other(energy);
    for (size_t i = 0; i < z.size(); ++i) z[i] = float(int(i * 37 % 101) - 50) / 40;
    std::vector<float> hidden(size_t(rows * chains)), delta(size_t((rows + widths.back()) * chains)), other_grad(z);
    p.z = z.data(), p.energy = energy.data(), p.grad = grad.data(), p.hidden = hidden.data(), p.delta = delta.data();
    kernels::mlp_energy_layers(p, threads);
    MlpEnergyGradParams q{chains, z.data(), problem.mlp, other.data(), other_grad.data()};
    kernels::mlp_energy_grad(q, threads);
    double worst = 0;
    for (size_t c = 0; c < energy.size(); ++c) worst = std::fmax(worst, std::fabs(energy[c] - other[c]));
    for (size_t i = 0; i < grad.size(); ++i) worst = std::fmax(worst, std::fabs(grad[i] - other_grad[i]));
    for (int64_t c = 0; c < chains; ++c)
        for (int k = 0; k < widths[0]; ++k) {
            double sum = 0;
            for (int j = 0; j < widths[1]; ++j)
                sum += double(delta[size_t(j * chains + c)]) * p.mlp.weights[0][j * widths[0] + k];
            worst = std::fmax(worst, std::fabs(sum - grad[size_t(c * widths[0] + k)]));
        }
    check(worst < 2e-5, "what a net's layers tell", worst);
    p.hidden = p.delta = p.grad = nullptr; // f alone
    kernels::mlp_energy_layers(p, threads);
}

// |W^T u| = sigma with u where the iteration ended, from a start that is as good as any
void check_spectral_norm(int64_t n_out, int64_t n_in) {
    std::vector<float> weight(size_t(n_out * n_in)), u(static_cast<size_t>(n_out), 0.0f), v(static_cast<size_t>(n_in));
    std::vector<float> normalised(weight);
    for (size_t i = 0; i < weight.size(); ++i) weight[i] = float(int(i * 53 % 97) - 48) / 30;
    u[0] = 1.0f;
    const double sigma =
        spectral_norm({n_out, n_in, weight.data(), u.data(), 1e-4, 400, u.data(), v.data(), normalised.data()});
    double square = 0;
    for (int64_t k = 0; k < n_in; ++k) {
        double sum = 0;
        for (int64_t j = 0; j < n_out; ++j) sum += double(u[size_t(j)]) * weight[size_t(j * n_in + k)];
        square += sum * sum;
    }
    check(std::fabs(std::sqrt(square) / sigma - 1) < 1e-3, "spectral norm", sigma);
    check(std::fabs(normalised[0] * sigma - weight[0]) < 1e-4, "weight by its spectral norm", normalised[0]);
}

} // namespace

int main() {
    for (int64_t chains : {1, 4, 17, 100}) {
        check_layers({10, 23, 14, 1}, chains, 3);
        check_layers({3, 5, 1}, chains, 1);
    }
    for (int64_t n_out : {1, 2, 7, 50})
        for (int64_t n_in : {1, 3, 16, 50}) check_spectral_norm(n_out, n_in);
    for (int64_t chains : {1, 16, 37})
        for (int64_t dim : {1, 4, 10, 50}) check_noise(chains, dim);
    for (int threads : {1, 3})
        for (int64_t chains : {1, 4, 7, 17, 100}) {
            check_chain({10, 23, 14, 1}, chains, threads);
            check_chain({3, 5, 1}, chains, threads);
        }
    check_chain({50, 100, 100, 1}, 40, 2);
    for (int64_t chains : {0, 1, 4, 15, 16, 37, 511, 513, 1100}) {
        check_weight_grads({10, 23, 14, 1}, chains, 3);
        check_weight_grads({1, 5, 3}, chains, 1);
    }
    check_weight_grads({50, 100, 100, 7}, 100, 2);
    std::printf(failures ? "%d failures\n" : "all equal\n", failures);
    return failures != 0;
}
