// One layer for one block of chains: out[j] = bias[j] + sum_k W[j, k] in[k], J outputs of V vectors in registers.
//
// A block is V vectors of kLanes chains and every array is [feature][V * kLanes]: one SIMD lane is one chain, so the
// inner loop is one broadcast weight times V vectors. Weights are packed once per call as [tile][k][J].
#pragma once

#include <cstring>
#include <utility>

#include "cpu/simd.h"

namespace jlebm {
namespace JLEBM_TARGET {

// Register tile: J outputs x V vectors of accumulators, V inputs and one weight must fit the register file.
// AVX-512 and NEON: 14 x 2 + 2 + 1 = 31 of 32; 16 registers: 6 x 2 + 2 + 1 = 15.
constexpr int kTile = kRegisters == 32 ? 14 : 6;
// The narrow block serves few chains. Below 8 accumulators the FMA latency shows, so only long tiles allow one vector.
constexpr int kNarrow = kRegisters == 32 ? 1 : 2;
constexpr int kWide = 2;

struct Tiles {
    int count, base, longer; // the first `longer` tiles have base + 1 outputs, the others base
};

JLEBM_INLINE Tiles tiles_of(int n_out) {
    const int count = (n_out + kTile - 1) / kTile;
    return {count, n_out / count, n_out % count};
}

struct PackedLayer {
    int n_in, n_out;
    const float* weights; // [tile][k][J]
    const float* bias;    // [n_out] or null
};

constexpr int kTilePad = 16; // floats a packed layer may write beyond its end
static_assert(kTile <= kTilePad, "a copy of kTilePad floats must cover a row of a tile");

// out(j) = sum_k weight(j, k) in(k), weight(j, k) = w[j * stride_out + k * stride_in]
inline PackedLayer pack_layer(float* to, const float* w, int n_out, int n_in, int64_t stride_out, int64_t stride_in,
                              const float* bias) {
    const Tiles tiles = tiles_of(n_out);
    float* p = to;
    for (int t = 0, j0 = 0; t < tiles.count; ++t) {
        const int width = tiles.base + (t < tiles.longer);
        const float* from = w + j0 * stride_out;
        if (stride_out == 1) {
            // rows of consecutive outputs: 16 floats at once, the surplus is overwritten by the next row
            for (int k = 0; k < n_in; ++k, p += width, from += stride_in) {
                const bool inside = k * stride_in + j0 + kTilePad <= int64_t(n_in) * n_out;
                std::memcpy(p, from, size_t(inside ? kTilePad : width) * sizeof(float));
            }
        } else {
            // the long loop inside: with the few outputs of a tile there, a call of LEBM took 9 microseconds more
            for (int j = 0; j < width; ++j, from += stride_out)
                for (int k = 0; k < n_in; ++k) p[k * width + j] = from[k * stride_in];
            p += int64_t(width) * n_in;
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
    // 12 multiply-adds are too few for a loop's own work: where hyperthreads share a core, 6 to 9 % of a chain
#pragma GCC unroll 4
    for (int k = 0; k < n_in; ++k) {
        F x[V];
        for (int v = 0; v < V; ++v) x[v] = load(in + v * kLanes);
        ((acc[A] = fma(splat(w[A / V]), x[A % V], acc[A])), ...);
        w += J;
        in += V * kLanes;
    }
    if constexpr (Epilogue::kWholeTile)
        epilogue(out, acc, J);
    else
        (epilogue(out + A * kLanes, acc[A]), ...);
}

template <int J, int V, class Epilogue>
__attribute__((noinline)) void tile_of(const float* w, const float* in, int n_in, const float* bias,
                                       const float* context, float* out, const Epilogue epilogue) {
    tile<J, V>(w, in, n_in, bias, context, out, epilogue, std::make_index_sequence<size_t(J) * V>{});
}

struct NothingMore {
    JLEBM_INLINE void operator()(int64_t, int64_t) const {}
};

// out = epilogue(W in + bias + context): epilogue(at, sum) stores one vector of outputs, or, with kWholeTile,
// epilogue(at, sums, J) the J rows of a tile; after_tile(offset, n_vectors) is told of each tile while it is in the
// first-level cache
template <int V, class Epilogue, class AfterTile = NothingMore>
inline void run_layer(const PackedLayer& layer, const float* in, const float* context, float* out,
                      const Epilogue epilogue, const AfterTile after_tile = {}) {
    const float* const begin = out;
    const Tiles tiles = tiles_of(layer.n_out);
    const float* w = layer.weights;
    const float* bias = layer.bias;
    for (int t = 0; t < tiles.count; ++t) {
        const int width = tiles.base + (t < tiles.longer);
        switch (width) {
#define JLEBM_TILE(J)                                                                                                  \
    case J:                                                                                                            \
        if constexpr (J <= kTile) tile_of<J, V>(w, in, layer.n_in, bias, context, out, epilogue);                      \
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
        after_tile(out - begin, int64_t(width) * V);
        w += int64_t(width) * layer.n_in;
        out += int64_t(width) * V * kLanes;
        if (bias) bias += width;
        if (context) context += int64_t(width) * V * kLanes;
    }
}

// The ways to store a tile's sum.
struct OneByOne {
    static constexpr bool kWholeTile = false;
};
struct StoreSum : OneByOne {
    JLEBM_INLINE void operator()(float* at, F sum) const { store(at, sum); }
};
struct LeakyForward : OneByOne { // h = phi(a)
    float slope;
    explicit LeakyForward(float slope) : slope(slope) {}
    JLEBM_INLINE void operator()(float* at, F a) const { store(at, a > 0.0f ? a : a * slope); }
};
struct LeakyBackward : OneByOne { // `at` holds h, whose sign is that of a: delta = sum * phi'(a)
    float slope;
    explicit LeakyBackward(float slope) : slope(slope) {}
    JLEBM_INLINE void operator()(float* at, F sum) const { store(at, load(at) > 0.0f ? sum : sum * slope); }
};
struct SlopeBackward : OneByOne { // `at` holds phi'(a)
    JLEBM_INLINE void operator()(float* at, F sum) const { store(at, load(at) * sum); }
};
// delta = factor * phi'(a), with a factor per row for either sign of a; kEnergy: energy += delta a, which is
// factor * phi(a) for the activations that are straight on either side of 0
template <int V, bool kEnergy>
struct LeakyDelta {
    static constexpr bool kWholeTile = true;
    const float *positive, *negative, *first_row;
    F* energy;

    JLEBM_INLINE void operator()(float* at, const F* a, const int rows) const {
        const int64_t row = (at - first_row) / (V * kLanes);
        F sum[V] = {};
#pragma GCC unroll 16 // all of it: the sums stay in registers
        for (int j = 0; j < rows; ++j) {
            const F above = splat(positive[row + j]), below = splat(negative[row + j]);
            for (int v = 0; v < V; ++v) {
                // a NaN counts as not positive, as in LeakyBackward; z itself carries it on
                const F delta = a[j * V + v] > 0.0f ? above : below;
                if (kEnergy) sum[v] = fma(delta, a[j * V + v], sum[v]);
                store(at + (j * V + v) * kLanes, delta);
            }
        }
        if (kEnergy)
            for (int v = 0; v < V; ++v) energy[v] = energy[v] + sum[v];
    }
};

} // namespace JLEBM_TARGET
} // namespace jlebm
