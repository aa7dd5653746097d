// device.h on the chip: each word is one instruction, or the CUDA function that is it. See device.h for the interface.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/errors.h"

#define JLEBM_KERNEL(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, min_blocks)
#define JLEBM_PARAMETER const __grid_constant__
#define JLEBM_DEVICE __device__ __forceinline__
#define JLEBM_UNPAREN_(...) __VA_ARGS__
#define JLEBM_LAUNCH(kernel, geometry, launch, ...)                                                                    \
    ::jlebm::cuda::enqueue(::jlebm::cuda::LaunchSite{#kernel, __FILE__, __LINE__}, kernel, JLEBM_UNPAREN_ geometry,    \
                           launch, __VA_ARGS__)

namespace jlebm {
namespace cuda {

template <class... P, class... A>
void enqueue(const LaunchSite& site, void (*kernel)(P...), const Geometry& geometry, const CudaLaunch& launch,
             A&&... arguments) {
    if (geometry.grid == 0 || geometry.grid_y == 0) return;
    const DeviceScope device(launch.device, site);
    // 48 KB need no permission. Above, each function of each device has to be told (cheap, and legal in a capture):
    // always the most that it may have, so that a launch beside this one, from another thread, never finds it lowered.
    if (geometry.shared_bytes > 48 * 1024)
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   std::max(launch.max_shared_bytes, int(geometry.shared_bytes))),
              site, geometry, launch);
    const dim3 grid(unsigned(geometry.grid), unsigned(geometry.grid_y), 1);
    if (geometry.cluster > 1) {
        cudaLaunchAttribute cluster = {};
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = unsigned(geometry.cluster), cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = grid, config.blockDim = dim3(unsigned(geometry.block));
        config.dynamicSmemBytes = size_t(geometry.shared_bytes), config.stream = cudaStream_t(launch.stream);
        config.attrs = &cluster, config.numAttrs = 1;
        check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...), site, geometry, launch);
        return;
    }
    kernel<<<grid, unsigned(geometry.block), size_t(geometry.shared_bytes), cudaStream_t(launch.stream)>>>(
        static_cast<P>(arguments)...);
    check(cudaGetLastError(), site, geometry, launch);
}

JLEBM_DEVICE int lane_index() { return int(threadIdx.x & (kWarp - 1)); }
JLEBM_DEVICE int warp_index() { return int(threadIdx.x / kWarp); }

extern __shared__ __align__(1024) unsigned char jlebm_shared_memory[];

template <class T>
JLEBM_DEVICE T* shared_memory(int64_t byte_offset = 0) {
    return reinterpret_cast<T*>(jlebm_shared_memory + byte_offset);
}

JLEBM_DEVICE uint32_t shared_address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }

JLEBM_DEVICE void sync_block() { __syncthreads(); }
JLEBM_DEVICE void sync_group(int id, int n_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}
JLEBM_DEVICE void arrive_group(int id, int n_threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}
JLEBM_DEVICE void sync_warp() { __syncwarp(); }

// Clusters and mbarriers that count bytes are of compute capability 9.0 and newer; for others the kernels that use them
// are not built.
JLEBM_DEVICE int cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
}
// arrive releases what this thread wrote, wait acquires what the others did, in any block's shared memory
JLEBM_DEVICE void sync_cluster() {
    __syncwarp(); // .aligned: the lanes come together
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
JLEBM_DEVICE void mbarrier_init(uint64_t* m, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(m)), "r"(arrivals) : "memory");
}
JLEBM_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
JLEBM_DEVICE void mbarrier_arrive(uint64_t* m, int bytes = 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(m)), "r"(bytes)
                 : "memory");
}
JLEBM_DEVICE void mbarrier_wait(uint64_t* m, int parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(shared_address(m)),
                 "r"(parity)
                 : "memory");
}
template <class T>
JLEBM_DEVICE void store_async(T* own, const T& v, uint64_t* own_mbarrier, int rank) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "what one instruction stores");
    uint32_t at, m;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(own)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(m) : "r"(shared_address(own_mbarrier)), "r"(rank));
    const auto* w = reinterpret_cast<const uint32_t*>(&v);
    if constexpr (sizeof(T) == 4)
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(at), "r"(w[0]),
                     "r"(m)
                     : "memory");
    else if constexpr (sizeof(T) == 8)
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(at),
                     "r"(w[0]), "r"(w[1]), "r"(m)
                     : "memory");
    else
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(at),
            "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(m)
            : "memory");
}

template <class T>
JLEBM_DEVICE T shuffle(T v, int lane) {
    return __shfl_sync(0xffffffffu, v, lane);
}
template <class T>
JLEBM_DEVICE T shuffle_xor(T v, int mask) {
    return __shfl_xor_sync(0xffffffffu, v, mask);
}
template <class T>
JLEBM_DEVICE T shuffle_down(T v, int delta) {
    return __shfl_down_sync(0xffffffffu, v, unsigned(delta));
}
JLEBM_DEVICE bool warp_any(bool v) { return __any_sync(0xffffffffu, v); }
JLEBM_DEVICE bool warp_all(bool v) { return __all_sync(0xffffffffu, v); }

