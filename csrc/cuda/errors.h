// From a CUDA status to an exception, and the current device of a scope. Only for nvcc.
#pragma once

#include <cuda_runtime.h>

#include "cuda/geometry.h"

namespace jlebm {
namespace cuda {

// throws std::runtime_error with status.h's sentence; clears CUDA's last error first, so that the next call is not
// blamed
[[noreturn]] void raise(cudaError_t status, const LaunchSite& site, const Geometry& geometry, int device);

inline void check(cudaError_t status, const LaunchSite& site, const Geometry& geometry, const CudaLaunch& launch) {
    if (status != cudaSuccess) raise(status, site, geometry, launch.device);
}

// Makes `device` current and gives the caller's back: one process may drive several GPUs, and torch has its own idea.
class DeviceScope {
public:
    DeviceScope(int device, const LaunchSite& site) {
        Geometry none;
        none.grid = 0;
        CudaLaunch launch;
        launch.device = device;
        check(cudaGetDevice(&before_), site, none, launch);
        changed_ = before_ != device;
        if (changed_) check(cudaSetDevice(device), site, none, launch);
    }
    ~DeviceScope() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceScope(const DeviceScope&) = delete;
    DeviceScope& operator=(const DeviceScope&) = delete;

private:
    int before_ = 0;
    bool changed_ = false;
};

} // namespace cuda
} // namespace jlebm
