// langevin_step: one update with a gradient from anywhere, [chains, dim] -> [chains, dim].
//
//     z <- z + c_grad * grad + c_prior * ((mean - z) * precision + extra_grad) + c_noise * eps
// One thread, four coordinates of a chain. Sums are formed in the order of csrc/cpu/update_lanes.h, fused alike.
#include "cuda/rows.h"

namespace jlebm {
namespace cuda {

template <bool kWhole>
JLEBM_KERNEL(kRowThreads, 2)
langevin_step_kernel(LangevinStepParams p) {
    const UpdateParams& u = p.update;
    const float step_grad = load_readonly(u.step_coefficients), step_prior = load_readonly(u.step_coefficients + 1),
                step_noise = load_readonly(u.step_coefficients + 2);
    const bool noisy = step_noise != 0.0f;
    const uint64_t key = u.noise_key_at ? *u.noise_key_at : u.noise_key;
    const int64_t quads = (p.dim + 3) / 4;
    const int64_t n_quads = p.chains * quads, stride = int64_t(gridDim.x) * kRowThreads;
    for (int64_t index = int64_t(blockIdx.x) * kRowThreads + threadIdx.x; index < n_quads; index += stride) {
        const Divided chain_quad = divide(index, quads);
        const int64_t chain = chain_quad.quotient, d = chain_quad.remainder * 4, first = chain * p.dim + d;
        const int count = int(p.dim - d < 4 ? p.dim - d : 4);
        float c_grad = step_grad, c_prior = step_prior, c_noise = step_noise;
        if (u.chain_coefficients) {
            const float* factors = u.chain_coefficients + 3 * chain;
            c_grad *= load_readonly(factors), c_prior *= load_readonly(factors + 1);
            c_noise *= load_readonly(factors + 2);
        }
        float z[4], grad[4], mean[4] = {}, precision[4] = {}, extra[4] = {}, eps[4] = {};
        load_quad<kWhole>(z, p.z + first, count);
        load_quad<kWhole>(grad, p.grad + first, count);
        if (u.prior_precision) {
            load_quad<kWhole>(precision, u.prior_precision + chain * u.prior_precision_stride + d, count);
            if (u.prior_mean) load_quad<kWhole>(mean, u.prior_mean + chain * u.prior_mean_stride + d, count);
        }
        if (u.extra_grad) load_quad<kWhole>(extra, u.extra_grad + first, count);
        if (noisy && u.noise) load_quad<kWhole>(eps, u.noise + first, count);
        if (noisy && !u.noise)
            normal_quad(eps, uint32_t(chain_quad.remainder), u.first_chain + uint32_t(chain), u.first_step,
                        kStreamLangevin, key);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float z1 = fma_rn(c_grad, grad[i], z[i]);
            if (u.prior_precision) z1 = fma_rn(c_prior * precision[i], u.prior_mean ? mean[i] - z[i] : -z[i], z1);
            if (u.extra_grad) z1 = fma_rn(c_prior, extra[i], z1);
            if (noisy) z1 = fma_rn(c_noise, eps[i], z1);
            const bool keeps = u.frozen && i < count && load_readonly(u.frozen + chain * u.frozen_stride + d + i);
            if (!keeps) z[i] = z1;
        }
        store_quad<kWhole>(p.out + first, z, count);
    }
}

void langevin_step(const LangevinStepParams& p, const CudaLaunch& launch) {
    const UpdateParams& u = p.update;
    const Geometry geometry = geometry_of_quads(p.chains * ((p.dim + 3) / 4), launch);
    const bool whole = p.dim % 4 == 0 && aligned16(p.z) && aligned16(p.grad) && aligned16(p.out) &&
                       aligned16(u.prior_mean) && aligned16(u.prior_precision) && aligned16(u.extra_grad) &&
                       aligned16(u.noise);
    if (whole)
        JLEBM_LAUNCH((langevin_step_kernel<true>), (geometry), launch, p);
    else
        JLEBM_LAUNCH((langevin_step_kernel<false>), (geometry), launch, p);
}

} // namespace cuda
} // namespace jlebm
