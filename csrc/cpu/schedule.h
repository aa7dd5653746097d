// Who computes which steps of which chains.
//
// Chains are grouped into blocks of one or two units (a unit is the narrow block). Noise is a function of (chain,
// step), so a block's steps may be computed by several workers in turn. With few blocks a free worker takes the block
// that has most steps left, computes some of them and looks again: preemptive scheduling by longest remaining time,
// which ends all workers together (Muntz and Coffman, Journal of the ACM 17, 1970) even where cores differ in speed,
// as they do on shared machines. 100 chains are 7 vectors: on 4 workers that is 1.75 vectors each instead of 2. With
// many blocks, workers take the next one from a counter.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

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
            run_turns(run_piece);
    }

private:
    static constexpr int kManyBlocks = 16; // an idle worker then waits for at most 1/16 of the time
    static constexpr int kTurnsPerShare = 4;

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

    struct Block {
        int64_t done = 0; // steps
        bool taken = false;
    };

    // Turns shrink with the work that is left, so that all workers end within a turn or so of each other.
    int64_t turn(int64_t units_left, int units) const {
        const int64_t share = units_left / (int64_t(kTurnsPerShare) * workers_ * units);
        return std::max<int64_t>(1, share);
    }

    template <class Run>
    void run_turns(const Run& run_piece) const {
        std::vector<Block> blocks(static_cast<size_t>(n_blocks_));
        std::mutex mutex;
        int64_t units_left = n_units_ * n_steps_; // not yet given out, in units times steps
        parallel_workers(workers_, [&](int worker) {
            int64_t mine = -1, end = 0;
            for (;;) {
                Piece next{};
                {
                    const std::lock_guard<std::mutex> lock(mutex);
                    if (mine >= 0) blocks[size_t(mine)] = {end, false};
                    if (units_left == 0) return;
                    // the block just left wins a tie: its state is still in this core's cache
                    int64_t longest = 0;
                    const int64_t last = std::exchange(mine, -1);
                    for (int64_t i = 0; i < n_blocks_; ++i) {
                        const int64_t b = last < 0 ? i : (last + i) % n_blocks_;
                        const Block& block = blocks[size_t(b)];
                        const int64_t left = (n_steps_ - block.done) * piece(b, 0, 0, 0).units;
                        if (!block.taken && left > longest) longest = left, mine = b;
                    }
                    if (mine >= 0) {
                        Block& block = blocks[size_t(mine)];
                        const int units = piece(mine, 0, 0, 0).units;
                        end = std::min(n_steps_, block.done + turn(units_left, units));
                        next = piece(mine, block.done, end, worker);
                        units_left -= (end - block.done) * units;
                        block.taken = true;
                    }
                }
                if (mine >= 0)
                    run_piece(next);
                else
                    std::this_thread::yield(); // every unfinished block is being computed
            }
        });
    }

    int64_t n_units_, n_steps_, n_blocks_;
    int units_, workers_;
    bool dynamic_;
};

} // namespace JLEBM_TARGET
} // namespace jlebm
