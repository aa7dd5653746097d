// The CUDA kernels as a Python module without a device: csrc/cuda/*.cu compiled for the host, run by fibres.
#include "bindings_records.h"
#include "cuda/host/block.h"

PYBIND11_MODULE(cuda_on_host, m) {
    jlebm::bind_cuda(m);
    m.def(
        "take_statistics",
        [] {
            jlebm::cuda::host::Statistics& counts = jlebm::cuda::host::statistics();
            const auto taken = std::make_tuple(counts.blocks, counts.barriers, counts.mma, counts.ldmatrix,
                                               counts.ldmatrix_wavefronts);
            counts = {};
            return taken;
        },
        "(blocks, barriers, matrix products, 8 x 8 loads, wavefronts of those) since the last call");
}
