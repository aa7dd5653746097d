// Philox4x32 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011), one scalar call.
//
// The noise contract addresses every normal by value, nobody keeps a stream:
//     counter = (dim / 4, chain, step, stream),   key = (low word, high word) of the 64-bit noise key
// Known answers: tests/data/philox_kat.txt (the vectors that Random123 publishes).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define JLEBM_HD __host__ __device__ __forceinline__
#else
#define JLEBM_HD inline
#endif

namespace jlebm {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u; // golden ratio
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u; // sqrt(3) - 1
constexpr int kPhiloxRounds = 10;

enum Stream : uint32_t { kStreamLangevin = 0, kStreamInitial = 1, kStreamAcceptReject = 2 };

struct PhiloxWords {
    uint32_t w[4];
};

template <int kRounds = kPhiloxRounds>
JLEBM_HD PhiloxWords philox4x32(PhiloxWords counter, uint32_t key0, uint32_t key1) {
    uint32_t c0 = counter.w[0], c1 = counter.w[1], c2 = counter.w[2], c3 = counter.w[3];
    for (int round = 0; round < kRounds; ++round) {
        const uint64_t p0 = uint64_t(kPhiloxM0) * c0;
        const uint64_t p1 = uint64_t(kPhiloxM1) * c2;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ key0;
        c1 = uint32_t(p1);
        c2 = uint32_t(p0 >> 32) ^ c3 ^ key1;
        c3 = uint32_t(p0);
        key0 += kPhiloxW0;
        key1 += kPhiloxW1;
    }
    return {{c0, c1, c2, c3}};
}

} // namespace jlebm
