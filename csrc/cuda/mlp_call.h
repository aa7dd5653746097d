// One call of the MLP kernel, as it travels to the device: both operations are this record.
#pragma once

#include "cuda/mlp_plan.h"

namespace jlebm {
namespace cuda {

struct MlpCall {
    int64_t chains = 0, n_steps = 1;
    const float* z = nullptr; // [chains, dim]
    MlpParams mlp;
    UpdateParams update;
    RecordParams record;
    float* out = nullptr; // [chains, dim] z after the steps; null: no update (mlp_energy_grad)
    // of the last point, or null
    float* energy = nullptr;              // [chains]
    float* grad = nullptr;                // [chains, dim]
    float* hidden[kMaxHiddenLayers] = {}; // [chains, H_l]
    float* delta[kMaxHiddenLayers] = {};  // [chains, H_l]
    bool whole_quads = false;             // rows of z, out, grad and trajectory are made of aligned quadruples
    bool general_head = false;            // MlpNeeds::slope_of_logits_general
    MlpPlan plan;
    const void* stream = nullptr;    // not resident: packed weights
    unsigned char* slopes = nullptr; // lean: [block][slopes_bytes]
};

// Plans and enqueues; the launcher of both operations. `workspace_bytes` of the same call was given to the caller
// before.
void run_mlp_call(MlpCall& call, const CudaLaunch& launch);
template <int kPrecision>
void enqueue_mlp_kernel(const MlpCall& call, const CudaLaunch& launch); // mlp_kernel_*.cu: one precision each
template <int kPrecision>
void enqueue_mlp_cluster(const MlpCall& call,
                         const CudaLaunch& launch); // mlp_kernel_cluster.cu, after its stream is packed

void enqueue_mlp_warpgroup(const MlpCall& call, const CudaLaunch& launch); // mlp_kernel_warpgroup.cu

int64_t mlp_workspace_bytes(const MlpNeeds& needs, const CudaLaunch& launch);
std::string mlp_regime(const MlpNeeds& needs, const CudaLaunch& launch);

} // namespace cuda
} // namespace jlebm
