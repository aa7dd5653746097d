// The MLP kernels of csrc/cuda, compiled for the host, as a Python module: records as the tuples of csrc/bindings.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/host/block.h"
#include "cuda/mlp_call.h"
#include "cuda/mlp_layers.h"

namespace py = pybind11;
using namespace jlebm;
using Address = uintptr_t;

namespace {

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

using MlpTuple = std::tuple<std::vector<int>, std::vector<int>, std::vector<float>, int, float, std::vector<Address>,
                            std::vector<Address>, Address, Address>;
using UpdateTuple = std::tuple<Address, Address, Address, int64_t, Address, int64_t, Address, int64_t, Address, Address,
                               uint64_t, uint32_t, uint32_t>;
using RecordTuple = std::tuple<int64_t, Address, Address, Address, Address, Address>;
// precision, multiprocessors, shared memory of a block, seed of the order of threads
using LaunchTuple = std::tuple<int, int, int, uint64_t>;

// resident, chain tiles, warps, groups, z in shared memory; -1: any
std::array<int, 5> wanted = {-1, -1, -1, -1, -1};

bool is_wanted(const cuda::MlpPlan& p) {
    const int have[5] = {p.resident, p.chain_tiles, p.warps, p.groups, p.z_in_shared};
    for (int i = 0; i < 5; ++i)
        if (wanted[size_t(i)] >= 0 && wanted[size_t(i)] != have[i]) return false;
    return true;
}

MlpParams mlp_of(const MlpTuple& t) {
    const auto& [widths, activations, activation_params, head, out_scale, weights, biases, context_bias, logit] = t;
    MlpParams p;
    p.n_hidden = int32_t(activations.size());
    std::copy(widths.begin(), widths.end(), p.widths);
    for (size_t l = 0; l < activations.size(); ++l) {
        p.activations[l] = Activation(activations[l]);
        p.activation_params[l] = activation_params[l];
    }
    for (size_t l = 0; l <= activations.size(); ++l) {
        p.weights[l] = at<const float>(weights[l]);
        p.biases[l] = at<const float>(biases[l]);
    }
    p.head = Head(head), p.out_scale = out_scale;
    p.context_bias = at<const float>(context_bias);
    p.logit = at<const int64_t>(logit);
    return p;
}

UpdateParams update_of(const UpdateTuple& t) {
    UpdateParams p;
    Address coefficients, chain_coefficients, mean, precision, frozen, noise, extra_grad;
    std::tie(coefficients, chain_coefficients, mean, p.prior_mean_stride, precision, p.prior_precision_stride, frozen,
             p.frozen_stride, noise, extra_grad, p.noise_key, p.first_step, p.first_chain) = t;
    p.step_coefficients = at<const float>(coefficients), p.chain_coefficients = at<const float>(chain_coefficients);
    p.prior_mean = at<const float>(mean), p.prior_precision = at<const float>(precision);
    p.frozen = at<const uint8_t>(frozen), p.noise = at<const float>(noise);
    p.extra_grad = at<const float>(extra_grad);
    return p;
}

RecordParams record_of(const RecordTuple& t) {
    RecordParams p;
    Address energy, grad_norm, displacement, first_bad_step, trajectory;
    std::tie(p.thin, energy, grad_norm, displacement, first_bad_step, trajectory) = t;
    p.energy = at<float>(energy), p.grad_norm = at<float>(grad_norm), p.displacement = at<float>(displacement);
    p.first_bad_step = at<int64_t>(first_bad_step), p.trajectory = at<float>(trajectory);
    return p;
}

cuda::CudaLaunch launch_of(const LaunchTuple& t) {
    cuda::CudaLaunch launch;
    std::tie(launch.precision, launch.multiprocessors, launch.max_shared_bytes, launch.order_seed) = t;
    return launch;
}

// exactly as large as asked for, so that the address sanitizer sees what goes beyond
class Workspace {
public:
    Workspace(cuda::CudaLaunch& launch, int64_t bytes)
        : memory_(static_cast<char*>(::operator new(size_t(bytes), k256))) {
        launch.workspace = memory_, launch.workspace_bytes = bytes;
    }
    ~Workspace() { ::operator delete(memory_, k256); }

private:
    static constexpr std::align_val_t k256{256};
    char* memory_;
};

std::string chain(int64_t chains, int64_t n_steps, Address z, const MlpTuple& mlp, const UpdateTuple& update,
                  const RecordTuple& record, Address out, Address key_at, const LaunchTuple& where) {
    MlpLangevinChainParams p;
    p.chains = chains, p.n_steps = n_steps;
    p.z = at<const float>(z), p.out = at<float>(out);
    p.mlp = mlp_of(mlp), p.update = update_of(update), p.record = record_of(record);
    p.update.noise_key_at = at<const uint64_t>(key_at);
    cuda::CudaLaunch launch = launch_of(where);
    const Workspace workspace(launch, cuda::mlp_langevin_chain_workspace_bytes(p, launch));
    cuda::mlp_langevin_chain(p, launch);
    return cuda::mlp_langevin_chain_regime(p, launch);
}

std::string energy_grad(int64_t chains, Address z, const MlpTuple& mlp, Address energy, Address grad,
                        const std::vector<Address>& hidden, const std::vector<Address>& delta,
                        const LaunchTuple& where) {
    MlpEnergyGradParams p;
    p.chains = chains, p.z = at<const float>(z), p.mlp = mlp_of(mlp);
    p.energy = at<float>(energy), p.grad = at<float>(grad);
    for (size_t l = 0; l < hidden.size(); ++l) p.hidden[l] = at<float>(hidden[l]);
    for (size_t l = 0; l < delta.size(); ++l) p.delta[l] = at<float>(delta[l]);
    cuda::CudaLaunch launch = launch_of(where);
    const Workspace workspace(launch, cuda::mlp_energy_grad_workspace_bytes(p, launch));
    cuda::mlp_energy_grad(p, launch);
    return cuda::mlp_energy_grad_regime(p, launch);
}

py::dict plan(const MlpTuple& mlp, int64_t chains, bool energies, const LaunchTuple& where) {
    const MlpParams params = mlp_of(mlp);
    cuda::MlpPlan p;
    const bool found = cuda::plan_mlp({&params, chains, energies, true}, launch_of(where), &p);
    py::dict d;
    d["found"] = found, d["resident"] = p.resident, d["chains"] = p.chains_per_block(), d["warps"] = p.warps;
    d["groups"] = p.groups, d["shared_bytes"] = p.shared_bytes, d["z_in_shared"] = p.z_in_shared;
    d["text"] = cuda::plan_text(p), d["stream_bytes"] = cuda::stream_bytes(p);
    return d;
}

// what was counted since the last call
py::dict statistics() {
    cuda::host::Statistics& counted = cuda::host::statistics();
    py::dict d;
    d["mma"] = counted.mma, d["ldmatrix"] = counted.ldmatrix, d["wavefronts"] = counted.ldmatrix_wavefronts;
    counted = {};
    return d;
}

} // namespace

// the sanitized build leaves a precision out to compile in time
#if !defined(WITH_TF32)
namespace jlebm {
namespace cuda {
template <>
void enqueue_mlp_kernel<kTf32>(const MlpCall&, const CudaLaunch&) {
    throw std::logic_error("built without tf32");
}
} // namespace cuda
} // namespace jlebm
#endif

PYBIND11_MODULE(mlp_host_kernels, m) {
    m.def("mlp_langevin_chain", &chain);
    m.def("mlp_energy_grad", &energy_grad);
    m.def("plan", &plan);
    m.def("unsupported_reason", [](const MlpTuple& mlp, const LaunchTuple& where) {
        return cuda::mlp_unsupported_reason(mlp_of(mlp), launch_of(where));
    });
    m.def("want_plan", [](const std::array<int, 5>& plan) { wanted = plan, cuda::plan_allowed = &is_wanted; });
    m.def("leave_out_barrier", [](int barrier) { cuda::barrier_left_out = barrier; });
    m.def("statistics", &statistics);
}
