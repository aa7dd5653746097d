// mlp_energy_grad: f(z) [chains] and grad f(z) [chains, dim] of an MLP (formulas in cpu/mlp_lanes.h).
// Compiled once per target.
#include "cpu/kernels_target.h"
#include "cpu/mlp_lanes.h"
#include "cpu/schedule.h"

namespace jlebm {
namespace JLEBM_TARGET {
namespace {

template <int V>
void run_block(const MlpEnergyGradParams& p, const PackedMlp& packed, int64_t first, Arena arena) {
    const int count = int(std::min<int64_t>(V * kLanes, p.chains - first));
    MlpWorkspace<V> workspace;
    workspace.take(packed, arena);
    lanes_from_rows<V>(workspace.z, p.z, p.mlp.dim(), first, count);
    if (workspace.context) lanes_from_rows<V>(workspace.context, p.mlp.context_bias, p.mlp.widths[1], first, count);
    I chosen[V];
    chosen_logits<V>(chosen, p.mlp.logit, first, count);
    F energy[V];
    energy_and_grad<V>(packed, workspace, chosen, true, energy);
    float row[V * kLanes];
    for (int v = 0; v < V; ++v) store(row + v * kLanes, energy[v]);
    std::memcpy(p.energy + first, row, size_t(count) * sizeof(float));
    if (p.grad) rows_from_lanes<V>(p.grad, workspace.grad, p.mlp.dim(), first, count);
}

} // namespace

void mlp_energy_grad(const MlpEnergyGradParams& p, int n_threads) {
    constexpr int kUnitChains = kNarrow * kLanes;
    const Schedule schedule((p.chains + kUnitChains - 1) / kUnitChains, 1, kWide / kNarrow, n_threads);
    const int64_t block_floats = MlpWorkspace<kWide>::floats(p.mlp);
    const int64_t packed = packed_floats(p.mlp);
    static thread_local ArenaStorage storage;
    float* memory = storage.reserve(packed + block_floats * schedule.workers());
    Arena weights(memory, packed);
    const PackedMlp mlp = pack_mlp(p.mlp, weights);
    schedule.run([&](const Piece& piece) {
        const Arena arena(memory + packed + block_floats * piece.worker, block_floats);
        const int64_t first = piece.first_unit * kUnitChains;
        if (kNarrow != kWide && piece.units == 1)
            run_block<kNarrow>(p, mlp, first, arena);
        else
            run_block<kWide>(p, mlp, first, arena);
    });
    storage.release_if_large();
}

} // namespace JLEBM_TARGET
} // namespace jlebm
