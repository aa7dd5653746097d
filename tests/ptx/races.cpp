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
    Clock over;   // accesses that are over
    Clock fenced; // those of them that the asynchronous proxy may see
    Clock read;   // what has been read, whether or not what was written before is over
};

namespace {

struct Moment {
    int thread = -1;
    uint32_t time = 0;
};
struct Cell {
    int64_t cluster = -1;
    const char* writer = "";
    std::vector<Moment> writes; // several only of the same bits
    std::vector<Moment> reads;  // since the last write, one of each thread
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
    join(into.read, other.read);
}

struct OfCluster {
    int64_t number;
    int block_threads;
    std::vector<Knowledge> of_thread;
    std::map<std::pair<int, int>, Place> places; // kind and block, warp or cluster; barrier
    std::map<std::pair<int, int64_t>, Mbarrier> mbarriers;
    std::vector<std::vector<Cell>> shared; // block; byte
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
        made->shared.resize(size_t(host::cluster_blocks()));
        for (auto& bytes : made->shared) bytes.resize(size_t(host::block->shared_bytes()));
        for (int i = 0; i < n; ++i) {
            made->of_thread[size_t(i)].over.resize(size_t(n), 0);
            made->of_thread[size_t(i)].fenced.resize(size_t(n), 0);
            made->of_thread[size_t(i)].read.resize(size_t(n), 0);
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
void remember(std::vector<Moment>& moments, Moment now) {
    for (Moment& moment : moments)
        if (moment.thread == now.thread) {
            moment = now;
            return;
        }
    moments.push_back(now);
}

int64_t offset_of(const void* p) { return static_cast<const unsigned char*>(p) - host::block->shared(); }
bool is_shared(const void* p) { return offset_of(p) >= 0 && offset_of(p) < host::block->shared_bytes(); }

// offset: in shared memory, -1 in global memory
void touch(OfCluster& all, Cell& cell, Access kind, const char* who, bool same_bits, int64_t offset) {
    const int me = running(all);
    const bool writes = kind == Access::kWrite;
    const Knowledge& known = all.of_thread[size_t(me)];
    const auto fail = [&](const std::string& other) {
        const std::string where =
            offset < 0 ? "an address of global memory" : "offset " + std::to_string(offset) + " of shared memory";
        throw std::runtime_error("a race at " + where + ": " + who + " by " + thread_text(all, me) + ", " + other +
                                 ", and nothing between them that orders the two");
    };
    if (cell.cluster >= 0 && cell.cluster != all.number) {
        if (!cell.writes.empty() && !same_bits) fail(std::string(cell.writer) + " by a thread of another block");
        if (writes && !cell.reads.empty()) fail("read by a thread of another block");
        if (!writes) return; // blocks that only read
        cell.writes.clear();
    }
    cell.cluster = all.number;
    bool all_over = true;
    for (const Moment& write : cell.writes) {
        const bool over = write.thread == me || known.over[size_t(write.thread)] >= write.time;
        all_over = all_over && over;
        if (!over && !same_bits) fail(std::string(cell.writer) + " by " + thread_text(all, write.thread));
        if (kind == Access::kAsyncProxyRead && known.fenced[size_t(write.thread)] < write.time)
            fail(std::string(cell.writer) + " by " + thread_text(all, write.thread) + " without a fence.proxy.async");
    }
    const Moment now = {me, known.over[size_t(me)]};
    if (!writes) return remember(cell.reads, now);
    for (const Moment& read : cell.reads)
        if (read.thread != me && std::max(known.over[size_t(read.thread)], known.read[size_t(read.thread)]) < read.time)
            fail("read by " + thread_text(all, read.thread));
    cell.reads.clear();
    if (all_over) cell.writes.clear();
    remember(cell.writes, now);
    cell.writer = who;
}

bool same(const void* at, const void* value, int byte) {
    return value && static_cast<const char*>(at)[byte] == static_cast<const char*>(value)[byte];
}

void touch_shared(OfCluster& all, int rank, const void* own, int bytes, Access kind, const char* who,
                  const void* value) {
    const int64_t offset = offset_of(own);
    for (int byte = 0; byte < bytes; ++byte)
        touch(all, all.shared[size_t(rank)][size_t(offset + byte)], kind, who, same(own, value, byte), offset + byte);
}

// after what a thread has told others it does something new
void release(OfCluster& all, Knowledge& into) {
    Knowledge& mine = all.of_thread[size_t(running(all))];
    join(into, mine);
    ++mine.over[size_t(running(all))];
}

Place& place_of(OfCluster& all, Meeting kind, int id) {
    const int rank = host::block->rank(), warp = host::block->running_index() / 32;
    const int group = kind == Meeting::kCluster ? 0 : kind == Meeting::kBlock ? 1 + rank : 1000 * (1 + rank) + warp;
    return all.places[{group, id}];
}

// of those who come together this time
std::shared_ptr<Knowledge> met_at(Place& place, int n_threads) {
    if (place.entered == 0) place.knowledge = std::make_shared<Knowledge>();
    if (++place.entered == n_threads) place.entered = 0;
    return place.knowledge;
}

} // namespace

bool wanted() { // asked once a launch
    static thread_local int64_t launch = -1;
    static thread_local bool is_set = false;
    if (launch != host::launch_number()) {
        launch = host::launch_number();
        const char* value = std::getenv("JLEBM_TEST_RACES");
        is_set = value && std::string(value) == "1";
    }
    return is_set;
}

void access(const void* at, int bytes, Access kind, const char* who, const void* value) {
    OfCluster& all = cluster();
    if (is_shared(at)) return touch_shared(all, host::block->rank(), at, bytes, kind, who, value);
    const auto first = reinterpret_cast<uintptr_t>(at);
    for (int byte = 0; byte < bytes; ++byte)
        touch(all, global().cells[first + uintptr_t(byte)], kind, who, same(at, value, byte), -1);
}

std::shared_ptr<Knowledge> enter(Meeting kind, int id, int n_threads) {
    OfCluster& all = cluster();
    const std::shared_ptr<Knowledge> knowledge = met_at(place_of(all, kind, id), n_threads);
    release(all, *knowledge);
    return knowledge;
}

void leave(const std::shared_ptr<Knowledge>& knowledge) {
    OfCluster& all = cluster();
    join(all.of_thread[size_t(running(all))], *knowledge);
}

std::shared_ptr<Knowledge> enter_exchange() {
    OfCluster& all = cluster();
    const std::shared_ptr<Knowledge> knowledge = met_at(place_of(all, Meeting::kWarp, 1), 32);
    Knowledge& mine = all.of_thread[size_t(running(all))];
    uint32_t& now = mine.over[size_t(running(all))];
    mine.read[size_t(running(all))] = now++;
    join(knowledge->read, mine.read);
    return knowledge;
}

void leave_exchange(const std::shared_ptr<Knowledge>& knowledge) {
    OfCluster& all = cluster();
    join(all.of_thread[size_t(running(all))].read, knowledge->read);
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
    touch_shared(all, rank, own, bytes, Access::kWrite, "st.async", nullptr);
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
    ++mine.over[size_t(running(all))]; // what this thread writes from here on has not passed it
}

} // namespace races
} // namespace ptx
