// All blocks of a launch: see block.h.
#include "cuda/host/block_threads.h"

namespace jlebm {
namespace cuda {
namespace host {

namespace {

constexpr size_t kStackBytes =
    512 * 1024; // the sanitizers' frames are several times larger; untouched pages cost nothing
constexpr int kMaxThreads = 1024, kMaxCluster = 8;

thread_local int64_t launches = 0;

bool any_ready(const Cluster& cluster) {
    return std::any_of(cluster.blocks.begin(), cluster.blocks.end(), [](const auto& one) { return one->ready(); });
}

// All threads of a cluster's blocks, block by block at random; now and then one block falls far behind the others.
void run_cluster(Cluster& cluster, Order& order, const std::function<void()>& kernel) {
    for (const auto& one : cluster.blocks) one->begin(kernel);
    const int n = int(cluster.blocks.size());
    int laggard = -1, picks_until_laggard = 0;
    std::vector<Block*> ready;
    while (true) {
        ready.clear();
        for (const auto& one : cluster.blocks)
            if (one->ready()) ready.push_back(one.get());
        // letters arrive one by one in any order, and at the latest when nobody can go on without them
        int n_received = cluster.letters.empty() ? 0 : ready.empty() ? 1 : order.below(4) ? 0 : order.below(32);
        for (; n_received > 0 && !cluster.letters.empty(); --n_received) {
            std::swap(cluster.letters[size_t(order.below(int(cluster.letters.size())))], cluster.letters.back());
            const Letter letter = cluster.letters.back();
            cluster.letters.pop_back();
            block = letter.to;
            letter.to->receive(letter);
        }
        if (ready.empty() && cluster.letters.empty() && !any_ready(cluster)) break;
        if (ready.empty()) continue;
        if (--picks_until_laggard <= 0) {
            laggard = order.below(2 * n);
            picks_until_laggard = 1 << (5 + order.below(9));
        }
        block = ready[size_t(order.below(int(ready.size())))];
        if (n > 1 && block->rank() == laggard) block = ready[size_t(order.below(int(ready.size())))];
        block->go_on();
    }
    for (const auto& one : cluster.blocks) {
        block = one.get();
        one->check_end();
    }
    block = nullptr;
}

} // namespace

int64_t launch_number() { return launches; }

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
    if (geometry.cluster < 1 || geometry.cluster > kMaxCluster || geometry.grid % geometry.cluster)
        throw std::runtime_error(where + ": clusters of " + std::to_string(geometry.cluster) + " blocks in a grid of " +
                                 std::to_string(geometry.grid) + "; 1 to " + std::to_string(kMaxCluster) +
                                 " that divide the grid can be launched");
    ++launches;
    static thread_local std::vector<std::unique_ptr<FibrePool>> fibres; // of each block of a cluster
    while (int(fibres.size()) < geometry.cluster) fibres.push_back(std::make_unique<FibrePool>(kStackBytes));
    if (block) throw std::runtime_error(where + ": launched from inside a kernel");
    const int64_t n_clusters = geometry.grid * geometry.grid_y / geometry.cluster;
    // some order that visits each cluster once: start anywhere, forwards or backwards
    Order order{launch.order_seed};
    const int64_t start = int64_t(order.next() % uint64_t(n_clusters));
    const bool backwards = order.next() % 2;
    for (int64_t n = 0; n < n_clusters; ++n) {
        const int64_t at = (start + (backwards ? n_clusters - n : n)) % n_clusters * geometry.cluster;
        Cluster cluster;
        for (int rank = 0; rank < geometry.cluster; ++rank) {
            const Index3 index{unsigned((at + rank) % geometry.grid), unsigned(at / geometry.grid), 0};
            cluster.blocks.push_back(
                std::make_unique<Block>(*fibres[size_t(rank)], geometry, index, order.next(), &cluster));
        }
        try {
            run_cluster(cluster, order, kernel);
        } catch (const std::exception& error) {
            const Index3 index = block->threads().front().place.block;
            block = nullptr;
            place = nullptr;
            throw std::runtime_error(where + ", block (" + std::to_string(index.x) + ", " + std::to_string(index.y) +
                                     "): " + error.what());
        }
        statistics().blocks += geometry.cluster;
    }
}

} // namespace host
} // namespace cuda
} // namespace jlebm
