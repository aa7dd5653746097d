// What threads do together: barriers, exchanges and matrix products of a warp, clusters of blocks.
#pragma once

#include "machine_memory.h"

namespace ptx {

inline u32 special_tid_x() { return host::place->thread.x; }
inline u32 special_ntid_x() { return host::place->block_size.x; }
inline u32 special_ctaid_x() { return host::place->block.x; }
inline u32 special_ctaid_y() { return host::place->block.y; }
inline u32 special_ctaid_z() { return host::place->block.z; }
inline u32 special_nctaid_x() { return host::place->grid_size.x; }
inline u32 special_nctaid_y() { return host::place->grid_size.y; }
inline u32 special_laneid() { return host::place->thread.x % 32; }
inline u32 special_cluster_ctarank() { return u32(host::cluster_rank()); }

inline void bar_sync(s64 id, s64 n) {
    if (!races::wanted()) return host::barrier(int(id), int(n), true);
    const auto met = races::enter(races::Meeting::kBlock, int(id), int(n));
    host::barrier(int(id), int(n), true);
    races::leave(met);
}
inline void bar_sync(s64 id) { bar_sync(id, special_ntid_x()); }
inline void bar_arrive(s64 id, s64 n) {
    if (races::wanted()) races::enter(races::Meeting::kBlock, int(id), int(n));
    host::barrier(int(id), int(n), false);
}
inline void membar_gl() {}
inline void membar_cta() {}
inline void fence_acq_rel_gpu() {}
inline void need_whole_warp(u32 mask, const char* who) {
    if (mask != ~0u) throw std::runtime_error(std::string(who) + ": a part of a warp, which is not emulated");
}
inline void bar_warp_sync(s64 mask) {
    need_whole_warp(u32(mask), "bar.warp.sync");
    if (!races::wanted()) return jlebm::cuda::sync_warp();
    const auto met = races::enter(races::Meeting::kWarp, 0, 32);
    jlebm::cuda::sync_warp();
    races::leave(met);
}
// around what exchanges registers between the lanes of a warp
class Exchanging {
public:
    Exchanging() {
        if (races::wanted()) knowledge_ = races::enter_exchange();
    }
    ~Exchanging() {
        if (knowledge_) races::leave_exchange(knowledge_);
    }

private:
    std::shared_ptr<races::Knowledge> knowledge_;
};

// c: the last lane of a segment (bits 0 to 4), which lanes share one (bits 8 to 12)
inline void shfl(u32& d, bool& inside, u32 a, u32 from, bool in_range, u32 mask, const char* who) {
    need_whole_warp(mask, who);
    const u32 lane = special_laneid();
    const Exchanging exchanging;
    inside = in_range;
    d = jlebm::cuda::shuffle(a, int(in_range ? from : lane));
}
inline void shfl_sync_bfly_b32(u32& d, bool& p, u32 a, u32 b, u32 c, u32 mask) {
    const u32 lane = special_laneid(), segment = c >> 8 & 31, last = (lane & segment) | (c & ~segment & 31);
    const u32 from = lane ^ (b & 31);
    shfl(d, p, a, from, from <= last, mask, "shfl.sync.bfly");
}
inline void shfl_sync_down_b32(u32& d, bool& p, u32 a, u32 b, u32 c, u32 mask) {
    const u32 lane = special_laneid(), segment = c >> 8 & 31, last = (lane & segment) | (c & ~segment & 31);
    const u32 from = lane + (b & 31);
    shfl(d, p, a, from, from <= last, mask, "shfl.sync.down");
}
inline void shfl_sync_up_b32(u32& d, bool& p, u32 a, u32 b, u32 c, u32 mask) {
    const u32 lane = special_laneid(), segment = c >> 8 & 31, first = (lane & segment) | (c & ~segment & 31);
    const s32 from = s32(lane) - s32(b & 31);
    shfl(d, p, a, u32(from), from >= s32(first), mask, "shfl.sync.up");
}
inline void shfl_sync_idx_b32(u32& d, bool& p, u32 a, u32 b, u32 c, u32 mask) {
    const u32 lane = special_laneid(), segment = c >> 8 & 31, last = (lane & segment) | (c & ~segment & 31);
    const u32 from = (lane & segment) | (b & 31 & ~segment);
    shfl(d, p, a, from, from <= last, mask, "shfl.sync.idx");
}
#define JLEBM_PTX_SHFL(name)                                                                                           \
    inline void name(u32& d, u32 a, u32 b, u32 c, u32 mask) {                                                          \
        bool inside;                                                                                                   \
        name(d, inside, a, b, c, mask);                                                                                \
    }
JLEBM_PTX_SHFL(shfl_sync_bfly_b32)
JLEBM_PTX_SHFL(shfl_sync_down_b32)
JLEBM_PTX_SHFL(shfl_sync_up_b32)
JLEBM_PTX_SHFL(shfl_sync_idx_b32)
inline void redux_sync_max_s32(u32& d, u32 a, u32 mask) {
    need_whole_warp(mask, "redux.sync.max");
    const Exchanging exchanging;
    s32 most = s32(a);
    for (int other = 1; other < 32; other *= 2) most = std::max(most, s32(jlebm::cuda::shuffle_xor(u32(most), other)));
    d = u32(most);
}
inline void vote_sync_any_pred(bool& d, bool a, u32 mask) {
    need_whole_warp(mask, "vote.sync.any");
    const Exchanging exchanging;
    d = jlebm::cuda::warp_any(a);
}
inline void vote_sync_all_pred(bool& d, bool a, u32 mask) {
    need_whole_warp(mask, "vote.sync.all");
    const Exchanging exchanging;
    d = jlebm::cuda::warp_all(a);
}

template <class F>
inline void mma(F product, u32& d0, u32& d1, u32& d2, u32& d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, u32 c0,
                u32 c1, u32 c2, u32 c3) {
    float d[4] = {f32(c0), f32(c1), f32(c2), f32(c3)};
    const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    const Exchanging exchanging;
    product(d, a, b);
    d0 = bits(d[0]), d1 = bits(d[1]), d2 = bits(d[2]), d3 = bits(d[3]);
}
template <class... R>
inline void mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32(R&&... r) {
    mma([](auto& d, auto& a, auto& b) { jlebm::cuda::mma_m16n8k8_tf32(d, a, b); }, r...);
}
template <class... R>
inline void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(R&&... r) {
    mma([](auto& d, auto& a, auto& b) { jlebm::cuda::mma_m16n8k16_bf16(d, a, b); }, r...);
}
template <class... R>
inline void load_matrices(bool transposed, u64 row, R&... r) {
    u32 all[sizeof...(R)];
    if (races::wanted() && special_laneid() < 8 * sizeof...(R))
        races::access(own_shared(row), 16, races::Access::kRead, "ldmatrix");
    const Exchanging exchanging;
    host::ldmatrix(all, int(sizeof...(R)), transposed, own_shared(row));
    int i = 0;
    ((r = all[i++]), ...);
}
// of csrc/cuda/host's exchange, to tell them from the loads
constexpr int kStoreMatrices = 16, kStoreTransposed = 32;
inline void store_rows(host::Exchange& all, int variant) {
    const bool transposed = variant & kStoreTransposed;
    for (int lane = 0; lane < 32; ++lane)
        for (int j = 0; j < (variant & 7); ++j) {
            u32 pair;
            std::memcpy(&pair, all.in[lane] + 8 + 4 * j, sizeof pair);
            for (int half = 0; half < 2; ++half) {
                const int g = lane / 4, other = lane % 4 * 2 + half;
                const int row = transposed ? other : g, column = transposed ? g : other;
                u64 address;
                std::memcpy(&address, all.in[8 * j + row], sizeof address);
                auto* at = static_cast<unsigned char*>(shared_at(address, 16, 16, "stmatrix"));
                const u16 value = u16(pair >> 16 * half);
                if (races::wanted()) // as the last lane that came; a barrier needs them all
                    races::access(at + 2 * column, 2, races::Access::kWrite, "stmatrix", &value);
                std::memcpy(at + 2 * column, &value, sizeof value);
            }
        }
}
template <class... R>
inline void store_matrices(bool transposed, u64 row, R... r) {
    unsigned char mine[8 + 4 * sizeof...(R)];
    const u32 all[] = {r...};
    std::memcpy(mine, &row, 8), std::memcpy(mine + 8, all, sizeof all);
    const int variant = kStoreMatrices + (transposed ? kStoreTransposed : 0) + int(sizeof...(R));
    host::exchange(host::Op::kLdmatrix, mine, int(sizeof mine), &store_rows, variant);
}
#define JLEBM_PTX_STMATRIX(suffix, transposed)                                                                         \
    inline void stmatrix_sync_aligned_m8n8_x1##suffix(u64 row, u32 a) { store_matrices(transposed, row, a); }          \
    inline void stmatrix_sync_aligned_m8n8_x2##suffix(u64 row, u32 a, u32 b) {                                         \
        store_matrices(transposed, row, a, b);                                                                         \
    }                                                                                                                  \
    inline void stmatrix_sync_aligned_m8n8_x4##suffix(u64 row, u32 a, u32 b, u32 c, u32 d) {                           \
        store_matrices(transposed, row, a, b, c, d);                                                                   \
    }
