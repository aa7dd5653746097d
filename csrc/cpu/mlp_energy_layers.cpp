// mlp_energy_layers: f(z) of an MLP with what the gradients in its parameters are made of (formulas in
// cpu/mlp_lanes.h):
//
//     h_l, delta_l = df / da_l  (the last delta: df / dlogits)       dW_l = delta_l h_{l-1}^T,   db_l = sum of delta_l
//
// each [units, chains], feature by feature as the lanes hold them, so that a block writes whole vectors and a matrix
// library takes the sums over chains. Without hidden and delta, and without grad, only the forward half runs.
// Compiled once per target.
#include "cpu/chain_blocks.h"
#include "cpu/kernels_target.h"

namespace jlebm {
namespace JLEBM_TARGET {
namespace {

template <class Lanes>
class EnergyLayersBlock {
    static constexpr int V = Lanes::kVectors;

public:
    static int64_t floats(const MlpEnergyLayersParams& p) { return MlpWorkspace<V>::floats(p.mlp); }

    EnergyLayersBlock(const MlpEnergyLayersParams& p, const PackedMlp& packed, const FewMlp*, int64_t first, int count,
                      Arena arena)
        : p_(p), packed_(packed), first_(first), count_(count) {
        ws_.take(packed, arena);
    }

    void run(int64_t, int64_t) {
        const MlpParams& mlp = p_.mlp;
        I chosen[V];
        ws_.load_chains(mlp, p_.z, first_, count_, chosen);
        const float* h = ws_.z;
        float* hidden = p_.hidden;
        for (int l = 0; l < mlp.n_hidden; ++l) {
            h = hidden_layer<V>(packed_, ws_, l, h);
            if (hidden) write_columns(hidden, h, mlp.widths[l + 1]), hidden += mlp.widths[l + 1] * p_.chains;
        }
        run_layer<V>(packed_.forward[mlp.n_hidden], h, nullptr, ws_.logits, StoreSum{});
        F energy[V];
        apply_head<V>(mlp, ws_.logits, chosen, energy);
        rows_from_vectors<V>(p_.energy, energy, first_, count_);
        if (p_.delta || p_.grad) backward();
    }

private:
    void backward() {
        const MlpParams& mlp = p_.mlp;
        float* to = p_.delta; // the deltas end here, and are written from the last one down
        if (to)
            for (int l = 0; l <= mlp.n_hidden; ++l) to += mlp.widths[l + 1] * p_.chains;
        const float* delta = ws_.logits;
        for (int l = mlp.n_hidden;; --l) {
            if (to) write_columns(to -= mlp.widths[l + 1] * p_.chains, delta, mlp.widths[l + 1]);
            if (l == 0) break;
            delta_of_layer<V>(packed_, ws_, l - 1, delta);
            delta = ws_.slope[l - 1];
        }
        if (!p_.grad) return;
        run_layer<V>(packed_.backward[0], delta, nullptr, ws_.grad, StoreSum{});
        rows_from_lanes<V>(p_.grad, ws_.grad, mlp.dim(), first_, count_);
    }

    // lanes [n][V * kLanes] -> this block's columns of [n, chains]
    void write_columns(float* to, const float* lanes, int64_t n) const {
        for (int64_t k = 0; k < n; ++k)
            std::memcpy(to + k * p_.chains + first_, lanes + k * V * kLanes, size_t(count_) * sizeof(float));
    }

    const MlpEnergyLayersParams& p_;
    const PackedMlp& packed_;
    const int64_t first_;
    const int count_;
    MlpWorkspace<V> ws_;
};

} // namespace

void mlp_energy_layers(const MlpEnergyLayersParams& p, int n_threads) {
    run_blocks<EnergyLayersBlock, false>(p, 1, n_threads);
}

} // namespace JLEBM_TARGET
} // namespace jlebm
