// Where everything of an MLP kernel stands: shared memory, warps, chains. Chosen on the host, read by the kernel.
//
// A block holds `groups` groups of `warps` warps. A group owns kChains = 8 * chain_tiles chains for all steps and
// synchronises only with itself; resident weights are shared by the groups of a block. Features are the M side of the
// matrix instructions (tiles of 16), chains the N side (tiles of 8).
//
//   buffers[0], [1]  operands of the next product, [chain tile][feature][8 chains]: z, h_2, delta_2, … and h_1,
//   delta_1,
//                    …; one row more than needed, so that the same feature of two chain tiles stands in other banks
//   slopes           phi'(a_l) of the layers whose delta is still to come, in the order of the accumulators: each
//                    thread reads what it wrote itself. In device memory where shared memory does not hold them (lean)
//   grad             gradient, float32, rows of 8 chains, five rows for four features: lies over the slopes, dead then;
//                    each quadruple's spare row keeps the lanes of the update in different banks
//   z                float32; a quadruple of coordinates belongs to one thread for good. In the output's memory where
//                    shared memory is better spent on chains (`z_in_shared` false)
#pragma once

#include "cuda/geometry.h"
#include "params.h"

namespace jlebm {
namespace cuda {

constexpr int kTileRows = 16;  // of a matrix instruction: features
constexpr int kTileChains = 8; // of a matrix instruction: chains
// 8 warps leave 255 registers to a thread, so that 4 x 4 accumulator tiles fit beside their operands
constexpr int kMaxWarps = 8;
constexpr int kMlpThreads = kMaxWarps * kWarp;
constexpr int kWarpgroup = 128, kWarpgroupChains = 64; // threads, and rows of its matrix instruction
// Instances of the warpgroup kernel: dim and widest hidden layer, padded to what the matrix instruction takes, and
// warpgroups of a block, whose threads then have 168 or 255 registers.
struct WarpgroupSize {
    int dim, width, groups;
};
constexpr WarpgroupSize kWarpgroupSizes[] = {{32, 64, 3}, {64, 112, 2}, {112, 208, 2}};
constexpr int kMaxClusterBlocks = 8; // what every chip with clusters can launch
constexpr int kExchangeBytes = 48;   // of shared memory: cluster_exchange.h

// Where weights and slopes are kept.
enum class Regime : int32_t {
    kResident, // both in shared memory
    kStreamed, // weights from L2 in every step, but for as many layers as fit beside the rest
    // As streamed, and the slopes in device memory, where they are few bytes beside the weights: so a block has room
    // for twice as many chains of a wide net, which share each fragment that comes from L2, or any room at all on chips
    // of little shared memory (1000 units in float32 on 99 KB). A block for each multiprocessor at most, which takes
    // one batch of chains after the other, so that the slopes' memory does not grow with the chains.
    kLean,
    // The units of each layer are shared out among the blocks of a cluster, each with its own fragments of the weights,
    // in shared memory as far as they fit, streamed from L2 otherwise. What a block computes it writes to all others:
    // every block has the whole operand of the next product. For few chains, which leave most multiprocessors idle.
    kCluster,
    // Weights in shared memory, everything else in registers: 64 chains by each warpgroup (mlp_warpgroup.h). For many
    // chains in bf16 on compute capability 9.0.
    kWarpgroup,
    kCount
};

// Fragments of 512 bytes that a warp keeps in flight from L2: 8 warps x 7 x 512 bytes cover about 28 KB, the product of
// an SM's share of L2 bandwidth (64 bytes a cycle) and its latency (300 to 400 cycles). Half as many where lean is for
// want of shared memory.
constexpr JLEBM_HD int ring_slots(Regime regime, int chain_tiles) {
    return regime == Regime::kLean && chain_tiles == 1 ? 4 : 8;
}

constexpr JLEBM_HD int round_up(int n, int to) { return (n + to - 1) / to * to; }
constexpr JLEBM_HD int tiles(int features) { return (features + kTileRows - 1) / kTileRows; }
// contraction length of one step: m16n8k16 for bf16, m16n8k8 for tf32
constexpr JLEBM_HD int step_k(int precision) { return precision == kBf16 ? 16 : 8; }
constexpr JLEBM_HD int element_bytes(int precision) { return precision == kBf16 ? 2 : 4; }
// Row tiles that a warp multiplies at a time: four by four halve the loads per product, which bf16 would otherwise wait
// for (1.5 instead of 2 loads of 128 bytes for a product of 1.6 cycles). fp32 has three products for each load, and
// tf32 in 4 x 4 tiles not quite enough registers (compiler's report: 255 and a spill).
constexpr JLEBM_HD int row_tiles(int precision, int chain_tiles) {
    return chain_tiles == 4 && precision == kBf16 ? 4 : 2;
}
// bytes from one row of a resident weight to the next: 16 bytes beside a multiple of 32 put 8 rows of 16 bytes, or
// 8 rows x 4 words, or 4 rows (0, 2, 4, 6) x 8 words into different banks: all loads of both directions
constexpr JLEBM_HD int weight_stride(int precision, int n_in) {
    return round_up(n_in, kTileRows) * element_bytes(precision) + 16;
}
constexpr JLEBM_HD int plane_bytes(int precision, int rows) {
    return (rows + 1) * kTileChains * element_bytes(precision);
}
// float32 rows of a chain tile's gradient; the remainder 1 modulo 4 puts chain tiles into different banks
constexpr JLEBM_HD int grad_rows(int dim) {
    const int rows = (dim + 3) / 4 * 5;
    return rows + (5 - rows % 4) % 4;
}
// tiles [first_tile(w), first_tile(w + 1)) of a layer belong to warp w of its group
constexpr JLEBM_HD int first_tile(int warp, int n_tiles, int n_warps) { return warp * n_tiles / n_warps; }

struct MlpPlan {
    int32_t precision = 0;
    int32_t chain_tiles = 1; // of a group
    int32_t groups = 1;      // of a block
    int32_t warps = 1;       // of a group in a block
    int32_t cluster = 1;     // blocks that share a group
    Regime regime = Regime::kResident;
    bool logits =
        false; // whether the last layer's product is needed: another head than identity, or energies asked for
    bool z_in_shared = true;
    int32_t shared_bytes = 0;
    double estimated_cycles = 0; // of a step of all chains
    // bytes from the beginning of shared memory
    int32_t weights_at[kMaxHiddenLayers + 1] = {}; // resident
    int32_t bias_at[kMaxHiddenLayers + 1] = {};
    uint32_t resident_layers = 0;             // a bit for each layer whose weight stands in shared memory
    int32_t kept_at = 0, exchange_at = 0;     // cluster: the warps' own fragments of those layers; cluster_exchange.h
    int32_t padded_dim = 0, padded_width = 0; // warpgroup: of the kernel's instance
    int32_t out_at = 0;                       // warpgroup: W_out, where logits are computed
    int32_t mean_at = 0, precision_at = 0;    // warpgroup: of the prior
    int32_t top_at = 0;                       // W_out out_scale of a single logit: delta_L without a product
    int32_t ring_at = 0;                      // not resident: [warp][slot][lane] fragments
    int32_t group_at = 0, group_bytes = 0;
    // bytes from the beginning of a group
    int32_t buffer_at[2] = {}, buffer_plane[2] = {};
    int32_t slopes_at[kMaxHiddenLayers] = {}; // lean: from the beginning of the block's slopes
    int32_t grad_at = 0, z_at = 0, logits_at = 0;
    int64_t slopes_bytes = 0;     // lean: of a block, in device memory
    int64_t stream_fragments = 0; // of the layers that are not resident, of all warps

