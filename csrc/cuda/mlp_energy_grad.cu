// mlp_energy_grad: f(z) [chains] and grad f(z) [chains, dim] of an MLP in one launch; on request h_l and delta_l, which
// the gradients in the parameters are made of.
//
// The kernel is that of mlp_langevin_chain (mlp_kernel.h) with one evaluation and no update.
#include <algorithm>

#include "cuda/mlp_call.h"

namespace jlebm {
namespace cuda {
namespace {

MlpNeeds energy_needs(const MlpEnergyGradParams& params) { return {&params.mlp, params.chains, true, false}; }

} // namespace

void mlp_energy_grad(const MlpEnergyGradParams& params, const CudaLaunch& launch) {
    MlpCall call;
    call.chains = params.chains;
    call.z = params.z, call.mlp = params.mlp;
    call.energy = params.energy, call.grad = params.grad;
    std::copy_n(params.hidden, kMaxHiddenLayers, call.hidden);
    std::copy_n(params.delta, kMaxHiddenLayers, call.delta);
    run_mlp_call(call, launch);
}

int64_t mlp_energy_grad_workspace_bytes(const MlpEnergyGradParams& params, const CudaLaunch& launch) {
    return mlp_workspace_bytes(energy_needs(params), launch);
}

std::string mlp_energy_grad_regime(const MlpEnergyGradParams& params, const CudaLaunch& launch) {
    return mlp_regime(energy_needs(params), launch);
}

} // namespace cuda
} // namespace jlebm
