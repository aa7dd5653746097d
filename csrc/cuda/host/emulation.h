// device.h on the host: every word with the meaning it has on the chip. See device.h for the interface.
#pragma once

#include <atomic>
#include <cmath>
#include <cstring>
#include <tuple>

#include "common/philox.h"
#include "cuda/host/block.h"
#include "cuda/wgmma_operand.h"

#define threadIdx (::jlebm::cuda::host::place->thread)
#define blockIdx (::jlebm::cuda::host::place->block)
#define blockDim (::jlebm::cuda::host::place->block_size)
#define gridDim (::jlebm::cuda::host::place->grid_size)

#define JLEBM_KERNEL(max_threads, min_blocks) void
#define JLEBM_PARAMETER const
#define JLEBM_DEVICE inline
#define JLEBM_UNPAREN_(...) __VA_ARGS__
#define JLEBM_LAUNCH(kernel, geometry, launch, ...)                                                                    \
    ::jlebm::cuda::enqueue(::jlebm::cuda::LaunchSite{#kernel, __FILE__, __LINE__}, kernel, JLEBM_UNPAREN_ geometry,    \
                           launch, __VA_ARGS__)

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace jlebm {
namespace cuda {

template <class... P, class... A>
void enqueue(const LaunchSite& site, void (*kernel)(P...), const Geometry& geometry, const CudaLaunch& launch,
             A&&... arguments) {
    if (const host::StandIn stand_in = host::stand_in_of(reinterpret_cast<const void*>(kernel))) {
        const std::tuple<P...> values(static_cast<P>(arguments)...);
        std::apply(
            [&](const auto&... value) {
                const void* const parameters[] = {&value...};
                host::run_grid(site, geometry, launch, [&] { stand_in(parameters); });
            },
            values);
        return;
    }
    host::run_grid(site, geometry, launch, [&] { kernel(static_cast<P>(arguments)...); });
}

inline int lane_index() { return int(threadIdx.x) % kWarp; }
inline int warp_index() { return int(threadIdx.x) / kWarp; }

template <class T>
T* shared_memory(int64_t byte_offset = 0) {
    return reinterpret_cast<T*>(host::shared_base() + byte_offset);
}

inline void sync_block() { host::barrier(0, int(blockDim.x), true); }
inline void sync_group(int id, int n_threads) { host::barrier(id, n_threads, true); }
inline void arrive_group(int id, int n_threads) { host::barrier(id, n_threads, false); }
inline int cluster_rank() { return host::cluster_rank(); }
inline void sync_cluster() { host::sync_cluster(); }
inline void mbarrier_init(uint64_t* m, int arrivals) { host::mbarrier_init(m, arrivals); }
inline void fence_mbarrier_init() { host::fence_mbarrier_init(); }
inline void mbarrier_arrive(uint64_t* m, int bytes = 0) { host::mbarrier_arrive(m, bytes); }
inline void mbarrier_wait(uint64_t* m, int parity) { host::mbarrier_wait(m, parity); }
template <class T>
void store_async(T* own, const T& v, uint64_t* own_mbarrier, int rank) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "what one instruction stores");
    host::store_async(own, &v, int(sizeof(T)), own_mbarrier, rank);
}
inline void sync_warp() { host::exchange(host::Op::kSyncWarp, nullptr, 0, nullptr, 0); }

template <class T>
T shuffle(T v, int lane) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
    const host::Exchange& all = host::exchange(host::Op::kShuffle, &v, sizeof(T), nullptr, sizeof(T));
    std::memcpy(&v, all.in[lane & (kWarp - 1)], sizeof(T));
    return v;
}
template <class T>
T shuffle_xor(T v, int mask) {
    return shuffle(v, lane_index() ^ mask);
}
template <class T>
T shuffle_down(T v, int delta) {
    // beyond the last lane a thread gets its own value
    return shuffle(v, lane_index() + delta < kWarp ? lane_index() + delta : lane_index());
}
inline int votes(bool v) {
    const int mine = v;
    const host::Exchange& all = host::exchange(host::Op::kVote, &mine, sizeof mine, nullptr, 0);
    int sum = 0;
    for (const auto& lane : all.in) {
        int theirs;
        std::memcpy(&theirs, lane, sizeof theirs);
        sum += theirs;
    }
    return sum;
}
inline bool warp_any(bool v) { return votes(v) != 0; }
inline bool warp_all(bool v) { return votes(v) == kWarp; }

// The chip's sum of exact products: aligned to the largest, cut off there, cut off again to float32.
namespace host {
float accumulate_tf32(float c, const float (&a)[8], const float (&b)[8]); // c + a . b, as one instruction adds it
float accumulate_bf16(float c, const float (&a)[16], const float (&b)[16]);
} // namespace host
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

