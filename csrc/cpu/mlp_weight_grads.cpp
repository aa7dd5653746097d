// mlp_weight_grads: gradients of sum_c g_c f(z_c) in the parameters of an MLP, from what mlp_energy_layers found there:
//
//     dW_l = (g delta_l) h_{l-1}^T  [n_out, n_in],     db_l = delta_l g  [n_out],     h_0 = z
//
// h_l and delta_l are [units, chains], so that every entry is a dot product of two rows in memory. Every entry is
// summed by one worker in one order: no bit depends on the number of threads. Compiled once per target.
#include <algorithm>
#include <atomic>

#include "cpu/arena.h"
#include "cpu/kernels_target.h"
#include "cpu/simd.h"
#include "cpu/threads.h"

namespace jlebm {
namespace JLEBM_TARGET {
namespace {

// Dot products at a time, rows of delta times rows of h: accumulators, the rows of delta and one of h fit the register
// file. 4 x 6 + 4 + 1 = 29 of 32; 3 x 4 + 3 + 1 = 16 of 16.
constexpr int kOut = kRegisters == 32 ? 4 : 3;
constexpr int kIn = kRegisters == 32 ? 6 : 4;
// Rows of delta that one worker takes: what it reads of h, from the second-level cache or beyond, serves all of them.
constexpr int kUnit = 4 * kOut;
// Chains at a time: kUnit rows of them stay in the first-level cache (24 or 32 KB).
constexpr int64_t kChunk = 512;
static_assert(kChunk % kLanes == 0, "only the last chunk has a rest");
// Multiply-adds that pay for waking one more worker; an estimate: it is a matter of microseconds either way.
constexpr int64_t kWorkOfWorker = 200000;

// Rows of h: whole vectors where they stand, and what is left of each, filled up with zeros.
struct Rows {
    const float* whole; // [n][stride]
    int64_t stride;
    const float* rest; // [n][kLanes]
};

Rows rows_of(const float* whole, int64_t n, int64_t chains, Arena& arena) {
    float* const rest = arena.take(n * kLanes);
    const int64_t begin = chains / kLanes * kLanes;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t k = 0; k < kLanes; ++k)
            rest[i * kLanes + k] = begin + k < chains ? whole[i * chains + begin + k] : 0.0f;
    return {whole, chains, rest};
}

// Some of the chains: whole vectors from `begin` on, and whether the rest comes after them.
struct Chunk {
    int64_t begin, n_vectors;
    bool has_rest;
};

JLEBM_INLINE float sum_of_lanes(F a) {
    float sum = a[0];
    for (int i = 1; i < kLanes; ++i) sum += a[i];
    return sum;
}

// out[j][i] (+)= sum_k delta[j][k] h[first + i][k] over a chunk, for kOut rows of delta, of which n_rows are stored,
// and I rows of h; the first chunk stores, the others add
template <int I>
__attribute__((noinline)) void dot_products(const float* delta, const Rows& h, int64_t first, const Chunk chunk,
                                            int n_rows, float* out, int64_t out_stride) {
    F acc[kOut * I] = {};
    const auto add = [&](const float* d, const float* x, int64_t stride) {
        F deltas[kOut];
#pragma GCC unroll 8
        for (int j = 0; j < kOut; ++j) deltas[j] = load(d + j * kChunk);
#pragma GCC unroll 8
        for (int i = 0; i < I; ++i) {
            const F input = load(x + i * stride);
#pragma GCC unroll 8
            for (int j = 0; j < kOut; ++j) acc[j * I + i] = fma(deltas[j], input, acc[j * I + i]);
        }
    };
    const float* const whole = h.whole + first * h.stride + chunk.begin;
    for (int64_t v = 0; v < chunk.n_vectors; ++v) add(delta + v * kLanes, whole + v * kLanes, h.stride);
    if (chunk.has_rest) add(delta + chunk.n_vectors * kLanes, h.rest + first * kLanes, kLanes);
    float sums[kOut * I];
#pragma GCC unroll 32
    for (int a = 0; a < kOut * I; ++a) sums[a] = sum_of_lanes(acc[a]);
    for (int j = 0; j < n_rows; ++j)
        for (int i = 0; i < I; ++i) {
            float& to = out[j * out_stride + i];
            to = chunk.begin == 0 ? sums[j * I + i] : to + sums[j * I + i];
        }
}

class WeightGrads {
public:
    explicit WeightGrads(const MlpWeightGradsParams& p) : p_(p) {
        for (int l = 0; l <= p.mlp.n_hidden; ++l)
            first_unit_[l + 1] = first_unit_[l] + (p.mlp.widths[l + 1] + kUnit - 1) / kUnit;
    }

    int n_units() const { return first_unit_[p_.mlp.n_hidden + 1]; }

    int workers(int n_threads) const {
        int64_t work = 0;
        for (int l = 0; l <= p_.mlp.n_hidden; ++l) work += int64_t(p_.mlp.widths[l]) * p_.mlp.widths[l + 1];
        const int most = std::max(1, std::min(n_threads, n_units()));
        return int(std::clamp<int64_t>(work * p_.chains / kWorkOfWorker, 1, most));
    }

