// See block.h.
#include "cuda/host/block.h"

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

#include "cuda/host/fibres.h"

namespace jlebm {
namespace cuda {
namespace host {

thread_local Place* place = nullptr;

namespace {

constexpr size_t kStackBytes =
    512 * 1024; // the sanitizers' frames are several times larger; untouched pages cost nothing
constexpr int kBarriers = 16;
constexpr int kMaxThreads = 1024;
constexpr uint16_t kPoison = 0x7fff; // NaN as bfloat16, and two of them as float32

const char* name_of(Op op) {
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

void poison(void* p, int64_t bytes) {
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
    int barrier = -1; // where it waits; -1: in a warp-wide instruction
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

class Block {
public:
    Block(FibrePool& fibres, const Geometry& geometry, Index3 index, uint64_t seed)
        : fibres_(fibres), order_{seed}, threads_(size_t(geometry.block)), warps_(size_t(geometry.block / kWarp)),
          shared_bytes_(geometry.shared_bytes) {
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

    void run(const std::function<void()>& kernel) {
        fibres_.reset(int(threads_.size()), [this, &kernel](int) {
            try {
                kernel();
            } catch (...) { // handed on by the thread that runs the block
                error_ = std::current_exception();
            }
        });
        for (int i = 0; i < int(threads_.size()); ++i) ready_.push_back(i);
        while (!ready_.empty()) {
            const int pick = next_ready();
            running_ = ready_[size_t(pick)];
            ready_[size_t(pick)] = ready_.back();
            ready_.pop_back();
            place = &threads_[size_t(running_)].place;
            threads_[size_t(running_)].done = fibres_.run(running_);
            place = nullptr;
            if (error_) std::rethrow_exception(error_);
        }
        check_end();
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

    unsigned char* shared() const { return shared_.get(); }
    int64_t shared_bytes() const { return shared_bytes_; }
    const std::vector<Thread>& threads() const { return threads_; }
    Thread& running() { return threads_[size_t(running_)]; }
    int running_index() const { return running_; }

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
            if (t.barrier >= 0) {
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

    FibrePool& fibres_;
    int laggard_ = -1, picks_until_laggard_ = 0;
    Order order_;
    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    Barrier barriers_[kBarriers];
    std::vector<int> ready_;
    std::unique_ptr<unsigned char, Free> shared_;
    int64_t shared_bytes_;
    int running_ = -1;
    std::exception_ptr error_;
};

thread_local Block* block = nullptr;

} // namespace

Statistics& statistics() {
    static thread_local Statistics counts;
    return counts;
}

const Exchange& exchange(Op op, const void* operands, int bytes, void (*finish)(Exchange&, int), int variant) {
    return block->exchange(op, operands, bytes, finish, variant);
}

void barrier(int id, int n_threads, bool wait) { block->barrier(id, n_threads, wait); }

unsigned char* shared_base() { return block->shared(); }

void check_shared(const void* p, int bytes, int alignment, const char* instruction) {
    const int64_t at = static_cast<const unsigned char*>(p) - block->shared();
    if (at < 0 || at + bytes > block->shared_bytes())
        throw std::runtime_error(std::string(instruction) + " by thread " + std::to_string(block->running_index()) +
                                 ": " + std::to_string(bytes) + " bytes at offset " + std::to_string(at) +
                                 " are not in the block's " + std::to_string(block->shared_bytes()) +
                                 " bytes of shared memory");
    if (at % alignment)
        throw std::runtime_error(std::string(instruction) + " by thread " + std::to_string(block->running_index()) +
                                 ": offset " + std::to_string(at) + " in shared memory must be a multiple of " +
                                 std::to_string(alignment));
}

void copy_async(void* shared, const void* global, int bytes, int source_bytes) {
    check_shared(shared, bytes, bytes, "cp_async");
    if (reinterpret_cast<uintptr_t>(global) % uintptr_t(bytes))
        throw std::runtime_error("cp_async by thread " + std::to_string(block->running_index()) +
                                 ": the source must be aligned to " + std::to_string(bytes) + " bytes");
    if (source_bytes < 0 || source_bytes > bytes)
        throw std::runtime_error("cp_async: source_bytes must be 0 to " + std::to_string(bytes) + ", got " +
                                 std::to_string(source_bytes));
    poison(shared, bytes); // until the wait nobody can know what stands there
    block->running().open.push_back({shared, global, bytes, source_bytes});
}

void copy_commit() {
    Thread& thread = block->running();
    thread.groups.push_back(std::move(thread.open));
    thread.open.clear();
}

void copy_wait(int groups_in_flight) {
    Thread& thread = block->running();
    while (int(thread.groups.size()) > groups_in_flight) {
        for (const Copy& copy : thread.groups.front()) {
            if (copy.source_bytes) std::memcpy(copy.shared, copy.global, size_t(copy.source_bytes));
            std::memset(static_cast<char*>(copy.shared) + copy.source_bytes, 0, size_t(copy.bytes - copy.source_bytes));
        }
        thread.groups.pop_front();
    }
}

void fence_for_wgmma() { block->running().fenced = true; }

void wgmma_begin() {
    if (block->threads().size() % 128)
        throw std::runtime_error("wgmma_begin: the block must be made of warpgroups of 128 threads, it has " +
                                 std::to_string(block->threads().size()));
    for (const Thread& thread : block->threads())
        if (!thread.fenced && !thread.done)
            throw std::runtime_error("wgmma_begin by thread " + std::to_string(block->running_index()) +
                                     " before every thread's fence_for_wgmma");
    block->running().begun = true;
}

float* wgmma_accumulator(float* d, int count, bool add) {
    Thread& thread = block->running();
    if (!thread.begun)
        throw std::runtime_error("wgmma_bf16 by thread " + std::to_string(block->running_index()) +
                                 " without wgmma_begin");
    const auto [found, fresh] = thread.accumulators.try_emplace(d, size_t(count), 0.0f);
    if (fresh && add) std::copy_n(d, count, found->second.begin());
    if (!fresh && !add) std::fill(found->second.begin(), found->second.end(), 0.0f);
    poison(d, int64_t(count) * 4);
    return found->second.data();
}

void wgmma_end(float* d, int count) {
    Thread& thread = block->running();
    const auto found = thread.accumulators.find(d);
    if (found == thread.accumulators.end() || int(found->second.size()) != count || thread.accumulators.size() != 1)
        throw std::runtime_error("wgmma_end by thread " + std::to_string(block->running_index()) +
                                 ": other accumulators are under way");
    std::copy_n(found->second.begin(), count, d);
    thread.accumulators.clear();
    thread.begun = false;
}

void run_grid(const LaunchSite& site, const Geometry& geometry, const CudaLaunch& launch,
              const std::function<void()>& kernel) {
    const std::string where = std::string(site.kernel) + " (" + site.file + ":" + std::to_string(site.line) + ")";
    if (geometry.grid == 0 || geometry.grid_y == 0) return;
    if (geometry.grid < 0 || geometry.grid > kMaxGridX || geometry.grid_y < 0 || geometry.grid_y > 65535 ||
        geometry.block < kWarp || geometry.block % kWarp || geometry.block > kMaxThreads || geometry.shared_bytes < 0 ||
        geometry.shared_bytes > launch.max_shared_bytes)
        throw std::runtime_error(where + ": a grid of " + std::to_string(geometry.grid) + " x " +
                                 std::to_string(geometry.grid_y) + " blocks of " + std::to_string(geometry.block) +
                                 " threads with " + std::to_string(geometry.shared_bytes) +
                                 " bytes of shared memory cannot be launched where a block may have " +
                                 std::to_string(launch.max_shared_bytes));
    static thread_local FibrePool fibres(kStackBytes);
    if (block) throw std::runtime_error(where + ": launched from inside a kernel");
    const int64_t n_blocks = geometry.grid * geometry.grid_y;
    // some order that visits each block once: start anywhere, stride prime to their number
    Order order{launch.order_seed};
    const int64_t start = int64_t(order.next() % uint64_t(n_blocks));
    const bool backwards = order.next() % 2;
    for (int64_t n = 0; n < n_blocks; ++n) {
        const int64_t at = (start + (backwards ? n_blocks - n : n)) % n_blocks;
        const Index3 index{unsigned(at % geometry.grid), unsigned(at / geometry.grid), 0};
        try {
            Block current(fibres, geometry, index, order.next());
            block = &current;
            current.run(kernel);
            block = nullptr;
        } catch (const std::exception& error) {
            block = nullptr;
            place = nullptr;
            throw std::runtime_error(where + ", block (" + std::to_string(index.x) + ", " + std::to_string(index.y) +
                                     "): " + error.what());
        }
        ++statistics().blocks;
    }
}

} // namespace host
} // namespace cuda
} // namespace jlebm
