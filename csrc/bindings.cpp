// The Python module: integers, floats and addresses in, exceptions out. Python is known to bindings* alone.
//
// Every operation takes its record of params.h as keyword arguments. Addresses are integers (0: absent) of contiguous
// arrays that the caller keeps alive and has checked; the Python interpreter's lock is released while a kernel runs.
#include <array>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "bindings_records.h"
#include "bindings_signals.h"
#include "cpu/kernels.h"
#include "cpu/spectral_norm.h"
#include "cpu/threads.h"

namespace jlebm {
namespace {

// z, grad: torch has tensors without memory, the zeros of its forward-mode gradients
const float* held(Address address, const char* name) {
    if (address == 0)
        throw std::invalid_argument(std::string(name) + " has no memory: pass a copy, " + name + ".clone()");
    return at<const float>(address);
}

void cpu_langevin_noise(uint64_t noise_key, uint32_t first_step, uint32_t first_chain, uint32_t stream, int64_t n_steps,
                        int64_t chains, int64_t dim, Address out, int n_threads) {
    LangevinNoiseParams p{noise_key, first_step, first_chain, stream, n_steps, chains, dim, at<float>(out)};
    const py::gil_scoped_release unlocked;
    cpu_kernels().langevin_noise(p, n_threads);
}

void cpu_langevin_step(int64_t chains, int64_t dim, Address z, Address grad, const UpdateParams& update, Address out,
                       int n_threads) {
    LangevinStepParams p{chains, dim, held(z, "z"), held(grad, "grad"), update, at<float>(out)};
    const py::gil_scoped_release unlocked;
    cpu_kernels().langevin_step(p, n_threads);
}

void cpu_mlp_energy_grad(int64_t chains, Address z, const MlpParams& mlp, Address energy, Address grad, int n_threads) {
    MlpEnergyGradParams p{chains, held(z, "z"), mlp, at<float>(energy), at<float>(grad)};
    const py::gil_scoped_release unlocked;
    cpu_kernels().mlp_energy_grad(p, n_threads);
}

void cpu_mlp_energy_layers(int64_t chains, Address z, const MlpParams& mlp, Address energy, Address hidden,
                           Address delta, Address grad, int n_threads) {
    MlpEnergyLayersParams p{chains,           held(z, "z"),   mlp, at<float>(energy), at<float>(hidden),
                            at<float>(delta), at<float>(grad)};
    const py::gil_scoped_release unlocked;
    cpu_kernels().mlp_energy_layers(p, n_threads);
}

void cpu_mlp_langevin_chain(int64_t chains, int64_t n_steps, Address z, const MlpParams& mlp,
                            const UpdateParams& update, const RecordParams& record, Address out, int n_threads) {
    MlpLangevinChainParams p;
    p.chains = chains, p.n_steps = n_steps;
    p.z = held(z, "z"), p.out = at<float>(out);
    p.mlp = mlp, p.update = update, p.record = record;
    try {
        run_heeding_signals([&] { cpu_kernels().mlp_langevin_chain(p, n_threads); });
    } catch (const RaisedForCaller& raised) {
        std::rethrow_exception(raised.error);
    }
}

std::vector<uint32_t> cpu_philox_words(int rounds, std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    if (rounds != 7 && rounds != 10) throw std::invalid_argument("rounds must be 7 or 10");
    std::vector<uint32_t> words(size_t(4 * *cpu_kernels().lanes));
    cpu_kernels().philox_words(rounds, counter.data(), key.data(), words.data());
    return words;
}

void cpu_mlp_activation(int activation, float param, int64_t n, Address a, Address h, Address d, int n_threads) {
    if (activation < 0 || activation >= int(Activation::kCount))
        throw std::invalid_argument("unknown activation " + std::to_string(activation));
    MlpActivationParams p{Activation(activation), param, n, at<const float>(a), at<float>(h), at<float>(d)};
    const py::gil_scoped_release unlocked;
    cpu_kernels().mlp_activation(p, n_threads);
}

// (n_out, n_in, weight, start, u, v, normalised) of each layer -> sigma of each
using NormTuple = std::tuple<int64_t, int64_t, Address, Address, Address, Address, Address>;

std::vector<double> cpu_spectral_norms(const std::vector<NormTuple>& layers, double tolerance, int most_products) {
    std::vector<double> sigmas;
    const py::gil_scoped_release unlocked;
    for (const auto& [n_out, n_in, weight, start, u, v, normalised] : layers) {
        if (n_out < 1 || n_in < 1) throw std::invalid_argument("a weight must have at least one row and one column");
        sigmas.push_back(spectral_norm({n_out, n_in, at<const float>(weight), at<const float>(start), tolerance,
                                        most_products, at<float>(u), at<float>(v), at<float>(normalised)}));
    }
    return sigmas;
}

double fma_peak(int n_threads, double seconds) {
    if (n_threads < 1) throw std::invalid_argument("n_threads must be at least 1");
    const py::gil_scoped_release unlocked;
    std::vector<double> rates(size_t(n_threads), 0.0);
    std::vector<std::thread> threads;
    for (int i = 0; i < n_threads; ++i)
        threads.emplace_back([&, i] { rates[size_t(i)] = cpu_kernels().fma_peak(seconds); });
    for (std::thread& t : threads) t.join();
    double sum = 0.0;
    for (double r : rates) sum += r;
    return sum;
}

} // namespace
} // namespace jlebm

