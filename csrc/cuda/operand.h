// Operands of the matrix instructions in the three precisions: elements, the chains' operand in shared memory,
// products.
//
//     bf16   m16n8k16, one product           tf32   m16n8k8, one product
//     fp32   m16n8k8 three times: v = hi + lo, both tf32;  a b = hi hi + (hi lo + lo hi), lo lo is below 2^-22 a b
//
// The chains' side stands in shared memory as one plane for each 8 chains: a row of 8 elements for each feature, so
// that an accumulator's pair of chains is stored as one word (or two) and every load and store is free of bank
// conflicts. g = lane / 4, t = lane % 4 throughout, as in device.h.
#pragma once

#include "cuda/device.h"
#include "cuda/mlp_plan.h"

namespace jlebm {
namespace cuda {

struct alignas(16) Fragment {
    uint32_t r[4];
};

template <int kPrecision>
struct Operand;

template <>
struct Operand<kBf16> {
    using Element = uint16_t;
    static constexpr int kBytes = 2;
    static constexpr int kRowBytes = kTileChains * kBytes;
    using Pair = uint32_t; // of neighbouring chains

    JLEBM_DEVICE static float round(float v) { return from_bf16(to_bf16(v)); }
    JLEBM_DEVICE static Element element(float v) { return to_bf16(v); }
    JLEBM_DEVICE static float value(Element e) { return from_bf16(e); }
    JLEBM_DEVICE static int row_at(int feature) { return feature * kRowBytes; }
    JLEBM_DEVICE static Pair pair(float v0, float v1) { return pack_bf16(v0, v1); }
    struct alignas(8) Slopes {
        uint32_t pair[2];
    };
    JLEBM_DEVICE static Slopes pack(const float (&d)[4]) { return {{pack_bf16(d[0], d[1]), pack_bf16(d[2], d[3])}}; }
    JLEBM_DEVICE static void unpack(const Slopes& s, float (&d)[4]) {
        d[0] = from_bf16(uint16_t(s.pair[0])), d[1] = from_bf16(uint16_t(s.pair[0] >> 16));
        d[2] = from_bf16(uint16_t(s.pair[1])), d[3] = from_bf16(uint16_t(s.pair[1] >> 16));
    }
};

struct WordOperand {
    using Element = float;
    static constexpr int kBytes = 4;
    static constexpr int kRowBytes = kTileChains * kBytes;
    using Pair = float2;

    JLEBM_DEVICE static float value(float e) { return e; }
    // Rows 4 to 7 of each eight trade places in pairs: then rows (0, 1, 2, 3) and rows (0, 2, 4, 6), which a forward
    // and a backward load take together, both stand in different banks.
    JLEBM_DEVICE static int row_at(int feature) { return (feature ^ (feature >> 2 & 1)) * kRowBytes; }
    using Slopes = Fragment;
    JLEBM_DEVICE static Slopes pack(const float (&d)[4]) {
        return {{float_bits(d[0]), float_bits(d[1]), float_bits(d[2]), float_bits(d[3])}};
    }
    JLEBM_DEVICE static void unpack(const Slopes& s, float (&d)[4]) {
        for (int i = 0; i < 4; ++i) d[i] = bits_float(s.r[i]);
    }
};

template <>
struct Operand<kTf32> : WordOperand {
    JLEBM_DEVICE static float round(float v) { return bits_float(to_tf32(v)); }
    JLEBM_DEVICE static float element(float v) { return round(v); }
    JLEBM_DEVICE static Pair pair(float v0, float v1) { return make_float2(round(v0), round(v1)); }
};

template <>
struct Operand<kFp32> : WordOperand {
    JLEBM_DEVICE static float round(float v) { return v; }
    JLEBM_DEVICE static float element(float v) { return v; }
    JLEBM_DEVICE static Pair pair(float v0, float v1) { return make_float2(v0, v1); }
};

// v = hi + lo to 2^-22 of v; an infinite v has lo = NaN, as inf * 0 would in the plain product
JLEBM_DEVICE void split_tf32(uint32_t v, uint32_t& hi, uint32_t& lo) {
    hi = to_tf32(bits_float(v));
    lo = to_tf32(sub_rn(bits_float(v), bits_float(hi)));
}

// Chains' operands of one step of the contraction, from planes in shared memory.
template <int kPrecision, int kChainTiles, bool kForward>
class ChainOperands {
public:
    static constexpr bool kHalf = kPrecision == kBf16;

