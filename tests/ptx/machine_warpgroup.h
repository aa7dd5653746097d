// wgmma: products of 64 x N by a warpgroup, from registers or from matrices in shared memory with any swizzle.
//
// A descriptor names the matrix in units of 16 bytes: bits 0 to 13 where it begins, 16 to 29 and 32 to 45 two strides,
// 62 and 63 how it is swizzled. The strides' meaning is that of the canonical layouts in CUTLASS (cute/arch/
// mma_sm90_desc.hpp). Products are made at once: that nobody looks at them before their time is for the emulation of
// device.h to show (csrc/cuda/host).
#pragma once

#include "machine_threads.h"

namespace ptx {

inline void fence_proxy_async_shared_cta() {
    if (races::wanted()) races::proxy_fence();
}
inline void wgmma_fence_sync_aligned() {}
inline void wgmma_commit_group_sync_aligned() {}
inline void wgmma_wait_group_sync_aligned(s64) {}

// bytes from the beginning of shared memory to element (row or column `mn`, `k`) of a matrix
inline u64 element_at(u64 descriptor, int mn, int k, int element_bytes, bool mn_major) {
    const u64 start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
    const u64 stride = (descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 49 & 7) throw std::runtime_error("wgmma: a descriptor with a base offset, which is not emulated");
    constexpr int kRowBytes[] = {16, 128, 64, 32}; // by the kind of swizzle; without, a matrix is of 8 x 16 bytes
    const int kind = int(descriptor >> 62), row_bytes = kRowBytes[kind];
    u64 at;
    if (mn_major) {
        const int bytes = mn * element_bytes;
        at = u64(bytes / row_bytes) * (kind ? leading : stride) + u64(k / 8) * (kind ? stride : leading) +
             u64(k % 8 * row_bytes + bytes % row_bytes);
    } else {
        const int bytes = k * element_bytes;
        at = u64(mn / 8) * stride + u64(mn % 8 * row_bytes) +
             (kind ? u64(bytes) : u64(bytes / 16) * leading + u64(bytes % 16));
    }
    at += start;
    constexpr u64 kMoved[] = {0, 7, 3, 1};
    return at ^ (at >> 7 & kMoved[kind]) << 4;
}

template <int kDepth>
inline float element(u64 descriptor, int mn, int k, bool mn_major) {
    constexpr int bytes = 32 / kDepth;
    u32 found = 0;
    void* const at = shared_at(element_at(descriptor, mn, k, bytes, mn_major), bytes, bytes, "wgmma");
    std::memcpy(&found, noticed(at, bytes, races::Access::kAsyncProxyRead, "wgmma"), size_t(bytes));
    return f32(kDepth == 16 ? found << 16 : found & 0xffffe000u);
}

// One lane's part of d (+)= a b: rows g and g + 8 of its warp's 16, of every 8 columns those of 2 t and 2 t + 1.
template <int kDepth, class RowOfA>
inline void warpgroup_product(int columns, u32* const* d, RowOfA row_of_a, u64 b, bool add, bool b_mn_major) {
    const int lane = int(special_laneid()), g = lane / 4, t = lane % 4;
    float rows[2][kDepth];
    for (int upper = 0; upper < 2; ++upper)
        for (int k = 0; k < kDepth; ++k) rows[upper][k] = row_of_a(g + 8 * upper, k);
    for (int tile = 0; tile < columns / 8; ++tile)
        for (int i = 0; i < 2; ++i) {
            float column[kDepth];
            for (int k = 0; k < kDepth; ++k) column[k] = element<kDepth>(b, 8 * tile + 2 * t + i, k, b_mn_major);
            for (int upper = 0; upper < 2; ++upper) {
                u32& out = *d[4 * tile + 2 * upper + i];
                const float before = add ? f32(out) : 0.0f;
                if constexpr (kDepth == 16)
                    out = bits(host::accumulate_bf16(before, rows[upper], column));
                else
                    out = bits(host::accumulate_tf32(before, rows[upper], column));
            }
        }
}

// kDepth is 16 for bf16 and 8 for tf32. A from registers, laid out as in mma.m16n8k16 and mma.m16n8k8:
template <int kDepth>
inline void wgmma(int columns, u32* const* d, u32 a0, u32 a1, u32 a2, u32 a3, u64 b, bool add, bool b_mn_major) {
    const u32 mine[4] = {a0, a1, a2, a3};
    const host::Exchange& all = host::exchange(host::Op::kWgmma, mine, 16, nullptr, columns + kDepth);
    const auto row_of_a = [&](int row, int k) {
        u32 of_lane[4];
        std::memcpy(of_lane, all.in[row % 8 * 4 + (kDepth == 16 ? k % 8 / 2 : k % 4)], 16);
        const u32 word = of_lane[row / 8 + 2 * (k / (kDepth / 2))];
        return f32(kDepth == 8 ? word & 0xffffe000u : k % 2 ? word & 0xffff0000u : word << 16);
    };
    warpgroup_product<kDepth>(columns, d, row_of_a, b, add, b_mn_major);
}
// A from shared memory:
template <int kDepth>
inline void wgmma(int columns, u32* const* d, u64 a, u64 b, bool add, bool a_mn_major, bool b_mn_major) {
    host::exchange(host::Op::kWgmma, nullptr, 0, nullptr, columns + kDepth + 1024);
    const int first = int(special_tid_x()) / 32 % 4 * 16;
    const auto row_of_a = [&](int row, int k) { return element<kDepth>(a, first + row, k, a_mn_major); };
    warpgroup_product<kDepth>(columns, d, row_of_a, b, add, b_mn_major);
}

} // namespace ptx
