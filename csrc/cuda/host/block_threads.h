// A block and its cluster while they run: threads, what they wait for, what they have handed in (block.h's words).
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/host/block.h"
#include "cuda/host/fibres.h"

namespace jlebm {
namespace cuda {
namespace host {

constexpr int kBarriers = 16, kClusterBarrier = kBarriers, kMbarrier = kBarriers + 1;
constexpr uint16_t kPoison = 0x7fff; // NaN as bfloat16, and two of them as float32

inline const char* name_of(Op op) {
    switch (op) {
    case Op::kSyncWarp:
        return "sync_warp";
    case Op::kShuffle:
        return "shuffle";
    case Op::kVote:
        return "warp_any or warp_all";
    case Op::kMmaTf32:
        return "mma_m16n8k8_tf32";
    case Op::kMmaBf16:
        return "mma_m16n8k16_bf16";
    case Op::kLdmatrix:
        return "ldmatrix";
    case Op::kLdmatrixTrans:
        return "ldmatrix_trans";
    case Op::kWgmma:
        return "wgmma_bf16";
    }
    return "?";
}

inline void poison(void* p, int64_t bytes) {
    auto* bytes_of = static_cast<unsigned char*>(p);
    for (int64_t i = 0; i < bytes; ++i) bytes_of[i] = i % 2 ? uint8_t(kPoison >> 8) : uint8_t(kPoison);
}

// splitmix64
struct Order {
    uint64_t state;
    uint64_t next() {
        uint64_t v = (state += 0x9E3779B97F4A7C15u);
        v = (v ^ (v >> 30)) * 0xBF58476D1CE4E5B9u;
        v = (v ^ (v >> 27)) * 0x94D049BB133111EBu;
        return v ^ (v >> 31);
    }
    int below(int n) { return int(next() % uint64_t(n)); }
};

struct Copy {
    void* shared;
    const void* global;
    int bytes, source_bytes;
};

struct Thread {
    Place place;
    bool waits = false;
    int barrier = -1; // where it waits; -1: in a warp-wide instruction; kClusterBarrier; kMbarrier
    bool done = false;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
    bool fenced = false, begun = false;
    std::map<float*, std::vector<float>> accumulators; // of matrix instructions under way
};

struct Warp {
    int arrived = 0, parity = 0;
    Op op = Op::kSyncWarp;
    int variant = 0, first_lane = 0;
    Exchange buffers[2]; // a lane may be one instruction ahead of one that still reads
};

struct Barrier {
    int arrived = 0, wanted = 0;
    std::vector<int> waiting;
};

// of a cluster, in the order of their ranks; a block of its own is a cluster of one
class Block;
struct Letter { // a store_async on its way
    Block* to;
    int64_t at, mbarrier; // from the beginning of shared memory
    int bytes;
    unsigned char value[16];
};
struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;
    int64_t arrived = 0, barriers = 0;
    std::vector<Letter> letters;
    std::shared_ptr<void> kept;
};

struct Mbarrier {
    int arrivals = 0, pending = 0, phase = 0;
    int64_t bytes = 0; // announced and not come; below 0 while some come before they are announced
    std::vector<int> waiting;
};

class Block {
public:
    Block(FibrePool& fibres, const Geometry& geometry, Index3 index, uint64_t seed, Cluster* cluster)
        : cluster_(cluster), fibres_(fibres), order_{seed}, threads_(size_t(geometry.block)),
          warps_(size_t(geometry.block / kWarp)), shared_bytes_(geometry.shared_bytes) {
        for (int i = 0; i < geometry.block; ++i) {
            threads_[size_t(i)].place = {{unsigned(i), 0, 0},
                                         index,
                                         {unsigned(geometry.block), 1, 1},
                                         {unsigned(geometry.grid), unsigned(geometry.grid_y), 1}};
        }
        if (shared_bytes_ > 0) {
            void* memory = nullptr; // exactly as large as asked for: the address sanitizer sees what lies beyond
            if (posix_memalign(&memory, 1024, size_t(shared_bytes_)) != 0) throw std::bad_alloc();
            shared_.reset(static_cast<unsigned char*>(memory));
            poison(memory, shared_bytes_);
        }
    }

