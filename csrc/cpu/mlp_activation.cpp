// mlp_activation: h = phi(a) and d = phi'(a) over n values, for the layers that go through a matrix library.
// Compiled once per target.
#include "cpu/activation_lanes.h"
#include "cpu/kernels_target.h"
#include "cpu/schedule.h"

namespace jlebm {
namespace JLEBM_TARGET {

void mlp_activation(const MlpActivationParams& p, int n_threads) {
    constexpr int64_t kChunk = 4096; // floats: 16 KB in, 32 KB out, stays in the first-level cache
    const ActivateRows rows = activate_rows_of(p.activation);
    const Schedule schedule((p.n + kChunk - 1) / kChunk, 1, 1, n_threads);
    schedule.run([&](const Piece& piece) {
        const int64_t begin = piece.first_unit * kChunk, end = std::min(p.n, begin + kChunk);
        const int64_t vectors = (end - begin) / kLanes;
        rows(p.a + begin, p.param, p.h ? p.h + begin : nullptr, p.d + begin, vectors);
        const int64_t done = begin + vectors * kLanes, rest = end - done;
        if (rest == 0) return;
        float a[kLanes] = {}, h[kLanes], d[kLanes];
        std::memcpy(a, p.a + done, size_t(rest) * sizeof(float));
        rows(a, p.param, h, d, 1);
        if (p.h) std::memcpy(p.h + done, h, size_t(rest) * sizeof(float));
        std::memcpy(p.d + done, d, size_t(rest) * sizeof(float));
    });
}

} // namespace JLEBM_TARGET
} // namespace jlebm
