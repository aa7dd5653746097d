// What the blocks of a cluster write into each other's shared memory, and how they know that it has come.
//
// Time goes in exchanges. In each, a block sends what it has computed, and at least a token, to every other block, and
// waits for what they send. Two mbarriers take turns, each made for the warps of its block, which come when they have
// read all that the exchange before had brought, and for the bytes of the other blocks. Whoever has all of an exchange
// knows of every block that it had all of the one before. So nothing that is sent for the next one meets in memory, or
// is counted with, what is still on its way or still to be read from the last but one, which had the same mbarrier and
// the same buffer. Without the token that fails where a block has no share of a layer, or of a single logit.
//
// Stores are asynchronous, overtake each other, and are counted where they arrive. A barrier of the whole cluster would
// first have to see all stores of a thread through, at the scope of the device (MEMBAR.ALL.GPU in the compiler's
// listing).
#pragma once

#include "cuda/device.h"
#include "cuda/mlp_plan.h"

namespace jlebm {
namespace cuda {

class ClusterExchange {
public:
    // `memory`: kExchangeBytes of shared memory. n_blocks is a power of two.
    JLEBM_DEVICE ClusterExchange(unsigned char* memory, int n_blocks, int n_warps)
        : mbarriers_(reinterpret_cast<uint64_t*>(memory)), tokens_(reinterpret_cast<uint32_t*>(memory + 16)),
          n_blocks_(n_blocks), rank_(cluster_rank()) {
        static_assert(kExchangeBytes >= 16 + 4 * kMaxClusterBlocks, "two mbarriers, and a token of every block");
        if (threadIdx.x == 0) {
            for (int i = 0; i < 2; ++i) mbarrier_init(mbarriers_ + i, n_warps);
            fence_mbarrier_init();
        }
        sync_cluster(); // all blocks have begun, and their mbarriers may be counted at
    }

    // to the same place of every other block's memory; T of 4, 8 or 16 bytes
    template <class T>
    JLEBM_DEVICE void send(T* own, const T& v) const {
#pragma unroll 1
        for (int other = 1; other < n_blocks_; ++other) send_to((rank_ + other) & (n_blocks_ - 1), own, v);
    }
    template <class T>
    JLEBM_DEVICE void send_to(int rank, T* own, const T& v) const {
        store_async(own, v, current(), rank);
    }

    // All warps of this block have come, and `bytes` from the other blocks. The next exchange begins.
    JLEBM_DEVICE void arrive_and_wait(int bytes, bool wait = true) {
        sync_warp(); // what the warp's lanes have read and written comes before its arrival
        if (threadIdx.x == 0) send(tokens_ + rank_, 0u);
        if (lane_index() == 0) mbarrier_arrive(current(), warp_index() == 0 ? bytes + 4 * (n_blocks_ - 1) : 0);
        if (wait) mbarrier_wait(current(), exchange_ >> 1 & 1);
        ++exchange_;
    }

private:
    JLEBM_DEVICE uint64_t* current() const { return mbarriers_ + (exchange_ & 1); }

    uint64_t* const mbarriers_;
    uint32_t* const tokens_;
    const int n_blocks_, rank_;
    uint32_t exchange_ = 0;
};

} // namespace cuda
} // namespace jlebm
