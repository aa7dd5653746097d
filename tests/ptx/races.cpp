// See races.h.
#include "races.h"

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda/host/block_threads.h"

namespace ptx {
namespace races {

namespace host = jlebm::cuda::host;
using Clock = std::vector<uint32_t>;

struct Knowledge {
    Clock over, fenced; // accesses that are over, and those of them that the asynchronous proxy may see
};

namespace {

constexpr int kCell = 2; // bytes: the smallest that two threads write beside each other

struct Moment {
    int thread = -1;
    uint32_t time = 0;
};
struct Cell {
    int64_t cluster = -1;
    Moment write;
    const char* writer = "";
    std::vector<Moment> reads; // since the last write, one of each thread
};
struct Place {
    int entered = 0;
    std::shared_ptr<Knowledge> knowledge;
};
struct Mbarrier {
    int64_t arrivals = 1, arrived = 0;
    std::map<int64_t, Knowledge> of_phase;
    Knowledge sent;
};
struct Copy {
    const void* to;
    int bytes;
};
struct Copies {
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
};

void join(Clock& into, const Clock& other) {
    if (into.size() < other.size()) into.resize(other.size(), 0);
    for (size_t i = 0; i < other.size(); ++i) into[i] = std::max(into[i], other[i]);
}
void join(Knowledge& into, const Knowledge& other) {
    join(into.over, other.over);
    join(into.fenced, other.fenced);
}

struct OfCluster {
    int64_t number;
    int block_threads;
    std::vector<Knowledge> of_thread;
    std::map<std::pair<int, int>, Place> places; // kind and block, warp or cluster; barrier
    std::map<std::pair<int, int64_t>, Mbarrier> mbarriers;
    std::map<std::pair<int, int64_t>, Cell> shared; // block; cell
    std::vector<Copies> copies;
};

struct Global {
    int64_t launch = -1, clusters = 0;
    std::unordered_map<uintptr_t, Cell> cells;
};
Global& global() {
    static thread_local Global of_launch;
    if (of_launch.launch != host::launch_number()) of_launch = {host::launch_number(), 0, {}};
    return of_launch;
}

OfCluster& cluster() {
    std::shared_ptr<void>& kept = host::kept_with_cluster();
    if (!kept) {
        auto made = std::make_shared<OfCluster>();
        made->number = global().clusters++;
        made->block_threads = int(host::block->threads().size());
        const int n = made->block_threads * host::cluster_blocks();
        made->of_thread.resize(size_t(n));
        made->copies.resize(size_t(n));
        for (int i = 0; i < n; ++i) {
            made->of_thread[size_t(i)].over.resize(size_t(n), 0);
            made->of_thread[size_t(i)].fenced.resize(size_t(n), 0);
            made->of_thread[size_t(i)].over[size_t(i)] = 1;
        }
        kept = made;
    }
    return *static_cast<OfCluster*>(kept.get());
}

int running(const OfCluster& all) { return host::block->rank() * all.block_threads + host::block->running_index(); }
std::string thread_text(const OfCluster& all, int thread) {
    std::string text = "thread " + std::to_string(thread % all.block_threads);
    if (int(all.of_thread.size()) > all.block_threads)
        text += " of block " + std::to_string(thread / all.block_threads) + " of its cluster";
    return text;
}
int64_t offset_of(const void* p) { return static_cast<const unsigned char*>(p) - host::block->shared(); }
bool is_shared(const void* p) { return offset_of(p) >= 0 && offset_of(p) < host::block->shared_bytes(); }

// which may be of another block
void touch(OfCluster& all, Cell& cell, Access kind, const char* who, const std::string& where) {
    const int me = running(all);
    const bool writes = kind == Access::kWrite;
    const Knowledge& known = all.of_thread[size_t(me)];
    const auto fail = [&](const std::string& other) {
        throw std::runtime_error("a race at " + where + ": " + who + " by " + thread_text(all, me) + ", " + other +
                                 ", and nothing between them that orders the two");
    };
    if (cell.cluster >= 0 && cell.cluster != all.number) {
        if (cell.write.thread >= 0) fail(std::string(cell.writer) + " by a thread of another block");
        if (writes && !cell.reads.empty()) fail("read by a thread of another block");
        if (writes) cell.reads.clear();
        if (!writes) return; // blocks that only read
    }
    cell.cluster = all.number;
    if (cell.write.thread >= 0 && cell.write.thread != me) {
        if (known.over[size_t(cell.write.thread)] < cell.write.time)
            fail(std::string(cell.writer) + " by " + thread_text(all, cell.write.thread));
    }
    if (kind == Access::kAsyncProxyRead && cell.write.thread >= 0 &&
        known.fenced[size_t(cell.write.thread)] < cell.write.time)
        fail(std::string(cell.writer) + " by " + thread_text(all, cell.write.thread) + " without a fence.proxy.async");
    const uint32_t now = known.over[size_t(me)];
    if (writes) {
        for (const Moment& read : cell.reads)
            if (read.thread != me && known.over[size_t(read.thread)] < read.time)
                fail("read by " + thread_text(all, read.thread));
        cell.reads.clear();
        cell.write = {me, now}, cell.writer = who;
        return;
    }
    for (Moment& read : cell.reads)
        if (read.thread == me) {
            read.time = now;
            return;
        }
    cell.reads.push_back({me, now});
}

void touch_shared(OfCluster& all, int rank, int64_t offset, int bytes, Access kind, const char* who) {
    for (int64_t at = offset / kCell; at * kCell < offset + bytes; ++at)
        touch(all, all.shared[{rank, at}], kind, who, "offset " + std::to_string(at * kCell) + " of shared memory");
}

// after what a thread has told others it does something new
void release(OfCluster& all, Knowledge& into) {
    Knowledge& mine = all.of_thread[size_t(running(all))];
    join(into, mine);
    ++mine.over[size_t(running(all))];
}

} // namespace

bool wanted() {
    static const bool is_set = std::getenv("JLEBM_TEST_RACES") && std::string(std::getenv("JLEBM_TEST_RACES")) == "1";
    return is_set;
}

void access(const void* at, int bytes, Access kind, const char* who) {
    OfCluster& all = cluster();
    if (is_shared(at)) return touch_shared(all, host::block->rank(), offset_of(at), bytes, kind, who);
    const auto first = reinterpret_cast<uintptr_t>(at);
    for (uintptr_t cell = first / kCell; cell * kCell < first + uintptr_t(bytes); ++cell)
        touch(all, global().cells[cell], kind, who, "an address of global memory");
}

std::shared_ptr<Knowledge> enter(Meeting kind, int id, int n_threads) {
    OfCluster& all = cluster();
    const int rank = host::block->rank(), warp = host::block->running_index() / 32;
    const int group = kind == Meeting::kCluster ? 0 : kind == Meeting::kBlock ? 1 + rank : 1000 * (1 + rank) + warp;
    Place& place = all.places[{group, id}];
    if (place.entered == 0) place.knowledge = std::make_shared<Knowledge>();
    const std::shared_ptr<Knowledge> knowledge = place.knowledge;
    release(all, *knowledge);
    if (++place.entered == n_threads) place.entered = 0;
    return knowledge;
}

void leave(const std::shared_ptr<Knowledge>& knowledge) {
    OfCluster& all = cluster();
    join(all.of_thread[size_t(running(all))], *knowledge);
}

void mbarrier_made(const void* m, int arrivals) {
    cluster().mbarriers[{host::block->rank(), offset_of(m)}].arrivals = arrivals;
}
void mbarrier_arrived(const void* m) {
    OfCluster& all = cluster();
    Mbarrier& mine = all.mbarriers[{host::block->rank(), offset_of(m)}];
    release(all, mine.of_phase[mine.arrived / mine.arrivals]);
    ++mine.arrived;
}
void mbarrier_waited(const void* m, int parity) {
    OfCluster& all = cluster();
    Mbarrier& mine = all.mbarriers[{host::block->rank(), offset_of(m)}];
    int64_t phase = mine.arrived / mine.arrivals - 1; // the last one that is complete
    if (phase >= 0 && (phase & 1) != parity) --phase;
    Knowledge& known = all.of_thread[size_t(running(all))];
    if (phase >= 0) join(known, mine.of_phase[phase]);
    join(known, mine.sent);
}
void sent(const void* own, int bytes, const void* own_mbarrier, int rank) {
    OfCluster& all = cluster();
    touch_shared(all, rank, offset_of(own), bytes, Access::kWrite, "st.async");
    release(all, all.mbarriers[{rank, offset_of(own_mbarrier)}].sent);
}

void copy_issued(const void* to, int bytes) {
    OfCluster& all = cluster();
    access(to, bytes, Access::kWrite, "cp.async");
    all.copies[size_t(running(all))].open.push_back({to, bytes});
}
void copies_committed() {
    OfCluster& all = cluster();
    Copies& mine = all.copies[size_t(running(all))];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}
void copies_waited(int groups_in_flight) {
    OfCluster& all = cluster();
    Copies& mine = all.copies[size_t(running(all))];
    while (int(mine.groups.size()) > groups_in_flight) {
        for (const Copy& copy : mine.groups.front()) access(copy.to, copy.bytes, Access::kWrite, "cp.async");
        mine.groups.pop_front();
    }
}

void proxy_fence() {
    OfCluster& all = cluster();
    Knowledge& mine = all.of_thread[size_t(running(all))];
    mine.fenced = mine.over;
}

} // namespace races
} // namespace ptx
