// Forward and input-gradient pass of an MLP for one block of chains.
//
// A block is V vectors of kLanes chains. Every array is [feature][V * kLanes]: one SIMD lane is one chain, so a layer is
//     out[j] = bias[j] + sum_k W[j, k] in[k]     one broadcast weight times V vectors, J outputs at a time in registers
// and weights are packed once per call as [tile][k][J], in both directions.
//
//     a_l = W_l h_{l-1} + b_l, h_l = phi(a_l);   delta_L = (W_out^T head') * phi'(a_L),
//     delta_l = (W_{l+1}^T delta_{l+1}) * phi'(a_l),   grad f = W_1^T delta_1
#pragma once

#include <algorithm>
#include <utility>

#include "cpu/activation_lanes.h"
#include "cpu/arena.h"

namespace jlebm {
namespace JLEBM_TARGET {

// Register tile: J outputs x V vectors of accumulators, V inputs and one weight must fit the register file.
// AVX-512 and NEON: 14 x 2 + 2 + 1 = 31 of 32; 16 registers: 6 x 2 + 2 + 1 = 15.
constexpr int kTile = kRegisters == 32 ? 14 : 6;
// The narrow block serves few chains. Below 8 accumulators the FMA latency shows, so only long tiles allow one vector.
constexpr int kNarrow = kRegisters == 32 ? 1 : 2;
constexpr int kWide = 2;

struct Tiles {
    int count, base, longer;  // the first `longer` tiles have base + 1 outputs, the others base
};

JLEBM_INLINE Tiles tiles_of(int n_out) {
    const int count = (n_out + kTile - 1) / kTile;
    return {count, n_out / count, n_out % count};
}

struct PackedLayer {
    int n_in, n_out;
    const float* weights;  // [tile][k][J]
    const float* bias;     // [n_out] or null
};

constexpr int kTilePad = 16;  // floats a packed layer may write beyond its end
static_assert(kTile <= kTilePad, "a copy of kTilePad floats must cover a row of a tile");

// out(j) = sum_k weight(j, k) in(k), weight(j, k) = w[j * stride_out + k * stride_in]
inline PackedLayer pack_layer(float* to, const float* w, int n_out, int n_in, int64_t stride_out, int64_t stride_in,
                              const float* bias) {
    const Tiles tiles = tiles_of(n_out);
    float* p = to;
    for (int t = 0, j0 = 0; t < tiles.count; ++t) {
        const int width = tiles.base + (t < tiles.longer);
        const float* from = w + j0 * stride_out;
        for (int k = 0; k < n_in; ++k, p += width) {
            // rows of consecutive outputs: 16 floats at once, the surplus is overwritten by the next row
            if (stride_out == 1 && k * stride_in + j0 + kTilePad <= int64_t(n_in) * n_out) {
                std::memcpy(p, from + k * stride_in, kTilePad * sizeof(float));
                continue;
            }
            for (int j = 0; j < width; ++j) p[j] = from[j * stride_out + k * stride_in];
        }
        j0 += width;
    }
    return {n_in, n_out, to, bias};
}

// out, context: the tile's first row; both, like `in`, [feature][V * kLanes]
template <int J, int V, class Epilogue, size_t... A>
JLEBM_INLINE void tile(const float* __restrict w, const float* __restrict in, int n_in, const float* bias,
                       const float* context, float* out, const Epilogue epilogue, std::index_sequence<A...>) {
    F acc[J * V] = {(bias ? splat(bias[A / V]) : F{})...};
    if (context) ((acc[A] = acc[A] + load(context + A * kLanes)), ...);
    for (int k = 0; k < n_in; ++k) {
        F x[V];
        for (int v = 0; v < V; ++v) x[v] = load(in + v * kLanes);
        ((acc[A] = fma(splat(w[A / V]), x[A % V], acc[A])), ...);
        w += J;
        in += V * kLanes;
    }
    (epilogue(out + A * kLanes, acc[A]), ...);
}

template <int J, int V, class Epilogue>
__attribute__((noinline)) void tile_of(const float* w, const float* in, int n_in, const float* bias,
                                       const float* context, float* out, const Epilogue epilogue) {
    tile<J, V>(w, in, n_in, bias, context, out, epilogue, std::make_index_sequence<size_t(J) * V>{});
}

// out = epilogue(W in + bias + context): epilogue(at, sum) stores one vector of outputs
template <int V, class Epilogue>
inline void run_layer(const PackedLayer& layer, const float* in, const float* context, float* out,
                      const Epilogue epilogue) {
    const Tiles tiles = tiles_of(layer.n_out);
    const float* w = layer.weights;
    const float* bias = layer.bias;
    for (int t = 0; t < tiles.count; ++t) {
        const int width = tiles.base + (t < tiles.longer);
        switch (width) {
#define JLEBM_TILE(J)                                                                                         \
    case J:                                                                                                   \
        if constexpr (J <= kTile) tile_of<J, V>(w, in, layer.n_in, bias, context, out, epilogue);             \
        break;
            JLEBM_TILE(1)
            JLEBM_TILE(2)
            JLEBM_TILE(3)
            JLEBM_TILE(4)
            JLEBM_TILE(5)
            JLEBM_TILE(6)
            JLEBM_TILE(7)
            JLEBM_TILE(8)
            JLEBM_TILE(9)
            JLEBM_TILE(10)
            JLEBM_TILE(11)
            JLEBM_TILE(12)
            JLEBM_TILE(13)
            JLEBM_TILE(14)
#undef JLEBM_TILE
        }
        static_assert(kTile <= 14, "a case per tile width");
        w += int64_t(width) * layer.n_in;
        out += int64_t(width) * V * kLanes;
        if (bias) bias += width;
        if (context) context += int64_t(width) * V * kLanes;
    }
}

// The ways to store a tile's sum.
struct StoreSum {
    JLEBM_INLINE void operator()(float* at, F sum) const { store(at, sum); }
};
struct LeakyForward {  // h = phi(a)
    float slope;
    JLEBM_INLINE void operator()(float* at, F a) const { store(at, a > 0.0f ? a : a * slope); }
};
struct LeakyBackward {  // `at` holds h, whose sign is that of a: delta = sum * phi'(a)
    float slope;
    JLEBM_INLINE void operator()(float* at, F sum) const { store(at, load(at) > 0.0f ? sum : sum * slope); }
};
struct SlopeBackward {  // `at` holds phi'(a)
    JLEBM_INLINE void operator()(float* at, F sum) const { store(at, load(at) * sum); }
};

// leaky_relu, relu and identity: h and the derivative's sign live in one array, phi is applied in the tile's epilogue
struct PackedMlp {
    const MlpParams* params;
    PackedLayer forward[kMaxHiddenLayers + 1];
    PackedLayer backward[kMaxHiddenLayers + 1];  // backward[l] maps delta_{l+1} to layer l's output
    bool fused[kMaxHiddenLayers];
    float slope[kMaxHiddenLayers];
    int widest;

