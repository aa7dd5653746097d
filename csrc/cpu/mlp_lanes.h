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
};

inline int64_t packed_floats(const MlpParams& mlp) {
    int64_t n = 0;
    for (int l = 0; l <= mlp.n_hidden; ++l)
        n +=
            2 * (int64_t(mlp.widths[l]) * mlp.widths[l + 1] + kTilePad + kArenaAlign) + mlp.widths[l + 1] + kArenaAlign;
    return n + 2 * (mlp.widths[mlp.n_hidden] + kArenaAlign);
}

// a copy, so that a chain is of one moment's parameters whatever another thread does to them meanwhile
inline const float* copy_of_bias(const float* bias, int n, Arena& arena) {
    if (!bias) return nullptr;
    float* const to = arena.take(n);
    std::memcpy(to, bias, size_t(n) * sizeof(float));
    return to;
}

inline PackedMlp pack_mlp(const MlpParams& mlp, Arena& arena) {
    PackedMlp packed{};
    packed.params = &mlp;
    for (int l = 0; l <= mlp.n_hidden; ++l) {
        const int n_in = mlp.widths[l], n_out = mlp.widths[l + 1];
        const int64_t size = int64_t(n_in) * n_out + kTilePad;
        const float* const bias = copy_of_bias(mlp.biases[l], n_out, arena);
        packed.forward[l] = pack_layer(arena.take(size), mlp.weights[l], n_out, n_in, n_in, 1, bias);
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

    // the caller's rows of chains [first, first + count)
    void load_chains(const MlpParams& mlp, const float* z_rows, int64_t first, int count, I* chosen) {
        lanes_from_rows<V>(z, z_rows, mlp.dim(), first, count);
        if (context) lanes_from_rows<V>(context, mlp.context_bias, mlp.widths[1], first, count);
        chosen_logits<V>(chosen, mlp, first, count);
    }
};

// Rows of one tile of the last hidden layer below an identity head, [n_vectors / V][V * kLanes]; w = out_scale W_out.
//
// slope -> delta = w slope; with h, energy += w h
template <int V>
JLEBM_INLINE void delta_and_energy(const float* w, const float* h, float* slope, int64_t n_vectors, F* energy) {
    F sum[V] = {};
    for (int64_t i = 0; i < n_vectors; i += V) {
        const F weight = splat(*w++);
        for (int v = 0; v < V; ++v) {
            float* const at = slope + (i + v) * kLanes;
            if (h) sum[v] = fma(weight, load(h + (i + v) * kLanes), sum[v]);
            store(at, load(at) * weight);
        }
    }
    if (h)
        for (int v = 0; v < V; ++v) energy[v] = energy[v] + sum[v];
}

// h_{l+1} from h_l = in, with what delta_{l+1} will need in ws.slope[l]; returns h_{l+1}
template <int V>
inline const float* hidden_layer(const PackedMlp& packed, MlpWorkspace<V>& ws, int l, const float* in) {
    const MlpParams& mlp = *packed.params;
    const float* context = l == 0 ? ws.context : nullptr;
    float* const slope = ws.slope[l];
    if (packed.fused[l]) {
        run_layer<V>(packed.forward[l], in, context, slope, LeakyForward{packed.slope[l]});
        return slope;
    }
    float* const h = ws.pre[l & 1];
    const ActivateRows activate = activate_rows_of(mlp.activations[l]);
    const float param = mlp.activation_params[l];
    run_layer<V>(packed.forward[l], in, context, h, StoreSum{},
                 [=](int64_t at, int64_t n_vectors) { activate(h + at, param, h + at, slope + at, n_vectors); });
    return h;
}

// The last hidden layer below an identity head, where delta_L = out_scale W_out phi'(a_L) is at hand with a_L: delta_L
// into ws.slope, f into `energy` unless it is null.
template <int V>
inline void last_layer_of_identity_head(const PackedMlp& packed, MlpWorkspace<V>& ws, const float* in, F* energy) {
    constexpr int kRow = V * kLanes;
    const MlpParams& mlp = *packed.params;
    const int last = mlp.n_hidden - 1;
    const PackedLayer& layer = packed.forward[last];
    const float* context = last == 0 ? ws.context : nullptr;
    float* const slope = ws.slope[last];
    const float *const positive = packed.last_delta, *const negative = packed.last_delta_negative;
    if (energy) {
        const float* bias = packed.forward[last + 1].bias;
        for (int v = 0; v < V; ++v) energy[v] = splat(bias ? mlp.out_scale * *bias : 0.0f);
    }
    if (packed.fused[last] && energy) {
        run_layer<V>(layer, in, context, slope, LeakyDelta<V, true>{positive, negative, slope, energy});
    } else if (packed.fused[last]) {
        run_layer<V>(layer, in, context, slope, LeakyDelta<V, false>{positive, negative, slope, nullptr});
    } else {
        // phi' replaces the pre-activation where it stands; only the energy needs h, and only one tile of it at a time
        float* const h = energy ? ws.pre[last & 1] : nullptr;
        const ActivateRows activate = activate_rows_of(mlp.activations[last]);
        const float param = mlp.activation_params[last];
        run_layer<V>(layer, in, context, slope, StoreSum{}, [=](int64_t at, int64_t n_vectors) {
            activate(slope + at, param, h, slope + at, n_vectors);
            delta_and_energy<V>(positive + at / kRow, h, slope + at, n_vectors, energy);
        });
    }
}

// delta_l into ws.slope[l], from delta_{l+1}
template <int V>
inline void delta_of_layer(const PackedMlp& packed, MlpWorkspace<V>& ws, int l, const float* delta_above) {
    if (packed.fused[l])
        run_layer<V>(packed.backward[l + 1], delta_above, nullptr, ws.slope[l], LeakyBackward{packed.slope[l]});
    else
        run_layer<V>(packed.backward[l + 1], delta_above, nullptr, ws.slope[l], SlopeBackward{});
}

// grad f into ws.grad; f into energy[V] if asked for
template <int V>
inline void energy_and_grad(const PackedMlp& packed, MlpWorkspace<V>& ws, const I* chosen, bool want_energy,
                            F* energy) {
    const MlpParams& mlp = *packed.params;
    const int last = mlp.n_hidden - 1;
    const float* h = ws.z;
    for (int l = 0; l < last; ++l) h = hidden_layer<V>(packed, ws, l, h);
    if (mlp.head == Head::kIdentity) {
        last_layer_of_identity_head<V>(packed, ws, h, want_energy ? energy : nullptr);
    } else {
        h = hidden_layer<V>(packed, ws, last, h);
        run_layer<V>(packed.forward[last + 1], h, nullptr, ws.logits, StoreSum{});
        apply_head<V>(mlp, ws.logits, chosen, energy);
        delta_of_layer<V>(packed, ws, last, ws.logits);
    }
    for (int l = last - 1; l >= 0; --l) delta_of_layer<V>(packed, ws, l, ws.slope[l + 1]);
    run_layer<V>(packed.backward[0], ws.slope[0], nullptr, ws.grad, StoreSum{});
}

} // namespace JLEBM_TARGET
} // namespace jlebm
