// The host implementation of csrc/cuda/device.h against plain loops, and against faults that it must report.
// emulation_check <case> <seed>: prints "ok", or what is wrong.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.h"

using namespace jlebm;
using namespace jlebm::cuda;

namespace {

uint64_t state = 1;
float random_float() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return float(int32_t(state >> 33) % 2001 - 1000) / 256.0f;
}

void expect(bool holds, const std::string& what) {
    if (!holds) throw std::runtime_error("wrong: " + what);
}

CudaLaunch launch_of(uint64_t seed) {
    CudaLaunch launch;
    launch.max_shared_bytes = 101376, launch.multiprocessors = 2, launch.order_seed = seed;
    return launch;
}

#include "emulation_check_cluster.h"

// --- fragments: one warp, 16 x 8 = 16 x K times K x 8 ----------------------------------------------------------------

JLEBM_KERNEL(32, 1) tf32_product(const float* a, const float* b, float* d) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const uint32_t af[4] = {to_tf32(a[g * 8 + t]), to_tf32(a[(g + 8) * 8 + t]), to_tf32(a[g * 8 + t + 4]),
                            to_tf32(a[(g + 8) * 8 + t + 4])};
    const uint32_t bf[2] = {to_tf32(b[t * 8 + g]), to_tf32(b[(t + 4) * 8 + g])};
    float df[4] = {};
    mma_m16n8k8_tf32(df, af, bf);
    for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = df[i];
}

// both operands through ldmatrix from row-major shared memory: a as it stands, b [k][n] transposed
JLEBM_KERNEL(32, 1) bf16_product(const float* a, const float* b, float* d) {
    auto* as = shared_memory<uint16_t>();    // [16][16]
    auto* bs = shared_memory<uint16_t>(512); // [16][8]
    for (int i = lane_index(); i < 256; i += kWarp) as[i] = to_bf16(a[i]);
    for (int i = lane_index(); i < 128; i += kWarp) bs[i] = to_bf16(b[i]);
    sync_warp();
    uint32_t af[4], bf[2];
    const int lane = lane_index(), row = lane % 8, matrix = lane / 8;
    ldmatrix_x4(af, as + (row + 8 * (matrix % 2)) * 16 + 8 * (matrix / 2));
    ldmatrix_x2_trans(bf, bs + (lane % 16) * 8);
    float df[4] = {};
    mma_m16n8k16_bf16(df, af, bf);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = df[i];
}

void products(uint64_t seed, int k, void (*kernel)(const float*, const float*, float*), float (*rounded)(float)) {
    std::vector<float> a(size_t(16 * k)), b(size_t(8 * k)), d(128);
    for (float& v : a) v = rounded(random_float());
    for (float& v : b) v = rounded(random_float());
    JLEBM_LAUNCH((kernel), (Geometry{1, 32, 1024}), launch_of(seed), a.data(), b.data(), d.data());
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 8; ++n) {
            double sum = 0, size = 0;
            for (int i = 0; i < k; ++i) {
                sum += double(a[size_t(m * k + i)]) * b[size_t(i * 8 + n)];
                size += std::fabs(double(a[size_t(m * k + i)]) * b[size_t(i * 8 + n)]);
            }
            const double error = std::fabs(d[size_t(m * 8 + n)] - sum);
            expect(error <= 3e-7 * size, "element " + std::to_string(m) + ", " + std::to_string(n));
        }
}

// --- a warpgroup: 64 x 32 = 64 x 32 times 32 x 32, the second operand as it stands or transposed
// ----------------------

struct WgmmaFaults {
    bool fenced = true, begun = true, ended = true, early = false;
    int at = 0; // of the second operand
};

