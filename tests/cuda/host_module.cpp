// The CUDA kernels as a Python module without a device: csrc/cuda/*.cu compiled for the host, run by fibres.
#include "bindings_records.h"
#include "cuda/host/block.h"
#include "cuda/mlp_layers.h"

namespace {

using namespace jlebm;

// regime, chain tiles, warps, groups, z in shared memory, layers with resident weights, blocks of a cluster; -1: any
using Wanted = std::array<int, 7>;
Wanted wanted = {-1, -1, -1, -1, -1, -1, -1};

bool is_wanted(const cuda::MlpPlan& p) {
    int n_resident = 0;
    for (uint32_t layers = p.resident_layers; layers; layers &= layers - 1) ++n_resident;
    const Wanted have = {int(p.regime), p.chain_tiles, p.warps, p.groups, p.z_in_shared, n_resident, p.cluster};
    for (size_t i = 0; i < have.size(); ++i)
        if (wanted[i] >= 0 && wanted[i] != have[i]) return false;
    return true;
}

py::dict mlp_plan(const MlpParams& mlp, int64_t chains, bool energies, int precision, int multiprocessors,
                  int max_shared_bytes, bool warpgroups, bool clusters) {
    cuda::CudaLaunch launch;
    launch.precision = precision, launch.multiprocessors = multiprocessors, launch.max_shared_bytes = max_shared_bytes;
    launch.warpgroups = warpgroups, launch.clusters = clusters;
    cuda::MlpPlan p;
    py::dict d;
    d["found"] = cuda::plan_mlp({&mlp, chains, energies, true}, launch, &p);
    d["regime"] = int(p.regime), d["chains"] = p.chains_per_block(), d["warps"] = p.warps, d["groups"] = p.groups;
    d["shared_bytes"] = p.shared_bytes, d["z_in_shared"] = p.z_in_shared, d["stream_bytes"] = cuda::stream_bytes(p);
    d["workspace_bytes"] = cuda::workspace_bytes(p, chains, launch);
    d["cluster"] = p.cluster, d["text"] = cuda::plan_text(p), d["cycles"] = p.estimated_cycles;
    return d;
}

} // namespace

PYBIND11_MODULE(cuda_on_host, m) {
    jlebm::bind_cuda(m);
    m.def("mlp_plan", &mlp_plan);
    m.def("weight_stride", &cuda::weight_stride, "bytes from row to row of a resident weight: (precision, n_in)");
    m.def("word_row_at", &cuda::Operand<cuda::kTf32>::row_at, "byte of a feature's row of 8 chains of 32-bit words");
    m.def(
        "want_plan", [](const Wanted& plan) { wanted = plan, cuda::plan_allowed = &is_wanted; },
        "only plans of these (regime, chain tiles, warps, groups, z in shared memory, layers with resident weights, "
        "blocks of a cluster), -1: any");
    m.def("leave_out_barrier", [](int barrier) { cuda::barrier_left_out = barrier; }, "After of mlp_layers.h; 0: none");
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
