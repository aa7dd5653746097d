// mlp_langevin_chain: n_steps Langevin steps of an MLP energy, [chains, dim] -> [chains, dim], one pass over memory.
//
//     z <- z + c_grad * grad f(z) + c_prior * ((mean - z) * precision + extra_grad) + c_noise * eps
// Compiled once per target.
#include "cpu/chain_blocks.h"
#include "cpu/kernels_target.h"
#include "cpu/update_lanes.h"

namespace jlebm {
namespace JLEBM_TARGET {
namespace {

template <class Lanes>
class ChainBlock {
    static constexpr int V = Lanes::kVectors;

public:
    static int64_t floats(const MlpLangevinChainParams& p) {
        return Lanes::Workspace::floats(p.mlp) + UpdateWorkspace<V>::floats(p.mlp.dim());
    }

    ChainBlock(const MlpLangevinChainParams& p, const PackedMlp& packed, const FewMlp* few, int64_t first, int count,
               Arena arena)
        : p_(p), packed_(packed), few_(few), dim_(p.mlp.dim()), first_(first), count_(count) {
        mlp_.take(packed, arena);
        update_.take(p.update, dim_, arena);
    }

    void run(int64_t begin, int64_t end) {
        const RecordParams& record = p_.record;
        // a block that another worker began goes on from where it stands in the output
        mlp_.load_chains(p_.mlp, begin == 0 ? p_.z : p_.out, first_, count_, chosen_);
        update_.load_chains(p_.update, dim_, first_, count_);
        if (record.first_bad_step && begin == 0) std::fill_n(record.first_bad_step + first_, count_, int64_t(-1));

        const bool diagnostics = record.energy || record.grad_norm || record.displacement || record.first_bad_step;
        for (int64_t step = begin; step < end; ++step) {
            update_.load_coefficients(p_.update, step);
            const bool noisy = update_.load_noise(p_.update, p_.chains, dim_, first_, count_, step);
            const bool kept = (step + 1) % record.thin == 0;
            F energy[V];
            Lanes::energy_and_grad(packed_, few_, mlp_, chosen_, kept && record.energy, energy);
            if (diagnostics) {
                StepSums sums[V];
                update_block<V, true>(p_.update, update_, dim_, noisy, mlp_.z, mlp_.grad, sums);
                record_step(step, kept, energy, sums);
            } else {
                update_block<V, false>(p_.update, update_, dim_, noisy, mlp_.z, mlp_.grad, nullptr);
            }
            if (kept && record.trajectory)
                rows_from_lanes<V>(record.trajectory + kept_index(step) * p_.chains * dim_, mlp_.z, dim_, first_,
                                   count_);
        }
        rows_from_lanes<V>(p_.out, mlp_.z, dim_, first_, count_);
    }

private:
    int64_t kept_index(int64_t step) const { return (step + 1) / p_.record.thin - 1; }

    void record_step(int64_t step, bool kept, const F* energy, const StepSums* sums) {
        const RecordParams& record = p_.record;
        if (record.first_bad_step) {
            for (int v = 0; v < V; ++v) {
                const I bad = not_finite<V>(sums[v].move2, mlp_.z + v * kLanes, dim_);
                for (int i = 0; i < kLanes; ++i) {
                    const int c = v * kLanes + i;
                    if (bad[i] && c < count_ && record.first_bad_step[first_ + c] < 0)
                        record.first_bad_step[first_ + c] = step;
                }
            }
        }
        if (!kept) return;
        const int64_t at = kept_index(step) * p_.chains;
        F norm[V];
        if (record.energy) rows_from_vectors<V>(record.energy + at, energy, first_, count_);
        if (record.grad_norm) {
            for (int v = 0; v < V; ++v) norm[v] = rn_sqrt(sums[v].grad2);
            rows_from_vectors<V>(record.grad_norm + at, norm, first_, count_);
        }
        if (record.displacement) {
            for (int v = 0; v < V; ++v) norm[v] = rn_sqrt(sums[v].move2);
            rows_from_vectors<V>(record.displacement + at, norm, first_, count_);
        }
    }

    const MlpLangevinChainParams& p_;
    const PackedMlp& packed_;
    const FewMlp* const few_;
    const int64_t dim_, first_;
    const int count_;
    typename Lanes::Workspace mlp_;
    UpdateWorkspace<V> update_;
    I chosen_[V];
};

} // namespace

void mlp_langevin_chain(const MlpLangevinChainParams& p, int n_threads) {
    run_blocks<ChainBlock, true>(p, p.n_steps, n_threads);
}

} // namespace JLEBM_TARGET
} // namespace jlebm
