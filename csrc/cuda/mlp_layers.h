// Forward and input-gradient pass of an MLP by one group of warps, for its kChains chains (formulas: csrc/README.md).
//
// A warp owns a run of row tiles of each layer, the same forward and backward, so that phi'(a) waits for delta in
// memory of the very thread that wrote it. Between two products the group meets at its barrier; every other dependence
// is inside a thread. A group may be the warps of a whole cluster of blocks (cluster): then operands are written to all
// of them, and gradient and z stay with the block that owns their rows. Chains are columns of every product: a NaN
// stays in its column, and a padded chain in its own.
#pragma once

#include <type_traits>

#include "cuda/activation.h"
#include "cuda/cluster_exchange.h"
#include "cuda/mlp_call.h"
#include "cuda/mlp_weights.h"

namespace jlebm {
namespace cuda {

// The barriers of a step, by what comes before them.
enum class After : int { kForward = 1, kLogits, kHead, kTop, kBackward, kGrad, kUpdate, kDiagnostics, kMoved };
#if defined(JLEBM_CUDA_ON_HOST)
inline int barrier_left_out = 0; // tests leave one out, to see that its absence is caught
#endif

struct NoStream {
    JLEBM_DEVICE NoStream(const void*, int64_t, int64_t, unsigned char*) {}
    JLEBM_DEVICE void finish() {}
};
struct NoKept {
    JLEBM_DEVICE explicit NoKept(unsigned char*) {}
};
struct NoExchange {
    JLEBM_DEVICE NoExchange(unsigned char*, int, int) {}
};

template <int kPrecision, int kChainTiles, Regime kRegime>
class ChainGroup {
public:
    using O = Operand<kPrecision>;
    static constexpr int kChains = kChainTiles * kTileChains;
    static constexpr int kRowTiles = row_tiles(kPrecision, kChainTiles);
    static constexpr bool kInCluster = kRegime == Regime::kCluster;

    JLEBM_DEVICE ChainGroup(const MlpCall& call, int64_t first_of_block)
        : call_(call), plan_(call.plan), mlp_(call.mlp), rank_(rank()), warp_(warp_index() % call.plan.warps),
          group_(warp_index() / call.plan.warps), thread_(warp_ * kWarp + lane_index()),
          threads_(call.plan.warps * kWarp), first_(first_of_block + group_ * kChains),
          memory_(shared_memory<unsigned char>(call.plan.group_at + int64_t(group_) * call.plan.group_bytes)),
          stream_(
              call.stream, fragments_at(call, false, 0), fragments_at(call, false, 1),
              shared_memory<unsigned char>(call.plan.ring_at + warp_ * ring_slots(kRegime, kChainTiles) * kWarp * 16)),
          kept_(shared_memory<unsigned char>(kept_at(call))),
          exchange_(shared_memory<unsigned char>(call.plan.exchange_at), call.plan.cluster, call.plan.warps) {
        if constexpr (kInCluster)
            kept_.template load<kPrecision, kChainTiles>(mlp_, plan_, call_.general_head, rank_ * plan_.warps + warp_);
    }

    // f into `energy` of thread c for chain c where logits are computed; grad f into grad_at()
    JLEBM_DEVICE void energy_and_grad(float& energy) {
        // one call of forward and one of backward, since each is inlined
        const int n = mlp_.n_hidden;
        if constexpr (kInCluster) kept_.rewind();
#pragma unroll 1
        for (int l = 0; l < n + (plan_.logits ? 1 : 0); ++l) {
            forward(l);
            if (l < n)
                share(After::kForward, mlp_.widths[l + 1]);
            else
                share_logits();
            if (l < n && call_.hidden[l]) copy_operand(call_.hidden[l], l + 1);
        }
        if (plan_.logits) {
            if (thread_ < kChains) energy = head(thread_);
            if (!call_.general_head) top_delta();
            if (call_.general_head)
                sync(After::kHead);
            else
                share(After::kTop, mlp_.widths[n]);
        }
#pragma unroll 1
        for (int l = call_.general_head ? n : n - 1; l >= 0; --l) {
            if (l < n && call_.delta[l]) copy_operand(call_.delta[l], l + 1);
            backward(l);
            if (l > 0) share(l == n ? After::kTop : After::kBackward, mlp_.widths[l]);
        }
    }

protected:
    JLEBM_DEVICE void sync(After phase) {
#if defined(JLEBM_CUDA_ON_HOST)
        if (barrier_left_out == int(phase)) return;
#else
        (void)phase;
#endif
        if (plan_.warps == 1)
            sync_warp();
        else
            sync_group(1 + group_, threads_);
    }

