// The MLP kernel whose units are shared out among a cluster of blocks, in all precisions: for compute capability 9.0
// and newer alone, hence a file of its own.
#include "cuda/mlp_kernel.h"

namespace jlebm {
namespace cuda {

template <int kPrecision>
void enqueue_mlp_cluster(const MlpCall& call, const CudaLaunch& launch) {
    enqueue_tiles<kPrecision, Regime::kCluster>(call, launch);
}

template void enqueue_mlp_cluster<kFp32>(const MlpCall& call, const CudaLaunch& launch);
template void enqueue_mlp_cluster<kTf32>(const MlpCall& call, const CudaLaunch& launch);
template void enqueue_mlp_cluster<kBf16>(const MlpCall& call, const CudaLaunch& launch);

} // namespace cuda
} // namespace jlebm
