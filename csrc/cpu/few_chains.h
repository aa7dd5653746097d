// Forward and input-gradient pass for the few chains that fill no vector: a lane is one of four features of a chain.
//
// 100 chains are six vectors of 16 and four more. As lanes of a seventh they would leave twelve idle; here the vector
//     [quad of features][S * kLanes], lane 4 c + i of vector s: feature 4 quad + i of chain s * kLanes / 4 + c
// holds a quarter as many chains, and a layer is four weights, repeated for every chain, times one input, repeated for
// the four outputs. Every sum is taken in the order of cpu/layer_tiles.h and cpu/mlp_lanes.h, so that a chain's
// result is the same in every bit.
#pragma once

#include "cpu/mlp_lanes.h"

namespace jlebm {
namespace JLEBM_TARGET {

constexpr int kMostFewVectors = kLanes > 4 ? 2 : 0; // S; vectors of four lanes have nothing to gain
constexpr int kFewChainsOfVector = kLanes / 4;
constexpr int kFewestFewSteps = 8; // the weights are packed once more
constexpr int kFewestFewUnits = 4;

// Of a step, where one of kLanes chains costs kCostOfUnit; measured on AVX-512: 0.44 to 0.54 for S = 1, 0.58 to 0.61
// for S = 2, not 0.25 and 0.5, because all weights come from the second-level cache for so little work.
constexpr int cost_of_few(int vectors) { return 3 + vectors; }

// vectors that hold `chains` with four lanes each; 0 if that does not pay or is not possible
inline int few_vectors(const MlpParams& mlp, int64_t chains, int64_t n_steps) {
    const int64_t vectors = (chains + kFewChainsOfVector - 1) / kFewChainsOfVector;
    if (vectors > kMostFewVectors || n_steps < kFewestFewSteps || mlp.head != Head::kIdentity) return 0;
    for (int l = 0; l <= mlp.n_hidden; ++l)
        if (mlp.widths[l] < kFewestFewUnits) return 0;
    return int(vectors);
}

inline int quads(int n) { return (n + 3) / 4; }

struct FewLayer {
    int n_in, n_out;
    const float* weights; // [n_in][4 * quads(n_out)]
    const float* bias;    // [4 * quads(n_out)] or null
};

inline int64_t few_layer_floats(int n_in, int n_out) { return int64_t(n_in) * 4 * quads(n_out) + kTilePad; }

inline FewLayer pack_few_layer(const PackedLayer& layer, float* to, float* bias) {
    const int stride = 4 * quads(layer.n_out);
    const Tiles tiles = tiles_of(layer.n_out);
    for (int k = 0; k < layer.n_in; ++k) {
        const float* from = layer.weights;
        float* p = to + int64_t(k) * stride;
        for (int t = 0; t < tiles.count; ++t) {
            const int width = tiles.base + (t < tiles.longer);
            // whatever stands beyond the last output reaches only lanes that nobody reads
            std::memcpy(p, from + int64_t(k) * width, kTilePad * sizeof(float));
            p += width, from += int64_t(layer.n_in) * width;
        }
    }
    if (!layer.bias || !bias) return {layer.n_in, layer.n_out, to, nullptr};
    std::memset(bias, 0, size_t(stride) * sizeof(float));
    std::memcpy(bias, layer.bias, size_t(layer.n_out) * sizeof(float));
    return {layer.n_in, layer.n_out, to, bias};
}

// All layers but the last, whose single output is no matter of matrix products.
struct FewMlp {
    FewLayer forward[kMaxHiddenLayers], backward[kMaxHiddenLayers];

    static int64_t floats(const MlpParams& mlp) {
        int64_t n = 0;
        for (int l = 0; l < mlp.n_hidden; ++l) {
            const int n_in = mlp.widths[l], n_out = mlp.widths[l + 1];
            n += few_layer_floats(n_in, n_out) + few_layer_floats(n_out, n_in) + n_out + 4 + 3 * kArenaAlign;
        }
        return n;
    }

