// Which regime, how many chains a group, how many groups a block: by an estimate of the cycles of a step.
#include "cuda/mlp_plan.h"

#include <algorithm>

namespace jlebm {
namespace cuda {
namespace {

// Estimates of one multiprocessor, in cycles; from instruction rates, to be replaced by measured ones.
constexpr double kPhaseLatency = 120;          // of a product: barrier, first loads, activation of one tile
constexpr double kClusterLatency = 500;        // more of it: stores to other blocks, barrier of all of them
constexpr double kStepLatency = 36;            // of one step of the contraction, each waiting for the one before
constexpr double kProductCycles = 1.6;         // of one m16n8 instruction, four tensor cores at work
constexpr double kLoadCyclesPer128Bytes = 1;   // shared memory
constexpr double kStreamCyclesPer128Bytes = 4; // L2, all multiprocessors at once
constexpr double kElementCycles = 0.15;        // activation or its derivative, of one feature of one chain
constexpr double kQuadCycles = 1.5;            // noise and update of four coordinates, all schedulers at work
// A warpgroup: multiply-adds of all tensor cores at once, slopes read and multiplied, what its own waits add to its
// work at activations and noise, and a product's way in and out of the tensor cores.
constexpr double kWarpgroupProducts = 2048, kSlopeCycles = 0.05, kAloneFactor = 1.4, kWarpgroupLatency = 150;
constexpr double kQuadLatency = 350; // of the same, in one thread

class Layout {
public:
    int take(int64_t bytes) {
        const int64_t at = end_;
        end_ += (bytes + 15) / 16 * 16;
        return int(std::min<int64_t>(at, INT32_MAX));
    }
    int64_t bytes() const { return end_; }

private:
    int64_t end_ = 0;
};

int n_slope_layers(const MlpNeeds& needs) { return needs.mlp->n_hidden - (needs.logits() ? 0 : 1); }

// whether the warpgroup kernel runs this call; fills the sizes of its instance
bool suits_warpgroup(const MlpNeeds& needs, const CudaLaunch& launch, MlpPlan* plan) {
    if (!launch.warpgroups || launch.precision != kBf16 || !needs.update || needs.slope_of_logits_general())
        return false;
    if (needs.mlp->n_hidden == 0) return false; // a product of its own stands at the top
    int widest = 0;
    for (int l = 1; l <= needs.mlp->n_hidden; ++l) widest = std::max(widest, needs.mlp->widths[l]);
    for (const WarpgroupSize& size : kWarpgroupSizes)
        if (needs.mlp->dim() <= size.dim && widest <= size.width) {
            plan->padded_dim = size.dim, plan->padded_width = size.width;
            return plan->groups <= size.groups;
        }
    return false;
}

int64_t lay_out_warpgroup(const MlpNeeds& needs, MlpPlan* plan) {
    const int n = needs.mlp->n_hidden, dim = plan->padded_dim, width = plan->padded_width;
    plan->logits = needs.logits();
    Layout block;
    for (int l = 0; l < n; ++l) {
        plan->weights_at[l] = block.take(int64_t(l == 0 ? dim : width) * width * 2);
        plan->bias_at[l] = block.take(width * 4);
    }
    plan->top_at = block.take(width * 4);
    if (plan->logits) plan->out_at = block.take(width * 4);
    plan->mean_at = block.take(dim * 4), plan->precision_at = block.take(dim * 4);
    plan->group_at = block.take(0);
    plan->group_bytes = (n - 1) * kWarpgroupChains * width * 2; // slopes
    const int64_t total = block.bytes() + int64_t(plan->groups) * plan->group_bytes;
    plan->shared_bytes = int(std::min<int64_t>(total, INT32_MAX));
    return total;
}

double estimate_warpgroup(const MlpNeeds& needs, const MlpPlan& plan, int multiprocessors) {
    const int n = needs.mlp->n_hidden;
    const double dim = plan.padded_dim, width = plan.padded_width;
    const double products = kWarpgroupChains * (2 * dim * width + 2.0 * (n - 1) * width * width) / kWarpgroupProducts;
    const double elements = kWarpgroupChains * width * (n * kElementCycles + (n - 1) * kSlopeCycles);
    const double work = elements + kWarpgroupChains * ((needs.mlp->dim() + 3) / 4) * kQuadCycles;
    const double wait = products + kAloneFactor * work + 2 * n * kWarpgroupLatency;
    const int64_t blocks = (needs.chains + plan.chains_per_block() - 1) / plan.chains_per_block();
    const int64_t rounds = (blocks + multiprocessors - 1) / multiprocessors;
    return double(rounds) * std::max(wait, plan.groups * std::max(products, work));
}

// of the row tiles of a layer, the most that one block of the group has
int most_tiles_of_block(const MlpPlan& plan, int n_tiles) {
    int most = 0;
    for (int rank = 0; rank < plan.cluster; ++rank)
        most = std::max(most, first_tile((rank + 1) * plan.warps, n_tiles, plan.warps_per_group()) -
                                  first_tile(rank * plan.warps, n_tiles, plan.warps_per_group()));
    return most;
}

// cluster: the most that one block keeps of the weights
int64_t kept_bytes(const MlpNeeds& needs, const MlpPlan& plan) {
    int64_t most = 0, before = 0;
    for (int rank = 0; rank < plan.cluster; ++rank) {
        const int64_t after =
            fragments_before(*needs.mlp, plan, needs.slope_of_logits_general(), true, (rank + 1) * plan.warps);
        most = std::max(most, after - before);
        before = after;
    }
    return most * kWarp * 16;
}

// bytes of shared memory
int64_t lay_out(const MlpNeeds& needs, MlpPlan* plan) {
    const MlpParams& mlp = *needs.mlp;
    const int precision = plan->precision, chains = plan->chains_per_group();
    const int n_layers = mlp.n_hidden + 1;
    plan->logits = needs.logits();
    Layout block;
    for (int l = 0; l < n_layers; ++l) {
        const bool used = l < mlp.n_hidden || plan->logits;
        const int rows = tiles(mlp.widths[l + 1]) * kTileRows;
        if (used && plan->layer_resident(l) && plan->cluster == 1)
            plan->weights_at[l] = block.take(int64_t(rows) * weight_stride(precision, mlp.widths[l]));
        if (used) plan->bias_at[l] = block.take(int64_t(rows) * 4);
    }
    plan->top_at = block.take(int64_t(tiles(mlp.widths[mlp.n_hidden])) * kTileRows * 4);
    if (plan->cluster > 1) {
        plan->exchange_at = block.take(kExchangeBytes);
        plan->kept_at = block.take(kept_bytes(needs, *plan));
    }
    plan->stream_fragments = plan->resident() ? 0
                                              : fragments_before(mlp, *plan, needs.slope_of_logits_general(), false,
                                                                 plan->warps_per_group());
    if (plan->stream_fragments)
        plan->ring_at = block.take(int64_t(plan->warps) * ring_slots(plan->regime, plan->chain_tiles) * kWarp * 16);
    plan->group_at = block.take(0);

    Layout group;
    for (int parity = 0; parity < 2; ++parity) {
        int rows = 0;
        for (int l = parity; l <= mlp.n_hidden + (plan->logits ? 1 : 0); l += 2)
            rows = std::max(rows, tiles(mlp.widths[l]) * kTileRows);
        plan->buffer_plane[parity] = plane_bytes(precision, rows);
        plan->buffer_at[parity] = group.take(int64_t(plan->chain_tiles) * plan->buffer_plane[parity]);
    }
    int64_t slopes = 0;
    const bool lean = plan->regime == Regime::kLean;
    const int over = lean ? 0 : group.take(0);
    for (int l = 0; l < n_slope_layers(needs); ++l) {
        plan->slopes_at[l] = int(over + slopes);
        slopes += int64_t(most_tiles_of_block(*plan, tiles(mlp.widths[l + 1]))) * kTileRows * chains *
                  element_bytes(precision);
    }
    const int64_t grad = int64_t(plan->chain_tiles) * grad_rows(mlp.dim()) * kTileChains * 4;
    plan->grad_at = group.take(lean ? grad : std::max(slopes, grad));
    plan->slopes_bytes = lean ? slopes : 0;
    if (plan->logits) plan->logits_at = group.take(int64_t(mlp.n_logits()) * chains * 4);
    const int quads = std::min((mlp.dim() + 3) / 4, most_tiles_of_block(*plan, tiles(mlp.dim())) * kTileRows / 4);
    if (plan->z_in_shared) plan->z_at = group.take(int64_t(quads) * chains * 16);
    const int64_t group_bytes = (group.bytes() + 127) / 128 * 128;
    plan->group_bytes = int(std::min<int64_t>(group_bytes, INT32_MAX));
    const int64_t total = block.bytes() + plan->groups * group_bytes;
    plan->shared_bytes = int(std::min<int64_t>(total, INT32_MAX));
    return total;
}

// Blocks that run at a time, or clusters: those lie within one of the chip's parts of 16 multiprocessors or a few more.
int64_t batches_at_once(const MlpPlan& plan, int multiprocessors) {
    if (plan.cluster == 1) return multiprocessors;
    return std::max(1, multiprocessors / 16 * (16 / plan.cluster));
}

// cycles of a step of all chains: what the multiprocessor must do for all groups of a block, or what one group waits
// for
double estimate(const MlpNeeds& needs, const MlpPlan& plan, int multiprocessors) {
    const MlpParams& mlp = *needs.mlp;
    const int precision = plan.precision, n = plan.chain_tiles;
    const bool general = needs.slope_of_logits_general();
    // one of four tensor cores and schedulers serves a quarter of the warps
    const int warps_per_core = (plan.warps + 3) / 4;
    const double latency = kPhaseLatency + (plan.cluster > 1 ? kClusterLatency : 0);
    double work = 0, wait = 0;
    for (int i = 0; i < phase_count(mlp.n_hidden, plan.logits, general); ++i) {
        const Phase phase = phase_of(i, mlp.n_hidden, plan.logits, general);
        const int n_tiles = tiles(phase_rows(mlp, phase)), k_steps = phase_steps(mlp, phase, precision);
        const int most = (n_tiles + plan.warps_per_group() - 1) / plan.warps_per_group(); // row tiles of a warp
        const int at_once = std::min(most, row_tiles(precision, n));
        const int passes = (most + at_once - 1) / at_once;
        const double products = k_steps * n * kProductCycles * (precision == kFp32 ? 3 : 1);
        const double weights =
            k_steps * 4 * (plan.layer_resident(phase.layer) ? kLoadCyclesPer128Bytes : kStreamCyclesPer128Bytes);
        const double operands = double(k_steps) * n * 2 / at_once * kLoadCyclesPer128Bytes;
        const double activation = kElementCycles * kTileRows * n * kTileChains;
        const double tile = std::max(products, weights + operands) + activation;
        work += most_tiles_of_block(plan, n_tiles) * tile;
        wait += latency + std::max(4 * tile * most * warps_per_core, double(passes) * k_steps * kStepLatency);
    }
    const int quads =
        std::min((mlp.dim() + 3) / 4, most_tiles_of_block(plan, tiles(mlp.dim())) * kTileRows / 4) * n * kTileChains;
    const int turns = (quads + plan.warps * kWarp - 1) / (plan.warps * kWarp);
    if (plan.regime == Regime::kLean) // written and read once; more than that costs no other regime
        work += 2 * kStreamCyclesPer128Bytes * double(plan.slopes_bytes) / 128;
    work += quads * kQuadCycles;
    wait += latency + turns * kQuadLatency;
    const int64_t batches = (needs.chains + plan.chains_per_block() - 1) / plan.chains_per_block();
    const int64_t at_once = batches_at_once(plan, multiprocessors);
    const int64_t rounds = (batches + at_once - 1) / at_once;
    return double(rounds) * std::max(wait, plan.groups * work);
}

// a bit for each of the n layers whose weights are the largest, or the smallest
uint32_t layers_by_size(const MlpParams& mlp, int n, bool largest) {
    uint32_t chosen = 0;
    for (; n > 0; --n) {
        int next = -1;
        int64_t best = 0;
        for (int l = 0; l <= mlp.n_hidden; ++l) {
            const int64_t size = int64_t(mlp.widths[l]) * mlp.widths[l + 1];
            if (!(chosen >> l & 1) && (next < 0 || (largest ? size > best : size < best))) next = l, best = size;
        }
        chosen |= 1u << next;
    }
    return chosen;
}

// The plan of least estimated time so far.
class Search {
public:
    MlpPlan best;
    bool found = false;
    int64_t least_bytes = INT64_MAX; // of a plan, whether or not it fits

