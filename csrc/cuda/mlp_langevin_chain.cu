// mlp_langevin_chain: n_steps Langevin steps of an MLP energy, [chains, dim] -> [chains, dim], in one launch.
//
//     z <- z + c_grad * grad f(z) + c_prior * ((mean - z) * precision + extra_grad) + c_noise * eps
// Posterior chains call it with n_steps = 1 and extra_grad: gradient and update in the same launch.
// Here is also the launcher that mlp_energy_grad shares; the kernels themselves are compiled in mlp_kernel_*.cu.
#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/mlp_call.h"

namespace jlebm {
namespace cuda {
namespace {

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// all that a plan depends on
using PlanKey = std::array<int64_t, kMaxHiddenLayers + 2 + 10>;

PlanKey plan_key(const MlpNeeds& needs, const CudaLaunch& launch) {
    PlanKey key{needs.chains,
                needs.mlp->n_hidden,
                needs.energies,
                needs.update,
                needs.slope_of_logits_general(),
                launch.precision,
                launch.multiprocessors,
                launch.max_shared_bytes,
                launch.warpgroups,
                launch.clusters};
    for (int l = 0; l < needs.mlp->n_hidden + 2; ++l) key[size_t(10 + l)] = needs.mlp->widths[l];
    return key;
}

// Choosing takes 10 to 30 microseconds of the host, and a loop asks for the same few again and again: each thread
// remembers its last ones.
MlpPlan planned(const MlpNeeds& needs, const CudaLaunch& launch) {
    constexpr size_t kRemembered = 8;
    static thread_local std::vector<std::pair<PlanKey, MlpPlan>> remembered;
    const PlanKey key = plan_key(needs, launch);
#if defined(JLEBM_CUDA_ON_HOST)
    if (plan_allowed) remembered.clear(); // tests allow one plan or the other
#endif
    for (const auto& [known, plan] : remembered)
        if (known == key) return plan;
    MlpPlan plan;
    if (!plan_mlp(needs, launch, &plan)) throw std::invalid_argument(mlp_unsupported_reason(*needs.mlp, launch));
#if defined(JLEBM_CUDA_ON_HOST)
    if (plan_allowed) return plan;
#endif
    if (remembered.size() == kRemembered) remembered.erase(remembered.begin());
    remembered.emplace_back(key, plan);
    return plan;
}

MlpNeeds chain_needs(const MlpLangevinChainParams& params) {
    return {&params.mlp, params.chains, params.record.energy != nullptr};
}

} // namespace

void run_mlp_call(MlpCall& call, const CudaLaunch& launch) {
    if (call.chains == 0) return;
    const MlpNeeds needs{&call.mlp, call.chains, call.energy || call.record.energy, call.out != nullptr};
    call.plan = planned(needs, launch);
    call.general_head = needs.slope_of_logits_general();
    call.whole_quads = call.mlp.dim() % 4 == 0 && aligned(call.z) && aligned(call.out) && aligned(call.grad) &&
                       aligned(call.record.trajectory) && aligned(call.update.noise);
    const int64_t bytes = workspace_bytes(call.plan, call.chains, launch);
    if (launch.workspace_bytes < bytes)
        throw std::invalid_argument("the workspace must have " + std::to_string(bytes) + " bytes, got " +
                                    std::to_string(launch.workspace_bytes));
    call.stream = launch.workspace;
    call.slopes = static_cast<unsigned char*>(launch.workspace) + stream_bytes(call.plan);
    if (call.plan.regime == Regime::kWarpgroup) return enqueue_mlp_warpgroup(call, launch);
    switch (launch.precision) {
    case kFp32:
        return enqueue_mlp_kernel<kFp32>(call, launch);
    case kTf32:
        return enqueue_mlp_kernel<kTf32>(call, launch);
    case kBf16:
        return enqueue_mlp_kernel<kBf16>(call, launch);
    default:
        throw std::invalid_argument("precision must be 0 (fp32), 1 (tf32) or 2 (bf16), got " +
                                    std::to_string(launch.precision));
    }
}

int64_t mlp_workspace_bytes(const MlpNeeds& needs, const CudaLaunch& launch) {
    return workspace_bytes(planned(needs, launch), needs.chains, launch);
}

std::string mlp_regime(const MlpNeeds& needs, const CudaLaunch& launch) { return plan_text(planned(needs, launch)); }

std::string mlp_unsupported_reason(const MlpParams& mlp, const CudaLaunch& launch) {
    // with logits, which an energy or a record of energies needs whatever the head
    const MlpNeeds needs{&mlp, 1, true};
    MlpPlan plan;
    int64_t least = 0;
    if (plan_mlp(needs, launch, &plan, &least)) return "";
    int widest = 0;
    for (int l = 0; l <= mlp.n_hidden; ++l) widest = std::max(widest, mlp.widths[l]);
    return "its activations need " + std::to_string(least) + " bytes of shared memory with 8 chains a block (" +
           std::to_string(mlp.n_hidden) + " hidden layers, the widest of " + std::to_string(widest) +
           "), this device gives a block " + std::to_string(launch.max_shared_bytes) +
           (launch.precision == kBf16 ? "; use backend 'triton' or 'eager'"
                                      : "; use bf16 (torch.set_float32_matmul_precision('medium')), or backend "
                                        "'triton' or 'eager'");
}

void mlp_langevin_chain(const MlpLangevinChainParams& params, const CudaLaunch& launch) {
    MlpCall call;
    call.chains = params.chains, call.n_steps = params.n_steps;
    call.z = params.z, call.out = params.out;
    call.mlp = params.mlp, call.update = params.update, call.record = params.record;
    run_mlp_call(call, launch);
}

int64_t mlp_langevin_chain_workspace_bytes(const MlpLangevinChainParams& params, const CudaLaunch& launch) {
    return mlp_workspace_bytes(chain_needs(params), launch);
}

std::string mlp_langevin_chain_regime(const MlpLangevinChainParams& params, const CudaLaunch& launch) {
    return mlp_regime(chain_needs(params), launch);
}

} // namespace cuda
} // namespace jlebm