    // Behind it, the group has what its warps have written to the operand of a layer of this many features.
    JLEBM_DEVICE void share(After phase, int features) {
        if constexpr (kInCluster) {
            const int n_tiles = tiles(features);
            const int others = n_tiles - (block_tile(n_tiles, 1) - block_tile(n_tiles, 0));
            await(phase, others * kTileRows * kChainTiles * O::kRowBytes);
        } else {
            sync(phase);
        }
    }
    JLEBM_DEVICE void share_logits() {
        if constexpr (kInCluster) {
            const int n = mlp_.n_logits(), begin = block_tile(tiles(n), 0) * kTileRows;
            const int end = block_tile(tiles(n), 1) * kTileRows;
            await(After::kLogits, (n - ((end < n ? end : n) - (begin < n ? begin : n))) * kChains * 4);
        } else {
            sync(After::kLogits);
        }
    }
    // cluster: until all warps of this block have come, and so many bytes from the others
    JLEBM_DEVICE void await(After phase, int bytes) {
        bool wait = true;
#if defined(JLEBM_CUDA_ON_HOST)
        wait = barrier_left_out != int(phase);
#else
        (void)phase;
#endif
        exchange_.arrive_and_wait(bytes, wait);
    }

    // operands that layer l's product reads forward: h_l, h_0 = z; and delta_l after its backward product
    JLEBM_DEVICE unsigned char* buffer(int l) const { return memory_ + plan_.buffer_at[l & 1]; }
    JLEBM_DEVICE int plane(int l) const { return plan_.buffer_plane[l & 1]; }
    JLEBM_DEVICE unsigned char* operand_at(int l, int feature, int chain) const {
        return buffer(l) + chain / kTileChains * plane(l) + O::row_at(feature) + chain % kTileChains * O::kBytes;
    }
    JLEBM_DEVICE void store_operand(int l, int feature, int chain, float v) const {
        *reinterpret_cast<typename O::Element*>(operand_at(l, feature, chain)) = O::element(v);
    }
    // into this block's memory, and to the same place in the other blocks' of a cluster
    template <class T>
    JLEBM_DEVICE void store_everywhere(T* own, const T& v) const {
        *own = v;
        if constexpr (kInCluster) exchange_.send(own, v);
    }
    // row tiles [own_tile(n_tiles, 0), own_tile(n_tiles, 1)) of a layer are this warp's
    JLEBM_DEVICE int own_tile(int n_tiles, int next) const {
        return first_tile(rank_ * plan_.warps + warp_ + next, n_tiles, plan_.warps_per_group());
    }
    // the same of this block
    JLEBM_DEVICE int block_tile(int n_tiles, int next) const {
        return first_tile((rank_ + next) * plan_.warps, n_tiles, plan_.warps_per_group());
    }
    // first of the rows of quadruple `quad`; its rows are kTileChains floats apart
    JLEBM_DEVICE float* grad_at(int quad, int chain) const {
        return reinterpret_cast<float*>(memory_ + plan_.grad_at) +
               (chain / kTileChains * grad_rows(mlp_.dim()) + 5 * quad) * kTileChains + chain % kTileChains;
    }

    const MlpCall& call_;
    const MlpPlan& plan_;
    const MlpParams& mlp_;
    const int rank_;                            // of this block in its cluster
    const int warp_, group_, thread_, threads_; // of this block
    const int64_t first_;                       // chain
    unsigned char* const memory_;
    std::conditional_t<kRegime == Regime::kResident, NoStream, WeightStream<ring_slots(kRegime, kChainTiles)>> stream_;
    std::conditional_t<kInCluster, KeptWeights, NoKept> kept_;
    std::conditional_t<kInCluster, ClusterExchange, NoExchange> exchange_;

private:
    using Tile = float[kChainTiles][4];

