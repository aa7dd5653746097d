// spectral_norms: of each weight W [n_out, n_in] the largest singular value sigma with its vectors, and W / sigma.
//
//     v = W^T u, forth = W v, u <- forth / |forth|   until   |W W^T u - |v|^2 u| <= tolerance |W v|
//     sigma = |forth| / |v|
// One block, one weight: everything but W stands in shared memory, and W, read twice an iteration, in the first-level
// cache. No one outside looks at a value, so that a chain with a spectral norm neither waits nor leaves a CUDA graph.
#include <stdexcept>

#include "cuda/device.h"

namespace jlebm {
namespace cuda {
namespace {

constexpr int kNormWarps = 16;
constexpr int kNormThreads = kNormWarps * kWarp;
// Two singular values whose squares differ by a part d keep the residual above t for at most 2 ln(d / t) / d
// iterations, which for t = 1e-4 is largest, 7358, at d = 2.7e-4; a start near the answer takes one or two.
constexpr int kMostIterations = 8192;
// columns whose sums over the rows of one warp are kept at a time
constexpr int kColumns = 512;

struct NormMemory {
    float *u, *forth, *back, *partial;
    static constexpr int64_t floats(int64_t n_out, int64_t n_in) { return 2 * n_out + n_in + kNormWarps * kColumns; }
};

JLEBM_DEVICE float warp_sum(float v) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) v = add_rn(v, shuffle_xor(v, mask));
    return v;
}

// |a|^2, the same in every warp
JLEBM_DEVICE float square(const float* a, int n) {
    float sum = 0.0f;
    for (int i = lane_index(); i < n; i += kWarp) sum = fma_rn(a[i], a[i], sum);
    return warp_sum(sum);
}

// back = W^T u
JLEBM_DEVICE void transposed_product(const SpectralWeight& w, const NormMemory& m) {
    for (int first = 0; first < w.n_in; first += kColumns) {
        const int end = w.n_in - first < kColumns ? w.n_in : first + kColumns;
        for (int c = first + lane_index(); c < end; c += kWarp) {
            float sum = 0.0f;
            for (int r = warp_index(); r < w.n_out; r += kNormWarps)
                sum = fma_rn(load_readonly(w.weight + int64_t(r) * w.n_in + c), m.u[r], sum);
            m.partial[warp_index() * kColumns + c - first] = sum;
        }
        sync_block();
        for (int c = first + int(threadIdx.x); c < end; c += kNormThreads) {
            float sum = 0.0f;
#pragma unroll
            for (int warp = 0; warp < kNormWarps; ++warp) sum = add_rn(sum, m.partial[warp * kColumns + c - first]);
            m.back[c] = sum;
        }
        sync_block();
    }
}

// forth = W back
JLEBM_DEVICE void product(const SpectralWeight& w, const NormMemory& m) {
    for (int r = warp_index(); r < w.n_out; r += kNormWarps) {
        float sum = 0.0f;
        for (int c = lane_index(); c < w.n_in; c += kWarp)
            sum = fma_rn(load_readonly(w.weight + int64_t(r) * w.n_in + c), m.back[c], sum);
        sum = warp_sum(sum);
        if (lane_index() == 0) m.forth[r] = sum;
    }
    sync_block();
}

// A start of no use (zero, orthogonal to all that W maps to, not finite) is replaced by this one, once.
JLEBM_DEVICE float other_start(int r) { return 1.0f + 0.5f * float((uint32_t(r) * 2654435761u) >> 8) * 0x1p-24f; }

} // namespace

JLEBM_KERNEL(kNormThreads, 1)
spectral_norm_kernel(JLEBM_PARAMETER SpectralNormsParams p) {
    const SpectralWeight& w = p.weights[blockIdx.x];
    NormMemory m;
    m.u = shared_memory<float>();
    m.forth = m.u + w.n_out, m.back = m.forth + w.n_out, m.partial = m.back + w.n_in;
    for (int r = int(threadIdx.x); r < w.n_out; r += kNormThreads) m.u[r] = w.start[r];
    sync_block();

    float sigma = 0.0f, back_length = 1.0f;
    bool restarted = false;
    for (int iteration = 0; iteration < kMostIterations; ++iteration) {
        transposed_product(w, m);
        product(w, m);
        // every warp forms these sums, in one order: all threads take the same way
        const float square_back = square(m.back, w.n_in), square_forth = square(m.forth, w.n_out);
        float residual = 0.0f;
        for (int r = lane_index(); r < w.n_out; r += kWarp) {
            const float d = fma_rn(-square_back, m.u[r], m.forth[r]);
            residual = fma_rn(d, d, residual);
        }
        residual = warp_sum(residual);
        sync_block(); // all have read u
        if (!(square_forth > 0.0f && square_forth < INFINITY)) {
            sigma = square_forth == 0.0f ? 0.0f : bits_float(0x7fc00000u); // NaN, also where squares overflow
            if (restarted) break;
            restarted = true;
            for (int r = int(threadIdx.x); r < w.n_out; r += kNormThreads) m.u[r] = other_start(r);
            sync_block();
            continue;
        }
        const float length = sqrt_rn(square_forth);
        for (int r = int(threadIdx.x); r < w.n_out; r += kNormThreads) m.u[r] = m.forth[r] / length;
        sync_block();
        back_length = sqrt_rn(square_back);
        sigma = length / back_length;
        if (residual <= p.tolerance * p.tolerance * square_forth) break;
    }

    const bool keep = sigma > 0.0f && sigma < INFINITY;
    for (int r = int(threadIdx.x); r < w.n_out; r += kNormThreads) {
        w.u[r] = m.u[r];
        if (keep && w.kept_u) w.kept_u[r] = m.u[r];
    }
    for (int c = int(threadIdx.x); c < w.n_in; c += kNormThreads) {
        const float v = m.back[c] / back_length;
        w.v[c] = v;
        if (keep && w.kept_v) w.kept_v[c] = v;
    }
    if (threadIdx.x == 0) *w.sigma = sigma;
    const int64_t size = int64_t(w.n_out) * w.n_in;
    for (int64_t i = int64_t(threadIdx.x); i < size; i += kNormThreads)
        w.normalised[i] = load_readonly(w.weight + i) / sigma;
}

namespace {
int64_t shared_bytes(int64_t n_out, int64_t n_in) { return NormMemory::floats(n_out, n_in) * int64_t(sizeof(float)); }
} // namespace

std::string spectral_unsupported_reason(int64_t n_out, int64_t n_in, const CudaLaunch& launch) {
    const int64_t bytes = shared_bytes(n_out, n_in);
    if (bytes <= launch.max_shared_bytes) return "";
    return "the singular vectors of a weight [" + std::to_string(n_out) + ", " + std::to_string(n_in) + "] need " +
           std::to_string(bytes) + " bytes of shared memory, this device gives a block " +
           std::to_string(launch.max_shared_bytes);
}

void spectral_norms(const SpectralNormsParams& params, const CudaLaunch& launch) {
    Geometry geometry;
    geometry.grid = params.count, geometry.block = kNormThreads;
    for (int i = 0; i < params.count; ++i) {
        const SpectralWeight& w = params.weights[i];
        const std::string reason = spectral_unsupported_reason(w.n_out, w.n_in, launch);
        if (!reason.empty()) throw std::invalid_argument(reason);
        const int64_t bytes = shared_bytes(w.n_out, w.n_in);
        if (bytes > geometry.shared_bytes) geometry.shared_bytes = bytes;
    }
    JLEBM_LAUNCH((spectral_norm_kernel), (geometry), launch, params);
}

} // namespace cuda
} // namespace jlebm