    Search(const MlpNeeds& needs, const CudaLaunch& launch) : needs_(needs), launch_(launch) {
        for (int l = 0; l <= needs_.mlp->n_hidden; ++l)
            most_tiles_ = std::max(most_tiles_, tiles(needs_.mlp->widths[l]));
    }

    void blocks(Regime regime) {
        for (const int chain_tiles : {1, 2, 4})
            for (const int warps : {1, 2, 4, 8})
                for (const bool z_in_shared : {true, false})
                    for (int groups = 1; groups * warps <= kMaxWarps; ++groups) {
                        MlpPlan p;
                        p.precision = launch_.precision;
                        p.regime = regime, p.chain_tiles = chain_tiles, p.warps = warps, p.groups = groups;
                        p.z_in_shared = z_in_shared;
                        if (z_in_shared && !needs_.update) continue; // nothing to keep
                        // more warps than tiles only wait; every group of a streamed block would stream for itself
                        if (warps > 1 && warps / 2 >= most_tiles_) continue;
                        if (!p.resident() && (groups > 1 || (warps < kMaxWarps && 2 * warps <= most_tiles_))) continue;
                        const int n_layers = needs_.mlp->n_hidden + 1;
                        offer_layers(p, p.resident() ? n_layers : 0,
                                     regime == Regime::kLean ? 0
                                     : p.resident()          ? n_layers
                                                             : n_layers - 1);
                    }
    }