namespace host {
void ldmatrix(uint32_t* r, int n_matrices, bool transposed, const void* row);
}
inline void ldmatrix_x1(uint32_t (&r)[1], const void* row) { host::ldmatrix(r, 1, false, row); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) { host::ldmatrix(r, 2, false, row); }
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { host::ldmatrix(r, 4, false, row); }
inline void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row) { host::ldmatrix(r, 1, true, row); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) { host::ldmatrix(r, 2, true, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { host::ldmatrix(r, 4, true, row); }

namespace host {
void wgmma(float* d, int columns, bool add, bool transposed, const uint32_t* a, uint64_t b);
}
inline uint64_t wgmma_operand(const void* shared, int along_k, int along_n) {
    host::check_shared(shared, 128, 16, "wgmma_operand");
    const int64_t address = static_cast<const unsigned char*>(shared) - host::shared_base();
    return wgmma_descriptor(uint32_t(address), along_k, along_n);
}
inline void fence_for_wgmma() { host::fence_for_wgmma(); }
template <int kCount, int kWords>
void wgmma_begin(uint32_t (&)[kWords]) {
    static_assert(kCount <= kWords, "words of the operand");
    host::wgmma_begin();
}
template <int kCount>
void wgmma_keep(float (&)[kCount]) {}
template <bool kAdd, bool kTransposed, int kCount>
void wgmma_bf16(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b) {
    host::wgmma(d, 2 * kCount, kAdd, kTransposed, a, b);
}
template <int kCount>
void wgmma_end(float (&d)[kCount]) {
    host::wgmma_end(d, kCount);
}
template <class T>
T opaque(T v) {
    return v;
}

inline void cp_async_4(void* shared, const void* global, int source_bytes = 4) {
    host::copy_async(shared, global, 4, source_bytes);
}
inline void cp_async_8(void* shared, const void* global, int source_bytes = 8) {
    host::copy_async(shared, global, 8, source_bytes);
}
inline void cp_async_16(void* shared, const void* global, int source_bytes = 16) {
    host::copy_async(shared, global, 16, source_bytes);
}
inline void cp_async_commit() { host::copy_commit(); }
template <int kGroupsInFlight>
void cp_async_wait() {
    host::copy_wait(kGroupsInFlight);
}

inline uint32_t float_bits(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits;
}
inline float bits_float(uint32_t bits) {
    float v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

inline uint32_t to_tf32(float v) {
    const uint32_t bits = float_bits(v);
    if ((bits & 0x7f800000u) == 0x7f800000u) return v == v ? bits : 0x7fffffffu; // inf stays, NaN is canonical
    return (bits + 0x1000u) & 0xffffe000u; // ties away from zero: the magnitude grows
}
inline uint16_t to_bf16(float v) {
    const uint32_t bits = float_bits(v);
    if (v != v) return 0x7fff;
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline uint32_t pack_bf16(float low, float high) { return to_bf16(low) | uint32_t(to_bf16(high)) << 16; }
inline float from_bf16(uint16_t bits) { return bits_float(uint32_t(bits) << 16); }

// one rounding each: this is compiled with -ffp-contract=off
inline float mul_rn(float a, float b) { return a * b; }
inline float add_rn(float a, float b) { return a + b; }
inline float sub_rn(float a, float b) { return a - b; }
inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float sqrt_rn(float a) { return std::sqrt(a); }
inline float sqrt_rn_normal(float a) { return std::sqrt(a); }
inline float exp_few_ulp(float v) { return std::exp(v); }
inline float exp2_few_ulp(float v) { return std::exp2(v); }
inline float reciprocal_few_ulp(float v) { return 1.0f / v; }

template <class T>
T load_readonly(const T* p) {
    return *p;
}

// blocks share no thread of the host with others, but a caller may run several launches at once
template <class T, class F>
T atomically(T* p, F&& change) {
    T old = __atomic_load_n(p, __ATOMIC_RELAXED), next = change(old);
    while (!__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) next = change(old);
    return old;
}
template <class T>
T atomic_min(T* p, T v) {
    return atomically(p, [v](T old) { return v < old ? v : old; });
}
template <class T>
T atomic_max(T* p, T v) {
    return atomically(p, [v](T old) { return v > old ? v : old; });
}
template <class T>
T atomic_add(T* p, T v) {
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
inline float atomic_add(float* p, float v) {
    auto* bits = reinterpret_cast<uint32_t*>(p);
    return bits_float(atomically(bits, [v](uint32_t old) { return float_bits(bits_float(old) + v); }));
}
inline void fence_block() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void fence_device() { std::atomic_thread_fence(std::memory_order_seq_cst); }

} // namespace cuda
} // namespace jlebm
