// mlp_energy_grad: f(z) [chains] and grad f(z) [chains, dim] of an MLP (formulas in cpu/mlp_lanes.h).
// Compiled once per target.
#include "cpu/chain_blocks.h"
#include "cpu/kernels_target.h"

namespace jlebm {
namespace JLEBM_TARGET {
namespace {

template <class Lanes>
class EnergyGradBlock {
    static constexpr int V = Lanes::kVectors;

public:
    static int64_t floats(const MlpEnergyGradParams& p) { return MlpWorkspace<V>::floats(p.mlp); }

    EnergyGradBlock(const MlpEnergyGradParams& p, const PackedMlp& packed, const FewMlp*, int64_t first, int count,
                    Arena arena)
        : p_(p), packed_(packed), first_(first), count_(count) {
        workspace_.take(packed, arena);
    }

    void run(int64_t, int64_t) {
        I chosen[V];
        workspace_.load_chains(p_.mlp, p_.z, first_, count_, chosen);
        F energy[V];
        energy_and_grad<V>(packed_, workspace_, chosen, true, energy);
        rows_from_vectors<V>(p_.energy, energy, first_, count_);
        if (p_.grad) rows_from_lanes<V>(p_.grad, workspace_.grad, p_.mlp.dim(), first_, count_);
    }

private:
    const MlpEnergyGradParams& p_;
    const PackedMlp& packed_;
    const int64_t first_;
    const int count_;
    MlpWorkspace<V> workspace_;
};

} // namespace

void mlp_energy_grad(const MlpEnergyGradParams& p, int n_threads) {
    run_blocks<EnergyGradBlock, false>(p, 1, n_threads);
}

} // namespace JLEBM_TARGET
} // namespace jlebm
