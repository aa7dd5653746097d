// Clusters on the host: stores to other blocks, mbarriers, and faults with them. Included by emulation_check.cpp,
// behind expect() and launch_of().
#pragma once

// --- a cluster: each block sends to the next one, in values of 4, 8 and 16 bytes, twice

struct ClusterFaults {
    bool begun = true, fenced = true, waited = true, stays = true;
    int arrivals = 64, bytes = 64 * 28;
};

JLEBM_KERNEL(64, 1) sent_around(float* out, ClusterFaults faults) {
    struct alignas(16) Four {
        float v[4];
    };
    auto* one = shared_memory<float>();
    auto* two = shared_memory<float2>(256);
    auto* four = shared_memory<Four>(768);
    auto* m = shared_memory<uint64_t>(1792);
    const int thread = int(threadIdx.x), rank = cluster_rank(), next = (rank + 1) % 4;
    if (thread == 0) {
        for (int i = 0; i < 2; ++i) mbarrier_init(m + i, faults.arrivals);
        if (faults.fenced) fence_mbarrier_init();
    }
    if (faults.begun) sync_cluster();
    for (int round = 0; round < 3; ++round) {
        const float v = float(1000 * round + 100 * rank + thread);
        uint64_t* const mine = m + round % 2;
        store_async(one + thread, v, mine, next);
        store_async(two + thread, make_float2(v + 1, v + 2), mine, next);
        store_async(four + thread, Four{{v + 3, v + 4, v + 5, v + 6}}, mine, next);
        mbarrier_arrive(mine, thread == 17 ? faults.bytes : 0);
        if (faults.waited) mbarrier_wait(mine, round / 2);
        float sum = one[thread] + two[thread].x + two[thread].y;
        for (float w : four[thread].v) sum += w;
        out[(3 * int(blockIdx.x) + round) * 64 + thread] = sum;
        sync_cluster(); // read by all, before it is written again
    }
    if (!faults.stays && rank == 3) store_async(one + thread, 0.0f, m + 1, 0);
}

void check_cluster(uint64_t seed, const ClusterFaults& faults) {
    std::vector<float> out(8 * 3 * 64, NAN);
    Geometry geometry{8, 64, 1808};
    geometry.cluster = 4;
    JLEBM_LAUNCH(sent_around, (geometry), launch_of(seed), out.data(), faults);
    for (int i = 0; i < 8 * 3 * 64; ++i) {
        const int thread = i % 64, round = i / 64 % 3, from = (i / 192 + 3) % 4;
        expect(out[size_t(i)] == 7.0f * float(1000 * round + 100 * from + thread) + 21.0f,
               "value " + std::to_string(i));
    }
}
