// The noise contract in SIMD lanes: one lane is one chain.
//
// A vector of kLanes chains is kept as two vectors of 64-bit lanes (even chains, odd chains): the 32 x 32 -> 64
// multiplication reads the low half of each, so high halves may hold anything and no word is ever masked.
// Only the chain differs between lanes. The first three rounds are therefore mostly scalar.
#pragma once

#include "common/normal.h"
#include "cpu/twin.h"

namespace jlebm {
namespace JLEBM_TARGET {

JLEBM_INLINE W wide(uint64_t v) { return W{} + v; }

// Round keys, made once per call site: a round then takes them straight from memory.
template <int kRounds>
struct KeySchedule {
    uint64_t k0[kRounds], k1[kRounds];

    explicit KeySchedule(uint64_t noise_key) {
        uint32_t a = uint32_t(noise_key), b = uint32_t(noise_key >> 32);
        for (int i = 0; i < kRounds; ++i, a += kPhiloxW0, b += kPhiloxW1) k0[i] = a, k1[i] = b;
    }
};

template <class T>
struct PhiloxState {
    T c0, c1, c2, c3;
};

template <class T>
JLEBM_INLINE PhiloxState<Twin<T>> side_by_side(const PhiloxState<T>& x, const PhiloxState<T>& y) {
    return {{x.c0, y.c0}, {x.c1, y.c1}, {x.c2, y.c2}, {x.c3, y.c3}};
}

// rounds 1 to 3 of one half: all counter words but the chain are the same in every lane
template <int kRounds>
JLEBM_INLINE PhiloxState<W> philox_first_rounds(W chain, uint32_t group, uint32_t step, uint32_t stream,
                                                const KeySchedule<kRounds>& keys) {
    const auto key = [&](const uint64_t* k, int round) { return uint32_t(k[round]); };
    // round 1: only c1 (the chain) is a vector
    uint64_t s0 = uint64_t(kPhiloxM0) * group, s1 = uint64_t(kPhiloxM1) * step;
    W c0 = chain ^ wide(uint32_t(s1 >> 32) ^ key(keys.k0, 0));
    uint32_t u1 = uint32_t(s1), u2 = uint32_t(s0 >> 32) ^ stream ^ key(keys.k1, 0), u3 = uint32_t(s0);
    // round 2: only c0 is a vector
    const W p0 = mul_low32(c0, wide(kPhiloxM0));
    s1 = uint64_t(kPhiloxM1) * u2;
    const uint32_t u0 = uint32_t(s1 >> 32) ^ u1 ^ key(keys.k0, 1);
    u1 = uint32_t(s1);
    const W c2 = (p0 >> 32) ^ wide(u3 ^ key(keys.k1, 1));
    // round 3: c2 and c3 are vectors
    s0 = uint64_t(kPhiloxM0) * u0;
    const W p1 = mul_low32(c2, wide(kPhiloxM1));
    return {(p1 >> 32) ^ wide(u1 ^ key(keys.k0, 2)), p1, p0 ^ wide(uint32_t(s0 >> 32) ^ key(keys.k1, 2)),
            wide(uint32_t(s0))};
}

template <int kRounds, class T>
JLEBM_INLINE PhiloxState<T> philox_last_rounds(PhiloxState<T> s, const KeySchedule<kRounds>& keys) {
    static_assert(kRounds >= 4, "the first three rounds are unrolled by hand");
    const W m0 = wide(kPhiloxM0), m1 = wide(kPhiloxM1);
#pragma GCC unroll 16
    for (int round = 3; round < kRounds; ++round) {
        const T p0 = mul_low32_each(s.c0, m0), p1 = mul_low32_each(s.c2, m1);
        s = {(p1 >> 32) ^ s.c1 ^ wide(keys.k0[round]), p1, (p0 >> 32) ^ s.c3 ^ wide(keys.k1[round]), p0};
    }
    return s;
}

// even and odd chains' low halves, side by side again
JLEBM_INLINE U interleave(W even, W odd) { return (U)((even & 0xffffffffu) | (odd << 32)); }

struct ChainLanes {
    W even, odd;

