// langevin_noise: the noise field eps [n_steps, chains, dim] of the noise contract (common/normal.h).
//
// One thread, one Philox call, four coordinates; equal in every bit to the CPU's and to plain torch's.
#include "cuda/rows.h"

namespace jlebm {
namespace cuda {

template <bool kWhole>
JLEBM_KERNEL(kRowThreads, 4)
langevin_noise_kernel(LangevinNoiseParams p) {
    const uint64_t key = p.noise_key_at ? *p.noise_key_at : p.noise_key;
    const int64_t quads = (p.dim + 3) / 4;
    const int64_t n_quads = p.n_steps * p.chains * quads, stride = int64_t(gridDim.x) * kRowThreads;
    for (int64_t i = int64_t(blockIdx.x) * kRowThreads + threadIdx.x; i < n_quads; i += stride) {
        const Divided row_quad = divide(i, quads), step_chain = divide(row_quad.quotient, p.chains);
        float eps[4];
        // counters are 32-bit and wrap
        normal_quad(eps, uint32_t(row_quad.remainder), p.first_chain + uint32_t(step_chain.remainder),
                    p.first_step + uint32_t(step_chain.quotient), p.stream, key);
        const int64_t first = row_quad.remainder * 4;
        store_quad<kWhole>(p.out + row_quad.quotient * p.dim + first, eps, int(p.dim - first < 4 ? p.dim - first : 4));
    }
}

// one thread: behind the kernels that read the key, on their stream
JLEBM_KERNEL(kWarp, 1) advance_noise_key_kernel(uint64_t* noise_key) {
    // an odd constant visits all 2^64 keys; the golden ratio keeps away from keys that people count up by hand
    if (threadIdx.x == 0) *noise_key += 0x9E3779B97F4A7C15u;
}

void langevin_noise(const LangevinNoiseParams& p, const CudaLaunch& launch) {
    const Geometry geometry = geometry_of_quads(p.n_steps * p.chains * ((p.dim + 3) / 4), launch);
    if (p.dim % 4 == 0 && aligned16(p.out))
        JLEBM_LAUNCH((langevin_noise_kernel<true>), (geometry), launch, p);
    else
        JLEBM_LAUNCH((langevin_noise_kernel<false>), (geometry), launch, p);
}

void advance_noise_key(uint64_t* noise_key, const CudaLaunch& launch) {
    JLEBM_LAUNCH((advance_noise_key_kernel), (Geometry{1, kWarp, 0}), launch, noise_key);
}

} // namespace cuda
} // namespace jlebm
