// Between the caller's rows, [chains, n], and the kernels' lanes, [n][V * kLanes].
#pragma once

#include <cstring>

#include "cpu/simd.h"

namespace jlebm {
namespace JLEBM_TARGET {

// rows [first_chain, first_chain + count) of a [chains, n] array -> [n][V * kLanes], missing chains zero
template <int V, class T>
inline void lanes_from_rows(float* to, const T* rows, int64_t n, int64_t first_chain, int count) {
    constexpr int kRow = V * kLanes;
    for (int c = 0; c < count; ++c)
        for (int64_t k = 0; k < n; ++k) to[k * kRow + c] = float(rows[(first_chain + c) * n + k]);
    for (int c = count; c < kRow; ++c)
        for (int64_t k = 0; k < n; ++k) to[k * kRow + c] = 0.0f;
}

template <int V>
inline void rows_from_lanes(float* rows, const float* from, int64_t n, int64_t first_chain, int count) {
    constexpr int kRow = V * kLanes;
    for (int c = 0; c < count; ++c)
        for (int64_t k = 0; k < n; ++k) rows[(first_chain + c) * n + k] = from[k * kRow + c];
}

// one value of each chain
template <int V>
inline void rows_from_vectors(float* rows, const F* values, int64_t first_chain, int count) {
    if (count == V * kLanes) {
        for (int v = 0; v < V; ++v) store(rows + first_chain + v * kLanes, values[v]);
        return;
    }
    float row[V * kLanes];
    for (int v = 0; v < V; ++v) store(row + v * kLanes, values[v]);
    std::memcpy(rows + first_chain, row, size_t(count) * sizeof(float));
}

} // namespace JLEBM_TARGET
} // namespace jlebm