    int64_t shared_floats() const {
        int64_t rows = 0;
        for (int l = 0; l <= p_.mlp.n_hidden; ++l) rows += p_.mlp.widths[l];
        return p_.mlp.dim() * p_.chains + rows * kLanes + (kMaxHiddenLayers + 2) * kArenaAlign;
    }

    void prepare(Arena arena) {
        const int64_t dim = p_.mlp.dim();
        float* const z = arena.take(dim * p_.chains);
        for (int64_t c = 0; c < p_.chains; ++c)
            for (int64_t d = 0; d < dim; ++d) z[d * p_.chains + c] = p_.z[c * dim + d];
        inputs_[0] = rows_of(z, dim, p_.chains, arena);
        const float* hidden = p_.hidden;
        for (int l = 1; l <= p_.mlp.n_hidden; hidden += p_.mlp.widths[l] * p_.chains, ++l)
            inputs_[l] = rows_of(hidden, p_.mlp.widths[l], p_.chains, arena);
    }

    // kUnit rows of one layer; scaled is [kUnit][kChunk]
    void run(int unit, float* scaled) const {
        int l = 0;
        const float* delta = p_.delta;
        for (; unit >= first_unit_[l + 1]; ++l) delta += p_.mlp.widths[l + 1] * p_.chains;
        const int64_t n_in = p_.mlp.widths[l], first = int64_t(unit - first_unit_[l]) * kUnit;
        const int n_rows = int(std::min<int64_t>(kUnit, p_.mlp.widths[l + 1] - first));
        float* const weights = p_.weight_grads[l] ? p_.weight_grads[l] + first * n_in : nullptr;
        float* const biases = p_.bias_grads[l] ? p_.bias_grads[l] + first : nullptr;
        // without a chain one empty chunk, whose sums are zeros
        for (int64_t begin = 0; begin == 0 || begin < p_.chains; begin += kChunk) {
            const int64_t count = std::min(kChunk, p_.chains - begin);
            const Chunk chunk{begin, count / kLanes, count % kLanes != 0};
            scale(delta + first * p_.chains, n_rows, begin, count, scaled);
            if (biases) add_biases(scaled, n_rows, chunk, biases);
            if (weights) add_weights(scaled, inputs_[l], n_rows, chunk, weights, n_in);
        }
    }

private:
    // g delta of n_rows rows; zeros in the place of further rows of the last kOut, and of chains beyond the last
    void scale(const float* delta, int n_rows, int64_t begin, int64_t count, float* scaled) const {
        const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
        for (int j = 0; j < (n_rows + kOut - 1) / kOut * kOut; ++j, scaled += kChunk) {
            const int64_t used = j < n_rows ? count : 0;
            for (int64_t c = 0; c < used; ++c) scaled[c] = p_.cotangent[begin + c] * delta[j * p_.chains + begin + c];
            std::fill(scaled + used, scaled + padded, 0.0f);
        }
    }

    static void add_biases(const float* scaled, int n_rows, const Chunk chunk, float* biases) {
        for (int j = 0; j < n_rows; ++j, scaled += kChunk) {
            F sum{};
            for (int64_t v = 0; v < chunk.n_vectors + chunk.has_rest; ++v) sum = sum + load(scaled + v * kLanes);
            biases[j] = (chunk.begin == 0 ? 0.0f : biases[j]) + sum_of_lanes(sum);
        }
    }

    static void add_weights(const float* scaled, const Rows& h, int n_rows, const Chunk chunk, float* weights,
                            int64_t n_in) {
        const auto columns = [&](auto dots, int64_t i) {
            for (int j = 0; j < n_rows; j += kOut)
                dots(scaled + j * kChunk, h, i, chunk, std::min(kOut, n_rows - j), weights + j * n_in + i, n_in);
        };
        int64_t i = 0;
        for (; i + kIn <= n_in; i += kIn) columns(dot_products<kIn>, i);
        for (; i + 2 <= n_in; i += 2) columns(dot_products<2>, i);
        if (i < n_in) columns(dot_products<1>, i);
    }

    const MlpWeightGradsParams& p_;
    int first_unit_[kMaxHiddenLayers + 2] = {};
    Rows inputs_[kMaxHiddenLayers + 1] = {};
};

} // namespace

void mlp_weight_grads(const MlpWeightGradsParams& p, int n_threads) {
    WeightGrads grads(p);
    const int workers = grads.workers(n_threads);
    const int64_t shared = (grads.shared_floats() + kArenaAlign - 1) / kArenaAlign * kArenaAlign;
    static thread_local ArenaStorage storage;
    float* const memory = storage.reserve(shared + kUnit * kChunk * workers);
    grads.prepare(Arena(memory, shared));
    std::atomic<int> next{0};
    parallel_workers(workers, [&](int worker) {
        for (int unit = next.fetch_add(1); unit < grads.n_units(); unit = next.fetch_add(1))
            grads.run(unit, memory + shared + kUnit * kChunk * worker);
    });
    storage.give_back();
}

} // namespace JLEBM_TARGET
} // namespace jlebm
