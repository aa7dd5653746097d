// CUDA's status numbers as sentences: what was launched, what CUDA said, what to do. Plain C++, so that every case is
// tested where there is no GPU, and shared by the launcher and by the questions that Python asks beforehand.
#pragma once

#include <string>

namespace jlebm {
namespace cuda {

// the statuses that have a remedy of their own; values of cudaError_t, compared with the header in device_query.cu
enum Status : int {
    kSuccess = 0,
    kInvalidValue = 1,
    kMemoryAllocation = 2,
    kInvalidConfiguration = 9,
    kInsufficientDriver = 35,
    kInvalidDeviceFunction = 98,
    kNoDevice = 100,
    kInvalidDevice = 101,
    kNoKernelImage = 209,
    kUnsupportedPtx = 222,
    kIllegalAddress = 700,
    kLaunchOutOfResources = 701,
    kLaunchFailure = 719,
    kCaptureInvalidated = 901
};

struct Failure {
    int status = 0;
    const char* status_name = ""; // cudaGetErrorName
    const char* status_text = ""; // cudaGetErrorString
    const char* kernel = "";
    const char* file = "";
    int line = 0;
    long long grid = 0;
    int block = 0;
    long long shared_bytes = 0;
    int device = 0;
    int driver_version = 0;  // as CUDA counts, 13000 is 13.0; 0: no driver
    int runtime_version = 0; // of the toolkit these kernels were built with
    int capability = 0;      // 90 is 9.0; 0: unknown
    const char* archs = "";  // what the kernels were built for
};

// "13.0" of 13000
std::string version_text(int version);

// what to do about a status; "" where there is nothing to say beyond CUDA's own words
std::string remedy(const Failure& failure);

// "mlp_langevin_chain<8> (csrc/cuda/x.cu:120) on cuda:0, grid 13, block 128, 34816 bytes of shared memory:
//  cudaErrorInvalidValue: invalid argument. <remedy>"
std::string failure_text(const Failure& failure);

// A driver serves kernels of its own major version, whatever the minor (CUDA minor version compatibility). Why this one
// does not, with the remedy; "" if it does.
std::string driver_reason(int driver_version, int runtime_version);

// archs: comma-separated as in JLEBM_CUDA_ARCHS, "80-real,90a-real,120-virtual". Why a device of this compute
// capability cannot run kernels built for them, with the remedy; "" if it can.
std::string capability_reason(int capability, const std::string& archs);

} // namespace cuda
} // namespace jlebm
