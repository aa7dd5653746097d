// See block.h.
#include "cuda/host/block.h"

#include "cuda/host/block_threads.h"

namespace jlebm {
namespace cuda {
namespace host {

thread_local Place* place = nullptr;
thread_local Block* block = nullptr;

Statistics& statistics() {
    static thread_local Statistics counts;
    return counts;
}

namespace {
std::map<const void*, StandIn>& stand_ins() {
    static std::map<const void*, StandIn> of_kernels;
    return of_kernels;
}
} // namespace

void set_stand_in(const void* kernel, StandIn program) { stand_ins()[kernel] = program; }
StandIn stand_in_of(const void* kernel) {
    const auto found = stand_ins().find(kernel);
    return found == stand_ins().end() ? nullptr : found->second;
}

const Exchange& exchange(Op op, const void* operands, int bytes, void (*finish)(Exchange&, int), int variant) {
    return block->exchange(op, operands, bytes, finish, variant);
}

void barrier(int id, int n_threads, bool wait) { block->barrier(id, n_threads, wait); }

int cluster_rank() { return block->rank(); }
void sync_cluster() { block->sync_cluster(); }
void mbarrier_init(void* m, int arrivals) { block->mbarrier_init(m, arrivals); }
void fence_mbarrier_init() { block->fence_mbarrier_init(); }
void mbarrier_arrive(void* m, int bytes) { block->mbarrier_arrive(m, bytes); }
void mbarrier_wait(void* m, int parity) { block->mbarrier_wait(m, parity); }
void store_async(void* own, const void* value, int bytes, void* own_mbarrier, int rank) {
    block->store_async(own, value, bytes, own_mbarrier, rank);
}

int cluster_blocks() { return int(block->cluster().blocks.size()); }
std::shared_ptr<void>& kept_with_cluster() { return block->cluster().kept; }

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

} // namespace host
} // namespace cuda
} // namespace jlebm