// a [64][32], b [32][32]; kTransposed: b's rows stand together in shared memory, else its columns
template <bool kTransposed>
JLEBM_KERNEL(128, 1)
warpgroup_product(const float* a, const float* b, float* d, WgmmaFaults faults) {
    constexpr int kAlongK = kTransposed ? 512 : 128, kAlongN = kTransposed ? 128 : 512;
    auto* bs = shared_memory<unsigned char>();
    for (int i = int(threadIdx.x); i < 1024; i += 128) {
        const int k = i / 32, n = i % 32, inside = kTransposed ? k % 8 * 8 + n % 8 : n % 8 * 8 + k % 8;
        reinterpret_cast<uint16_t*>(bs + k / 8 * kAlongK + n / 8 * kAlongN)[inside] = to_bf16(b[i]);
    }
    if (faults.fenced || threadIdx.x != 77) fence_for_wgmma();
    sync_block();
    const int row = warp_index() * 16 + lane_index() / 4, t = lane_index() % 4;
    float acc[16];
    for (int i = 0; i < 16; ++i) acc[i] = 0.5f;
    uint32_t none[1] = {};
    if (faults.begun) wgmma_begin<0>(none);
    const uint64_t whole = wgmma_operand(bs + faults.at, kAlongK, kAlongN);
    for (int k = 0; k < 2; ++k) {
        uint32_t af[4];
        for (int i = 0; i < 4; ++i) {
            const float* from = a + (row + i % 2 * 8) * 32 + k * 16 + i / 2 * 8 + 2 * t;
            af[i] = pack_bf16(from[0], from[1]);
        }
        wgmma_bf16<true, kTransposed>(acc, af, wgmma_operand_at(whole, 2 * k * kAlongK));
    }
    if (faults.early) d[row * 32 + 2 * t] = acc[0];
    if (faults.ended) wgmma_end(acc);
    if (faults.early) return;
    for (int j = 0; j < 4; ++j)
        for (int i = 0; i < 4; ++i) d[(row + i / 2 * 8) * 32 + 8 * j + 2 * t + i % 2] = acc[4 * j + i];
}

template <bool kTransposed>
void check_wgmma(uint64_t seed, const WgmmaFaults& faults) {
    std::vector<float> a(64 * 32), b(32 * 32), d(64 * 32);
    for (float& v : a) v = from_bf16(to_bf16(random_float()));
    for (float& v : b) v = from_bf16(to_bf16(random_float()));
    JLEBM_LAUNCH((warpgroup_product<kTransposed>), (Geometry{1, 128, 2048}), launch_of(seed), a.data(), b.data(),
                 d.data(), faults);
    for (int m = 0; m < 64; ++m)
        for (int n = 0; n < 32; ++n) {
            double sum = 0.5, size = 0.5;
            for (int i = 0; i < 32; ++i) {
                const double product = double(a[size_t(m * 32 + i)]) * b[size_t(i * 32 + n)];
                sum += product, size += std::fabs(product);
            }
            const double error = std::fabs(d[size_t(m * 32 + n)] - sum);
            expect(error <= 3e-7 * size, "element " + std::to_string(m) + ", " + std::to_string(n));
        }
}

float as_tf32(float v) { return bits_float(to_tf32(v)); }
float as_bf16(float v) { return from_bf16(to_bf16(v)); }

void check_tf32(uint64_t seed) { products(seed, 8, &tf32_product, &as_tf32); }
void check_bf16(uint64_t seed) { products(seed, 16, &bf16_product, &as_bf16); }

// operands that are not rounded are cut off, as on the chip
JLEBM_KERNEL(32, 1) unrounded(float* d) {
    const float a = 1.0f + 0x1p-11f; // to the nearest would be a tie, up
    const uint32_t af[4] = {float_bits(a), 0, 0, 0}, bf[2] = {float_bits(1.0f), 0};
    float df[4] = {};
    mma_m16n8k8_tf32(df, af, bf);
    if (lane_index() == 0) d[0] = df[0];
}
void check_rounding(uint64_t seed) {
    float d = 0;
    JLEBM_LAUNCH((unrounded), (Geometry{1, 32, 0}), launch_of(seed), &d);
    expect(d == 4.0f, "tf32 operands cut off, got " + std::to_string(d)); // four k of ones
    expect(as_tf32(1.0f + 0x1p-11f) == 1.0f + 0x1p-10f, "ties away from zero");
    expect(as_tf32(-1.0f - 0x1p-11f) == -1.0f - 0x1p-10f, "ties away from zero, negative");
    expect(as_bf16(1.0f + 0x1p-8f) == 1.0f && as_bf16(1.0f + 0x3p-8f) == 1.0f + 0x4p-8f, "ties to even");
    expect(std::isnan(as_bf16(NAN)) && std::isinf(as_bf16(INFINITY)) && std::isinf(as_tf32(INFINITY)), "specials");
}

