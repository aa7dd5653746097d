// One Langevin update of a block of chains:
//     z <- z + c_grad * grad + c_prior * ((mean - z) * precision + extra_grad) + c_noise * eps
// with everything in lanes, [dim][V * kLanes], and what is recorded on the way.
#pragma once

#include "cpu/arena.h"
#include "cpu/chain_rows.h"
#include "cpu/noise_lanes.h"

namespace jlebm {
namespace JLEBM_TARGET {

template <int V>
struct UpdateWorkspace {
    static constexpr int kRow = V * kLanes;
    float* eps; // padded to a multiple of four dims
    // per-chain inputs turned into lanes, null where the input is absent or the same for all chains
    float* mean;
    float* precision;
    float* frozen;
    float* extra_grad;
    float* coefficients; // [3]
    F c_grad[V], c_prior[V], c_noise[V];

    static int64_t floats(int64_t dim) { return kRow * (5 * dim + 4 + 3) + 8 * kArenaAlign; }

    void take(const UpdateParams& update, int64_t dim, Arena& arena) {
        eps = arena.take(kRow * ((dim + 3) / 4 * 4));
        mean = update.prior_mean && update.prior_mean_stride ? arena.take(kRow * dim) : nullptr;
        precision = update.prior_precision && update.prior_precision_stride ? arena.take(kRow * dim) : nullptr;
        frozen = update.frozen && update.frozen_stride ? arena.take(kRow * dim) : nullptr;
        extra_grad = update.extra_grad ? arena.take(kRow * dim) : nullptr;
        coefficients = update.chain_coefficients ? arena.take(kRow * 3) : nullptr;
    }

    void load_chains(const UpdateParams& update, int64_t dim, int64_t first, int count) {
        if (mean) lanes_from_rows<V>(mean, update.prior_mean, dim, first, count);
        if (precision) lanes_from_rows<V>(precision, update.prior_precision, dim, first, count);
        if (frozen) lanes_from_rows<V>(frozen, update.frozen, dim, first, count);
        if (extra_grad) lanes_from_rows<V>(extra_grad, update.extra_grad, dim, first, count);
        if (coefficients) lanes_from_rows<V>(coefficients, update.chain_coefficients, 3, first, count);
    }

    void load_coefficients(const UpdateParams& update, int64_t step) {
        const float* c = update.step_coefficients + 3 * step;
        for (int v = 0; v < V; ++v) {
            c_grad[v] = splat(c[0]), c_prior[v] = splat(c[1]), c_noise[v] = splat(c[2]);
            if (coefficients) {
                c_grad[v] = c_grad[v] * load(coefficients + v * kLanes);
                c_prior[v] = c_prior[v] * load(coefficients + kRow + v * kLanes);
                c_noise[v] = c_noise[v] * load(coefficients + 2 * kRow + v * kLanes);
            }
        }
    }

    // true if there is noise in this step
    bool load_noise(const UpdateParams& update, int64_t n_chains, int64_t dim, int64_t first, int count, int64_t step) {
        if (update.step_coefficients[3 * step + 2] == 0.0f) return false;
        if (update.noise) {
            lanes_from_rows<V>(eps, update.noise + step * n_chains * dim, dim, first, count);
            return true;
        }
        normals_of_step<V>(eps, int((dim + 3) / 4), update.first_chain + uint32_t(first),
                           update.first_step + uint32_t(step), kStreamLangevin, update.noise_key);
        return true;
    }
};

struct StepSums {
    F grad2, move2; // |grad|^2, |displacement|^2
};

// kUsual: noise and a prior around 0 whose precisions all chains share, no extra gradient, nothing frozen
template <int V, bool kRecord, bool kUsual>
inline void update_dims(const UpdateParams& update, const UpdateWorkspace<V>& ws, int64_t dim, bool noisy, float* z,
                        const float* grad, StepSums* sums) {
    constexpr int kRow = V * kLanes;
    // copies: a store to z might change what stands in memory, for all the compiler knows
    const float *const precisions = update.prior_precision, *const means = update.prior_mean;
    const float *const chain_precisions = ws.precision, *const chain_means = ws.mean, *const chain_frozen = ws.frozen;
    const float *const extra_grad = ws.extra_grad, *const eps = ws.eps;
    const uint8_t* const frozen_dims = update.frozen;
    F c_grad[V], c_prior[V], c_noise[V], grad2[V], move2[V];
    for (int v = 0; v < V; ++v) {
        c_grad[v] = ws.c_grad[v], c_prior[v] = ws.c_prior[v], c_noise[v] = ws.c_noise[v];
        grad2[v] = move2[v] = F{};
    }
    for (int64_t d = 0; d < dim; ++d) {
        for (int v = 0; v < V; ++v) {
            const int64_t at = d * kRow + v * kLanes;
            const F z0 = load(z + at);
            F g = load(grad + at);
            F z1 = fma(c_grad[v], g, z0);
            if (kUsual || precisions) {
                const F precision = !kUsual && chain_precisions ? load(chain_precisions + at) : splat(precisions[d]);
                F pull = -z0;
                if (!kUsual && means) pull = (chain_means ? load(chain_means + at) : splat(means[d])) - z0;
                z1 = fma(c_prior[v] * precision, pull, z1);
            }
            if (!kUsual && extra_grad) {
                const F extra = load(extra_grad + at);
                z1 = fma(c_prior[v], extra, z1);
                if (kRecord) g = g + extra;
            }
            if (kUsual || noisy) z1 = fma(c_noise[v], load(eps + at), z1);
            if (!kUsual && frozen_dims) {
                const F frozen = chain_frozen ? load(chain_frozen + at) : splat(float(frozen_dims[d]));
                z1 = frozen != 0.0f ? z0 : z1;
            }
            store(z + at, z1);
            if (kRecord) {
                const F move = z1 - z0;
                grad2[v] = fma(g, g, grad2[v]);
                move2[v] = fma(move, move, move2[v]);
            }
        }
    }
    if (kRecord)
        for (int v = 0; v < V; ++v) sums[v] = {grad2[v], move2[v]};
}

template <int V, bool kRecord>
inline void update_block(const UpdateParams& update, const UpdateWorkspace<V>& ws, int64_t dim, bool noisy, float* z,
                         const float* grad, StepSums* sums) {
    if (noisy && update.prior_precision && !ws.precision && !update.prior_mean && !update.extra_grad && !update.frozen)
        update_dims<V, kRecord, true>(update, ws, dim, noisy, z, grad, sums);
    else
        update_dims<V, kRecord, false>(update, ws, dim, noisy, z, grad, sums);
}

// for the chains of a vector: -1 where z, [dim][V * kLanes], is not finite in some dim. A chain that a step left so has
// moved by what is not finite either, so that most steps are told by their displacement alone.
template <int V>
inline I not_finite(F move2, const float* z, int64_t dim) {
    const F of_move = move2 * F{}; // inf * 0 and NaN * 0 are NaN
    const I suspected = of_move != of_move;
    int32_t any = 0;
    for (int i = 0; i < kLanes; ++i) any |= suspected[i];
    if (any == 0) return I{};
    F bad{};
    for (int64_t d = 0; d < dim; ++d) bad = fma(load(z + d * V * kLanes), F{}, bad);
    return bad != bad;
}

} // namespace JLEBM_TARGET
} // namespace jlebm