// volatile: warp-wide, never to be moved under a branch that only some lanes take
JLEBM_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
JLEBM_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// volatile and the memory clobber keep a load behind the barrier that makes its rows visible
#define JLEBM_LDMATRIX(suffix, modifier)                                                                               \
    JLEBM_DEVICE void ldmatrix_x1##suffix(uint32_t (&r)[1], const void* row) {                                         \
        asm volatile("ldmatrix.sync.aligned.m8n8.x1" modifier ".shared.b16 {%0}, [%1];"                                \
                     : "=r"(r[0])                                                                                      \
                     : "r"(shared_address(row))                                                                        \
                     : "memory");                                                                                      \
    }                                                                                                                  \
    JLEBM_DEVICE void ldmatrix_x2##suffix(uint32_t (&r)[2], const void* row) {                                         \
        asm volatile("ldmatrix.sync.aligned.m8n8.x2" modifier ".shared.b16 {%0,%1}, [%2];"                             \
                     : "=r"(r[0]), "=r"(r[1])                                                                          \
                     : "r"(shared_address(row))                                                                        \
                     : "memory");                                                                                      \
    }                                                                                                                  \
    JLEBM_DEVICE void ldmatrix_x4##suffix(uint32_t (&r)[4], const void* row) {                                         \
        asm volatile("ldmatrix.sync.aligned.m8n8.x4" modifier ".shared.b16 {%0,%1,%2,%3}, [%4];"                       \
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                                  \
                     : "r"(shared_address(row))                                                                        \
                     : "memory");                                                                                      \
    }
JLEBM_LDMATRIX(, "")
JLEBM_LDMATRIX(_trans, ".trans")
#undef JLEBM_LDMATRIX

JLEBM_DEVICE void cp_async_4(void* shared, const void* global, int source_bytes = 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(source_bytes)
                 : "memory");
}
JLEBM_DEVICE void cp_async_8(void* shared, const void* global, int source_bytes = 8) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(source_bytes)
                 : "memory");
}
// past L1: what is copied into shared memory is not read from L1 again
JLEBM_DEVICE void cp_async_16(void* shared, const void* global, int source_bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(source_bytes)
                 : "memory");
}
JLEBM_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsInFlight>
JLEBM_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsInFlight) : "memory");
}

JLEBM_DEVICE uint32_t to_tf32(float v) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
    return bits;
}
JLEBM_DEVICE uint16_t to_bf16(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
JLEBM_DEVICE uint32_t pack_bf16(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
JLEBM_DEVICE int opaque(int v) {
    asm volatile("" : "+r"(v));
    return v;
}
JLEBM_DEVICE int64_t opaque(int64_t v) {
    asm volatile("" : "+l"(v));
    return v;
}
JLEBM_DEVICE uint32_t float_bits(float v) { return __float_as_uint(v); }
JLEBM_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
JLEBM_DEVICE float from_bf16(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

JLEBM_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
JLEBM_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
JLEBM_DEVICE float sub_rn(float a, float b) { return __fsub_rn(a, b); }
JLEBM_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
JLEBM_DEVICE float sqrt_rn(float a) { return __fsqrt_rn(a); }

// The steps of sqrt.rn without its branch for what is not a normal number, which would end a block of the program twice
// in each quadruple's noise.
JLEBM_DEVICE float sqrt_rn_normal(float a) {
    float r;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
    const float s = __fmul_rn(a, r);
    return __fmaf_rn(__fmaf_rn(-s, s, a), __fmul_rn(r, 0.5f), s);
}

// exp(v) = 2^y (1 + rest ln 2), y + rest = v log2(e) in twice the precision: ex2.approx alone would lose |v| ulp
JLEBM_DEVICE float exp_few_ulp(float v) {
    const float y = __fmul_rn(v, 1.44269502f);
    const float rest = __fmaf_rn(v, 1.92596303e-8f, __fmaf_rn(v, 1.44269502f, -y));
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(y));
    // at +-inf the rest is NaN; the power is right as it is where it is 0 or inf
    return (power > 0.0f && power < INFINITY) ? __fmaf_rn(power, rest * 0.693147182f, power) : power;
}
JLEBM_DEVICE float exp2_few_ulp(float v) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v));
    return power;
}
JLEBM_DEVICE float reciprocal_few_ulp(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

template <class T>
JLEBM_DEVICE T load_readonly(const T* p) {
    return __ldg(p);
}
template <class T>
JLEBM_DEVICE T atomic_add(T* p, T v) {
    return atomicAdd(p, v);
}
JLEBM_DEVICE uint64_t atomic_add(uint64_t* p, uint64_t v) {
    return atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}
template <class T>
JLEBM_DEVICE T atomic_min(T* p, T v) {
    return atomicMin(p, v);
}
JLEBM_DEVICE int64_t atomic_min(int64_t* p, int64_t v) {
    return atomicMin(reinterpret_cast<long long*>(p), static_cast<long long>(v));
}
template <class T>
JLEBM_DEVICE T atomic_max(T* p, T v) {
    return atomicMax(p, v);
}
JLEBM_DEVICE int64_t atomic_max(int64_t* p, int64_t v) {
    return atomicMax(reinterpret_cast<long long*>(p), static_cast<long long>(v));
}
JLEBM_DEVICE void fence_block() { __threadfence_block(); }
JLEBM_DEVICE void fence_device() { __threadfence(); }

} // namespace cuda
} // namespace jlebm
