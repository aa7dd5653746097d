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
#include <limits>
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

constexpr int kCostOfUnit = 8;

class Schedule {
public:
    // wide_units: units of a wide block; a block is wide only if every worker still gets at least one
    // last_cost: of the last unit; if it is not kCostOfUnit, that unit is a block of its own
    Schedule(int64_t n_units, int64_t n_steps, int wide_units, int n_threads, int last_cost = kCostOfUnit)
        : n_units_(n_units), n_steps_(n_steps), last_cost_(last_cost) {
        const int64_t threads = std::max<int64_t>(1, n_threads);
        units_ = n_units >= wide_units * threads ? wide_units : 1;
        n_even_units_ = n_units - (last_cost != kCostOfUnit);
        n_blocks_ = (n_even_units_ + units_ - 1) / units_ + (n_units - n_even_units_);
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
    static constexpr int64_t kFirst = std::numeric_limits<int64_t>::max();

    Piece piece(int64_t block, int64_t begin, int64_t end, int worker) const {
        const int64_t first = std::min(block * units_, n_even_units_);
        const int64_t units = std::min<int64_t>(units_, n_even_units_ - first);
        return {first, int(std::max<int64_t>(1, units)), begin, end, worker};
    }

    // the block of another cost works with data of its own: one worker takes it, first of all, and computes all of it
    bool in_one_turn(int64_t block) const { return block * units_ >= n_even_units_; }

    int64_t cost_of_step(int64_t block) const {
        return in_one_turn(block) ? last_cost_ : piece(block, 0, 0, 0).units * kCostOfUnit;
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
    int64_t turn(int64_t cost_left, int64_t cost_of_step) const {
        return std::max<int64_t>(1, cost_left / (kTurnsPerShare * workers_ * cost_of_step));
    }

    template <class Run>
    void run_turns(const Run& run_piece) const {
        std::vector<Block> blocks(static_cast<size_t>(n_blocks_));
        std::mutex mutex;
        int64_t cost_left = 0; // of what is not yet given out
        for (int64_t b = 0; b < n_blocks_; ++b) cost_left += cost_of_step(b) * n_steps_;
        parallel_workers(workers_, [&](int worker) {
            int64_t mine = -1, end = 0;
            for (;;) {
                Piece next{};
                {
                    const std::lock_guard<std::mutex> lock(mutex);
                    if (mine >= 0) blocks[size_t(mine)] = {end, false};
                    if (cost_left == 0) return;
                    // the block just left wins a tie: its state is still in this core's cache
                    int64_t longest = 0;
                    const int64_t last = std::exchange(mine, -1);
                    for (int64_t i = 0; i < n_blocks_; ++i) {
                        const int64_t b = last < 0 ? i : (last + i) % n_blocks_;
                        const Block& block = blocks[size_t(b)];
                        const int64_t left = in_one_turn(b) ? kFirst : (n_steps_ - block.done) * cost_of_step(b);
                        if (!block.taken && block.done < n_steps_ && left > longest) longest = left, mine = b;
                    }
                    if (mine >= 0) {
                        Block& block = blocks[size_t(mine)];
                        const int64_t cost = cost_of_step(mine);
                        end = in_one_turn(mine) ? n_steps_ : std::min(n_steps_, block.done + turn(cost_left, cost));
                        next = piece(mine, block.done, end, worker);
                        cost_left -= (end - block.done) * cost;
                        block.taken = true;
                    }
                }
                if (mine >= 0) {
                    run_piece(next);
                } else {                    // every unfinished block is being computed
                    Interruptible::stops(); // who has begun the work goes on asking
                    std::this_thread::yield();
                }
            }
        });
    }

    int64_t n_units_, n_even_units_, n_steps_, n_blocks_;
    int last_cost_, units_, workers_;
    bool dynamic_;
};

} // namespace JLEBM_TARGET
} // namespace jlebm