    JLEBM_DEVICE ChainOperands(const unsigned char* planes, int plane_bytes) : plane_bytes_(plane_bytes) {
        const int lane = lane_index(), g = lane / 4, t = lane % 4;
        if (kHalf) {
            // ldmatrix: lanes 0 to 15 name the 16 features of a plane, 16 to 31 those of the next plane
            const int next_plane = kChainTiles > 1 ? lane / 16 : 0;
            at_[0] = planes + next_plane * plane_bytes + (lane % 16) * 16;
            at_[1] = at_[0];
        } else {
            using O = Operand<kTf32>;
            // slots k = t and t + 4 are features t and t + 4 forward, 2t and 2t + 1 backward (as in the weights)
            at_[0] = planes + O::row_at(kForward ? t : 2 * t) + 4 * g;
            at_[1] = planes + O::row_at(kForward ? t + 4 : 2 * t + 1) + 4 * g;
        }
    }

    JLEBM_DEVICE void load(uint32_t (&b)[kChainTiles][2]) {
        if constexpr (kHalf && kChainTiles == 1) {
            ldmatrix_x2_trans(b[0], at_[0]);
        } else if constexpr (kHalf) {
#pragma unroll
            for (int n = 0; n < kChainTiles; n += 2) {
                uint32_t r[4];
                ldmatrix_x4_trans(r, at_[0] + n * plane_bytes_);
                b[n][0] = r[0], b[n][1] = r[1];
                b[n + 1][0] = r[2], b[n + 1][1] = r[3];
            }
        } else {
#pragma unroll
            for (int n = 0; n < kChainTiles; ++n)
                for (int i = 0; i < 2; ++i) b[n][i] = *reinterpret_cast<const uint32_t*>(at_[i] + n * plane_bytes_);
        }
        // 16 rows of 16 bytes, 8 rows of 32 bytes
        at_[0] += 256;
        at_[1] += 256;
    }

private:
    int plane_bytes_;
    const unsigned char* at_[2];
};

// acc[m][n] += A_m B over the contraction, for the first kCount row tiles.
template <int kPrecision, bool kForward, int kCount, int kRowTiles, int kChainTiles, class Weights>
class RowProducts {
public:
    using Chains = ChainOperands<kPrecision, kChainTiles, kForward>;
    // Few products do not hide the loads of their own step, so those of the next step are under way before them. Many
    // do, with a second warp beside them, and have no registers for two steps.
    static constexpr bool kLoadsAhead = kCount * kChainTiles <= 4;

    JLEBM_DEVICE static void run(float (&acc)[kRowTiles][kChainTiles][4], Weights& weights, Chains chains,
                                 int k_steps) {
        Small small = {};
        if constexpr (kLoadsAhead) {
            Step one, other = {};
            load(one, weights, chains);
#pragma unroll 1
            while (true) {
                if (k_steps > 1) load(other, weights, chains);
                products(acc, small, one);
                if (--k_steps == 0) break;
                if (k_steps > 1) load(one, weights, chains);
                products(acc, small, other);
                if (--k_steps == 0) break;
            }
        } else {
#pragma unroll 1
            for (; k_steps > 0; --k_steps) {
                uint32_t b[kChainTiles][2];
                chains.load(b);
                const Chained operands(b);
#pragma unroll
                for (int m = 0; m < kCount; ++m)
                    products(acc[m], small[kPrecision == kFp32 ? m : 0], weights.next(m), operands);
                weights.step();
            }
        }
        if constexpr (kPrecision == kFp32) {
#pragma unroll
            for (int m = 0; m < kCount; ++m)
                for (int n = 0; n < kChainTiles; ++n)
                    for (int i = 0; i < 4; ++i) acc[m][n][i] = add_rn(acc[m][n][i], small[m][n][i]);
        }
    }

private:
    using Small = float[kPrecision == kFp32 ? kCount : 1][kChainTiles][4]; // hi lo + lo hi