    JLEBM_DEVICE static int rank() {
        if constexpr (kInCluster) return cluster_rank();
        return 0;
    }
    // of all fragments kept, or of all streamed ones: the first of this warp, or the one behind its last
    JLEBM_DEVICE int64_t fragments_at(const MlpCall& call, bool kept, int next) const {
        if (kRegime == Regime::kResident) return 0;
        return fragments_before(call.mlp, call.plan, call.general_head, kept, rank_ * call.plan.warps + warp_ + next);
    }
    JLEBM_DEVICE int64_t kept_at(const MlpCall& call) const {
        if constexpr (!kInCluster) return 0;
        const int64_t of_block =
            fragments_before(call.mlp, call.plan, call.general_head, true, rank_ * call.plan.warps);
        return call.plan.kept_at + (fragments_at(call, true, 0) - of_block) * kWarp * 16;
    }

    template <bool kForward>
    JLEBM_DEVICE void product(float (&acc)[kRowTiles][kChainTiles][4], int layer, int row_tile, int count) {
        const int in = kForward ? layer : layer + 1;
        const int k_steps = (mlp_.widths[in] + step_k(kPrecision) - 1) / step_k(kPrecision);
        const ChainOperands<kPrecision, kChainTiles, kForward> chains(buffer(in), plane(in));
        if constexpr (kInCluster) {
            if (plan_.layer_resident(layer))
                multiply<kPrecision, kForward>(acc, kept_, count, chains, k_steps);
            else
                multiply<kPrecision, kForward>(acc, stream_, count, chains, k_steps);
        } else if (kRegime == Regime::kResident || (kRegime == Regime::kStreamed && plan_.layer_resident(layer))) {
            ResidentWeights<kPrecision, kForward> weights(shared_memory<unsigned char>(plan_.weights_at[layer]),
                                                          weight_stride(kPrecision, mlp_.widths[layer]), row_tile);
            multiply<kPrecision, kForward>(acc, weights, count, chains, k_steps);
        } else if constexpr (kRegime != Regime::kResident) {
            multiply<kPrecision, kForward>(acc, stream_, count, chains, k_steps);
        }
    }

    // h_{layer+1} (or delta_L at once) from h_layer; layer L: the logits
    JLEBM_DEVICE void forward(int layer) {
        const int n_tiles = tiles(mlp_.widths[layer + 1]);
        const int end = own_tile(n_tiles, 1);
#pragma unroll 1
        for (int tile = own_tile(n_tiles, 0); tile < end; tile += kRowTiles) {
            const int count = end - tile < kRowTiles ? end - tile : kRowTiles;
            float acc[kRowTiles][kChainTiles][4];
            const auto* bias = shared_memory<float>(plan_.bias_at[layer]) + tile * kTileRows + lane_index() / 4;
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m)
                for (int n = 0; n < kChainTiles; ++n)
                    for (int i = 0; i < 4; ++i) acc[m][n][i] = m < count ? bias[m * kTileRows + i / 2 * 8] : 0.0f;
            if (layer == 0 && mlp_.context_bias) add_context(acc, tile, count);
            product<true>(acc, layer, tile, count);
            // One row tile after the other through acc[0], so that there is one copy of the code below.
#pragma unroll 1
            for (int m = 0; m < count; ++m) {
                if (layer == mlp_.n_hidden)
                    store_logits(acc[0], tile + m);
                else
                    activate(acc[0], layer, tile + m);
#pragma unroll
                for (int j = 0; j + 1 < kRowTiles; ++j)
                    for (int n = 0; n < kChainTiles; ++n)
                        for (int i = 0; i < 4; ++i) acc[j][n][i] = acc[j + 1][n][i];
            }
        }
    }

