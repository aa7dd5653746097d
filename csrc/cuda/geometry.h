// The size of a launch and where it stands in the source: shared by both implementations of device.h.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace jlebm {
namespace cuda {

struct Geometry {
    int64_t grid = 1; // blocks along x
    int block = 32;   // threads along x, a multiple of 32
    int64_t shared_bytes = 0;
    int grid_y = 1;
    int cluster = 1; // consecutive blocks along x that run at the same time and reach each other's shared memory
};

struct LaunchSite {
    const char* kernel;
    const char* file;
    int line;
};

constexpr int kWarp = 32;
constexpr int64_t kMaxGridX =
    2147483647; // of every CUDA device; a launcher loops in the kernel instead of going beyond

} // namespace cuda
} // namespace jlebm
