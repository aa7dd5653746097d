// Races between threads, found by what must happen before what, in whichever order the threads have run.
//
// Each thread has a clock for each thread of its cluster: how far it knows the other one to have come. A barrier makes
// those who meet there know what each of them knew. An access to memory is a race if an earlier access of another
// thread to the same bytes, one of the two a write, is not known to be over (Flanagan, Freund: FastTrack, PLDI 2009).
// Two writes of the same bits are none: Triton's threads store what several of them hold. Blocks of different clusters
// know nothing of each other.
//
// Synchronises: bar.sync and bar.arrive, bar.warp.sync, barrier.cluster, mbarriers with the bytes that st.async brings,
// and for cp.async its wait, after which the copy has been written by its thread. Shuffles, votes and mma exchange
// registers: who has their result knows that what the other lanes had read is read, and nothing of what they wrote.
// What wgmma reads from shared memory must also have passed a fence.proxy.async on its way from the thread that wrote
// it; that it goes on reading until its wait is not followed. Looked for where JLEBM_TEST_RACES=1.
#pragma once

#include <cstdint>
#include <memory>

namespace ptx {
namespace races {

bool wanted();

enum class Access { kRead, kWrite, kAsyncProxyRead };

// of the running thread, before memory changes; `who` is the instruction, `value` what it is about to write, if that is
// known
void access(const void* at, int bytes, Access kind, const char* who, const void* value = nullptr);

struct Knowledge; // what those who meet have known
// What a barrier is told apart by. Exactly `n_threads` enter it each time; who waits leaves with what enter() returned.
enum class Meeting { kBlock, kWarp, kCluster };
std::shared_ptr<Knowledge> enter(Meeting kind, int id, int n_threads);
void leave(const std::shared_ptr<Knowledge>& knowledge);
// around an instruction that exchanges registers in a warp
std::shared_ptr<Knowledge> enter_exchange();
void leave_exchange(const std::shared_ptr<Knowledge>& knowledge);

void mbarrier_made(const void* m, int arrivals);
void mbarrier_arrived(const void* m);
void mbarrier_waited(const void* m, int parity);
// bytes to block `rank`, counted at its mbarrier; both pointers are to this block's memory
void sent(const void* own, int bytes, const void* own_mbarrier, int rank);

void copy_issued(const void* to, int bytes);
void copies_committed();
void copies_waited(int groups_in_flight);

void proxy_fence();

} // namespace races
} // namespace ptx