    void begin(const std::function<void()>& kernel) {
        fibres_.reset(int(threads_.size()), [this, &kernel](int) {
            try {
                kernel();
            } catch (...) { // handed on by the thread that runs the block
                error_ = std::current_exception();
            }
        });
        for (int i = 0; i < int(threads_.size()); ++i) ready_.push_back(i);
    }

    bool ready() const { return !ready_.empty(); }

    // one of the threads, as far as it comes
    void go_on() {
        const int pick = next_ready();
        running_ = ready_[size_t(pick)];
        ready_[size_t(pick)] = ready_.back();
        ready_.pop_back();
        place = &threads_[size_t(running_)].place;
        threads_[size_t(running_)].done = fibres_.run(running_);
        n_done_ += threads_[size_t(running_)].done;
        place = nullptr;
        if (error_) std::rethrow_exception(error_);
    }

    const Exchange& exchange(Op op, const void* operands, int bytes, void (*finish)(Exchange&, int), int variant) {
        Warp& warp = warps_[size_t(running_ / kWarp)];
        const int lane = running_ % kWarp;
        if (warp.arrived == 0) {
            warp.op = op, warp.variant = variant, warp.first_lane = lane;
        } else if (warp.op != op || warp.variant != variant) {
            throw std::runtime_error("warp " + std::to_string(running_ / kWarp) + ": lane " + std::to_string(lane) +
                                     " runs " + name_of(op) + " while lane " + std::to_string(warp.first_lane) +
                                     " runs " + name_of(warp.op) + (warp.op == op ? " of another size" : "") +
                                     "; all 32 lanes must run the same");
        }
        Exchange& buffer = warp.buffers[warp.parity];
        if (bytes > 0) std::memcpy(buffer.in[lane], operands, size_t(bytes));
        if (++warp.arrived < kWarp) {
            wait_at(-1);
        } else {
            warp.arrived = 0;
            warp.parity ^= 1;
            const int first = running_ - lane;
            for (int i = first; i < first + kWarp; ++i)
                if (i != running_) wake(i);
            if (finish) finish(buffer, variant);
        }
        return buffer;
    }

    void barrier(int id, int n_threads, bool wait) {
        if (id < 0 || id >= kBarriers || n_threads < kWarp || n_threads % kWarp || n_threads > int(threads_.size()))
            throw std::runtime_error("barrier " + std::to_string(id) + " of " + std::to_string(n_threads) +
                                     " threads: ids are 0 to 15, and threads a multiple of 32 up to the block's " +
                                     std::to_string(threads_.size()));
        Barrier& b = barriers_[id];
        if (b.arrived == 0) b.wanted = n_threads;
        if (b.wanted != n_threads)
            throw std::runtime_error("barrier " + std::to_string(id) + ": thread " + std::to_string(running_) +
                                     " says it is for " + std::to_string(n_threads) + " threads, others said " +
                                     std::to_string(b.wanted));
        if (++b.arrived == n_threads) {
            for (int i : b.waiting) wake(i);
            b.waiting.clear();
            b.arrived = 0;
            ++statistics().barriers;
        } else if (wait) {
            b.waiting.push_back(running_);
            wait_at(id);
        }
    }

    void sync_cluster() {
        int64_t n_threads = 0;
        for (const auto& block : cluster_->blocks) n_threads += int64_t(block->threads_.size());
        if (++cluster_->arrived < n_threads) return wait_at(kClusterBarrier);
        cluster_->arrived = 0;
        ++cluster_->barriers;
        ++statistics().barriers;
        for (const auto& block : cluster_->blocks)
            for (int i = 0; i < int(block->threads_.size()); ++i)
                if (block->threads_[size_t(i)].waits && block->threads_[size_t(i)].barrier == kClusterBarrier)
                    block->wake(i);
    }