    JLEBM_DEVICE void add_context(float (&acc)[kRowTiles][kChainTiles][4], int tile, int count) const {
        const int width = mlp_.widths[1];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
            for (int n = 0; n < kChainTiles; ++n)
                for (int i = 0; i < 4; ++i) {
                    const int row = (tile + m) * kTileRows + lane_index() / 4 + i / 2 * 8;
                    const int64_t chain = first_ + n * kTileChains + lane_index() % 4 * 2 + i % 2;
                    if (m < count && row < width && chain < call_.chains)
                        acc[m][n][i] += load_readonly(mlp_.context_bias + chain * width + row);
                }
    }

    JLEBM_DEVICE void activate(Tile& a, int layer, int tile) {
        const Activation kind = mlp_.activations[layer];
        const float param = kind == Activation::kIdentity ? 1.0f : mlp_.activation_params[layer];
        ValueSlope v[4];
        // unrolled over the chain tiles for the popular kinds
        if (is_broken_line(kind)) {
#pragma unroll
            for (int n = 0; n < kChainTiles; ++n) {
                for (int i = 0; i < 4; ++i) v[i] = broken_line_slope(a[n][i], param);
                store_activated(v, layer, tile, n);
            }
        } else if (kind == Activation::kGelu) {
#pragma unroll
            for (int n = 0; n < kChainTiles; ++n) {
                for (int i = 0; i < 4; ++i) v[i] = gelu_slope<kPrecision == kBf16>(a[n][i]);
                store_activated(v, layer, tile, n);
            }
        } else {
#pragma unroll 1
            for (int n = 0; n < kChainTiles; ++n) {
                for (int i = 0; i < 4; ++i) v[i] = other_slope(kind, a[0][i], param);
                store_activated(v, layer, tile, n);
#pragma unroll
                for (int j = 0; j + 1 < kChainTiles; ++j)
                    for (int i = 0; i < 4; ++i) a[j][i] = a[j + 1][i];
            }
        }
    }

    JLEBM_DEVICE void store_activated(const ValueSlope (&v)[4], int layer, int tile, int n) {
        float d[4] = {v[0].d, v[1].d, v[2].d, v[3].d};
        if (layer == mlp_.n_hidden - 1 && !call_.general_head) {
            // f = out_scale (w . h_L + b): delta_L = out_scale w phi' needs no product
            const auto* top = shared_memory<float>(plan_.top_at) + tile * kTileRows + lane_index() / 4;
            d[0] *= top[0], d[1] *= top[0], d[2] *= top[8], d[3] *= top[8];
            if (!plan_.logits) return store_rows(layer + 1, tile, n, d[0], d[1], d[2], d[3]);
        }
        store_rows(layer + 1, tile, n, v[0].h, v[1].h, v[2].h, v[3].h);
        *slopes_at(layer, tile, n) = O::pack(d);
    }

    // an accumulator fragment into the operand buffer of h_l or delta_l
    JLEBM_DEVICE void store_rows(int l, int tile, int n, float v0, float v1, float v2, float v3) {
        const int lane = lane_index(), row = tile * kTileRows + lane / 4;
        unsigned char* at = buffer(l) + n * plane(l);
        using Pair = typename O::Pair;
        store_everywhere(reinterpret_cast<Pair*>(at + O::row_at(row)) + lane % 4, O::pair(v0, v1));
        store_everywhere(reinterpret_cast<Pair*>(at + O::row_at(row + 8)) + lane % 4, O::pair(v2, v3));
    }

    JLEBM_DEVICE typename O::Slopes* slopes_at(int layer, int tile, int n) const {
        unsigned char* const slopes =
            kRegime == Regime::kLean ? call_.slopes + int64_t(blockIdx.x) * plan_.slopes_bytes : memory_;
        if (kInCluster) tile -= block_tile(tiles(mlp_.widths[layer + 1]), 0);
        return reinterpret_cast<typename O::Slopes*>(slopes + plan_.slopes_at[layer]) +
               (tile * kChainTiles + n) * kWarp + lane_index();
    }

