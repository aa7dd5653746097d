// langevin_noise and langevin_step on buffers that end where their tensors end: for the sanitizers.
#include <cstdio>
#include <memory>
#include <vector>

#include "cuda/launch.h"

using namespace jlebm;

int main() {
    cuda::CudaLaunch launch;
    launch.max_shared_bytes = 101376, launch.multiprocessors = 1;
    for (int64_t chains : {1, 9, 300})
        for (int64_t dim : {1, 2, 4, 7, 16, 50}) {
            const size_t n = size_t(chains * dim);
            const std::vector<float> rows = {0.08f, 0.07f, 0.4f}, factors(size_t(3 * chains), 1.1f);
            const std::vector<float> z(n, 0.5f), grad(n, 0.1f), mean(n, 0.2f), precision(n, 2.0f), extra(n, 0.3f);
            const std::vector<uint8_t> frozen(n, uint8_t(0));
            std::vector<float> noise(2 * n), out(n);
            launch.order_seed = uint64_t(n);
            cuda::langevin_noise({7, ~0u, ~0u, 1, 2, chains, dim, noise.data()}, launch);
            LangevinStepParams step{chains, dim, z.data(), grad.data(), {}, out.data()};
            UpdateParams& u = step.update;
            u.step_coefficients = rows.data(), u.chain_coefficients = factors.data();
            u.prior_mean = mean.data(), u.prior_precision = precision.data(), u.frozen = frozen.data();
            u.prior_mean_stride = u.prior_precision_stride = u.frozen_stride = dim;
            u.extra_grad = extra.data(), u.noise_key = 7;
            cuda::langevin_step(step, launch);
            u.noise = noise.data();
            u.prior_mean_stride = u.prior_precision_stride = u.frozen_stride = 0;
            cuda::langevin_step(step, launch);
            uint64_t key = 1;
            cuda::advance_noise_key(&key, launch);
        }
    std::puts("ok");
}