    Cluster& cluster() const { return *cluster_; }
    int rank() const {
        int rank = 0;
        while (cluster_->blocks[size_t(rank)].get() != this) ++rank;
        return rank;
    }

    void mbarrier_init(void* m, int arrivals) {
        check_shared(m, 8, 8, "mbarrier_init");
        Mbarrier& fresh = mbarriers_[at_of(m)];
        fresh.arrivals = fresh.pending = arrivals;
        init_fenced_ = false;
    }

    void fence_mbarrier_init() { init_fenced_ = true; }

    void mbarrier_arrive(void* m, int bytes) {
        Mbarrier& mine = mbarrier_at(at_of(m), "mbarrier_arrive");
        if (mine.pending == 0)
            throw std::runtime_error("mbarrier_arrive: more threads than the " + std::to_string(mine.arrivals) +
                                     " it was made for");
        --mine.pending;
        mine.bytes += bytes;
        end_phase(mine);
    }

    void mbarrier_wait(void* m, int parity) {
        Mbarrier& mine = mbarrier_at(at_of(m), "mbarrier_wait");
        if (mine.phase != parity) return; // ended
        mine.waiting.push_back(running_);
        wait_at(kMbarrier);
    }

    void store_async(void* own, const void* value, int bytes, void* own_mbarrier, int rank) {
        check_shared(own, bytes, bytes, "store_async");
        if (rank < 0 || rank >= int(cluster_->blocks.size()))
            throw std::runtime_error("store_async: the cluster has " + std::to_string(cluster_->blocks.size()) +
                                     " blocks, got rank " + std::to_string(rank));
        Block& to = *cluster_->blocks[size_t(rank)];
        if (cluster_->barriers == 0)
            throw std::runtime_error("store_async before the first sync_cluster: block " + std::to_string(rank) +
                                     " may not have begun");
        if (to.n_done_ == int(threads_.size()))
            throw std::runtime_error("store_async: block " + std::to_string(rank) + " has ended");
        Letter letter{&to, at_of(own), at_of(own_mbarrier), bytes, {}};
        to.mbarrier_at(letter.mbarrier, "store_async");
        std::memcpy(letter.value, value, size_t(bytes));
        poison(to.shared() + letter.at, bytes); // until it is counted nobody can know what stands there
        cluster_->letters.push_back(letter);
    }

    // the value of a store_async to this block is there
    void receive(const Letter& letter) {
        if (n_done_ == int(threads_.size()))
            throw std::runtime_error("store_async: the block has ended before its bytes have come");
        std::memcpy(shared() + letter.at, letter.value, size_t(letter.bytes));
        Mbarrier& mine = mbarrier_at(letter.mbarrier, "store_async");
        mine.bytes -= letter.bytes;
        end_phase(mine);
    }

    unsigned char* shared() const { return shared_.get(); }
    int64_t shared_bytes() const { return shared_bytes_; }
    const std::vector<Thread>& threads() const { return threads_; }
    Thread& running() { return threads_[size_t(running_)]; }
    int running_index() const { return running_; }

