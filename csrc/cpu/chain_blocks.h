// All chains of an MLP kernel, a block of them at a time, over the threads.
#pragma once

#include "cpu/arena.h"
#include "cpu/few_chains.h"
#include "cpu/schedule.h"

namespace jlebm {
namespace JLEBM_TARGET {

// How a block holds its chains.
template <int N>
struct LanesOfChains { // N vectors of kLanes chains
    static constexpr int kVectors = N;
    using Workspace = MlpWorkspace<N>;

    static void energy_and_grad(const PackedMlp& packed, const FewMlp*, Workspace& ws, const I* chosen,
                                bool want_energy, F* energy) {
        JLEBM_TARGET::energy_and_grad<N>(packed, ws, chosen, want_energy, energy);
    }
};
template <int S>
struct LanesOfFeatures { // S vectors of kLanes / 4 chains, which for all but the energy count as one of kLanes
    static constexpr int kVectors = 1;
    using Workspace = FewWorkspace<S>;

    static void energy_and_grad(const PackedMlp& packed, const FewMlp* few, Workspace& ws, const I*, bool want_energy,
                                F* energy) {
        few_energy_and_grad<S>(packed, *few, ws, want_energy ? energy : nullptr);
    }
};

// Block<Lanes> is an op's work on the chains of a block:
//     static int64_t floats(p)                      of its workspace
//     Block(p, packed, few, first_chain, count, arena)
//     run(begin, end)                               steps [begin, end); of one block, pieces come one after another
// kRepeats: there may be so many steps that the last few chains deserve weights of their own
template <template <class> class Block, bool kRepeats, class Params>
void run_blocks(const Params& p, int64_t n_steps, int n_threads) {
    constexpr int kUnitChains = kNarrow * kLanes;
    const int few_chains = int(p.chains % kUnitChains);
    const int few = kRepeats && few_chains ? few_vectors(p.mlp, few_chains, n_steps) : 0;
    const Schedule schedule((p.chains + kUnitChains - 1) / kUnitChains, n_steps, kWide / kNarrow, n_threads,
                            few ? cost_of_few(few) / kNarrow : kCostOfUnit);
    const int64_t packed_size = packed_floats(p.mlp), few_size = few ? FewMlp::floats(p.mlp) : 0;
    int64_t block_size = Block<LanesOfChains<kWide>>::floats(p);
    if constexpr (kRepeats) block_size = std::max(block_size, Block<LanesOfFeatures<2>>::floats(p));
    // a chain may be asked amid its work whether to give up, and who answers may run another one
    static thread_local ArenaStorage reused;
    ArenaStorage own;
    ArenaStorage& storage = reused.taken() ? own : reused;
    float* const memory = storage.reserve(packed_size + few_size + block_size * schedule.workers());
    Arena weights(memory, packed_size);
    const PackedMlp packed = pack_mlp(p.mlp, weights);
    schedule.run([&](const Piece& piece) {
        const int64_t first = piece.first_unit * kUnitChains;
        const int count = int(std::min<int64_t>(int64_t(piece.units) * kUnitChains, p.chains - first));
        const Arena arena(memory + packed_size + few_size + block_size * piece.worker, block_size);
        const auto run = [&](auto block) { block.run(piece.begin, piece.end); };
        if constexpr (kRepeats && kMostFewVectors > 0) {
            if (few && count == few_chains) {
                FewMlp few_mlp; // here, beside the other workers: one of them computes all of this block's steps
                few_mlp.pack(packed, Arena(memory + packed_size, few_size));
                if (few == 1) return run(Block<LanesOfFeatures<1>>(p, packed, &few_mlp, first, count, arena));
                return run(Block<LanesOfFeatures<2>>(p, packed, &few_mlp, first, count, arena));
            }
        }
        if (kNarrow != kWide && piece.units == 1)
            run(Block<LanesOfChains<kNarrow>>(p, packed, nullptr, first, count, arena));
        else
            run(Block<LanesOfChains<kWide>>(p, packed, nullptr, first, count, arena));
    });
    storage.give_back();
}

} // namespace JLEBM_TARGET
} // namespace jlebm