// all ldmatrix variants against the table in the PTX ISA
JLEBM_KERNEL(32, 1) load_all(uint32_t* out) {
    auto* rows = shared_memory<uint16_t>(); // [32][8], element = 8 row + column
    for (int i = lane_index(); i < 256; i += kWarp) rows[i] = uint16_t(i);
    sync_warp();
    const int lane = lane_index();
    uint32_t r1[1], r2[2], r4[4], t1[1], t2[2], t4[4];
    ldmatrix_x1(r1, rows + 8 * (lane % 8)), ldmatrix_x2(r2, rows + 8 * (lane % 16)), ldmatrix_x4(r4, rows + 8 * lane);
    ldmatrix_x1_trans(t1, rows + 8 * (lane % 8)), ldmatrix_x2_trans(t2, rows + 8 * (lane % 16));
    ldmatrix_x4_trans(t4, rows + 8 * lane);
    for (int j = 0; j < 4; ++j) out[lane * 8 + j] = r4[j], out[lane * 8 + 4 + j] = t4[j];
    for (int j = 0; j < 2; ++j)
        if (r2[j] != r4[j] || t2[j] != t4[j]) out[lane * 8] = ~0u;
    if (r1[0] != r4[0] || t1[0] != t4[0]) out[lane * 8] = ~0u;
}
void check_ldmatrix(uint64_t seed) {
    std::vector<uint32_t> out(256);
    host::statistics() = {};
    JLEBM_LAUNCH((load_all), (Geometry{1, 32, 512}), launch_of(seed), out.data());
    for (uint32_t lane = 0; lane < 32; ++lane)
        for (uint32_t j = 0; j < 4; ++j) {
            const uint32_t g = lane / 4, t = lane % 4, matrix = 64 * j;
            const uint32_t plain = (matrix + 8 * g + 2 * t) | (matrix + 8 * g + 2 * t + 1) << 16;
            const uint32_t transposed = (matrix + 16 * t + g) | (matrix + 16 * t + 8 + g) << 16;
            expect(out[lane * 8 + j] == plain, "ldmatrix, lane " + std::to_string(lane));
            expect(out[lane * 8 + 4 + j] == transposed, "ldmatrix_trans, lane " + std::to_string(lane));
        }
    expect(host::statistics().ldmatrix == 14 && host::statistics().ldmatrix_wavefronts == 14, "bank conflicts counted");
}

// --- exchange, barriers, atomics -------------------------------------------------------------------------------------

JLEBM_KERNEL(96, 1) exchanges(int* out) {
    const int lane = lane_index();
    int sum = lane;
    for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
    const double wide = shuffle(double(lane), 5);
    const int next = shuffle_down(lane, 3);
    const bool good = sum == 496 && wide == 5.0 && next == (lane < 29 ? lane + 3 : lane) && warp_any(lane == 7) &&
                      !warp_all(lane == 7) && warp_all(lane >= 0) && warp_index() == int(threadIdx.x) / 32;
    if (!good) atomic_add(out, 1000000);
    atomic_add(out, 1);
    atomic_max(out + 1, int(threadIdx.x));
    atomic_min(out + 2, -int(threadIdx.x));
    atomic_add(reinterpret_cast<float*>(out + 3), 0.5f);
}
void check_exchange(uint64_t seed) {
    int out[4] = {};
    JLEBM_LAUNCH((exchanges), (Geometry{2, 96, 0}), launch_of(seed), out);
    float sum;
    std::memcpy(&sum, out + 3, sizeof sum);
    expect(out[0] == 192 && out[1] == 95 && out[2] == -95 && sum == 96.0f, "shuffles, votes or atomics");
}

