// See status.h.
#include "cuda/status.h"

#include <sstream>

namespace jlebm {
namespace cuda {

namespace {

constexpr int kLowestCapability = 80; // mma.sync on bf16 and tf32, cp.async

std::string capability_text(int capability) {
    return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

std::string rebuild(int capability) {
    return "rebuild with JLEBM_CUDA_ARCHS=" + std::to_string(capability) +
           " pip install -e . (a toolkit that knows this device is needed), or use backend='eager'";
}

// one entry of the list against one device
bool serves(const std::string& entry, int capability) {
    const int arch = std::atoi(entry.c_str());
    const bool ptx = entry.find("virtual") != std::string::npos, both = entry.find('-') == std::string::npos;
    const size_t digits = entry.find_first_not_of("0123456789");
    const char letter = digits == std::string::npos ? '\0' : entry[digits];
    if (letter == 'a') return arch == capability; // of exactly this device
    const bool family = arch / 10 == capability / 10 && arch <= capability;
    if (letter == 'f') return family;
    // machine code runs within the major version, PTX on everything newer
    return ((!ptx || both) && family) || ((ptx || both) && arch <= capability);
}

} // namespace

std::string version_text(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string driver_reason(int driver_version, int runtime_version) {
    if (driver_version <= 0)
        return "no NVIDIA driver was found (libcuda.so.1 does not load); install the driver, or start the container "
               "with access to the GPU; backend='eager' runs without";
    if (driver_version / 1000 < runtime_version / 1000)
        return "the NVIDIA driver is older than the CUDA toolkit that the kernels were built with: it supports CUDA " +
               version_text(driver_version) + ", they need " + version_text(runtime_version / 1000 * 1000) +
               "; update the driver, or rebuild with a toolkit of CUDA " + std::to_string(driver_version / 1000) +
               ".x on PATH (pip install -e .)";
    return "";
}

std::string capability_reason(int capability, const std::string& archs) {
    if (capability < kLowestCapability)
        return "it needs compute capability 8.0 or newer (Ampere, Ada, Hopper, Blackwell), got " +
               capability_text(capability) + "; use backend='eager' on this device";
    std::stringstream list(archs);
    for (std::string entry; std::getline(list, entry, ',');)
        if (serves(entry, capability)) return "";
    return "its kernels were built for " + archs + " and have no image for compute capability " +
           capability_text(capability) + "; " + rebuild(capability);
}

std::string remedy(const Failure& f) {
    switch (f.status) {
    case kInsufficientDriver:
    case kNoDevice:
    case kUnsupportedPtx: {
        const std::string reason = driver_reason(f.driver_version, f.runtime_version);
        if (!reason.empty()) return reason;
        if (f.status == kUnsupportedPtx) return rebuild(f.capability);
        return "no GPU is visible; look at nvidia-smi and at CUDA_VISIBLE_DEVICES";
    }
    case kInvalidDevice:
        return "torch.cuda.device_count() says how many devices there are";
    case kInvalidDeviceFunction:
    case kNoKernelImage: {
        const std::string reason = capability_reason(f.capability, f.archs);
        return reason.empty() ? rebuild(f.capability) : reason;
    }
    case kMemoryAllocation:
        return "free device memory, or sample fewer chains at a time";
    case kInvalidValue:
    case kInvalidConfiguration:
    case kLaunchOutOfResources:
        return "the launch asks for more than this device has; report it with this message, and use backend='eager' "
               "meanwhile";
    case kIllegalAddress:
    case kLaunchFailure:
        return "a kernel enqueued before may be the cause: CUDA reports late; CUDA_LAUNCH_BLOCKING=1 names the right "
               "one. The process has to be started anew";
    case kCaptureInvalidated:
        return "an earlier operation of this graph capture was not allowed in a capture";
    default:
        return "";
    }
}

std::string failure_text(const Failure& f) {
    std::string text =
        std::string(f.kernel) + " (" + f.file + ":" + std::to_string(f.line) + ") on cuda:" + std::to_string(f.device);
    if (f.grid > 0)
        text += ", grid " + std::to_string(f.grid) + ", block " + std::to_string(f.block) + ", " +
                std::to_string(f.shared_bytes) + " bytes of shared memory";
    text += std::string(": ") + f.status_name + ": " + f.status_text;
    const std::string advice = remedy(f);
    return advice.empty() ? text : text + ". " + advice;
}

} // namespace cuda
} // namespace jlebm