    void pack(const PackedMlp& packed, Arena arena) {
        const MlpParams& mlp = *packed.params;
        for (int l = 0; l < mlp.n_hidden; ++l) {
            const int n_in = mlp.widths[l], n_out = mlp.widths[l + 1];
            float* const to = arena.take(few_layer_floats(n_in, n_out));
            forward[l] = pack_few_layer(packed.forward[l], to, arena.take(4 * quads(n_out)));
            backward[l] = pack_few_layer(packed.backward[l], arena.take(few_layer_floats(n_out, n_in)), nullptr);
        }
    }
};

// --- one layer -------------------------------------------------------------------------------------------------------

// Quads of outputs in registers: S vectors each, S inputs and one weight must fit the register file.
template <int S>
constexpr int kFewTile = kRegisters == 32 ? (S == 1 ? 14 : 12) : (S == 1 ? 10 : 5);

template <int K, int T, int S, size_t... A>
JLEBM_INLINE void add_input(const float* w, const F* x, F* acc, std::index_sequence<A...>) {
    F repeated[S];
    for (int s = 0; s < S; ++s) repeated[s] = repeat_in_four<K>(x[s]);
    ((acc[A] = fma(load_four(w + 4 * (A / S)), repeated[A % S], acc[A])), ...);
}

template <int T, int S, size_t... A>
__attribute__((noinline)) void few_tile(const float* w, int64_t stride, const float* in, int n_in, const float* bias,
                                        const float* context, float* out, std::index_sequence<A...> outputs) {
    F acc[T * S] = {(bias ? load_four(bias + 4 * (A / S)) : F{})...};
    if (context) ((acc[A] = acc[A] + load(context + A * kLanes)), ...);
    const auto inputs = [&](F* x) {
        for (int s = 0; s < S; ++s) x[s] = load(in + s * kLanes);
        in += S * kLanes;
    };
    int k = 0;
    for (; k + 4 <= n_in; k += 4, w += 4 * stride) {
        F x[S];
        inputs(x);
        add_input<0, T, S>(w, x, acc, outputs);
        add_input<1, T, S>(w + stride, x, acc, outputs);
        add_input<2, T, S>(w + 2 * stride, x, acc, outputs);
        add_input<3, T, S>(w + 3 * stride, x, acc, outputs);
    }
    if (k < n_in) {
        F x[S];
        inputs(x);
        add_input<0, T, S>(w, x, acc, outputs);
        if (k + 1 < n_in) add_input<1, T, S>(w + stride, x, acc, outputs);
        if (k + 2 < n_in) add_input<2, T, S>(w + 2 * stride, x, acc, outputs);
    }
    (store(out + A * kLanes, acc[A]), ...);
}

template <int S>
inline void run_few_layer(const FewLayer& layer, const float* in, const float* context, float* out) {
    const int n = quads(layer.n_out), count = (n + kFewTile<S> - 1) / kFewTile<S>;
    const float *w = layer.weights, *bias = layer.bias;
    for (int t = 0; t < count; ++t) {
        const int width = n / count + (t < n % count);
        switch (width) {
#define JLEBM_FEW_TILE(T)                                                                                              \
    case T:                                                                                                            \
        if constexpr (T <= kFewTile<S>)                                                                                \
            few_tile<T, S>(w, 4 * n, in, layer.n_in, bias, context, out, std::make_index_sequence<size_t(T) * S>{});   \
        break;
            JLEBM_FEW_TILE(1)
            JLEBM_FEW_TILE(2)
            JLEBM_FEW_TILE(3)
            JLEBM_FEW_TILE(4)
            JLEBM_FEW_TILE(5)
            JLEBM_FEW_TILE(6)
            JLEBM_FEW_TILE(7)
            JLEBM_FEW_TILE(8)
            JLEBM_FEW_TILE(9)
            JLEBM_FEW_TILE(10)
            JLEBM_FEW_TILE(11)
            JLEBM_FEW_TILE(12)
            JLEBM_FEW_TILE(13)
            JLEBM_FEW_TILE(14)
#undef JLEBM_FEW_TILE
        }
        static_assert(kFewTile<S> <= 14, "a case per tile width");
        w += 4 * width;
        out += width * S * kLanes;
        if (bias) bias += 4 * width;
        if (context) context += width * S * kLanes;
    }
}

// --- between lanes of chains and lanes of features -------------------------------------------------------------------

// [n][kLanes], a lane a chain -> [quads(n)][S * kLanes]
template <int S>
inline void few_from_lanes(float* to, const float* lanes, int n) {
    I chain, feature;
    for (int i = 0; i < kLanes; ++i) chain[i] = i / 4, feature[i] = i % 4;
    for (int q = 0; q < quads(n); ++q, to += S * kLanes) {
        const float* const rows = lanes + int64_t(q) * 4 * kLanes;
        for (int s = 0; s < S; ++s) {
            const I from = chain + s * kFewChainsOfVector;
            F all = permute(load(rows), from);
            for (int i = 1; i < 4 && 4 * q + i < n; ++i)
                all = select(feature == i, permute(load(rows + i * kLanes), from), all);
            store(to + s * kLanes, all);
        }
    }
}

// One feature's lanes of chains; what stands in the lanes beyond the chains is of no account.
template <int S>
struct OfFeature {
    I from, is_first;

