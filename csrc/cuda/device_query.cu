// See device_query.h and errors.h.
#include "cuda/device_query.h"

#include <stdexcept>

#include "cuda/errors.h"
#include "cuda/status.h"

namespace jlebm {
namespace cuda {

static_assert(kInvalidValue == int(cudaErrorInvalidValue) && kMemoryAllocation == int(cudaErrorMemoryAllocation) &&
                  kInvalidConfiguration == int(cudaErrorInvalidConfiguration) &&
                  kInsufficientDriver == int(cudaErrorInsufficientDriver) &&
                  kInvalidDeviceFunction == int(cudaErrorInvalidDeviceFunction) &&
                  kNoDevice == int(cudaErrorNoDevice) && kInvalidDevice == int(cudaErrorInvalidDevice) &&
                  kNoKernelImage == int(cudaErrorNoKernelImageForDevice) &&
                  kUnsupportedPtx == int(cudaErrorUnsupportedPtxVersion) &&
                  kIllegalAddress == int(cudaErrorIllegalAddress) &&
                  kLaunchOutOfResources == int(cudaErrorLaunchOutOfResources) &&
                  kLaunchFailure == int(cudaErrorLaunchFailure) &&
                  kCaptureInvalidated == int(cudaErrorStreamCaptureInvalidated),
              "status.h must name CUDA's own numbers");

int driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() { return CUDART_VERSION; }

const char* built_archs() { return JLEBM_CUDA_ARCHS; }

namespace {
int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}
int capability_of(int device) {
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
           attribute(cudaDevAttrComputeCapabilityMinor, device);
}
} // namespace

DeviceFacts device_facts(int device) {
    Geometry none;
    none.grid = 0;
    CudaLaunch launch;
    launch.device = device;
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, device), LaunchSite{"device_facts", __FILE__, __LINE__}, none, launch);
    DeviceFacts facts;
    facts.name = properties.name;
    facts.capability = 10 * properties.major + properties.minor;
    facts.multiprocessors = properties.multiProcessorCount;
    facts.max_shared_bytes = int(properties.sharedMemPerBlockOptin);
#if defined(JLEBM_CUDA_WARPGROUPS)
    facts.warpgroups = facts.capability == 90; // sm_90a is machine code of this one capability
#endif
#if defined(JLEBM_CUDA_CLUSTERS)
    // the large chips, whose parts have 16 multiprocessors and more
    facts.clusters = (properties.major == 9 || properties.major == 10) && attribute(cudaDevAttrClusterLaunch, device);
#endif
    return facts;
}

void raise(cudaError_t status, const LaunchSite& site, const Geometry& geometry, int device) {
    Failure failure;
    failure.status = int(status);
    failure.status_name = cudaGetErrorName(status);
    failure.status_text = cudaGetErrorString(status);
    failure.kernel = site.kernel, failure.file = site.file, failure.line = site.line;
    failure.grid = geometry.grid * geometry.grid_y, failure.block = geometry.block;
    failure.shared_bytes = geometry.shared_bytes;
    failure.device = device;
    failure.driver_version = driver_version();
    failure.runtime_version = runtime_version();
    failure.capability = failure.driver_version ? capability_of(device) : 0;
    failure.archs = built_archs();
    cudaGetLastError();
    throw std::runtime_error(failure_text(failure));
}

} // namespace cuda
} // namespace jlebm
