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

    JLEBM_DEVICE static float round(float v) { return from_bf16(to_bf16(v)); }
    JLEBM_DEVICE static Element element(float v) { return to_bf16(v); }
    JLEBM_DEVICE static float value(Element e) { return from_bf16(e); }
    JLEBM_DEVICE static int row_at(int feature) { return feature * kRowBytes; }
    // chains 2t, 2t + 1 of a feature
    JLEBM_DEVICE static void store_pair(unsigned char* row, int t, float v0, float v1) {
        *reinterpret_cast<uint32_t*>(row + 4 * t) = pack_bf16(v0, v1);
    }
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
    JLEBM_DEVICE static void store_pair(unsigned char* row, int t, float v0, float v1) {
        *reinterpret_cast<float2*>(row + 8 * t) = make_float2(round(v0), round(v1));
    }
};

template <>
struct Operand<kFp32> : WordOperand {
    JLEBM_DEVICE static float round(float v) { return v; }
    JLEBM_DEVICE static float element(float v) { return v; }
    JLEBM_DEVICE static void store_pair(unsigned char* row, int t, float v0, float v1) {
        *reinterpret_cast<float2*>(row + 8 * t) = make_float2(v0, v1);
    }
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

// acc[m][n] += A_m B over k_steps; `weights.next()` gives the fragment of the next row tile, step after step. `count`
// row tiles are real, the same for the whole warp.
template <int kPrecision, bool kForward, int kRowTiles, int kChainTiles, class Weights>
JLEBM_DEVICE void multiply(float (&acc)[kRowTiles][kChainTiles][4], Weights& weights, int count,
                           ChainOperands<kPrecision, kChainTiles, kForward> chains, int k_steps) {
    if constexpr (kPrecision == kFp32) {
        float small[kRowTiles][kChainTiles][4] = {}; // hi lo + lo hi
#pragma unroll 1
        for (int k = 0; k < k_steps; ++k) {
            uint32_t b[kChainTiles][2], b_hi[kChainTiles][2], b_lo[kChainTiles][2];
            chains.load(b);
#pragma unroll
            for (int n = 0; n < kChainTiles; ++n)
                for (int i = 0; i < 2; ++i) split_tf32(b[n][i], b_hi[n][i], b_lo[n][i]);
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) {
                if (m >= count) break;
                const Fragment a = weights.next(m);
                uint32_t a_hi[4], a_lo[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) split_tf32(a.r[i], a_hi[i], a_lo[i]);
#pragma unroll
                for (int n = 0; n < kChainTiles; ++n) {
                    mma_m16n8k8_tf32(small[m][n], a_hi, b_lo[n]);
                    mma_m16n8k8_tf32(small[m][n], a_lo, b_hi[n]);
                    // The tensor core cuts its sums off instead of rounding them; so the sum over k, where that would
                    // add up, is made of rounded additions.
                    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                    mma_m16n8k8_tf32(part, a_hi, b_hi[n]);
#pragma unroll
                    for (int i = 0; i < 4; ++i) acc[m][n][i] = add_rn(acc[m][n][i], part[i]);
                }
            }
            weights.step();
        }
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
            for (int n = 0; n < kChainTiles; ++n)
                for (int i = 0; i < 4; ++i) acc[m][n][i] = add_rn(acc[m][n][i], small[m][n][i]);
    } else {
// two steps at a time, so that the loads of one wait behind the products of the other; tf32 in 4 x 4 tiles has no
// registers for it
#pragma unroll(kPrecision == kTf32 && kRowTiles * kChainTiles > 8 ? 1 : 2)
        for (int k = 0; k < k_steps; ++k) {
            uint32_t b[kChainTiles][2];
            chains.load(b);
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) {
                if (m >= count) break;
                const Fragment a = weights.next(m);
#pragma unroll
                for (int n = 0; n < kChainTiles; ++n) {
                    if constexpr (kPrecision == kBf16)
                        mma_m16n8k16_bf16(acc[m][n], a.r, b[n]);
                    else
                        mma_m16n8k8_tf32(acc[m][n], a.r, b[n]);
                }
            }
            weights.step();
        }
    }
}

} // namespace cuda
} // namespace jlebm
