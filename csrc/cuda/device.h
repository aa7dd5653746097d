// What only a GPU has, behind one interface with two implementations:
//
//     nvcc                                   below: the instructions themselves
//     any C++17 compiler, JLEBM_CUDA_ON_HOST  host/emulation.h: a block's threads as fibres that switch at barriers
//
// A kernel file includes this, is written in the words below and nothing else that is CUDA's, and is compiled by both.
//
//   kernel     JLEBM_KERNEL(max_threads, min_blocks) name(Params p) { … }      returns void; may be a template
//              JLEBM_PARAMETER Params p: a large record that stays in constant memory, indexed at run time
//   launch     JLEBM_LAUNCH((name<8, true>), (Geometry{grid, block, shared_bytes}), launch, p)    throws on failure
//   device fn  JLEBM_DEVICE float name(float a) { … }       inlined;  JLEBM_HD (common/philox.h) is host and device
//   indices    threadIdx, blockIdx, blockDim, gridDim (.x; blockIdx.y); lane_index(), warp_index(); blockDim.x is a
//              multiple of 32, and warps are made along x
//   shared     shared_memory<T>(byte_offset = 0): the block's dynamic shared memory, 1024-byte aligned at offset 0;
//              there is no other: no __shared__ variables
//   barriers   sync_block(), sync_group(id, n_threads) and arrive_group(id, n_threads) with id 1 … 15 and n_threads a
//              multiple of 32, sync_warp()
//   clusters   of geometry.cluster blocks: cluster_rank() of this block; sync_cluster() by all threads of all its
//   blocks.
//              An mbarrier, 8 bytes of shared memory, has phases: one ends when as many threads have arrived as
//              mbarrier_init(m, arrivals) said, and as many bytes have come as arrivals announced.
//              fence_mbarrier_init() by whoever initialised, then sync_cluster(); mbarrier_arrive(m, bytes = 0);
//              mbarrier_wait(m, parity) until the phase of this parity (first 0, then 1, 0, …) has ended.
//              store_async(p, v, m, rank): v, of 4, 8 or 16 bytes, into block `rank`'s shared memory where p is in this
//              block's, to be read once that block's m has counted its bytes
//   exchange   shuffle(v, lane), shuffle_xor(v, mask), shuffle_down(v, delta) of 4- and 8-byte values;
//              warp_any, warp_all (all 32 lanes take part in each of these, and in everything down to ldmatrix)
//   matrices   mma_m16n8k8_tf32(d, a, b), mma_m16n8k16_bf16(d, a, b): d += a b
//                  d float[4], a uint32_t[4], b uint32_t[2] by reference
//                  g = lane / 4, t = lane % 4;   d: (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1), row-major 16 x 8
//                  tf32  a: (g, t) (g+8, t) (g, t+4) (g+8, t+4) of 16 x 8;   b: (k=t, n=g) (k=t+4, n=g) of 8 x 8
//                  bf16  a: (g, 2t..2t+1) (g+8, 2t..) (g, 2t+8..) (g+8, 2t+8..) of 16 x 16, low half first;
//                        b: (k=2t..2t+1, n=g) (k=2t+8.., n=g) of 16 x 8
//              ldmatrix_x1, _x2, _x4(r, row) and ldmatrix_x1_trans, …: lanes 8j … 8j+7 give the 16-byte rows of 8 x 8
//              matrix j of 16-bit elements, 16-byte aligned, in shared memory; r[j]: elements (g, 2t) (g, 2t+1) of
//              matrix j, low half first, of its transpose (2t, g) (2t+1, g) with _trans
//   warpgroup  four consecutive warps, the first one's index a multiple of 4; compute capability 9.0 alone:
//              wgmma_bf16<add, transposed>(d, a, b): d (+)= a b of 64 x N, d float[N / 2], a uint32_t[4], b of
//              wgmma_operand; N 32, 64, 112 or 208. Warp w has rows 16 w to 16 w + 15: a as in mma_m16n8k16_bf16,
//              d as 8 columns after the other in mma's d. b: 16 x N in shared memory as matrices of 8 x 8, 128 bytes
//              each, a column's 8 elements of k side by side, or with `transposed` a row's 8 columns;
//              wgmma_operand(shared, along_k, along_n): bytes from matrix to matrix; wgmma_operand_at(b, bytes) moves
//              wgmma_keep(d) if the first one adds, wgmma_begin<words>(a of all) before it, wgmma_end(d) waits for
//              all: between them nobody looks at d
//              fence_for_wgmma() by whoever wrote shared memory that b names, before the barrier
//   compiler   opaque(v): v, and nobody knows; what is computed from it is computed there
//   copies     cp_async_4, _8, _16(shared, global, source_bytes = all): both aligned to the size; the
//              rest is zero-filled. cp_async_commit(), cp_async_wait<groups that may still fly>(); then a barrier
//              before other threads read
//   rounding   to_tf32(float) -> bits, nearest (ties away); to_bf16(float) -> bits, nearest even;
//              pack_bf16(low, high) -> two of them; from_bf16(bits); float_bits(v), bits_float(bits)
//              mul_rn, add_rn, sub_rn, fma_rn, sqrt_rn: IEEE, never contracted; sqrt_rn_normal of what is at
//              least 2^-100 and at most 2^100
//   fast       exp_few_ulp(float), exp2_few_ulp(float), reciprocal_few_ulp(float): relative error below 4e-7 where the
//              result is normal;
//              expf, tanhf, erff, log1pf … are those of either C++ library
//   memory     load_readonly(ptr) for what no thread of the kernel writes; float2, float4, make_float2, make_float4;
//              atomic_add(ptr, v) -> old (float, int32, uint32, uint64), atomic_min, atomic_max (int32, uint32, int64),
//              fence_block(), fence_device()
//
// The host implementation reports: a barrier or warp-wide instruction that not all reach, misaligned or foreign
// addresses, copies never waited for; reads before a wait or a write return NaN. Threads run in
// random order between barriers.
#pragma once

#include "common/philox.h"
#include "cuda/geometry.h"

#if defined(JLEBM_CUDA_ON_HOST)
#include "cuda/host/emulation.h"
#elif defined(__CUDACC__)
#include "cuda/chip.h"
#include "cuda/chip_warpgroup.h"
#else
#error "device.h is for nvcc, or for any compiler with JLEBM_CUDA_ON_HOST defined"
#endif
