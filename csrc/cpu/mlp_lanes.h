// Forward and input-gradient pass of an MLP for one block of chains (layout: cpu/layer_tiles.h).
//
//     a_l = W_l h_{l-1} + b_l, h_l = phi(a_l);   delta_L = (W_out^T head') * phi'(a_L),
//     delta_l = (W_{l+1}^T delta_{l+1}) * phi'(a_l),   grad f = W_1^T delta_1
#pragma once

#include <algorithm>

#include "cpu/activation_lanes.h"
#include "cpu/arena.h"
#include "cpu/chain_rows.h"
#include "cpu/head_lanes.h"
#include "cpu/layer_tiles.h"

namespace jlebm {
namespace JLEBM_TARGET {

// leaky_relu, relu and identity: h and the derivative's sign live in one array, phi is applied in the tile's epilogue
struct PackedMlp {
    const MlpParams* params;
    PackedLayer forward[kMaxHiddenLayers + 1];
    PackedLayer backward[kMaxHiddenLayers + 1]; // backward[l] maps delta_{l+1} to layer l's output
    bool fused[kMaxHiddenLayers];
    float slope[kMaxHiddenLayers];
    // out_scale W_out of the one logit: delta_L / phi'(a_L) of the identity head; and times the last layer's slope
    const float* last_delta;
    const float* last_delta_negative;
    int widest;

    bool needs_logits() const { return params->head != Head::kIdentity; }
};

inline int64_t packed_floats(const MlpParams& mlp) {
    int64_t n = 0;
    for (int l = 0; l <= mlp.n_hidden; ++l)
        n += 2 * (int64_t(mlp.widths[l]) * mlp.widths[l + 1] + kTilePad + kArenaAlign);
    return n + 2 * (mlp.widths[mlp.n_hidden] + kArenaAlign);
}

inline PackedMlp pack_mlp(const MlpParams& mlp, Arena& arena) {
    PackedMlp packed{};
    packed.params = &mlp;
    for (int l = 0; l <= mlp.n_hidden; ++l) {
        const int n_in = mlp.widths[l], n_out = mlp.widths[l + 1];
        const int64_t size = int64_t(n_in) * n_out + kTilePad;
        packed.forward[l] = pack_layer(arena.take(size), mlp.weights[l], n_out, n_in, n_in, 1, mlp.biases[l]);
        packed.backward[l] = pack_layer(arena.take(size), mlp.weights[l], n_in, n_out, 1, n_in, nullptr);
        if (l < mlp.n_hidden) {
            const Activation a = mlp.activations[l];
            const float slope = a == Activation::kIdentity ? 1.0f
                                : a == Activation::kRelu   ? 0.0f
                                                           : mlp.activation_params[l];
            packed.fused[l] =
                a == Activation::kIdentity || a == Activation::kRelu || (a == Activation::kLeakyRelu && slope >= 0.0f);
            packed.slope[l] = slope;
            packed.widest = std::max(packed.widest, n_out);
        }
    }
    const int last = mlp.n_hidden - 1, width = mlp.widths[last + 1];
    float* const delta = arena.take(width);
    float* const negative = arena.take(width);
    for (int j = 0; j < width; ++j) {
        delta[j] = mlp.out_scale * mlp.weights[last + 1][j];
        negative[j] = delta[j] * packed.slope[last];
    }
    packed.last_delta = delta, packed.last_delta_negative = negative;
    return packed;
}

// Arrays of one block, all [feature][V * kLanes].
template <int V>
struct MlpWorkspace {
    static constexpr int kRow = V * kLanes;
    float* z;
    float* grad;
    float* pre[2];                  // pre-activation, then h, of the layers that are not fused
    float* slope[kMaxHiddenLayers]; // fused: h_l; otherwise phi'(a_l); overwritten by delta_l
    float* logits;                  // logits, then d f / d logits
    float* context;                 // first layer's extra bias, or null

    static int64_t floats(const MlpParams& mlp) {
        int64_t widest = 0, hidden = 0;
        for (int l = 0; l < mlp.n_hidden; ++l) {
            widest = std::max<int64_t>(widest, mlp.widths[l + 1]);
            hidden += mlp.widths[l + 1];
        }
        return kRow * (2 * int64_t(mlp.dim()) + 2 * widest + hidden + mlp.n_logits() + mlp.widths[1]) +
               8 * kArenaAlign + kMaxHiddenLayers * kArenaAlign;
    }