    void clusters() {
        if (!launch_.clusters || !needs_.update || needs_.mlp->n_hidden == 0) return;
        if (found && best.resident()) return; // nothing is streamed that a cluster could share
        for (const int cluster : {2, 4, kMaxClusterBlocks})
            for (const int chain_tiles : {1, 2, 4})
                for (const int warps : {1, 2, 4, 8})
                    for (const bool z_in_shared : {true, false}) {
                        MlpPlan p;
                        p.precision = launch_.precision, p.regime = Regime::kCluster, p.cluster = cluster;
                        p.chain_tiles = chain_tiles, p.warps = warps, p.z_in_shared = z_in_shared;
                        // more warps than tiles, or blocks, only wait
                        if (p.warps_per_group() / 2 >= most_tiles_ || cluster > most_tiles_) continue;
                        // where not all fit, the smaller ones may
                        if (!offer_layers(p, 0, needs_.mlp->n_hidden + 1))
                            offer_layers(p, 1, needs_.mlp->n_hidden, false);
                    }
    }

    void warpgroups() {
        for (const int groups : {1, 2, 3}) {
            MlpPlan p;
            p.precision = launch_.precision, p.regime = Regime::kWarpgroup;
            p.chain_tiles = kWarpgroupChains / kTileChains, p.warps = kWarpgroup / kWarp, p.groups = groups;
            if (!suits_warpgroup(needs_, launch_, &p)) continue;
            offer(p, lay_out_warpgroup(needs_, &p),
                  [&](const MlpPlan& plan) { return estimate_warpgroup(needs_, plan, multiprocessors_); });
        }
    }

private:
    // false if it does not fit; `estimated(plan)` is its cycles
    template <class Estimate>
    bool offer(MlpPlan& p, int64_t bytes, Estimate estimated) {
        least_bytes = std::min(least_bytes, bytes);
        if (bytes > launch_.max_shared_bytes) return false;
#if defined(JLEBM_CUDA_ON_HOST)
        if (plan_allowed && !plan_allowed(p)) return true;
#endif
        p.estimated_cycles = estimated(p);
        if (!found || p.estimated_cycles < best.estimated_cycles) found = true, best = p;
        return true;
    }

