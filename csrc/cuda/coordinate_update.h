// One coordinate's update, as every MLP kernel computes it.
//
//     z <- z + c_grad * grad + c_prior * ((mean - z) * precision + extra_grad) + c_noise * eps
#pragma once

#include "cuda/device.h"
#include "params.h"

namespace jlebm {
namespace cuda {

struct Coefficients {
    float grad, prior, noise;

    JLEBM_DEVICE static Coefficients of_step(const UpdateParams& u, int64_t step) {
        const float* c = u.step_coefficients + 3 * step;
        return {load_readonly(c), load_readonly(c + 1), load_readonly(c + 2)};
    }
    JLEBM_DEVICE Coefficients of_chain(const UpdateParams& u, int64_t chain) const {
        if (!u.chain_coefficients) return *this;
        const float* factors = u.chain_coefficients + 3 * chain;
        return {grad * load_readonly(factors), prior * load_readonly(factors + 1), noise * load_readonly(factors + 2)};
    }
};

// z after the step; grad f becomes the gradient of f and of the likelihood, which the records tell
JLEBM_DEVICE float moved(const UpdateParams& u, const Coefficients& c, int64_t chain, int dim, int d, float z0,
                         float& grad, float eps, bool noisy) {
    float z1 = fma_rn(c.grad, grad, z0);
    if (u.prior_precision) {
        const float precision = load_readonly(u.prior_precision + chain * u.prior_precision_stride + d);
        float pull = -z0;
        if (u.prior_mean) pull = load_readonly(u.prior_mean + chain * u.prior_mean_stride + d) - z0;
        z1 = fma_rn(c.prior * precision, pull, z1);
    }
    if (u.extra_grad) {
        const float extra = load_readonly(u.extra_grad + chain * dim + d);
        z1 = fma_rn(c.prior, extra, z1);
        grad += extra;
    }
    if (noisy) z1 = fma_rn(c.noise, eps, z1);
    return u.frozen && load_readonly(u.frozen + chain * u.frozen_stride + d) ? z0 : z1;
}

// what the records of a chain sum over its coordinates
struct MoveSums {
    float grad2 = 0.0f, move2 = 0.0f, bad = 0.0f;

    JLEBM_DEVICE void add(float grad, float z0, float z1) {
        const float move = z1 - z0;
        grad2 = fma_rn(grad, grad, grad2);
        move2 = fma_rn(move, move, move2);
        bad = fma_rn(z1, 0.0f, bad); // inf * 0 and NaN * 0 are NaN
    }
};

} // namespace cuda
} // namespace jlebm
