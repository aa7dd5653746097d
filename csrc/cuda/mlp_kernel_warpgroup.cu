// The MLP chain in bf16 by warpgroups (mlp_warpgroup.h): one instance for each of kWarpgroupSizes, for sm_90a alone.
#include "cuda/mlp_warpgroup.h"

namespace jlebm {
namespace cuda {
namespace {

template <int kSize>
void enqueue_size(const MlpCall& call, const CudaLaunch& launch) {
    constexpr WarpgroupSize size = kWarpgroupSizes[kSize];
    if (call.plan.padded_dim == size.dim && call.plan.padded_width == size.width) {
        const Geometry geometry{mlp_blocks(call.plan, call.chains, launch), call.plan.threads(),
                                call.plan.shared_bytes};
        JLEBM_LAUNCH((mlp_warpgroup_kernel<size.dim, size.width, size.groups>), (geometry), launch, call);
    } else if constexpr (kSize + 1 < int(sizeof kWarpgroupSizes / sizeof kWarpgroupSizes[0])) {
        enqueue_size<kSize + 1>(call, launch);
    }
}

} // namespace

void enqueue_mlp_warpgroup(const MlpCall& call, const CudaLaunch& launch) { enqueue_size<0>(call, launch); }

} // namespace cuda
} // namespace jlebm
