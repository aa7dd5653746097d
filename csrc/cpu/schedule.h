// Who computes which steps of which chains.
//
// Chains are grouped into blocks of one or two units (a unit is the narrow block). Noise is a function of (chain,
// step), so a block's steps may be split between two workers. With few blocks each worker gets an equal share of the
// line
//     block 0, block 1, ... each of length units * n_steps
// and where a share ends inside a block, the worker on the right computes the block's first steps at the start of its
// share and the worker on the left its last steps at the end of its own (McNaughton's wrap-around rule, Management
// Science 6, 1959): as no block is longer than a share, the two pieces never overlap in time and all workers end
// together. 100 chains are 7 vectors: on 4 workers that is 1.75 vectors each instead of 2. With many blocks, workers
// take the next one from a counter, which also evens out cores that run slower.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "cpu/threads.h"

namespace jlebm {
namespace JLEBM_TARGET { // each target its own copy: an inline function must not cross targets

struct Piece {
    int64_t first_unit;
    int units;          // 1 or 2
    int64_t begin, end; // steps
    int worker;
};

class Schedule {
public:
    // block_units: units of a wide block; a block is wide only if every worker still gets at least one
    Schedule(int64_t n_units, int64_t n_steps, int wide_units, int n_threads) : n_units_(n_units), n_steps_(n_steps) {
        const int64_t threads = std::max<int64_t>(1, n_threads);
        units_ = n_units >= wide_units * threads ? wide_units : 1;
        n_blocks_ = (n_units + units_ - 1) / units_;
        workers_ = int(std::min<int64_t>(threads, n_blocks_));
        dynamic_ = n_steps <= 1 || n_blocks_ >= int64_t(kManyBlocks) * workers_;
    }

    int workers() const { return workers_; }

    template <class Run>
    void run(const Run& run_piece) const {
        if (n_units_ == 0) return;
        if (dynamic_ || workers_ == 1)
            run_dynamic(run_piece);
        else
            run_shares(run_piece);
    }

private:
    static constexpr int kManyBlocks = 16; // an idle worker then waits for at most 1/16 of the time

    Piece piece(int64_t block, int64_t begin, int64_t end, int worker) const {
        const int64_t first = block * units_;
        return {first, int(std::min<int64_t>(units_, n_units_ - first)), begin, end, worker};
    }

    template <class Run>
    void run_dynamic(const Run& run_piece) const {
        std::atomic<int64_t> next{0};
        parallel_workers(workers_, [&](int worker) {
            for (int64_t b = next.fetch_add(1); b < n_blocks_; b = next.fetch_add(1))
                run_piece(piece(b, 0, n_steps_, worker));
        });
    }

    template <class Run>
    void run_shares(const Run& run_piece) const {
        const std::unique_ptr<std::atomic<int>[]> first_part_done(new std::atomic<int>[size_t(n_blocks_)]);
        for (int64_t b = 0; b < n_blocks_; ++b) first_part_done[size_t(b)].store(0, std::memory_order_relaxed);
        const int64_t line = n_units_ * n_steps_;
        parallel_workers(workers_, [&](int worker) {
            const int64_t lo = line * worker / workers_, hi = line * (worker + 1) / workers_;
            for (int64_t b = lo / (units_ * n_steps_); b < n_blocks_; ++b) {
                const Piece whole = piece(b, 0, n_steps_, worker);
                const int64_t start = b * units_ * n_steps_;
                if (start >= hi) break;
                const int64_t from = cut(lo - start, whole.units), to = cut(hi - start, whole.units);
                if (from >= to) continue;
                std::atomic<int>& done = first_part_done[size_t(b)];
                if (from > 0) { // the right worker's piece: the block's first steps
                    run_piece(piece(b, 0, n_steps_ - from, worker));
                    done.store(1, std::memory_order_release);
                } else {
                    const int64_t begin = n_steps_ - to;
                    while (begin > 0 && done.load(std::memory_order_acquire) == 0) std::this_thread::yield();
                    run_piece(piece(b, begin, n_steps_, worker));
                }
            }
        });
    }

    int64_t cut(int64_t along, int units) const {
        return std::clamp<int64_t>((along + units / 2) / units, 0, n_steps_);
    }

    int64_t n_units_, n_steps_, n_blocks_;
    int units_, workers_;
    bool dynamic_;
};

} // namespace JLEBM_TARGET
} // namespace jlebm
