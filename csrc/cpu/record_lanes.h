// What is recorded of a block of chains: energy, norms and the first step that left a chain non-finite.
//
// The caller's arrays are [n_kept, chains]. Rows of several steps are gathered in memory of the block's own and written
// together: neighbouring blocks share cache lines of every row, and workers that write them step by step would pull
// these lines from each other all the time.
#pragma once

#include <algorithm>

#include "cpu/arena.h"
#include "cpu/chain_rows.h"
#include "cpu/update_lanes.h"

namespace jlebm {
namespace JLEBM_TARGET {

template <int V>
class RecordLanes {
    static constexpr int kRow = V * kLanes;
    static constexpr int kRows = 16; // steps gathered; 6 kB with all that can be asked for, in the widest lanes

public:
    static int64_t floats() { return 3 * (kRows * kRow + kArenaAlign); }

    void take(const RecordParams& record, int64_t n_chains, int64_t first, int count, Arena& arena) {
        record_ = &record, n_chains_ = n_chains, first_ = first, count_ = count;
        float* const arrays[3] = {record.energy, record.grad_norm, record.displacement};
        for (int i = 0; i < 3; ++i) {
            to_[i] = arrays[i];
            rows_[i] = arrays[i] ? arena.take(kRows * kRow) : nullptr;
        }
    }

    bool asks() const { return to_[0] || to_[1] || to_[2] || record_->first_bad_step; }

    // step 0 is about to be taken
    void begin() {
        if (record_->first_bad_step) std::fill_n(record_->first_bad_step + first_, count_, int64_t(-1));
    }

    // z, [dim][kRow], after `step`
    void add(int64_t step, const F* energy, const StepSums* sums, const float* z, int64_t dim) {
        if (record_->first_bad_step) {
            for (int v = 0; v < V; ++v) mark_bad(step, v, not_finite<V>(sums[v].move2, z + v * kLanes, dim));
        }
        if ((step + 1) % record_->thin) return;
        if (gathered_ == 0) first_kept_ = kept_index(step);
        const int64_t at = int64_t(gathered_) * kRow;
        for (int v = 0; v < V; ++v) {
            if (rows_[0]) store(rows_[0] + at + v * kLanes, energy[v]);
            if (rows_[1]) store(rows_[1] + at + v * kLanes, rn_sqrt(sums[v].grad2));
            if (rows_[2]) store(rows_[2] + at + v * kLanes, rn_sqrt(sums[v].move2));
        }
        if (++gathered_ == kRows) write();
    }

    // what is gathered goes to the caller
    void write() {
        for (int i = 0; i < 3; ++i) {
            if (!rows_[i]) continue;
            float* to = to_[i] + first_kept_ * n_chains_ + first_;
            const float* from = rows_[i];
            for (int row = 0; row < gathered_; ++row, to += n_chains_, from += kRow)
                std::memcpy(to, from, size_t(count_) * sizeof(float));
        }
        gathered_ = 0;
    }

    int64_t kept_index(int64_t step) const { return (step + 1) / record_->thin - 1; }

private:
    void mark_bad(int64_t step, int v, I bad) {
        for (int i = 0; i < kLanes; ++i) {
            const int c = v * kLanes + i;
            if (bad[i] && c < count_ && record_->first_bad_step[first_ + c] < 0)
                record_->first_bad_step[first_ + c] = step;
        }
    }

    const RecordParams* record_ = nullptr;
    float *to_[3] = {}, *rows_[3] = {};
    int64_t n_chains_ = 0, first_ = 0, first_kept_ = 0;
    int count_ = 0, gathered_ = 0;
};

} // namespace JLEBM_TARGET
} // namespace jlebm