    struct Step {
        uint32_t b[kChainTiles][2];
        Fragment a[kCount];
    };

    JLEBM_DEVICE static void load(Step& step, Weights& weights, Chains& chains) {
        chains.load(step.b);
#pragma unroll
        for (int m = 0; m < kCount; ++m) step.a[m] = weights.next(m);
        weights.step();
    }

    // the chains' side of a step, split for fp32
    struct Chained {
        JLEBM_DEVICE explicit Chained(const uint32_t (&b)[kChainTiles][2]) {
#pragma unroll
            for (int n = 0; n < kChainTiles; ++n)
                for (int i = 0; i < 2; ++i) {
                    hi[n][i] = b[n][i];
                    if constexpr (kPrecision == kFp32) split_tf32(b[n][i], hi[n][i], lo[n][i]);
                }
        }
        uint32_t hi[kChainTiles][2], lo[kPrecision == kFp32 ? kChainTiles : 1][2];
    };

    JLEBM_DEVICE static void products(float (&acc)[kRowTiles][kChainTiles][4], Small& small, const Step& step) {
        const Chained chained(step.b);
#pragma unroll
        for (int m = 0; m < kCount; ++m) products(acc[m], small[kPrecision == kFp32 ? m : 0], step.a[m], chained);
    }

    JLEBM_DEVICE static void products(float (&acc)[kChainTiles][4], float (&small)[kChainTiles][4], const Fragment& a,
                                      const Chained& b) {
        if constexpr (kPrecision == kFp32) {
            uint32_t a_hi[4], a_lo[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) split_tf32(a.r[i], a_hi[i], a_lo[i]);
#pragma unroll
            for (int n = 0; n < kChainTiles; ++n) {
                // The tensor core cuts its sums off instead of rounding them; so the sum over k, where that would add
                // up, is made of rounded additions.
                float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                mma_m16n8k8_tf32(part, a_hi, b.hi[n]);
                mma_m16n8k8_tf32(small[n], a_hi, b.lo[n]);
                mma_m16n8k8_tf32(small[n], a_lo, b.hi[n]);
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[n][i] = add_rn(acc[n][i], part[i]);
            }
        } else {
            (void)small;
#pragma unroll
            for (int n = 0; n < kChainTiles; ++n) {
                if constexpr (kPrecision == kBf16)
                    mma_m16n8k16_bf16(acc[n], a.r, b.hi[n]);
                else
                    mma_m16n8k8_tf32(acc[n], a.r, b.hi[n]);
            }
        }
    }
};

// the same for a number of row tiles known at run time, equal for the whole warp: one copy of the code for each number,
// since a branch between two tiles would keep the second one's load from overtaking the first one's products
template <int kPrecision, bool kForward, int kRowTiles, int kChainTiles, class Weights>
JLEBM_DEVICE void multiply(float (&acc)[kRowTiles][kChainTiles][4], Weights& weights, int count,
                           const ChainOperands<kPrecision, kChainTiles, kForward>& chains, int k_steps) {
    static_assert(kRowTiles == 2 || kRowTiles == 4, "one case for each number of row tiles");
    if (count == kRowTiles)
        RowProducts<kPrecision, kForward, kRowTiles, kRowTiles, kChainTiles, Weights>::run(acc, weights, chains,
                                                                                           k_steps);
    else if (count == 1)
        RowProducts<kPrecision, kForward, 1, kRowTiles, kChainTiles, Weights>::run(acc, weights, chains, k_steps);
    else if constexpr (kRowTiles == 4) {
        if (count == 2)
            RowProducts<kPrecision, kForward, 2, kRowTiles, kChainTiles, Weights>::run(acc, weights, chains, k_steps);
        else
            RowProducts<kPrecision, kForward, 3, kRowTiles, kChainTiles, Weights>::run(acc, weights, chains, k_steps);
    }
}

} // namespace cuda
} // namespace jlebm