    void take(const PackedMlp& packed, Arena& arena) {
        const MlpParams& mlp = *packed.params;
        z = arena.take(kRow * int64_t(mlp.dim()));
        grad = arena.take(kRow * int64_t(mlp.dim()));
        for (float*& p : pre) p = arena.take(kRow * int64_t(packed.widest));
        for (int l = 0; l < mlp.n_hidden; ++l) slope[l] = arena.take(kRow * int64_t(mlp.widths[l + 1]));
        logits = arena.take(kRow * int64_t(mlp.n_logits()));
        context = mlp.context_bias ? arena.take(kRow * int64_t(mlp.widths[1])) : nullptr;
    }
};

// Sums w_j h_j over the rows of one tile of the last hidden layer, h [n_vectors / V][V * kLanes].
template <int V>
JLEBM_INLINE void add_to_logit(const float* w, const float* h, int64_t n_vectors, F* logit) {
    F sum[V] = {};
    for (int64_t i = 0; i < n_vectors; i += V) {
        const F weight = splat(*w++);
        for (int v = 0; v < V; ++v) sum[v] = fma(weight, load(h + (i + v) * kLanes), sum[v]);
    }
    for (int v = 0; v < V; ++v) logit[v] = logit[v] + sum[v];
}

// row j of a tile times factor[j]
template <int V>
JLEBM_INLINE void scale_rows(const float* factor, float* rows, int64_t n_vectors) {
    for (int64_t i = 0; i < n_vectors; i += V) {
        const F f = splat(*factor++);
        for (int v = 0; v < V; ++v) store(rows + (i + v) * kLanes, load(rows + (i + v) * kLanes) * f);
    }
}

// grad f into ws.grad; f into energy[V] if asked for
template <int V>
inline void energy_and_grad(const PackedMlp& packed, MlpWorkspace<V>& ws, const I* chosen, bool want_energy,
                            F* energy) {
    constexpr int kRow = V * kLanes;
    const MlpParams& mlp = *packed.params;
    const int last = mlp.n_hidden - 1;
    const bool want_logits = want_energy || packed.needs_logits();
    // one logit is summed tile by tile beside the last hidden layer: a layer of its own would wait on its only sum
    const PackedLayer& out = packed.forward[last + 1];
    const bool one_logit = want_logits && out.n_out == 1;
    F logit[V];
    for (int v = 0; v < V; ++v) logit[v] = out.bias ? splat(out.bias[0]) : F{};
    const float* in = ws.z;
    for (int l = 0; l <= last; ++l) {
        const float* context = l == 0 ? ws.context : nullptr;
        const bool sum_logit = one_logit && l == last;
        // without logits nobody needs the last h, and delta_L is at hand with a_L
        const bool only_delta = !want_logits && l == last;
        float* const slope = ws.slope[l];
        const PackedLayer& layer = packed.forward[l];
        if (packed.fused[l]) {
            const LeakyForward forward{packed.slope[l]};
            if (only_delta)
                run_layer<V>(layer, in, context, slope,
                             LeakyDelta<V>{packed.last_delta, packed.last_delta_negative, slope});
            else if (sum_logit)
                run_layer<V>(layer, in, context, slope, forward, [&](int64_t at, int64_t n_vectors) {
                    add_to_logit<V>(out.weights + at / kRow, slope + at, n_vectors, logit);
                });
            else
                run_layer<V>(layer, in, context, slope, forward);
            in = slope;
        } else {
            float* const pre = only_delta ? slope : ws.pre[l & 1];
            const ActivateRows activate = activate_rows_of(mlp.activations[l]);
            const float param = mlp.activation_params[l];
            run_layer<V>(layer, in, context, pre, StoreSum{}, [&](int64_t at, int64_t n_vectors) {
                activate(pre + at, param, only_delta ? nullptr : pre + at, slope + at, n_vectors);
                if (only_delta) scale_rows<V>(packed.last_delta + at / kRow, slope + at, n_vectors);
                if (sum_logit) add_to_logit<V>(out.weights + at / kRow, pre + at, n_vectors, logit);
            });
            in = pre;
        }
    }
    if (want_logits) {
        if (one_logit) {
            for (int v = 0; v < V; ++v) store(ws.logits + v * kLanes, logit[v]);
        } else {
            run_layer<V>(out, in, nullptr, ws.logits, StoreSum{});
        }
        apply_head<V>(mlp, ws.logits, chosen, energy);
    }
    const float* delta = want_logits ? ws.logits : ws.slope[last];
    for (int l = want_logits ? last : last - 1; l >= 0; --l) {
        float* to = ws.slope[l];
        if (packed.fused[l])
            run_layer<V>(packed.backward[l + 1], delta, nullptr, to, LeakyBackward{packed.slope[l]});
        else
            run_layer<V>(packed.backward[l + 1], delta, nullptr, to, SlopeBackward{});
        delta = to;
    }
    run_layer<V>(packed.backward[0], delta, nullptr, ws.grad, StoreSum{});
}

} // namespace JLEBM_TARGET
} // namespace jlebm
