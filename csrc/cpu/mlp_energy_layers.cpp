// mlp_energy_layers: f(z) of an MLP with what the gradients in its parameters are made of (formulas in
// cpu/mlp_lanes.h):
//
//     h_l, delta_l = df / da_l  (the last delta: df / dlogits)       dW_l = delta_l h_{l-1}^T,   db_l = sum of delta_l
//
// each [units, chains], feature by feature as the lanes hold them, so that a block writes whole vectors and a matrix
// library takes the sums over chains. Without hidden and delta, and without grad, only the forward half runs.
// Compiled once per target.
#include "cpu/kernels_target.h"
#include "cpu/mlp_lanes.h"
#include "cpu/schedule.h"

namespace jlebm {
namespace JLEBM_TARGET {
namespace {

// lanes [n][V * kLanes] -> columns [first, first + count) of [n, chains]
template <int V>
void features_from_lanes(float* to, const float* lanes, int64_t n, int64_t chains, int64_t first, int count) {
    for (int64_t k = 0; k < n; ++k)
        std::memcpy(to + k * chains + first, lanes + k * V * kLanes, size_t(count) * sizeof(float));
}

template <int V>
void run_block(const MlpEnergyLayersParams& p, const PackedMlp& packed, int64_t first, Arena arena) {
    const MlpParams& mlp = p.mlp;
    const int count = int(std::min<int64_t>(V * kLanes, p.chains - first));
    MlpWorkspace<V> ws;
    ws.take(packed, arena);
    lanes_from_rows<V>(ws.z, p.z, mlp.dim(), first, count);
    if (ws.context) lanes_from_rows<V>(ws.context, mlp.context_bias, mlp.widths[1], first, count);
    I chosen[V];
    chosen_logits<V>(chosen, mlp.logit, first, count);
    const float* h = ws.z;
    float* hidden = p.hidden;
    for (int l = 0; l < mlp.n_hidden; ++l) {
        const int64_t width = mlp.widths[l + 1];
        h = hidden_layer<V>(packed, ws, l, h);
        if (hidden) features_from_lanes<V>(hidden, h, width, p.chains, first, count), hidden += width * p.chains;
    }
    run_layer<V>(packed.forward[mlp.n_hidden], h, nullptr, ws.logits, StoreSum{});
    F energy[V];
    apply_head<V>(mlp, ws.logits, chosen, energy);
    float row[V * kLanes];
    for (int v = 0; v < V; ++v) store(row + v * kLanes, energy[v]);
    std::memcpy(p.energy + first, row, size_t(count) * sizeof(float));
    if (!p.delta && !p.grad) return;
    float* delta_end = p.delta;
    if (delta_end)
        for (int l = 0; l <= mlp.n_hidden; ++l) delta_end += mlp.widths[l + 1] * p.chains;
    const float* delta = ws.logits;
    for (int l = mlp.n_hidden; l >= 0; --l) {
        const int64_t width = mlp.widths[l + 1];
        if (delta_end) features_from_lanes<V>(delta_end -= width * p.chains, delta, width, p.chains, first, count);
        if (l == 0) break;
        float* const to = ws.slope[l - 1];
        if (packed.fused[l - 1])
            run_layer<V>(packed.backward[l], delta, nullptr, to, LeakyBackward{packed.slope[l - 1]});
        else
            run_layer<V>(packed.backward[l], delta, nullptr, to, SlopeBackward{});
        delta = to;
    }
    if (!p.grad) return;
    run_layer<V>(packed.backward[0], delta, nullptr, ws.grad, StoreSum{});
    rows_from_lanes<V>(p.grad, ws.grad, mlp.dim(), first, count);
}

} // namespace

void mlp_energy_layers(const MlpEnergyLayersParams& p, int n_threads) {
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