    constexpr JLEBM_HD bool layer_resident(int layer) const { return resident_layers >> layer & 1; }
    constexpr JLEBM_HD bool resident() const { return regime == Regime::kResident || regime == Regime::kWarpgroup; }

    constexpr JLEBM_HD int chains_per_group() const { return chain_tiles * kTileChains; }
    // of a block, or of the blocks of a cluster together
    constexpr JLEBM_HD int chains_per_block() const { return groups * chains_per_group(); }
    constexpr JLEBM_HD int warps_per_group() const { return cluster * warps; }
    constexpr JLEBM_HD int threads() const { return groups * warps * kWarp; }
};

// What a call needs of its plan.
struct MlpNeeds {
    const MlpParams* mlp = nullptr;
    int64_t chains = 0;
    bool energies = false; // f itself, at some step
    bool update = true;    // z is kept and moved
    bool slope_of_logits_general() const { return mlp->head != Head::kIdentity || mlp->n_logits() != 1; }
    bool logits() const { return energies || slope_of_logits_general(); }
};

// Products of one step in the order in which a group computes them: layers forward, then backward.
struct Phase {
    int layer;
    bool forward;
};

// n-th phase; a layer L (the last) takes part only where logits are needed, backward only for a head that is not a
// plain single logit
constexpr JLEBM_HD int phase_count(int n_hidden, bool logits, bool general_head) {
    return 2 * n_hidden + (logits ? 1 : 0) + (general_head ? 1 : 0);
}
constexpr JLEBM_HD Phase phase_of(int n, int n_hidden, bool logits, bool general_head) {
    const int forward = n_hidden + (logits ? 1 : 0);
    if (n < forward) return {n, true};
    return {n_hidden - (general_head ? 0 : 1) - (n - forward), false};
}
constexpr JLEBM_HD int phase_rows(const MlpParams& mlp, Phase phase) {
    return mlp.widths[phase.layer + (phase.forward ? 1 : 0)];
}
constexpr JLEBM_HD int phase_steps(const MlpParams& mlp, Phase phase, int precision) {
    const int k = mlp.widths[phase.layer + (phase.forward ? 0 : 1)];
    return (k + step_k(precision) - 1) / step_k(precision);
}

// row tiles of a phase whose fragments are streamed
constexpr JLEBM_HD int streamed_tiles(const MlpParams& mlp, const MlpPlan& plan, Phase phase) {
    return plan.layer_resident(phase.layer) ? 0 : tiles(phase_rows(mlp, phase));
}

// Fragments of all warps before `warp` of its group, of the layers that are kept in shared memory or of the others:
// where the warp's own begin.
constexpr JLEBM_HD int64_t fragments_before(const MlpParams& mlp, const MlpPlan& plan, bool general_head, bool kept,
                                            int warp) {
    int64_t before = 0;
    for (int n = 0; n < phase_count(mlp.n_hidden, plan.logits, general_head); ++n) {
        const Phase phase = phase_of(n, mlp.n_hidden, plan.logits, general_head);
        if (plan.layer_resident(phase.layer) == kept)
            before += int64_t(first_tile(warp, tiles(phase_rows(mlp, phase)), plan.warps_per_group())) *
                      phase_steps(mlp, phase, plan.precision);
    }
    return before;
}

#if defined(JLEBM_CUDA_ON_HOST)
inline bool (*plan_allowed)(const MlpPlan&) = nullptr; // tests try every geometry, not only the one of least time
#endif

// The plan of least estimated time among those that fit; false if none does. `least_bytes`, if given, is the shared
// memory of the smallest plan.
bool plan_mlp(const MlpNeeds& needs, const CudaLaunch& launch, MlpPlan* plan, int64_t* least_bytes = nullptr);

// "resident, bf16, 64 chains a block in 2 groups of 4 warps"
std::string plan_text(const MlpPlan& plan);

// blocks of a launch
int64_t mlp_blocks(const MlpPlan& plan, int64_t chains, const CudaLaunch& launch);

// bytes of the packed weights; 0 where they are resident
int64_t stream_bytes(const MlpPlan& plan);
// the same and the slopes of all blocks, which stand behind it
int64_t workspace_bytes(const MlpPlan& plan, int64_t chains, const CudaLaunch& launch);

} // namespace cuda
} // namespace jlebm
