// The MLP kernel in fp32: a file of its own, so that the precisions compile side by side.
#include "cuda/mlp_kernel.h"

namespace jlebm {
namespace cuda {

template void enqueue_mlp_kernel<kFp32>(const MlpCall& call, const CudaLaunch& launch);

} // namespace cuda
} // namespace jlebm
