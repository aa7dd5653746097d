// The four operations of one CPU target, and the choice of the target.
#pragma once

#include "params.h"

namespace jlebm {

struct CpuKernels {
    const char* target;
    const int* lanes;
    void (*langevin_noise)(const LangevinNoiseParams&, int n_threads);
    void (*langevin_step)(const LangevinStepParams&, int n_threads);
    void (*mlp_energy_grad)(const MlpEnergyGradParams&, int n_threads);
    void (*mlp_langevin_chain)(const MlpLangevinChainParams&, int n_threads);
    // words of `kLanes` consecutive chains for the known-answer test: out[4 * lanes], word-major
    void (*philox_words)(int rounds, const uint32_t counter[4], const uint32_t key[2], uint32_t* out);
    void (*mlp_energy_layers)(const MlpEnergyLayersParams&, int n_threads);
    void (*mlp_weight_grads)(const MlpWeightGradsParams&, int n_threads);
    void (*mlp_activation)(const MlpActivationParams&, int n_threads);
    // seconds of FMAs on one thread -> mean GFLOP/s
    double (*fma_peak)(double seconds);
};

// JLEBM_CPU_TARGET chooses one by name; unset, the widest that this processor runs. Throws std::runtime_error naming
// the targets of this build if the wanted one is not among them or the processor lacks it.
const CpuKernels& cpu_kernels();

// comma-separated names of the targets in this build that this processor runs
const char* cpu_targets();

} // namespace jlebm