// a chain of hand-overs: half a block writes, the other half reads, each pair of halves with a barrier of its own
JLEBM_KERNEL(128, 1) hand_over(int* wrong, bool with_barrier) {
    auto* slot = shared_memory<int>();
    const int half = int(threadIdx.x) / 64, i = int(threadIdx.x) % 64;
    for (int round = 0; round < 8; ++round) {
        if (half == 0) {
            slot[i] = 100 * round + i;
            if (with_barrier) arrive_group(1, 128);
            sync_group(2, 128);
        } else {
            if (with_barrier) sync_group(1, 128);
            if (slot[(i + 17) % 64] != 100 * round + (i + 17) % 64) atomic_add(wrong, 1);
            sync_group(2, 128);
        }
    }
}
void check_named_barriers(uint64_t seed) {
    int wrong = 0;
    JLEBM_LAUNCH((hand_over), (Geometry{1, 128, 256}), launch_of(seed), &wrong, true);
    expect(wrong == 0, std::to_string(wrong) + " stale reads");
}
void check_removed_named_barrier(uint64_t seed) {
    int wrong = 0;
    JLEBM_LAUNCH((hand_over), (Geometry{1, 128, 256}), launch_of(seed), &wrong, false);
    expect(wrong == 0, std::to_string(wrong) + " stale reads");
}

template <bool kWithBarrier>
JLEBM_KERNEL(128, 1)
reversal(float* out) {
    auto* row = shared_memory<float>();
    row[threadIdx.x] = float(threadIdx.x);
    if (kWithBarrier) sync_block();
    out[threadIdx.x] = row[127 - threadIdx.x];
}
template <bool kWithBarrier>
void check_reversal(uint64_t seed) {
    float out[128];
    JLEBM_LAUNCH((reversal<kWithBarrier>), (Geometry{1, 128, 512}), launch_of(seed), out);
    for (int i = 0; i < 128; ++i) expect(out[i] == float(127 - i), "read before it was written");
}

// --- asynchronous copies ---------------------------------------------------------------------------------------------

template <bool kWaits>
JLEBM_KERNEL(64, 1)
copies(const float* from, float* out) {
    auto* row = shared_memory<float>();
    cp_async_16(row + 4 * threadIdx.x, from + 4 * threadIdx.x, threadIdx.x == 63 ? 8 : 16);
    cp_async_commit();
    cp_async_8(row + 256 + 2 * threadIdx.x, from + 2 * threadIdx.x);
    cp_async_4(row + 384 + threadIdx.x, from + threadIdx.x);
    cp_async_commit();
    if (kWaits) cp_async_wait<1>();
    sync_block();
    for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = row[(4 * threadIdx.x + i + 8) % 256];
    const float early = row[256 + 2 * threadIdx.x];
    cp_async_wait<0>();
    sync_block();
    out[256 + threadIdx.x] = early;
    out[320 + threadIdx.x] = row[256 + (2 * threadIdx.x + 5) % 128] + row[384 + threadIdx.x];
}
template <bool kWaits>
void check_copies(uint64_t seed) {
    std::vector<float> from(256), out(384);
    for (float& v : from) v = random_float();
    JLEBM_LAUNCH((copies<kWaits>), (Geometry{1, 64, 448 * 4}), launch_of(seed), from.data(), out.data());
    for (int i = 0; i < 256; ++i) {
        const int at = (i + 8) % 256;
        expect(out[size_t(i)] == (at >= 254 ? 0.0f : from[size_t(at)]), "read before the copy was waited for");
    }
    for (int i = 0; i < 64; ++i) {
        expect(std::isnan(out[size_t(256 + i)]), "a copy in flight must not be visible");
        expect(out[size_t(320 + i)] == from[size_t((2 * i + 5) % 128)] + from[size_t(i)], "second group");
    }
}

// --- faults that must be reported ------------------------------------------------------------------------------------

JLEBM_KERNEL(64, 1) divergent_barrier() {
    if (threadIdx.x < 40) sync_block();
}
JLEBM_KERNEL(32, 1) divergent_warp(int* out) {
    if (lane_index() < 16)
        sync_warp();
    else
        out[0] = shuffle(1, 0);
}
JLEBM_KERNEL(32, 1) forgotten_copy(const float* from) {
    cp_async_4(shared_memory<float>() + threadIdx.x, from + threadIdx.x);
    cp_async_commit();
}
JLEBM_KERNEL(32, 1) misaligned_row(uint32_t* out) {
    uint32_t r[1];
    ldmatrix_x1(r, shared_memory<uint16_t>() + 8 * (lane_index() % 8) + 4);
    out[0] = r[0];
}
JLEBM_KERNEL(32, 1) foreign_row(uint32_t* out) {
    uint32_t r[1];
    ldmatrix_x1(r, out);
    out[0] = r[0];
}
JLEBM_KERNEL(32, 1) nothing() {}

