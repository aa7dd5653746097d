// All chains of an MLP kernel, a block of them at a time, over the threads.
#pragma once

#include "cpu/arena.h"
#include "cpu/mlp_lanes.h"
#include "cpu/schedule.h"

namespace jlebm {
namespace JLEBM_TARGET {

// Block<V> is an op's work on V * kLanes chains:
//     static int64_t floats(p)                 of its workspace
//     Block(p, packed, first_chain, arena)
//     run(begin, end)                          steps [begin, end); of one block, pieces come one after another
template <template <int> class Block, class Params>
void run_blocks(const Params& p, int64_t n_steps, int n_threads) {
    constexpr int kUnitChains = kNarrow * kLanes;
    const Schedule schedule((p.chains + kUnitChains - 1) / kUnitChains, n_steps, kWide / kNarrow, n_threads);
    const int64_t block_floats = Block<kWide>::floats(p);
    const int64_t packed = packed_floats(p.mlp);
    static thread_local ArenaStorage storage;
    float* memory = storage.reserve(packed + block_floats * schedule.workers());
    Arena weights(memory, packed);
    const PackedMlp mlp = pack_mlp(p.mlp, weights);
    schedule.run([&](const Piece& piece) {
        const Arena arena(memory + packed + block_floats * piece.worker, block_floats);
        const int64_t first = piece.first_unit * kUnitChains;
        if (kNarrow != kWide && piece.units == 1)
            Block<kNarrow>(p, mlp, first, arena).run(piece.begin, piece.end);
        else
            Block<kWide>(p, mlp, first, arena).run(piece.begin, piece.end);
    });
    storage.release_if_large();
}

// chains of a block that begins at `first`
template <int V>
inline int block_chains(int64_t first, int64_t chains) {
    return int(std::min<int64_t>(V * kLanes, chains - first));
}

} // namespace JLEBM_TARGET
} // namespace jlebm
