// mlp_langevin_chain: n_steps Langevin steps of an MLP energy, [chains, dim] -> [chains, dim], one pass over memory.
//
//     z <- z + c_grad * grad f(z) + c_prior * ((mean - z) * precision + extra_grad) + c_noise * eps
// Compiled once per target.
#include "cpu/chain_blocks.h"
#include "cpu/interrupt.h"
#include "cpu/kernels_target.h"
#include "cpu/record_lanes.h"
#include "cpu/update_lanes.h"

namespace jlebm {
namespace JLEBM_TARGET {
namespace {

// Few enough to be soon over where a step takes long, and enough to hide the look at a clock where it does not.
constexpr int64_t kStepsBetweenLooks = 16;

template <class Lanes>
class ChainBlock {
    static constexpr int V = Lanes::kVectors;

public:
    static int64_t floats(const MlpLangevinChainParams& p) {
        return Lanes::Workspace::floats(p.mlp) + UpdateWorkspace<V>::floats(p.mlp.dim()) + RecordLanes<V>::floats();
    }

    ChainBlock(const MlpLangevinChainParams& p, const PackedMlp& packed, const FewMlp* few, int64_t first, int count,
               Arena arena)
        : p_(p), packed_(packed), few_(few), dim_(p.mlp.dim()), first_(first), count_(count) {
        mlp_.take(packed, arena);
        update_.take(p.update, dim_, arena);
        record_.take(p.record, p.chains, first, count, arena);
    }

    void run(int64_t begin, int64_t end) {
        // a block that another worker began goes on from where it stands in the output
        mlp_.load_chains(p_.mlp, begin == 0 ? p_.z : p_.out, first_, count_, chosen_);
        update_.load_chains(p_.update, dim_, first_, count_);
        if (begin == 0) record_.begin();

        for (int64_t step = begin; step < end; ++step) {
            if ((step - begin) % kStepsBetweenLooks == 0 && Interruptible::stops()) break;
            update_.load_coefficients(p_.update, step);
            const bool noisy = update_.load_noise(p_.update, p_.chains, dim_, first_, count_, step);
            const bool kept = (step + 1) % p_.record.thin == 0;
            F energy[V];
            Lanes::energy_and_grad(packed_, few_, mlp_, chosen_, kept && p_.record.energy, energy);
            if (record_.asks()) {
                StepSums sums[V];
                update_block<V, true>(p_.update, update_, dim_, noisy, mlp_.z, mlp_.grad, sums);
                record_.add(step, energy, sums, mlp_.z, dim_);
            } else {
                update_block<V, false>(p_.update, update_, dim_, noisy, mlp_.z, mlp_.grad, nullptr);
            }
            if (kept && p_.record.trajectory)
                rows_from_lanes<V>(p_.record.trajectory + record_.kept_index(step) * p_.chains * dim_, mlp_.z, dim_,
                                   first_, count_);
        }
        record_.write();
        rows_from_lanes<V>(p_.out, mlp_.z, dim_, first_, count_);
    }

private:
    const MlpLangevinChainParams& p_;
    const PackedMlp& packed_;
    const FewMlp* const few_;
    const int64_t dim_, first_;
    const int count_;
    typename Lanes::Workspace mlp_;
    UpdateWorkspace<V> update_;
    RecordLanes<V> record_;
    I chosen_[V];
};

} // namespace

void mlp_langevin_chain(const MlpLangevinChainParams& p, int n_threads) {
    run_blocks<ChainBlock, true>(p, p.n_steps, n_threads);
}

} // namespace JLEBM_TARGET
} // namespace jlebm