    JLEBM_INLINE explicit ChainLanes(uint32_t first_chain) {
        for (int i = 0; i < kLanes / 2; ++i) {
            even[i] = uint32_t(first_chain + 2 * i);
            odd[i] = uint32_t(first_chain + 2 * i + 1);
        }
    }
};

// the two halves of one group of four dims
template <int kRounds>
JLEBM_INLINE PhiloxState<Twin<W>> philox_start(const ChainLanes& chains, uint32_t group, uint32_t step, uint32_t stream,
                                               const KeySchedule<kRounds>& keys) {
    return side_by_side(philox_first_rounds(chains.even, group, step, stream, keys),
                        philox_first_rounds(chains.odd, group, step, stream, keys));
}

JLEBM_INLINE U interleave(const Twin<W>& halves) { return interleave(halves.a, halves.b); }
JLEBM_INLINE Twin<U> interleave(const Twin<Twin<W>>& groups) { return {interleave(groups.a), interleave(groups.b)}; }

template <class T>
struct FourNormals {
    T n[4];
};

// words -> normals; words (0, 1) and (2, 3) side by side
template <class Ops, class State>
JLEBM_INLINE FourNormals<typename Ops::F> normals_of_words(const State& s) {
    const auto pair =
        box_muller<TwinOps<Ops>>({interleave(s.c0), interleave(s.c2)}, {interleave(s.c1), interleave(s.c3)});
    return {{pair.cosine.a, pair.sine.a, pair.cosine.b, pair.sine.b}};
}

// eps[4 group + i][V * kLanes] of V vectors of chains, for all groups: 4 * n_groups rows (the caller's buffer is padded
// to a multiple of four dims)
template <int V>
inline void normals_of_step(float* eps, int n_groups, uint32_t first_chain, uint32_t step, uint32_t stream,
                            uint64_t noise_key) {
    constexpr int kRow = V * kLanes;
    // Two vectors side by side, of chains or else of groups. Sixteen registers are too few for them, but the spills
    // cost less than waiting: 2.30 -> 2.12 ns a normal on AVX2, 3.24 -> 2.88 on the baseline (Zen 3).
    constexpr bool kTwoVectors = V == 2, kTwoGroups = V == 1;
    const KeySchedule<kPhiloxRounds> keys(noise_key);
    const auto start = [&](int v, int group) {
        return philox_start(ChainLanes(first_chain + uint32_t(v * kLanes)), uint32_t(group), step, stream, keys);
    };
    int group = 0;
    if constexpr (kTwoVectors) {
        for (; group < n_groups; ++group) {
            const auto words = philox_last_rounds(side_by_side(start(0, group), start(1, group)), keys);
            const auto normals = normals_of_words<TwinOps<NormalOps>>(words);
            float* row = eps + int64_t(4 * group) * kRow;
            for (int i = 0; i < 4; ++i) {
                store(row + i * kRow, normals.n[i].a);
                store(row + i * kRow + kLanes, normals.n[i].b);
            }
        }
    }
    if constexpr (kTwoGroups) {
        for (; group + 2 <= n_groups; group += 2) {
            const auto words = philox_last_rounds(side_by_side(start(0, group), start(0, group + 1)), keys);
            const auto normals = normals_of_words<TwinOps<NormalOps>>(words);
            float* row = eps + int64_t(4 * group) * kRow;
            for (int i = 0; i < 4; ++i) {
                store(row + i * kRow, normals.n[i].a);
                store(row + (4 + i) * kRow, normals.n[i].b);
            }
        }
    }
    for (; group < n_groups; ++group) {
        for (int v = 0; v < V; ++v) {
            const auto normals = normals_of_words<NormalOps>(philox_last_rounds(start(v, group), keys));
            float* row = eps + int64_t(4 * group) * kRow + v * kLanes;
            for (int i = 0; i < 4; ++i) store(row + i * kRow, normals.n[i]);
        }
    }
}

} // namespace JLEBM_TARGET
} // namespace jlebm
