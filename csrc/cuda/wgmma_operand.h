// Names a matrix in shared memory that a warpgroup's matrix instruction reads: matrix descriptors of the PTX ISA,
// section "Asynchronous warpgroup level matrix shared memory layout", without swizzling. Both implementations of
// device.h use this.
#pragma once

#include "common/philox.h"

namespace jlebm {
namespace cuda {

// bytes of shared memory from its beginning -> descriptor; the distances are between matrices of 8 by 8 elements (128
// bytes), in the direction of the contraction and of the columns
JLEBM_HD uint64_t wgmma_descriptor(uint32_t address, int along_k, int along_n) {
    return uint64_t(address >> 4 & 0x3fff) | uint64_t(along_k >> 4 & 0x3fff) << 16 |
           uint64_t(along_n >> 4 & 0x3fff) << 32;
}
JLEBM_HD uint64_t wgmma_operand_at(uint64_t descriptor, int bytes) { return descriptor + uint64_t(bytes >> 4); }

} // namespace cuda
} // namespace jlebm
