// One block of a kernel on the host: its threads as fibres, its barriers, its warps' exchanges, its copies.
// Blocks run one after the other, in an order that the seed permutes too; those of a cluster take turns.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "cuda/geometry.h"

namespace jlebm {
namespace cuda {
namespace host {

struct Index3 {
    unsigned x = 0, y = 0, z = 0;
};

// where the running thread stands; set before it runs
struct Place {
    Index3 thread, block, block_size, grid_size;
};
extern thread_local Place* place;

enum class Op : int { kSyncWarp, kShuffle, kVote, kMmaTf32, kMmaBf16, kLdmatrix, kLdmatrixTrans, kWgmma };

constexpr int kOperandBytes = 32; // of one lane in one warp-wide instruction

// What the lanes of a warp hand in and what they get: valid until the lane's second next warp-wide instruction.
struct Exchange {
    alignas(16) unsigned char in[kWarp][kOperandBytes];
    alignas(16) unsigned char out[kWarp][16];
};

// Hands in `bytes` of operands and waits for all 32 lanes; the last one runs `finish` (may be null) before any goes on.
const Exchange& exchange(Op op, const void* operands, int bytes, void (*finish)(Exchange&, int variant), int variant);

// id 0 is sync_block. Waits until n_threads have come to barrier `id`; with wait = false it only counts.
void barrier(int id, int n_threads, bool wait);

// Of the running thread's cluster: this block's place in it, a barrier of all its blocks, and stores into another
// block's shared memory, which may be sent from the first of these barriers on until that block's threads have
// returned. A store is on its way for a while, overtaken by others; until its bytes are counted NaN stands there.
int cluster_rank();
void sync_cluster();
void mbarrier_init(void* m, int arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(void* m, int bytes);
void mbarrier_wait(void* m, int parity);
void store_async(void* own, const void* value, int bytes, void* own_mbarrier, int rank);

int cluster_blocks();
// For tools that watch a kernel: what they keep with the running thread's cluster, which goes when it has ended, and
// the number of the running launch, of this thread of the host.
std::shared_ptr<void>& kept_with_cluster();
int64_t launch_number();

unsigned char* shared_base();
// throws unless [p, p + bytes) is shared memory of this block, aligned to `alignment`
void check_shared(const void* p, int bytes, int alignment, const char* instruction);

void copy_async(void* shared, const void* global, int bytes, int source_bytes);
void copy_commit();
void copy_wait(int groups_in_flight);

// The order that a warpgroup's matrix instructions ask for, of the running thread: a fence by every thread of the block
// before the first one, begin before a group of them, end before their results are read.
void fence_for_wgmma();
void wgmma_begin();
// what instructions under way will have made of d: until the end, d itself holds NaN
float* wgmma_accumulator(float* d, int count, bool add);
void wgmma_end(float* d, int count);

// Another program for a kernel, given where each of its parameters lies: tests run what the compiler has made of it.
using StandIn = void (*)(const void* const* parameters);
void set_stand_in(const void* kernel, StandIn program); // null: the kernel itself again
StandIn stand_in_of(const void* kernel);                // null: none

// counts since the last read, over all blocks of this thread of the host
struct Statistics {
    int64_t blocks = 0, barriers = 0, mma = 0, ldmatrix = 0;
    int64_t ldmatrix_wavefronts = 0; // 8 rows of 16 bytes without a bank conflict are one
};
Statistics& statistics();

// Runs all blocks. Throws std::runtime_error with kernel, file, line, block and what went wrong.
void run_grid(const LaunchSite& site, const Geometry& geometry, const CudaLaunch& launch,
              const std::function<void()>& kernel);

} // namespace host
} // namespace cuda
} // namespace jlebm
