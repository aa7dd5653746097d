// What each target's objects define; targets.cpp collects them.
#pragma once

#include "cpu/kernels.h"

namespace jlebm {
namespace JLEBM_TARGET {

void langevin_noise(const LangevinNoiseParams& p, int n_threads);
void langevin_step(const LangevinStepParams& p, int n_threads);
void mlp_energy_grad(const MlpEnergyGradParams& p, int n_threads);
void mlp_energy_layers(const MlpEnergyLayersParams& p, int n_threads);
void mlp_langevin_chain(const MlpLangevinChainParams& p, int n_threads);
extern const int lanes; // kLanes as this target was compiled
void philox_words(int rounds, const uint32_t counter[4], const uint32_t key[2], uint32_t* out);
void mlp_weight_grads(const MlpWeightGradsParams& p, int n_threads);
void mlp_activation(const MlpActivationParams& p, int n_threads);
double fma_peak(double seconds);

} // namespace JLEBM_TARGET
} // namespace jlebm