    // with the weights of the n largest layers in shared memory, the most traffic spared, or of the smallest: n from
    // `least` on, up to `most` or until they do not fit; false if these did not
    bool offer_layers(MlpPlan& p, int least, int most, bool largest = true) {
        for (int n_resident = least; n_resident <= most; ++n_resident) {
            p.resident_layers = layers_by_size(*needs_.mlp, n_resident, largest);
            // z in the output's memory costs a little; resident before streamed at the same estimate
            const auto estimated = [&](const MlpPlan& plan) {
                return estimate(needs_, plan, multiprocessors_) * (plan.z_in_shared ? 1.0 : 1.02);
            };
            if (!offer(p, lay_out(needs_, &p), estimated)) return false;
        }
        return true;
    }

    const MlpNeeds& needs_;
    const CudaLaunch& launch_;
    const int multiprocessors_ = std::max(1, launch_.multiprocessors);
    int most_tiles_ = 1;
};

} // namespace

bool plan_mlp(const MlpNeeds& needs, const CudaLaunch& launch, MlpPlan* plan, int64_t* least_bytes) {
    Search search(needs, launch);
    search.blocks(Regime::kResident);
    search.blocks(Regime::kStreamed);
    search.blocks(Regime::kLean);
    if (least_bytes) *least_bytes = search.least_bytes;
    search.clusters();
    search.warpgroups();
    *plan = search.best;
    return search.found;
}

int64_t mlp_blocks(const MlpPlan& plan, int64_t chains, const CudaLaunch& launch) {
    const int64_t blocks = (chains + plan.chains_per_block() - 1) / plan.chains_per_block();
    return plan.regime == Regime::kLean ? std::min<int64_t>(blocks, std::max(1, launch.multiprocessors))
                                        : blocks * plan.cluster;
}

int64_t stream_bytes(const MlpPlan& plan) { return plan.stream_fragments * kWarp * 16; }

int64_t workspace_bytes(const MlpPlan& plan, int64_t chains, const CudaLaunch& launch) {
    return stream_bytes(plan) + mlp_blocks(plan, chains, launch) * plan.slopes_bytes;
}

std::string plan_text(const MlpPlan& plan) {
    static const char* const kNames[kPrecisionCount] = {"fp32 (tf32 x 3)", "tf32", "bf16"};
    static const char* const kRegimes[int(Regime::kCount)] = {"resident, ", "streamed, ", "lean, ", "cluster, ",
                                                              "warpgroup, "};
    const auto counted = [](int n, const char* what) { return std::to_string(n) + " " + what + (n == 1 ? "" : "s"); };
    int n_resident = 0;
    for (uint32_t layers = plan.resident_layers; layers; layers &= layers - 1) ++n_resident;
    const bool some = !plan.resident() && n_resident > 0 && plan.stream_fragments > 0;
    const std::string kept = some ? std::to_string(n_resident) + " of the layers in shared memory, " : "";
    const std::string holder = plan.cluster > 1 ? " chains a cluster of " + counted(plan.cluster, "block") + " of "
                                                : " chains a block in " + counted(plan.groups, "group") + " of ";
    return std::string(kRegimes[int(plan.regime)]) + kept + kNames[plan.precision] + ", " +
           std::to_string(plan.chains_per_block()) + holder + counted(plan.warps, "warp") + ", " +
           std::to_string((plan.shared_bytes + 1023) / 1024) + " KB of shared memory";
}

} // namespace cuda
} // namespace jlebm