    bool needs_logits() const { return params->head != Head::kIdentity; }
};

inline int64_t packed_floats(const MlpParams& mlp) {
    int64_t n = 0;
    for (int l = 0; l <= mlp.n_hidden; ++l) n += 2 * (int64_t(mlp.widths[l]) * mlp.widths[l + 1] + kTilePad + kArenaAlign);
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
            const float slope = a == Activation::kIdentity ? 1.0f : a == Activation::kRelu ? 0.0f : mlp.activation_params[l];
            packed.fused[l] = a == Activation::kIdentity || a == Activation::kRelu ||
                              (a == Activation::kLeakyRelu && slope >= 0.0f);
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
    float* pre[2];                   // pre-activation, then h, of the layers that are not fused
    float* slope[kMaxHiddenLayers];  // fused: h_l; otherwise phi'(a_l); overwritten by delta_l
    float* logits;                   // logits, then d f / d logits
    float* context;                  // first layer's extra bias, or null

    static int64_t floats(const MlpParams& mlp) {
        int64_t widest = 0, hidden = 0;
        for (int l = 0; l < mlp.n_hidden; ++l) {
            widest = std::max<int64_t>(widest, mlp.widths[l + 1]);
            hidden += mlp.widths[l + 1];
        }
        return kRow * (2 * int64_t(mlp.dim()) + 2 * widest + hidden + mlp.n_logits() + mlp.widths[1]) + 8 * kArenaAlign +
               kMaxHiddenLayers * kArenaAlign;
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

// logits -> f and, in place, d f / d logits
template <int V>
inline void apply_head(const MlpParams& mlp, float* logits, const I* chosen, F* energy) {
    constexpr int kRow = V * kLanes;
    const int n = mlp.n_logits();
    const F scale = splat(mlp.out_scale);
    for (int v = 0; v < V; ++v) {
        float* at = logits + v * kLanes;
        const F a = load(at);
        switch (mlp.head) {
            case Head::kIdentity:
                energy[v] = a * scale;
                store(at, scale);
                break;
            case Head::kTanh: {
                const ValueSlope th = tanh_lanes(a);
                energy[v] = th.h * scale;
                store(at, th.d * scale);
                break;
            }
            case Head::kSigmoid: {
                const F s = sigmoid_lanes(a);
                energy[v] = s * scale;
                store(at, s * (1.0f - s) * scale);
                break;
            }
            case Head::kSoftplus:
                energy[v] = softplus_lanes(a) * scale;
                store(at, sigmoid_lanes(a) * scale);
                break;
            case Head::kLogsumexp: {
                F top = a;
                for (int j = 1; j < n; ++j) {
                    const F b = load(at + j * kRow);
                    top = b > top ? b : (b == b ? top : b);  // a NaN logit stays
                }
                F sum{};
                for (int j = 0; j < n; ++j) {
                    const F e = exp_lanes(load(at + j * kRow) - top);
                    store(at + j * kRow, e);
                    sum = sum + e;
                }
                energy[v] = (top + log_lanes(sum)) * scale;
                const F normalise = scale / sum;
                for (int j = 0; j < n; ++j) store(at + j * kRow, load(at + j * kRow) * normalise);
                break;
            }
            case Head::kLogit: {
                F picked{};
                for (int j = 0; j < n; ++j) {
                    const I mask = chosen[v] == j;
                    picked = select(mask, load(at + j * kRow), picked);
                    store(at + j * kRow, select(mask, scale, splat(0.0f)));
                }
                energy[v] = picked * scale;
                break;
            }
            case Head::kCount:
                break;
        }
    }
}

// grad f into ws.grad; f into energy[V] if asked for
template <int V>
inline void energy_and_grad(const PackedMlp& packed, MlpWorkspace<V>& ws, const I* chosen, bool want_energy, F* energy) {
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

// rows [first_chain, first_chain + count) of a [chains, n] array -> [n][V * kLanes], missing chains zero
template <int V, class T>
inline void lanes_from_rows(float* to, const T* rows, int64_t n, int64_t first_chain, int count) {
    constexpr int kRow = V * kLanes;
    for (int c = 0; c < count; ++c)
        for (int64_t k = 0; k < n; ++k) to[k * kRow + c] = float(rows[(first_chain + c) * n + k]);
    for (int c = count; c < kRow; ++c)
        for (int64_t k = 0; k < n; ++k) to[k * kRow + c] = 0.0f;
}

template <int V>
inline void rows_from_lanes(float* rows, const float* from, int64_t n, int64_t first_chain, int count) {
    constexpr int kRow = V * kLanes;
    for (int c = 0; c < count; ++c)
        for (int64_t k = 0; k < n; ++k) rows[(first_chain + c) * n + k] = from[k * kRow + c];
}

template <int V>
inline void chosen_logits(I* chosen, const int64_t* logit, int64_t first_chain, int count) {
    for (int v = 0; v < V; ++v)
        for (int i = 0; i < kLanes; ++i) {
            const int c = v * kLanes + i;
            chosen[v][i] = logit && c < count ? int32_t(logit[first_chain + c]) : 0;
        }
}

}  // namespace JLEBM_TARGET
}  // namespace jlebm