    explicit OfFeature(int feature) {
        for (int i = 0; i < kLanes; ++i) {
            from[i] = (4 * i + feature % 4) % kLanes;
            is_first[i] = i < kFewChainsOfVector ? -1 : 0;
        }
    }

    JLEBM_INLINE F operator()(const F* quad) const {
        const F first = permute(quad[0], from);
        return S == 1 ? first : select(is_first, first, permute(quad[S - 1], from));
    }
    JLEBM_INLINE F operator()(const float* quad) const {
        const F vectors[2] = {load(quad), load(quad + (S - 1) * kLanes)};
        return (*this)(vectors);
    }
};

template <int S>
inline void lanes_from_few(float* to, const float* few, int n) {
    const OfFeature<S> of[4] = {OfFeature<S>(0), OfFeature<S>(1), OfFeature<S>(2), OfFeature<S>(3)};
    for (int j = 0; j < n; ++j) store(to + int64_t(j) * kLanes, of[j % 4](few + int64_t(j / 4) * S * kLanes));
}

// --- the pass --------------------------------------------------------------------------------------------------------

// z, grad and context stay in lanes of chains, for the update; what lies between them is in lanes of features, and
// has room in the arrays of one vector of chains.
template <int S>
struct FewWorkspace : MlpWorkspace<1> {
    float *few_z, *few_grad, *few_context;

    static int64_t floats(const MlpParams& mlp) {
        return MlpWorkspace<1>::floats(mlp) + S * kLanes * int64_t(2 * quads(mlp.dim()) + quads(mlp.widths[1])) +
               3 * kArenaAlign;
    }

    void take(const PackedMlp& packed, Arena& arena) {
        const MlpParams& mlp = *packed.params;
        MlpWorkspace<1>::take(packed, arena);
        few_z = arena.take(S * kLanes * quads(mlp.dim()));
        few_grad = arena.take(S * kLanes * quads(mlp.dim()));
        few_context = mlp.context_bias ? arena.take(S * kLanes * quads(mlp.widths[1])) : nullptr;
    }