    // nobody can go on: either all have returned, or some wait for what will never come
    void check_end() const {
        int returned = 0;
        std::string who;
        for (size_t i = 0; i < threads_.size(); ++i) {
            const Thread& t = threads_[i];
            if (t.done) {
                ++returned;
                continue;
            }
            if (who.size() > 300) continue;
            who += (who.empty() ? "thread " : ", thread ") + std::to_string(i);
            if (t.barrier == kClusterBarrier) {
                who += " in sync_cluster (" + std::to_string(cluster_->arrived) + " came)";
            } else if (t.barrier == kMbarrier) {
                who += " at an mbarrier";
            } else if (t.barrier >= 0) {
                const Barrier& b = barriers_[t.barrier];
                who += " at barrier " + std::to_string(t.barrier) + " (" + std::to_string(b.arrived) + " of " +
                       std::to_string(b.wanted) + " came)";
            } else {
                const Warp& w = warps_[i / kWarp];
                who += std::string(" in ") + name_of(w.op) + " (" + std::to_string(w.arrived) + " of 32 lanes came)";
            }
        }
        if (!who.empty())
            throw std::runtime_error("threads wait for others that never come; " + std::to_string(returned) + " of " +
                                     std::to_string(threads_.size()) + " have returned, these wait: " + who);
        for (size_t i = 0; i < threads_.size(); ++i) {
            bool pending = !threads_[i].open.empty();
            for (const auto& group : threads_[i].groups) pending = pending || !group.empty();
            if (pending)
                throw std::runtime_error("thread " + std::to_string(i) +
                                         " returned with asynchronous copies that it never waited for");
            if (!threads_[i].accumulators.empty())
                throw std::runtime_error("thread " + std::to_string(i) +
                                         " returned with matrix instructions that it never waited for");
        }
        for (int id = 0; id < kBarriers; ++id)
            if (barriers_[id].arrived)
                throw std::runtime_error("barrier " + std::to_string(id) + " was left with " +
                                         std::to_string(barriers_[id].arrived) + " of " +
                                         std::to_string(barriers_[id].wanted) + " arrivals");
    }

private:
    // Any thread, but now and then one warp falls far behind the others: a race of a slow warp with a fast one that has
    // long work between shows only then.
    int next_ready() {
        const int n_warps = int(warps_.size()), n_ready = int(ready_.size());
        if (--picks_until_laggard_ <= 0) {
            laggard_ = order_.below(2 * n_warps); // none in half of the cases
            picks_until_laggard_ = 1 << (5 + order_.below(9));
        }
        int pick = order_.below(n_ready);
        for (int i = 0; i < 6 && ready_[size_t(pick)] / kWarp == laggard_; ++i) pick = order_.below(n_ready);
        return pick;
    }

    struct Free {
        void operator()(unsigned char* p) const { std::free(p); }
    };

    int64_t at_of(const void* p) const { return static_cast<const unsigned char*>(p) - shared(); }

    Mbarrier& mbarrier_at(int64_t at, const char* who) {
        const auto found = mbarriers_.find(at);
        if (found == mbarriers_.end() || !init_fenced_)
            throw std::runtime_error(std::string(who) + ": no mbarrier_init and fence_mbarrier_init for offset " +
                                     std::to_string(at) + " of shared memory");
        return found->second;
    }

    void end_phase(Mbarrier& mine) {
        if (mine.pending > 0 || mine.bytes != 0) return;
        mine.pending = mine.arrivals;
        mine.phase ^= 1;
        ++statistics().barriers;
        for (int i : mine.waiting) wake(i);
        mine.waiting.clear();
    }

    void wait_at(int barrier) {
        Thread& thread = running();
        thread.waits = true;
        thread.barrier = barrier;
        fibres_.pause();
    }

    void wake(int i) {
        threads_[size_t(i)].waits = false;
        ready_.push_back(i);
    }

    Cluster* cluster_;
    int n_done_ = 0;
    FibrePool& fibres_;
    int laggard_ = -1, picks_until_laggard_ = 0;
    Order order_;
    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    Barrier barriers_[kBarriers];
    std::map<int64_t, Mbarrier> mbarriers_; // by their place in shared memory
    bool init_fenced_ = true;
    std::vector<int> ready_;
    std::unique_ptr<unsigned char, Free> shared_;
    int64_t shared_bytes_;
    int running_ = -1;
    std::exception_ptr error_;
};

extern thread_local Block* block; // whose thread runs

} // namespace host
} // namespace cuda
} // namespace jlebm
