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
    F grad2, move2, bad; // |grad|^2, |displacement|^2, NaN where z is not finite
};

template <int V, bool kRecord>
inline void update_block(const UpdateParams& update, UpdateWorkspace<V>& ws, int64_t dim, bool noisy, float* z,
                         const float* grad, StepSums* sums) {
    constexpr int kRow = V * kLanes;
    if (kRecord)
        for (int v = 0; v < V; ++v) sums[v] = {F{}, F{}, F{}};
    for (int64_t d = 0; d < dim; ++d) {
        for (int v = 0; v < V; ++v) {
            const int64_t at = d * kRow + v * kLanes;
            const F z0 = load(z + at);
            F g = load(grad + at);
            F z1 = fma(ws.c_grad[v], g, z0);
            if (update.prior_precision) {
                const F precision = ws.precision ? load(ws.precision + at) : splat(update.prior_precision[d]);
                F pull = -z0;
                if (update.prior_mean) pull = (ws.mean ? load(ws.mean + at) : splat(update.prior_mean[d])) - z0;
                z1 = fma(ws.c_prior[v] * precision, pull, z1);
            }
            if (ws.extra_grad) {
                const F extra = load(ws.extra_grad + at);
                z1 = fma(ws.c_prior[v], extra, z1);
                if (kRecord) g = g + extra;
            }
            if (noisy) z1 = fma(ws.c_noise[v], load(ws.eps + at), z1);
            if (update.frozen) {
                const F frozen = ws.frozen ? load(ws.frozen + at) : splat(float(update.frozen[d]));
                z1 = frozen != 0.0f ? z0 : z1;
            }
            store(z + at, z1);
            if (kRecord) {
                const F move = z1 - z0;
                sums[v].grad2 = fma(g, g, sums[v].grad2);
                sums[v].move2 = fma(move, move, sums[v].move2);
                sums[v].bad = fma(z1, F{}, sums[v].bad); // inf * 0 and NaN * 0 are NaN
            }
        }
    }
}

} // namespace JLEBM_TARGET
} // namespace jlebm
