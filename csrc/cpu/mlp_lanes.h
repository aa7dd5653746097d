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
    int widest;

    bool needs_logits() const { return params->head != Head::kIdentity; }
};

inline int64_t packed_floats(const MlpParams& mlp) {
    int64_t n = 0;
    for (int l = 0; l <= mlp.n_hidden; ++l)
        n += 2 * (int64_t(mlp.widths[l]) * mlp.widths[l + 1] + kTilePad + kArenaAlign);
    return n;
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

// grad f into ws.grad; f into energy[V] if asked for
template <int V>
inline void energy_and_grad(const PackedMlp& packed, MlpWorkspace<V>& ws, const I* chosen, bool want_energy,
                            F* energy) {
    const MlpParams& mlp = *packed.params;
    const int last = mlp.n_hidden - 1;
    const bool want_logits = want_energy || packed.needs_logits();
    const float* in = ws.z;
    for (int l = 0; l <= last; ++l) {
        const float* context = l == 0 ? ws.context : nullptr;
        if (packed.fused[l]) {
            float* h = ws.slope[l];
            run_layer<V>(packed.forward[l], in, context, h, LeakyForward{packed.slope[l]});
            in = h;
        } else {
            float* pre = ws.pre[l & 1];
            run_layer<V>(packed.forward[l], in, context, pre, StoreSum{});
            float* h = l < last || want_logits ? pre : nullptr;
            activate_rows_of(mlp.activations[l])(pre, mlp.activation_params[l], h, ws.slope[l],
                                                 int64_t(mlp.widths[l + 1]) * V);
            in = pre;
        }
    }
    if (want_logits) {
        run_layer<V>(packed.forward[last + 1], in, nullptr, ws.logits, StoreSum{});
        apply_head<V>(mlp, ws.logits, chosen, energy);
    } else {
        for (int v = 0; v < V; ++v) store(ws.logits + v * kLanes, splat(mlp.out_scale));
    }
    const float* delta = ws.logits;
    for (int l = last; l >= 0; --l) {
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
