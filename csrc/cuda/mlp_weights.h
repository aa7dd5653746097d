// Fragments of the weights, forward (A = W, rows are outputs) and backward (A = W^T, rows are inputs), from one copy in
// shared memory (resident), from two packed streams in device memory (streamed), or as each warp's own fragments in
// shared memory (cluster).
#pragma once

#include "cuda/operand.h"

namespace jlebm {
namespace cuda {

// One layer's weight [n_out][n_in] in shared memory, rows `stride` bytes apart, zeros to the next multiple of 16.
template <int kPrecision, bool kForward>
class ResidentWeights {
public:
    static constexpr bool kHalf = kPrecision == kBf16;

    // fragments of row tiles row_tile, row_tile + 1, …
    JLEBM_DEVICE ResidentWeights(const unsigned char* weight, int stride, int row_tile) : stride_(stride) {
        const int lane = lane_index(), g = lane / 4, t = lane % 4;
        int row, column; // of W, this lane's first element
        if (kHalf && kForward) {
            row = lane % 16, column = lane / 16 * 8;
        } else if (kHalf) {
            row = lane / 16 * 8 + lane % 8, column = lane / 8 % 2 * 8;
        } else if (kForward) {
            row = g, column = t;
        } else {
            row = 2 * t, column = g; // rows 2t and 2t + 1: 8t + g runs through all banks
        }
        if (kForward) {
            row += row_tile * kTileRows;
            tile_bytes_ = kTileRows * stride;
            step_bytes_ = 32;
        } else {
            column += row_tile * kTileRows;
            tile_bytes_ = kTileRows * (kHalf ? 2 : 4);
            step_bytes_ = (kHalf ? 16 : 8) * stride;
        }
        at_ = weight + row * stride + column * (kHalf ? 2 : 4);
    }

    JLEBM_DEVICE Fragment next(int m) const {
        Fragment a;
        const unsigned char* at = at_ + m * tile_bytes_;
        if constexpr (kHalf && kForward) {
            ldmatrix_x4(a.r, at);
        } else if constexpr (kHalf) {
            ldmatrix_x4_trans(a.r, at);
        } else {
            const int eight_rows = kForward ? 8 * stride_ : 8 * 4, slot = kForward ? 4 * 4 : stride_;
            a.r[0] = *reinterpret_cast<const uint32_t*>(at);
            a.r[1] = *reinterpret_cast<const uint32_t*>(at + eight_rows);
            a.r[2] = *reinterpret_cast<const uint32_t*>(at + slot);
            a.r[3] = *reinterpret_cast<const uint32_t*>(at + slot + eight_rows);
        }
        return a;
    }
    JLEBM_DEVICE void step() { at_ += step_bytes_; }

private:
    const unsigned char* at_;
    int stride_, tile_bytes_, step_bytes_;
};

// Copies a float32 weight [n_out, n_in] into shared memory, rounded once for all steps.
template <int kPrecision>
JLEBM_DEVICE void load_weight(unsigned char* to, const float* weight, int n_out, int n_in) {
    using O = Operand<kPrecision>;
    const int stride = weight_stride(kPrecision, n_in);
    const int rows = round_up(n_out, kTileRows), columns = round_up(n_in, kTileRows);
    // four rows and four columns a lane, so that 16 loads are on their way at a time: every block of a small batch
    // begins with this
    constexpr int kRows = 4;
    for (int row = kRows * warp_index(); row < rows; row += kRows * int(blockDim.x) / kWarp) {
#pragma unroll 4
        for (int column = lane_index(); column < columns; column += kWarp) {
            float v[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r)
                v[r] =
                    row + r < n_out && column < n_in ? load_readonly(weight + int64_t(row + r) * n_in + column) : 0.0f;
#pragma unroll
            for (int r = 0; r < kRows; ++r)
                reinterpret_cast<typename O::Element*>(to + int64_t(row + r) * stride)[column] = O::element(v[r]);
        }
    }
}

// A warp's own fragments in the order in which it uses them, step after step: a ring of asynchronous copies. Each lane
// copies and reads its own 16 bytes, so no barrier is needed, and the copies run on across the group's barriers.
template <int kSlots>
class WeightStream {
public:
    JLEBM_DEVICE WeightStream(const void* fragments, int64_t begin, int64_t end, unsigned char* ring) {
        const auto* all = static_cast<const Fragment*>(fragments) + lane_index();
        begin_ = next_ = all + begin * kWarp;
        end_ = all + end * kWarp;
        ring_ = reinterpret_cast<Fragment*>(ring) + lane_index();
        slot_ = 0;
        if (begin_ == end_) return; // a warp without a tile
        for (int i = 0; i + 1 < kSlots; ++i) copy(i);
    }

    JLEBM_DEVICE Fragment next(int) {
        cp_async_wait<kSlots - 2>();
        const Fragment a = ring_[slot_ * kWarp];
        // into the slot before this one, read one call ago
        copy((slot_ + kSlots - 1) % kSlots);
        slot_ = (slot_ + 1) % kSlots;
        return a;
    }
    JLEBM_DEVICE void step() {}
    JLEBM_DEVICE void finish() { cp_async_wait<0>(); }

private:
    JLEBM_DEVICE void copy(int slot) {
        cp_async_16(ring_ + slot * kWarp, next_);
        cp_async_commit();
        next_ += kWarp;
        if (next_ == end_) next_ = begin_; // the next Langevin step uses them again
    }