    JLEBM_DEVICE void store_logits(const Tile& a, int tile) {
        auto* logits = reinterpret_cast<float*>(memory_ + plan_.logits_at);
#pragma unroll
        for (int n = 0; n < kChainTiles; ++n)
            for (int i = 0; i < 4; ++i) {
                const int row = tile * kTileRows + lane_index() / 4 + i / 2 * 8;
                const int chain = n * kTileChains + lane_index() % 4 * 2 + i % 2;
                if (row < mlp_.n_logits()) store_everywhere(logits + row * kChains + chain, a[n][i]);
            }
    }

    // one chain's f; d f / d logits becomes the operand above layer L
    JLEBM_DEVICE float head(int chain) {
        const auto* logits = reinterpret_cast<const float*>(memory_ + plan_.logits_at) + chain;
        const int64_t row = first_ + chain;
        const int64_t chosen = mlp_.head == Head::kLogit && row < call_.chains ? mlp_.logit[row] : 0;
        const int above = mlp_.n_hidden + 1;
        const bool general = call_.general_head;
        const float f = apply_head(mlp_, logits, kChains, chosen, [&](int j, float slope) {
            if (general) store_operand(above, j, chain, slope);
        });
        if (general)
            for (int j = mlp_.n_logits(); j < round_up(mlp_.n_logits(), kTileRows); ++j)
                store_operand(above, j, chain, 0.0f);
        return f;
    }

    // delta_L of a plain single logit goes where h_L, needed for f, stood until now
    JLEBM_DEVICE void top_delta() {
        const int layer = mlp_.n_hidden - 1, n_tiles = tiles(mlp_.widths[layer + 1]);
        const int end = own_tile(n_tiles, 1);
        for (int tile = own_tile(n_tiles, 0); tile < end; ++tile) {
            for (int n = 0; n < kChainTiles; ++n) {
                float d[4];
                O::unpack(*slopes_at(layer, tile, n), d);
                store_rows(layer + 1, tile, n, d[0], d[1], d[2], d[3]);
            }
        }
    }

    // delta_layer from delta_{layer+1}; layer 0: the gradient
    JLEBM_DEVICE void backward(int layer) {
        const int n_tiles = tiles(mlp_.widths[layer]);
        const int end = own_tile(n_tiles, 1);
#pragma unroll 1
        for (int tile = own_tile(n_tiles, 0); tile < end; tile += kRowTiles) {
            const int count = end - tile < kRowTiles ? end - tile : kRowTiles;
            float acc[kRowTiles][kChainTiles][4] = {};
            product<false>(acc, layer, tile, count);
            if (layer > 0) {
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m) {
                    if (m >= count) break;
#pragma unroll
                    for (int n = 0; n < kChainTiles; ++n) {
                        float d[4];
                        O::unpack(*slopes_at(layer - 1, tile + m, n), d);
                        const auto& a = acc[m][n];
                        store_rows(layer, tile + m, n, a[0] * d[0], a[1] * d[1], a[2] * d[2], a[3] * d[3]);
                    }
                }
            } else {
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m) {
                    if (m >= count) break;
#pragma unroll
                    for (int n = 0; n < kChainTiles; ++n)
                        for (int i = 0; i < 2; ++i) {
                            const int row = (tile + m) * kTileRows + lane_index() / 4 + 8 * i;
                            float* at =
                                grad_at(row / 4, n * kTileChains + lane_index() % 4 * 2) + row % 4 * kTileChains;
                            if (row < mlp_.dim())
                                *reinterpret_cast<float2*>(at) = make_float2(acc[m][n][2 * i], acc[m][n][2 * i + 1]);
                        }
                }
            }
        }
    }

    // operand l, as the products see it, to memory [chains, widths[l]]
    JLEBM_DEVICE void copy_operand(float* to, int l) const {
        const int width = mlp_.widths[l];
        for (int c = warp_; c < kChains && first_ + c < call_.chains; c += plan_.warps)
            for (int feature = lane_index(); feature < width; feature += kWarp)
                to[(first_ + c) * width + feature] =
                    O::value(*reinterpret_cast<const typename O::Element*>(operand_at(l, feature, c)));
        sync_warp(); // lanes have had unequal shares, and warp-wide instructions may follow
    }
};

} // namespace cuda
} // namespace jlebm
