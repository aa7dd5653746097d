// mlp_langevin_chain: n_steps Langevin steps of an MLP energy, [chains, dim] -> [chains, dim], one pass over memory.
//
//     z <- z + c_grad * grad f(z) + c_prior * ((mean - z) * precision + extra_grad) + c_noise * eps
// Compiled once per target.
#include "cpu/kernels_target.h"
#include "cpu/mlp_lanes.h"
#include "cpu/schedule.h"
#include "cpu/update_lanes.h"

namespace jlebm {
namespace JLEBM_TARGET {
namespace {

template <int V>
void write_lanes(float* to, int64_t first, int count, const F* values) {
    float row[V * kLanes];
    for (int v = 0; v < V; ++v) store(row + v * kLanes, values[v]);
    std::memcpy(to + first, row, size_t(count) * sizeof(float));
}

template <int V>
class ChainBlock {
public:
    static int64_t floats(const MlpLangevinChainParams& p) {
        return MlpWorkspace<V>::floats(p.mlp) + UpdateWorkspace<V>::floats(p.mlp.dim());
    }

    ChainBlock(const MlpLangevinChainParams& p, const PackedMlp& packed, int64_t first_chain, Arena arena)
        : p_(p), packed_(packed), dim_(p.mlp.dim()), first_(first_chain),
          count_(int(std::min<int64_t>(V * kLanes, p.chains - first_chain))) {
        mlp_.take(packed, arena);
        update_.take(p.update, dim_, arena);
    }

    void run(int64_t begin, int64_t end) {
        const RecordParams& record = p_.record;
        // a block that another worker began goes on from where it stands in the output
        lanes_from_rows<V>(mlp_.z, begin == 0 ? p_.z : p_.out, dim_, first_, count_);
        if (mlp_.context) lanes_from_rows<V>(mlp_.context, p_.mlp.context_bias, p_.mlp.widths[1], first_, count_);
        update_.load_chains(p_.update, dim_, first_, count_);
        chosen_logits<V>(chosen_, p_.mlp.logit, first_, count_);
        if (record.first_bad_step && begin == 0) std::fill_n(record.first_bad_step + first_, count_, int64_t(-1));

        const bool diagnostics = record.energy || record.grad_norm || record.displacement || record.first_bad_step;
        for (int64_t step = begin; step < end; ++step) {
            update_.load_coefficients(p_.update, step);
            const bool noisy = update_.load_noise(p_.update, p_.chains, dim_, first_, count_, step);
            const bool kept = (step + 1) % record.thin == 0;
            F energy[V];
            energy_and_grad<V>(packed_, mlp_, chosen_, kept && record.energy, energy);
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
                const I bad = sums[v].bad != sums[v].bad;
                int32_t any = 0;
                for (int i = 0; i < kLanes; ++i) any |= bad[i];
                if (any == 0) continue;
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
        if (record.energy) write_lanes<V>(record.energy + at, first_, count_, energy);
        if (record.grad_norm) {
            for (int v = 0; v < V; ++v) norm[v] = rn_sqrt(sums[v].grad2);
            write_lanes<V>(record.grad_norm + at, first_, count_, norm);
        }
        if (record.displacement) {
            for (int v = 0; v < V; ++v) norm[v] = rn_sqrt(sums[v].move2);
            write_lanes<V>(record.displacement + at, first_, count_, norm);
        }
    }

    const MlpLangevinChainParams& p_;
    const PackedMlp& packed_;
    const int64_t dim_, first_;
    const int count_;
    MlpWorkspace<V> mlp_;
    UpdateWorkspace<V> update_;
    I chosen_[V];
};

} // namespace

void mlp_langevin_chain(const MlpLangevinChainParams& p, int n_threads) {
    constexpr int kUnitChains = kNarrow * kLanes;
    const Schedule schedule((p.chains + kUnitChains - 1) / kUnitChains, p.n_steps, kWide / kNarrow, n_threads);
    const int64_t block_floats = ChainBlock<kWide>::floats(p);
    const int64_t packed = packed_floats(p.mlp);
    static thread_local ArenaStorage storage;
    const int64_t total = packed + block_floats * schedule.workers();
    float* memory = storage.reserve(total);
    Arena weights(memory, packed);
    const PackedMlp mlp = pack_mlp(p.mlp, weights);
    schedule.run([&](const Piece& piece) {
        const Arena arena(memory + packed + block_floats * piece.worker, block_floats);
        const int64_t first = piece.first_unit * kUnitChains;
        if (kNarrow != kWide && piece.units == 1)
            ChainBlock<kNarrow>(p, mlp, first, arena).run(piece.begin, piece.end);
        else
            ChainBlock<kWide>(p, mlp, first, arena).run(piece.begin, piece.end);
    });
    storage.release_if_large();
}

} // namespace JLEBM_TARGET
} // namespace jlebm
