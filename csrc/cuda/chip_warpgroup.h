// The warpgroup's words of device.h on the chip: wgmma, of compute capability 9.0 alone (sm_90a). Elsewhere the kernels
// that use them compile, so that every file compiles for every architecture, and are never launched.
#pragma once

#include "cuda/chip.h"
#include "cuda/wgmma_operand.h"

namespace jlebm {
namespace cuda {

template <int kCount>
JLEBM_DEVICE void no_warpgroup(float (&d)[kCount]) {
    d[0] = 0.0f;
    asm volatile("trap;");
}

JLEBM_DEVICE uint64_t wgmma_operand(const void* shared, int along_k, int along_n) {
    return wgmma_descriptor(shared_address(shared), along_k, along_n);
}

// what a warpgroup has written to shared memory becomes visible to its matrix instructions
JLEBM_DEVICE void fence_for_wgmma() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// The first kCount words of the operand are in their registers by now: the compiler may not move what makes them behind
// this, where the instructions already read them.
template <int kCount, int kWords>
JLEBM_DEVICE void wgmma_begin(uint32_t (&a)[kWords]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(a[i])::"memory");
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
template <int kCount>
JLEBM_DEVICE void wgmma_keep(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// D is not to be read, nor A changed, between the instructions and this
template <int kCount>
JLEBM_DEVICE void wgmma_end(float (&d)[kCount]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
    wgmma_keep(d);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define JLEBM_WGMMA(text, ...)                                                                                         \
    asm volatile(text                                                                                                  \
                 : __VA_ARGS__                                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(kAdd)), "n"(int(kTransposed)))
#else
#define JLEBM_WGMMA(text, ...) (void)a, (void)b, no_warpgroup(d)
#endif
// eight of the accumulator's registers, of 8 i on
#define JLEBM_D8(i)                                                                                                    \
    "+f"(d[8 * i]), "+f"(d[8 * i + 1]), "+f"(d[8 * i + 2]), "+f"(d[8 * i + 3]), "+f"(d[8 * i + 4]),                    \
        "+f"(d[8 * i + 5]), "+f"(d[8 * i + 6]), "+f"(d[8 * i + 7])

template <bool kAdd, bool kTransposed>
JLEBM_DEVICE void wgmma_bf16(float (&d)[16], const uint32_t (&a)[4], uint64_t b) {
    JLEBM_WGMMA("{.reg .pred p; setp.ne.b32 p, %21, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0,"
                "%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p, 1, 1, %22;}",
                JLEBM_D8(0), JLEBM_D8(1));
}

template <bool kAdd, bool kTransposed>
JLEBM_DEVICE void wgmma_bf16(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    JLEBM_WGMMA("{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0,"
                "%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
                "%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1, %38;}",
                JLEBM_D8(0), JLEBM_D8(1), JLEBM_D8(2), JLEBM_D8(3));
}

template <bool kAdd, bool kTransposed>
JLEBM_DEVICE void wgmma_bf16(float (&d)[56], const uint32_t (&a)[4], uint64_t b) {
    JLEBM_WGMMA("{.reg .pred p; setp.ne.b32 p, %61, 0; wgmma.mma_async.sync.aligned.m64n112k16.f32.bf16.bf16 {%0,"
                "%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
                "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,"
                "%51,%52,%53,%54,%55}, {%56,%57,%58,%59}, %60, p, 1, 1, %62;}",
                JLEBM_D8(0), JLEBM_D8(1), JLEBM_D8(2), JLEBM_D8(3), JLEBM_D8(4), JLEBM_D8(5), JLEBM_D8(6));
}

template <bool kAdd, bool kTransposed>
JLEBM_DEVICE void wgmma_bf16(float (&d)[104], const uint32_t (&a)[4], uint64_t b) {
    JLEBM_WGMMA("{.reg .pred p; setp.ne.b32 p, %109,"
                " 0; wgmma.mma_async.sync.aligned.m64n208k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,"
                "%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,"
                "%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,"
                "%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,"
                "%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103}, {%104,"
                "%105,%106,%107}, %108, p, 1, 1, %110;}",
                JLEBM_D8(0), JLEBM_D8(1), JLEBM_D8(2), JLEBM_D8(3), JLEBM_D8(4), JLEBM_D8(5), JLEBM_D8(6), JLEBM_D8(7),
                JLEBM_D8(8), JLEBM_D8(9), JLEBM_D8(10), JLEBM_D8(11), JLEBM_D8(12));
}

#undef JLEBM_D8
#undef JLEBM_WGMMA

} // namespace cuda
} // namespace jlebm