JLEBM_PTX_STMATRIX(_shared_b16, false)
JLEBM_PTX_STMATRIX(_trans_shared_b16, true)
inline void ldmatrix_sync_aligned_m8n8_x1_shared_b16(u32& a, u64 row) { load_matrices(false, row, a); }
inline void ldmatrix_sync_aligned_m8n8_x2_shared_b16(u32& a, u32& b, u64 row) { load_matrices(false, row, a, b); }
inline void ldmatrix_sync_aligned_m8n8_x4_shared_b16(u32& a, u32& b, u32& c, u32& d, u64 row) {
    load_matrices(false, row, a, b, c, d);
}
inline void ldmatrix_sync_aligned_m8n8_x1_trans_shared_b16(u32& a, u64 row) { load_matrices(true, row, a); }
inline void ldmatrix_sync_aligned_m8n8_x2_trans_shared_b16(u32& a, u32& b, u64 row) { load_matrices(true, row, a, b); }
inline void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(u32& a, u32& b, u32& c, u32& d, u64 row) {
    load_matrices(true, row, a, b, c, d);
}

// --- clusters: an address in another block's shared memory has that block's rank above bit 24
// ---------------------------
inline void barrier_cluster_arrive_release_aligned() {}
inline void barrier_cluster_wait_acquire_aligned() { // at once with the arrival, which stands just before it
    if (!races::wanted()) return host::sync_cluster();
    const auto met = races::enter(races::Meeting::kCluster, 0, int(special_ntid_x()) * host::cluster_blocks());
    host::sync_cluster();
    races::leave(met);
}
inline void mapa_shared_cluster_u32(u32& d, u32 a, u32 rank) { d = a | (rank + 1) << 24; }
inline void fence_mbarrier_init_release_cluster() { host::fence_mbarrier_init(); }
inline void mbarrier_init_shared_cta_b64(u64 m, s64 arrivals) {
    host::mbarrier_init(own_shared(m), int(arrivals));
    if (races::wanted()) races::mbarrier_made(own_shared(m), int(arrivals));
}
inline void mbarrier_arrive_expect_tx_shared_cta_b64(u64, u64 m, s64 bytes) {
    if (races::wanted()) races::mbarrier_arrived(own_shared(m));
    host::mbarrier_arrive(own_shared(m), int(bytes));
}
inline void mbarrier_try_wait_parity_acquire_cluster_shared_cta_b64(bool& done, u64 m, s64 parity) {
    host::mbarrier_wait(own_shared(m), int(parity));
    if (races::wanted()) races::mbarrier_waited(own_shared(m), int(parity));
    done = true;
}
template <class... V>
inline void store_async(u64 to, u64 mbarrier, V... values) {
    const u32 all[] = {values...};
    const u64 rank = to >> 24;
    if (rank == 0 || rank != mbarrier >> 24)
        throw std::runtime_error("st.async: the address and the mbarrier are of one block of the cluster, got " +
                                 std::to_string(s64(rank) - 1) + " and " + std::to_string(s64(mbarrier >> 24) - 1));
    if (races::wanted())
        races::sent(own_shared(to & 0xffffff), int(sizeof all), own_shared(mbarrier & 0xffffff), int(rank) - 1);
    host::store_async(own_shared(to & 0xffffff), all, int(sizeof all), own_shared(mbarrier & 0xffffff), int(rank) - 1);
}
inline void st_async_shared_cluster_mbarrier_complete_tx_bytes_b32(u64 to, u32 a, u64 m) { store_async(to, m, a); }
inline void st_async_shared_cluster_mbarrier_complete_tx_bytes_v2_b32(u64 to, u32 a, u32 b, u64 m) {
    store_async(to, m, a, b);
}
inline void st_async_shared_cluster_mbarrier_complete_tx_bytes_v4_b32(u64 to, u32 a, u32 b, u32 c, u32 d, u64 m) {
    store_async(to, m, a, b, c, d);
}
} // namespace ptx