PYBIND11_MODULE(_C, m) {
    using namespace jlebm;
    m.doc() = "Compiled kernels of jlebm_fast: the four operations on the CPU and, where built, on CUDA devices.";
    m.attr("max_hidden_layers") = kMaxHiddenLayers;
    m.attr("version") = JLEBM_VERSION;
    m.attr("compiler") = JLEBM_COMPILER;
#if defined(JLEBM_HAVE_CUDA)
    m.attr("cuda") = true;
    bind_cuda(m);
    bind_cuda_devices(m);
#else
    m.attr("cuda") = false;
#endif
    bind_objects(m);
    bind_plain(m);
    m.def("cpu_target", [] { return std::string(cpu_kernels().target); }, "target whose kernels run");
    m.def("cpu_lanes", [] { return *cpu_kernels().lanes; });
    m.def("cpu_targets", [] { return std::string(cpu_targets()); }, "targets of this build that this processor runs");
    m.def("leave_openmp", &leave_openmp);
    m.def("thread_runtime", [] { return std::string(thread_runtime()); });
    m.def("cpu_langevin_noise", &cpu_langevin_noise, py::kw_only(), py::arg("noise_key"), py::arg("first_step"),
          py::arg("first_chain"), py::arg("stream"), py::arg("n_steps"), py::arg("chains"), py::arg("dim"),
          py::arg("out"), py::arg("n_threads"));
    m.def("cpu_langevin_step", &cpu_langevin_step, py::kw_only(), py::arg("chains"), py::arg("dim"), py::arg("z"),
          py::arg("grad"), py::arg("update"), py::arg("out"), py::arg("n_threads"));
    m.def("cpu_mlp_energy_grad", &cpu_mlp_energy_grad, py::kw_only(), py::arg("chains"), py::arg("z"), py::arg("mlp"),
          py::arg("energy"), py::arg("grad"), py::arg("n_threads"));
    m.def("cpu_mlp_energy_layers", &cpu_mlp_energy_layers, py::kw_only(), py::arg("chains"), py::arg("z"),
          py::arg("mlp"), py::arg("energy"), py::arg("hidden"), py::arg("delta"), py::arg("grad"),
          py::arg("n_threads"));
    m.def("cpu_mlp_langevin_chain", &cpu_mlp_langevin_chain, py::kw_only(), py::arg("chains"), py::arg("n_steps"),
          py::arg("z"), py::arg("mlp"), py::arg("update"), py::arg("record"), py::arg("out"), py::arg("n_threads"));
    m.def("cpu_philox_words", &cpu_philox_words, py::arg("rounds"), py::arg("counter"), py::arg("key"));
    m.def("cpu_mlp_activation", &cpu_mlp_activation, py::kw_only(), py::arg("activation"), py::arg("param"),
          py::arg("n"), py::arg("a"), py::arg("h"), py::arg("d"), py::arg("n_threads"));
    m.def("cpu_spectral_norms", &cpu_spectral_norms, py::arg("layers"), py::arg("tolerance"), py::arg("most_products"));
    m.def("fma_peak", &fma_peak, py::arg("n_threads"), py::arg("seconds") = 0.2,
          "measured multiply-add rate of n_threads threads together, GFLOP/s");
}
