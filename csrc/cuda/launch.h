// The operations on a CUDA device as plain C++ functions: records of params.h and one CudaLaunch in, work enqueued on a
// stream out. No CUDA header, so bindings.cpp and the host build (csrc/cuda/host) include it too.
//
// Every function enqueues and returns; nothing synchronises. Pointers are device memory of `device`. A launch that
// fails throws std::runtime_error with file, line, kernel and CUDA's own words. Records are checked by Python; what
// only the kernels know (a size beyond every regime) comes from the *_unsupported_reason functions, before the launch.
#pragma once

#include <cstdint>
#include <string>

#include "params.h"

namespace jlebm {
namespace cuda {

enum Precision : int { kFp32 = 0, kTf32 = 1, kBf16 = 2, kPrecisionCount };

struct CudaLaunch {
    int device = 0;
    void* stream = nullptr;    // cudaStream_t; null: the legacy default stream
    int precision = kFp32;     // of the matrix products of an MLP; state, noise and accumulators are float32 in all
    void* workspace = nullptr; // device memory, 256-byte aligned, at least what *_workspace_bytes returns
    int64_t workspace_bytes = 0;
    int multiprocessors = 0;  // of the device
    int max_shared_bytes = 0; // dynamic shared memory one block may ask for (232448 on H100, 166912 on A100, 101376)
    bool warpgroups = false;  // compute capability 9.0, and the kernels for its warpgroups are in this build
    bool clusters = false;    // compute capability 9.0 or 10, and the kernels for clusters of blocks are in this build
#if defined(JLEBM_CUDA_ON_HOST)
    uint64_t order_seed = 0; // permutes the threads of a block between barriers
#endif
};

void langevin_noise(const LangevinNoiseParams& params, const CudaLaunch& launch);
void langevin_step(const LangevinStepParams& params, const CudaLaunch& launch);

// key <- key + odd constant, on the device: what a CUDA graph appends so that its next replay draws fresh noise
void advance_noise_key(uint64_t* noise_key, const CudaLaunch& launch);

// W / sigma of several weights, each by a block of its own
void spectral_norms(const SpectralNormsParams& params, const CudaLaunch& launch);
// Why a weight of this size cannot be normalised there; "" if it can.
std::string spectral_unsupported_reason(int64_t n_out, int64_t n_in, const CudaLaunch& launch);

// Scratch memory the call below needs on the device; 0 is common.
int64_t mlp_energy_grad_workspace_bytes(const MlpEnergyGradParams& params, const CudaLaunch& launch);
void mlp_energy_grad(const MlpEnergyGradParams& params, const CudaLaunch& launch);

int64_t mlp_langevin_chain_workspace_bytes(const MlpLangevinChainParams& params, const CudaLaunch& launch);
void mlp_langevin_chain(const MlpLangevinChainParams& params, const CudaLaunch& launch);

// Only sizes, activations and head of the record are read: no pointer.
// Why these kernels cannot run such an MLP on such a device, with the remedy; "" if they can.
std::string mlp_unsupported_reason(const MlpParams& mlp, const CudaLaunch& launch);
// The regime in words for explain(), e.g. "resident, tf32 x 3, 8 chains a block".
std::string mlp_energy_grad_regime(const MlpEnergyGradParams& params, const CudaLaunch& launch);
std::string mlp_langevin_chain_regime(const MlpLangevinChainParams& params, const CudaLaunch& launch);

} // namespace cuda
} // namespace jlebm
