// What a CUDA device is, asked of the driver without torch. Nothing here throws where there is no driver.
#pragma once

#include <string>

namespace jlebm {
namespace cuda {

struct DeviceFacts {
    std::string name;
    int capability = 0; // 90 is 9.0
    int multiprocessors = 0;
    int max_shared_bytes = 0; // of one block, when asked for
    bool warpgroups = false;  // whether the kernels for its warpgroups are in this build and run there
    bool clusters = false;    // the same of the kernels for clusters of blocks
};

int driver_version();      // 13000 is CUDA 13.0; 0 without a driver
int runtime_version();     // of the toolkit these kernels were built with
const char* built_archs(); // JLEBM_CUDA_ARCHS of this build, comma-separated
// throws std::runtime_error with status.h's sentence
DeviceFacts device_facts(int device);

} // namespace cuda
} // namespace jlebm
