// Which target's kernels run: decided once, from the processor and JLEBM_CPU_TARGET.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

// one line per object set that CMakeLists.txt builds (JLEBM_HAVE_<target>)
#define JLEBM_DECLARE_TARGET(name)                                                                                     \
    namespace jlebm {                                                                                                  \
    namespace name {                                                                                                   \
    void langevin_noise(const LangevinNoiseParams&, int);                                                              \
    void langevin_step(const LangevinStepParams&, int);                                                                \
    void mlp_energy_grad(const MlpEnergyGradParams&, int);                                                             \
    void mlp_energy_layers(const MlpEnergyLayersParams&, int);                                                         \
    void mlp_langevin_chain(const MlpLangevinChainParams&, int);                                                       \
    void philox_words(int, const uint32_t[4], const uint32_t[2], uint32_t*);                                           \
    void mlp_weight_grads(const MlpWeightGradsParams&, int);                                                           \
    void mlp_activation(const MlpActivationParams&, int);                                                              \
    double fma_peak(double);                                                                                           \
    extern const int lanes;                                                                                            \
    static const CpuKernels kernels = {#name,                                                                          \
                                       &lanes,                                                                         \
                                       langevin_noise,                                                                 \
                                       langevin_step,                                                                  \
                                       mlp_energy_grad,                                                                \
                                       mlp_langevin_chain,                                                             \
                                       philox_words,                                                                   \
                                       mlp_energy_layers,                                                              \
                                       mlp_weight_grads,                                                               \
                                       mlp_activation,                                                                 \
                                       fma_peak};                                                                      \
    }                                                                                                                  \
    }

#ifdef JLEBM_HAVE_AVX512
JLEBM_DECLARE_TARGET(avx512)
#endif
#ifdef JLEBM_HAVE_AVX2
JLEBM_DECLARE_TARGET(avx2)
#endif
JLEBM_DECLARE_TARGET(baseline)

namespace jlebm {
namespace {

// widest first
std::vector<const CpuKernels*> runnable_targets() {
    std::vector<const CpuKernels*> targets;
#ifdef JLEBM_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
        targets.push_back(&avx512::kernels);
#endif
#ifdef JLEBM_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) targets.push_back(&avx2::kernels);
#endif
    targets.push_back(&baseline::kernels);
    return targets;
}

const CpuKernels& choose() {
    const auto targets = runnable_targets();
    const char* wanted = std::getenv("JLEBM_CPU_TARGET");
    if (wanted == nullptr || *wanted == '\0') return *targets.front();
    for (const CpuKernels* kernels : targets)
        if (std::string(wanted) == kernels->target) return *kernels;
    throw std::runtime_error(std::string("JLEBM_CPU_TARGET must be one of ") + cpu_targets() +
                             " on this processor and in this build, got '" + wanted + "'");
}

} // namespace

const CpuKernels& cpu_kernels() {
    static const CpuKernels& chosen = choose();
    return chosen;
}

const char* cpu_targets() {
    static const std::string names = [] {
        std::string s;
        for (const CpuKernels* kernels : runnable_targets())
            s += (s.empty() ? "" : ", ") + std::string(kernels->target);
        return s;
    }();
    return names.c_str();
}

} // namespace jlebm
