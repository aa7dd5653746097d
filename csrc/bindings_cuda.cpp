// The operations on CUDA devices for Python. Also compiled for the host (JLEBM_CUDA_ON_HOST), where the same kernels
// run without a device: tests/cuda/host_module.cpp.
#include "bindings_records.h"
#include "cuda/launch.h"
#include "cuda/status.h"
#if !defined(JLEBM_CUDA_ON_HOST)
#include "cuda/device_query.h"
#endif

namespace jlebm {
namespace {

using cuda::CudaLaunch;

// (device, stream, precision, workspace, workspace_bytes, multiprocessors, max_shared_bytes, warpgroups, clusters); on
// the host the seed of the order of threads instead of the stream
using LaunchTuple = std::tuple<int, Address, int, Address, int64_t, int, int, bool, bool>;

CudaLaunch cuda_launch(const LaunchTuple& t) {
    CudaLaunch launch;
    Address stream, workspace;
    std::tie(launch.device, stream, launch.precision, workspace, launch.workspace_bytes, launch.multiprocessors,
             launch.max_shared_bytes, launch.warpgroups, launch.clusters) = t;
    if (launch.precision < 0 || launch.precision >= cuda::kPrecisionCount)
        throw std::invalid_argument("precision must be 0 (fp32), 1 (tf32) or 2 (bf16), got " +
                                    std::to_string(launch.precision));
#if defined(JLEBM_CUDA_ON_HOST)
    launch.order_seed = stream;
#else
    launch.stream = at<void>(stream);
#endif
    launch.workspace = at<void>(workspace);
    return launch;
}

void cuda_langevin_noise(uint64_t noise_key, Address noise_key_at, uint32_t first_step, uint32_t first_chain,
                         uint32_t stream, int64_t n_steps, int64_t chains, int64_t dim, Address out,
                         const LaunchTuple& launch) {
    LangevinNoiseParams p{noise_key, first_step,     first_chain,
                          stream,    n_steps,        chains,
                          dim,       at<float>(out), at<const uint64_t>(noise_key_at)};
    const CudaLaunch where = cuda_launch(launch);
    const py::gil_scoped_release unlocked;
    cuda::langevin_noise(p, where);
}

void cuda_langevin_step(int64_t chains, int64_t dim, Address z, Address grad, const UpdateParams& update,
                        Address noise_key_at, Address out, const LaunchTuple& launch) {
    LangevinStepParams p{chains, dim, at<const float>(z), at<const float>(grad), update, at<float>(out)};
    p.update.noise_key_at = at<const uint64_t>(noise_key_at);
    const CudaLaunch where = cuda_launch(launch);
    const py::gil_scoped_release unlocked;
    cuda::langevin_step(p, where);
}

void cuda_advance_noise_key(Address noise_key, const LaunchTuple& launch) {
    const CudaLaunch where = cuda_launch(launch);
    const py::gil_scoped_release unlocked;
    cuda::advance_noise_key(at<uint64_t>(noise_key), where);
}

MlpEnergyGradParams energy_grad_params(int64_t chains, Address z, const MlpParams& mlp, Address energy, Address grad,
                                       const std::vector<Address>& hidden, const std::vector<Address>& delta) {
    MlpEnergyGradParams p;
    p.chains = chains, p.z = at<const float>(z), p.mlp = mlp;
    p.energy = at<float>(energy), p.grad = at<float>(grad);
    if (hidden.size() > size_t(p.mlp.n_hidden) || delta.size() > size_t(p.mlp.n_hidden))
        throw std::invalid_argument("hidden and delta have at most one address for each hidden layer, " +
                                    std::to_string(p.mlp.n_hidden));
    for (size_t l = 0; l < hidden.size(); ++l) p.hidden[l] = at<float>(hidden[l]);
    for (size_t l = 0; l < delta.size(); ++l) p.delta[l] = at<float>(delta[l]);
    return p;
}

void cuda_mlp_energy_grad(int64_t chains, Address z, const MlpParams& mlp, Address energy, Address grad,
                          const std::vector<Address>& hidden, const std::vector<Address>& delta,
                          const LaunchTuple& launch) {
    const MlpEnergyGradParams p = energy_grad_params(chains, z, mlp, energy, grad, hidden, delta);
    const CudaLaunch where = cuda_launch(launch);
    const py::gil_scoped_release unlocked;
    cuda::mlp_energy_grad(p, where);
}

void cuda_mlp_langevin_chain(int64_t chains, int64_t n_steps, Address z, const MlpParams& mlp,
                             const UpdateParams& update, Address noise_key_at, const RecordParams& record, Address out,
                             const LaunchTuple& launch) {
    MlpLangevinChainParams p;
    p.chains = chains, p.n_steps = n_steps;
    p.z = at<const float>(z), p.out = at<float>(out);
    p.mlp = mlp, p.update = update, p.record = record;
    p.update.noise_key_at = at<const uint64_t>(noise_key_at);
    const CudaLaunch where = cuda_launch(launch);
    const py::gil_scoped_release unlocked;
    cuda::mlp_langevin_chain(p, where);
}

// (n_out, n_in, weight, start, u, v, sigma, normalised, kept_u, kept_v)
using SpectralTuple = std::tuple<int, int, Address, Address, Address, Address, Address, Address, Address, Address>;

void cuda_spectral_norms(const std::vector<SpectralTuple>& weights, float tolerance, const LaunchTuple& launch) {
    SpectralNormsParams p;
    if (weights.size() > size_t(kMaxHiddenLayers) + 1)
        throw std::invalid_argument("at most " + std::to_string(kMaxHiddenLayers + 1) + " weights at a time, got " +
                                    std::to_string(weights.size()));
    for (const SpectralTuple& t : weights) {
        const auto [n_out, n_in, weight, start, u, v, sigma, normalised, kept_u, kept_v] = t;
        p.weights[p.count++] = {n_out,
                                n_in,
                                at<const float>(weight),
                                at<const float>(start),
                                at<float>(u),
                                at<float>(v),
                                at<float>(sigma),
                                at<float>(normalised),
                                at<float>(kept_u),
                                at<float>(kept_v)};
    }
    p.tolerance = tolerance;
    const CudaLaunch where = cuda_launch(launch);
    const py::gil_scoped_release unlocked;
    cuda::spectral_norms(p, where);
}

// only sizes are read: an address that is not null stands for energies that are asked for
MlpLangevinChainParams chain_of_size(int64_t chains, const MlpParams& mlp, bool energies) {
    static float wanted;
    MlpLangevinChainParams p;
    p.chains = chains, p.n_steps = 1, p.mlp = mlp;
    p.record.energy = energies ? &wanted : nullptr;
    return p;
}

// (bytes of workspace, regime in words)
std::pair<int64_t, std::string> cuda_mlp_plan(const std::string& op, int64_t chains, const MlpParams& mlp,
                                              bool energies, const LaunchTuple& launch) {
    const CudaLaunch where = cuda_launch(launch);
    if (op == "mlp_energy_grad") {
        const MlpEnergyGradParams p = energy_grad_params(chains, 0, mlp, 0, 0, {}, {});
        return {cuda::mlp_energy_grad_workspace_bytes(p, where), cuda::mlp_energy_grad_regime(p, where)};
    }
    if (op != "mlp_langevin_chain") throw std::invalid_argument("no plan of " + op);
    const MlpLangevinChainParams p = chain_of_size(chains, mlp, energies);
    return {cuda::mlp_langevin_chain_workspace_bytes(p, where), cuda::mlp_langevin_chain_regime(p, where)};
}

std::string cuda_failure_text(int status, const std::string& name, const std::string& text, const std::string& kernel,
                              const std::string& file, int line, int device, int driver_version, int runtime_version,
                              int capability, const std::string& archs) {
    cuda::Failure f;
    f.status = status, f.status_name = name.c_str(), f.status_text = text.c_str(), f.kernel = kernel.c_str();
    f.file = file.c_str(), f.line = line, f.device = device, f.driver_version = driver_version;
    f.runtime_version = runtime_version, f.capability = capability, f.archs = archs.c_str();
    return cuda::failure_text(f);
}

} // namespace

void bind_cuda(py::module_& m) {
    m.def("cuda_langevin_noise", &cuda_langevin_noise, py::kw_only(), py::arg("noise_key"), py::arg("noise_key_at"),
          py::arg("first_step"), py::arg("first_chain"), py::arg("stream"), py::arg("n_steps"), py::arg("chains"),
          py::arg("dim"), py::arg("out"), py::arg("launch"));
    m.def("cuda_langevin_step", &cuda_langevin_step, py::kw_only(), py::arg("chains"), py::arg("dim"), py::arg("z"),
          py::arg("grad"), py::arg("update"), py::arg("noise_key_at"), py::arg("out"), py::arg("launch"));
    m.def("cuda_advance_noise_key", &cuda_advance_noise_key, py::kw_only(), py::arg("noise_key"), py::arg("launch"));
    m.def("cuda_spectral_norms", &cuda_spectral_norms, py::kw_only(), py::arg("weights"), py::arg("tolerance"),
          py::arg("launch"));
    m.def(
        "cuda_spectral_unsupported_reason",
        [](int64_t n_out, int64_t n_in, const LaunchTuple& launch) {
            return cuda::spectral_unsupported_reason(n_out, n_in, cuda_launch(launch));
        },
        py::kw_only(), py::arg("n_out"), py::arg("n_in"), py::arg("launch"));
    m.def("cuda_mlp_energy_grad", &cuda_mlp_energy_grad, py::kw_only(), py::arg("chains"), py::arg("z"), py::arg("mlp"),
          py::arg("energy"), py::arg("grad"), py::arg("hidden"), py::arg("delta"), py::arg("launch"));
    m.def("cuda_mlp_langevin_chain", &cuda_mlp_langevin_chain, py::kw_only(), py::arg("chains"), py::arg("n_steps"),
          py::arg("z"), py::arg("mlp"), py::arg("update"), py::arg("noise_key_at"), py::arg("record"), py::arg("out"),
          py::arg("launch"));
    m.def("cuda_mlp_plan", &cuda_mlp_plan, py::kw_only(), py::arg("op"), py::arg("chains"), py::arg("mlp"),
          py::arg("energies"), py::arg("launch"));
    m.def(
        "cuda_mlp_unsupported_reason",
        [](const MlpParams& mlp, const LaunchTuple& launch) {
            return cuda::mlp_unsupported_reason(mlp, cuda_launch(launch));
        },
        py::kw_only(), py::arg("mlp"), py::arg("launch"));
    m.def("cuda_driver_reason", &cuda::driver_reason, py::arg("driver_version"), py::arg("runtime_version"));
    m.def("cuda_capability_reason", &cuda::capability_reason, py::arg("capability"), py::arg("archs"));
    m.def("cuda_failure_text", &cuda_failure_text, py::kw_only(), py::arg("status"), py::arg("name"), py::arg("text"),
          py::arg("kernel"), py::arg("file"), py::arg("line"), py::arg("device"), py::arg("driver_version"),
          py::arg("runtime_version"), py::arg("capability"), py::arg("archs"));
}

#if !defined(JLEBM_CUDA_ON_HOST)
void bind_cuda_devices(py::module_& m) {
    m.attr("cuda_archs") = cuda::built_archs();
    m.attr("cuda_runtime_version") = cuda::runtime_version();
    m.def("cuda_driver_version", &cuda::driver_version, "13000 is CUDA 13.0; 0 without a driver");
    m.def(
        "cuda_device",
        [](int device) {
            const cuda::DeviceFacts facts = cuda::device_facts(device);
            return std::make_tuple(facts.name, facts.capability, facts.multiprocessors, facts.max_shared_bytes,
                                   facts.warpgroups, facts.clusters);
        },
        py::arg("device"),
        "(name, compute capability as 90, multiprocessors, shared bytes of a block, warpgroups, clusters)");
}
#endif

} // namespace jlebm