    const Fragment *begin_, *end_, *next_;
    Fragment* ring_;
    int slot_;
};

// The fragment at a row tile and a step of the contraction, from the float32 weight itself.
template <int kPrecision>
JLEBM_DEVICE Fragment fragment_of(const MlpParams& mlp, Phase phase, int row_tile, int k) {
    using O = Operand<kPrecision>;
    const int n_in = mlp.widths[phase.layer], n_out = mlp.widths[phase.layer + 1];
    const float* weight = mlp.weights[phase.layer];
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    const auto element = [&](int row, int k) {
        const int out = phase.forward ? row : k, in = phase.forward ? k : row;
        return out < n_out && in < n_in ? load_readonly(weight + int64_t(out) * n_in + in) : 0.0f;
    };
    Fragment a;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = row_tile * kTileRows + g + i % 2 * 8;
        if constexpr (kPrecision == kBf16) {
            const int column = k * 16 + 2 * t + i / 2 * 8;
            a.r[i] = pack_bf16(element(row, column), element(row, column + 1));
        } else {
            const int slot = phase.forward ? t + i / 2 * 4 : 2 * t + i / 2;
            a.r[i] = float_bits(O::element(element(row, k * 8 + slot)));
        }
    }
    return a;
}

// A warp's own fragments in shared memory, in the order in which it uses them.
class KeptWeights {
public:
    JLEBM_DEVICE explicit KeptWeights(unsigned char* at)
        : begin_(reinterpret_cast<Fragment*>(at) + lane_index()), next_(begin_) {}

    // Each lane writes what it alone reads: no barrier.
    template <int kPrecision, int kChainTiles>
    JLEBM_DEVICE void load(const MlpParams& mlp, const MlpPlan& plan, bool general_head, int warp) {
        Fragment* to = begin_;
        constexpr int kM = row_tiles(kPrecision, kChainTiles);
#pragma unroll 1
        for (int n = 0; n < phase_count(mlp.n_hidden, plan.logits, general_head); ++n) {
            const Phase phase = phase_of(n, mlp.n_hidden, plan.logits, general_head);
            if (!plan.layer_resident(phase.layer)) continue;
            const int n_tiles = tiles(phase_rows(mlp, phase)), k_steps = phase_steps(mlp, phase, kPrecision);
            const int end = first_tile(warp + 1, n_tiles, plan.warps_per_group());
#pragma unroll 1
            for (int tile = first_tile(warp, n_tiles, plan.warps_per_group()); tile < end; tile += kM) {
                const int count = end - tile < kM ? end - tile : kM;
#pragma unroll 1
                for (int m = 0; m < count; ++m)
#pragma unroll 4 // 16 loads on their way at a time, 32 in bf16
                    for (int k = 0; k < k_steps; ++k)
                        to[(k * count + m) * kWarp] = fragment_of<kPrecision>(mlp, phase, tile + m, k);
                to += k_steps * count * kWarp;
            }
        }
    }
    JLEBM_DEVICE void rewind() { next_ = begin_; }
    JLEBM_DEVICE Fragment next(int) {
        const Fragment a = *next_;
        next_ += kWarp;
        return a;
    }
    JLEBM_DEVICE void step() {}

private:
    Fragment* const begin_;
    const Fragment* next_;
};

// Writes the streams: one block for each row tile of each phase, its warps take turns with the steps of the
// contraction.
template <int kPrecision>
JLEBM_DEVICE void pack_stream(const MlpParams& mlp, const MlpPlan& plan, bool general_head, Fragment* fragments) {
    constexpr int kM = row_tiles(kPrecision, 1);
    const int n_warps = plan.warps_per_group();
    int row_tile = int(blockIdx.x), n = 0;
    Phase phase = phase_of(0, mlp.n_hidden, plan.logits, general_head);
    while (row_tile >= streamed_tiles(mlp, plan, phase)) {
        row_tile -= streamed_tiles(mlp, plan, phase);
        phase = phase_of(++n, mlp.n_hidden, plan.logits, general_head);
    }
    const int n_tiles = tiles(phase_rows(mlp, phase)), k_steps = phase_steps(mlp, phase, kPrecision);
    int warp = 0;
    while (first_tile(warp + 1, n_tiles, n_warps) <= row_tile) ++warp;
    int64_t at = fragments_before(mlp, plan, general_head, false, warp);
    for (int i = 0; i < n; ++i) {
        const Phase before = phase_of(i, mlp.n_hidden, plan.logits, general_head);
        const int all = streamed_tiles(mlp, plan, before);
        at += int64_t(first_tile(warp + 1, all, n_warps) - first_tile(warp, all, n_warps)) *
              phase_steps(mlp, before, kPrecision);
    }
    // passes of m row tiles; within a pass step after step, within a step tile after tile
    const int m_tiles = plan.chain_tiles == 4 ? row_tiles(kPrecision, 4) : kM;
    const int first = first_tile(warp, n_tiles, n_warps), last = first_tile(warp + 1, n_tiles, n_warps);
    const int pass = (row_tile - first) / m_tiles * m_tiles;
    const int count = last - first - pass < m_tiles ? last - first - pass : m_tiles;
    at += int64_t(pass) * k_steps + (row_tile - first - pass);
    for (int k = warp_index(); k < k_steps; k += int(blockDim.x) / kWarp)
        fragments[(at + int64_t(k) * count) * kWarp + lane_index()] = fragment_of<kPrecision>(mlp, phase, row_tile, k);
}

} // namespace cuda
} // namespace jlebm