    void load_chains(const MlpParams& mlp, const float* z_rows, int64_t first, int count, I* chosen) {
        MlpWorkspace<1>::load_chains(mlp, z_rows, first, count, chosen);
        if (few_context) few_from_lanes<S>(few_context, context, mlp.widths[1]);
    }
};

// f into energy, from the last hidden layer, as last_layer_of_identity_head in cpu/mlp_lanes.h sums it: factor * value,
// feature by feature within each tile of outputs. A chain's running sum goes round its four lanes, to where the next
// feature is. terms(quad, s, factor, value) gives those of one vector.
template <int S, class Terms>
inline void few_energy(const PackedMlp& packed, F* energy, const Terms terms) {
    const MlpParams& mlp = *packed.params;
    const int last = mlp.n_hidden - 1, n = mlp.widths[last + 1];
    const float* bias = packed.forward[last + 1].bias;
    *energy = splat(bias ? mlp.out_scale * *bias : 0.0f);
    const OfFeature<S> of[4] = {OfFeature<S>(0), OfFeature<S>(1), OfFeature<S>(2), OfFeature<S>(3)};
    const Tiles tiles = tiles_of(n);
    int tile = 0, tile_end = tiles.base + (tile < tiles.longer);
    F sum[S] = {};
    for (int q = 0; q < quads(n); ++q) {
        F factor[S], value[S];
        for (int s = 0; s < S; ++s) terms(q, s, factor[s], value[s]);
        for (int i = 0; i < 4 && 4 * q + i < n; ++i) {
            for (int s = 0; s < S; ++s) sum[s] = fma(factor[s], value[s], next_in_four(sum[s]));
            if (4 * q + i + 1 < tile_end) continue;
            *energy = *energy + of[i](sum);
            for (F& x : sum) x = F{};
            tile_end += tiles.base + (++tile < tiles.longer);
        }
    }
}

template <int S>
inline void few_last_layer(const PackedMlp& packed, const FewMlp& few, FewWorkspace<S>& ws, const float* in,
                           F* energy) {
    const MlpParams& mlp = *packed.params;
    const int last = mlp.n_hidden - 1, n = quads(mlp.widths[last + 1]);
    float* const slope = ws.slope[last];
    const float *const positive = packed.last_delta, *const negative = packed.last_delta_negative;
    run_few_layer<S>(few.forward[last], in, last == 0 ? ws.few_context : nullptr, slope);
    if (packed.fused[last]) {
        const auto delta = [=](int q, F a) {
            return a > 0.0f ? load_four(positive + 4 * q) : load_four(negative + 4 * q);
        };
        if (energy)
            few_energy<S>(packed, energy, [=](int q, int s, F& factor, F& a) {
                a = load(slope + (q * S + s) * kLanes);
                factor = delta(q, a);
            });
        for (int q = 0; q < n; ++q)
            for (int s = 0; s < S; ++s) {
                float* const at = slope + (q * S + s) * kLanes;
                store(at, delta(q, load(at)));
            }
        return;
    }
    float* const h = energy ? ws.pre[last & 1] : nullptr;
    activate_rows_of(mlp.activations[last])(slope, mlp.activation_params[last], h, slope, int64_t(n) * S);
    if (energy)
        few_energy<S>(packed, energy, [=](int q, int s, F& factor, F& value) {
            factor = load_four(positive + 4 * q);
            value = load(h + (q * S + s) * kLanes);
        });
    for (int q = 0; q < n; ++q) {
        const F weight = load_four(positive + 4 * q);
        for (int s = 0; s < S; ++s) {
            float* const at = slope + (q * S + s) * kLanes;
            store(at, load(at) * weight);
        }
    }
}

// grad f into ws.grad; f into *energy unless it is null; identity head
template <int S>
inline void few_energy_and_grad(const PackedMlp& packed, const FewMlp& few, FewWorkspace<S>& ws, F* energy) {
    const MlpParams& mlp = *packed.params;
    const int last = mlp.n_hidden - 1;
    few_from_lanes<S>(ws.few_z, ws.z, mlp.dim());
    const float* h = ws.few_z;
    for (int l = 0; l < last; ++l) {
        const int64_t n_vectors = int64_t(quads(mlp.widths[l + 1])) * S;
        float* const slope = ws.slope[l];
        const float* const context = l == 0 ? ws.few_context : nullptr;
        if (packed.fused[l]) {
            run_few_layer<S>(few.forward[l], h, context, slope);
            const LeakyForward store_h{packed.slope[l]};
            for (int64_t i = 0; i < n_vectors; ++i) store_h(slope + i * kLanes, load(slope + i * kLanes));
            h = slope;
        } else {
            float* const to = ws.pre[l & 1];
            run_few_layer<S>(few.forward[l], h, context, to);
            activate_rows_of(mlp.activations[l])(to, mlp.activation_params[l], to, slope, n_vectors);
            h = to;
        }
    }
    few_last_layer<S>(packed, few, ws, h, energy);
    float* const sums = ws.pre[0];
    for (int l = last - 1; l >= 0; --l) {
        const int64_t n_vectors = int64_t(quads(mlp.widths[l + 1])) * S;
        run_few_layer<S>(few.backward[l + 1], ws.slope[l + 1], nullptr, sums);
        float* const to = ws.slope[l];
        const LeakyBackward leaky{packed.slope[l]};
        for (int64_t i = 0; i < n_vectors; ++i) {
            const F sum = load(sums + i * kLanes);
            if (packed.fused[l])
                leaky(to + i * kLanes, sum);
            else
                SlopeBackward{}(to + i * kLanes, sum);
        }
    }
    run_few_layer<S>(few.backward[0], ws.slope[0], nullptr, ws.few_grad);
    lanes_from_few<S>(ws.grad, ws.few_grad, mlp.dim());
}

} // namespace JLEBM_TARGET
} // namespace jlebm
