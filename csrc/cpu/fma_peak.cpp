// The multiply-add rate of one core at this target's vector width: the limit that benchmarks compare with.
// Compiled once per target.
#include <chrono>

#include "cpu/kernels_target.h"
#include "cpu/simd.h"

namespace jlebm {
namespace JLEBM_TARGET {

// Mean rate over `seconds`, so that it compares with a kernel timed just before or after on the same busy machine.
double fma_peak(double seconds) {
    // twelve independent accumulators cover latency times ports (4 x 2); a/2 + 1/2 tends to 1 and never grows. Their
    // starts differ and come from memory, or the compiler would compute one of them and copy it.
    volatile float starts[12] = {0.1f, 0.2f, 0.3f, 0.4f, 0.5f, 0.6f, 0.7f, 0.8f, 0.9f, 1.0f, 1.1f, 1.2f};
    F a0 = splat(starts[0]), a1 = splat(starts[1]), a2 = splat(starts[2]), a3 = splat(starts[3]);
    F a4 = splat(starts[4]), a5 = splat(starts[5]), a6 = splat(starts[6]), a7 = splat(starts[7]);
    F a8 = splat(starts[8]), a9 = splat(starts[9]), a10 = splat(starts[10]), a11 = splat(starts[11]);
    const F b = splat(0.5f), c = splat(0.5f);
    constexpr int kAccumulators = 12, kInner = 10000;
    double loops = 0.0, elapsed = 0.0;
    const auto begin = std::chrono::steady_clock::now();
    do {
        for (int i = 0; i < kInner; ++i) {
            a0 = fma(a0, b, c), a1 = fma(a1, b, c), a2 = fma(a2, b, c), a3 = fma(a3, b, c);
            a4 = fma(a4, b, c), a5 = fma(a5, b, c), a6 = fma(a6, b, c), a7 = fma(a7, b, c);
            a8 = fma(a8, b, c), a9 = fma(a9, b, c), a10 = fma(a10, b, c), a11 = fma(a11, b, c);
        }
        loops += kInner;
        elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    } while (elapsed < seconds);
    const F sum = ((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7)) + ((a8 + a9) + (a10 + a11));
    float total = 0.0f;
    for (int i = 0; i < kLanes; ++i) total += sum[i];
    // the sum is near 12 per lane; looking at it keeps the loop
    return total > 0.0f ? 2.0 * kAccumulators * kLanes * loops / elapsed * 1e-9 : 0.0;
}

} // namespace JLEBM_TARGET
} // namespace jlebm