void check_reported(const std::string& which, uint64_t seed) {
    float from[32] = {};
    uint32_t out[64] = {};
    const CudaLaunch launch = launch_of(seed);
    if (which == "divergent_barrier")
        enqueue({"divergent_barrier", "here", 1}, &divergent_barrier, Geometry{1, 64, 0}, launch);
    else if (which == "divergent_warp")
        JLEBM_LAUNCH((divergent_warp), (Geometry{1, 32, 0}), launch, reinterpret_cast<int*>(out));
    else if (which == "forgotten_copy")
        JLEBM_LAUNCH((forgotten_copy), (Geometry{1, 32, 128}), launch, from);
    else if (which == "misaligned_row")
        JLEBM_LAUNCH((misaligned_row), (Geometry{1, 32, 256}), launch, out);
    else if (which == "foreign_row")
        JLEBM_LAUNCH((foreign_row), (Geometry{1, 32, 256}), launch, out);
    else if (which == "unfenced_wgmma")
        check_wgmma<false>(seed, {false, true, true, false, 0});
    else if (which == "wgmma_not_begun")
        check_wgmma<false>(seed, {true, false, true, false, 0});
    else if (which == "forgotten_wgmma")
        check_wgmma<false>(seed, {true, true, false, false, 0});
    else if (which == "foreign_wgmma")
        check_wgmma<true>(seed, {true, true, true, false, 128});
    else if (which == "cluster_not_begun")
        check_cluster(seed, {false, true, true, true, 64, 64 * 28});
    else if (which == "unfenced_mbarrier")
        check_cluster(seed, {true, false, true, true, 64, 64 * 28});
    else if (which == "too_many_arrivals")
        check_cluster(seed, {true, true, false, true, 32, 64 * 28});
    else if (which == "bytes_that_never_come")
        check_cluster(seed, {true, true, true, true, 64, 64 * 28 + 4});
    else if (which == "sent_to_an_ended_block")
        check_cluster(seed, {true, true, true, false, 64, 64 * 28});
    else if (which == "too_much_shared")
        enqueue({"nothing", "here", 1}, &nothing, Geometry{1, 32, 101377}, launch);
    else
        throw std::runtime_error("no case named " + which);
}

} // namespace

int main(int argc, char** argv) {
    const std::string which = argc > 1 ? argv[1] : "";
    const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
    state += 2 * seed;
    try {
        if (which == "tf32")
            check_tf32(seed);
        else if (which == "bf16")
            check_bf16(seed);
        else if (which == "wgmma") {
            check_wgmma<false>(seed, {});
            check_wgmma<true>(seed, {});
        } else if (which == "wgmma_read_early")
            check_wgmma<false>(seed, {true, true, true, true, 0});
        else if (which == "cluster")
            check_cluster(seed, {});
        else if (which == "cluster_read_early")
            check_cluster(seed, {true, true, false, true, 64, 64 * 28});
        else if (which == "rounding")
            check_rounding(seed);
        else if (which == "ldmatrix")
            check_ldmatrix(seed);
        else if (which == "exchange")
            check_exchange(seed);
        else if (which == "named_barriers")
            check_named_barriers(seed);
        else if (which == "removed_named_barrier")
            check_removed_named_barrier(seed);
        else if (which == "barrier")
            check_reversal<true>(seed);
        else if (which == "removed_barrier")
            check_reversal<false>(seed);
        else if (which == "copies")
            check_copies<true>(seed);
        else if (which == "removed_wait")
            check_copies<false>(seed);
        else
            check_reported(which, seed);
        std::puts("ok");
    } catch (const std::exception& error) {
        std::puts(error.what());
    }
    return 0;
}
