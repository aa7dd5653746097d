// Output heads: logits -> f and d f / d logits.
#pragma once

#include <limits>

#include "cpu/activation_lanes.h"

namespace jlebm {
namespace JLEBM_TARGET {

// logits -> f and, in place, d f / d logits
template <int V>
inline void apply_head(const MlpParams& mlp, float* logits, const I* chosen, F* energy) {
    constexpr int kRow = V * kLanes;
    const int n = mlp.n_logits();
    const F scale = splat(mlp.out_scale);
    for (int v = 0; v < V; ++v) {
        float* at = logits + v * kLanes;
        const F a = load(at);
        switch (mlp.head) {
        case Head::kIdentity: // mlp_energy_layers; a chain takes last_layer_of_identity_head in cpu/mlp_lanes.h
            energy[v] = a * scale;
            store(at, scale);
            break;
        case Head::kTanh: {
            const ValueSlope th = tanh_lanes(a);
            energy[v] = th.h * scale;
            store(at, th.d * scale);
            break;
        }
        case Head::kSigmoid: {
            const F s = sigmoid_lanes(a);
            energy[v] = s * scale;
            store(at, s * (1.0f - s) * scale);
            break;
        }
        case Head::kSoftplus:
            energy[v] = softplus_lanes(a) * scale;
            store(at, sigmoid_lanes(a) * scale);
            break;
        case Head::kLogsumexp: {
            F top = a;
            for (int j = 1; j < n; ++j) {
                const F b = load(at + j * kRow);
                top = b > top ? b : (b == b ? top : b); // a NaN logit stays
            }
            F sum{};
            for (int j = 0; j < n; ++j) {
                const F e = exp_lanes(load(at + j * kRow) - top);
                store(at + j * kRow, e);
                sum = sum + e;
            }
            energy[v] = (top + log_lanes(sum)) * scale;
            const F normalise = scale / sum;
            for (int j = 0; j < n; ++j) store(at + j * kRow, load(at + j * kRow) * normalise);
            break;
        }
        case Head::kLogit: {
            // a number that is no logit's makes its chain NaN
            const F nan = splat(std::numeric_limits<float>::quiet_NaN());
            const F others = select(chosen[v] < 0, nan, splat(0.0f));
            F picked = nan;
            for (int j = 0; j < n; ++j) {
                const I mask = chosen[v] == j;
                picked = select(mask, load(at + j * kRow), picked);
                store(at + j * kRow, select(mask, scale, others));
            }
            energy[v] = picked * scale;
            break;
        }
        case Head::kCount:
            break;
        }
    }
}

// -1 for a number that is no logit's
template <int V>
inline void chosen_logits(I* chosen, const MlpParams& mlp, int64_t first_chain, int count) {
    for (int v = 0; v < V; ++v)
        for (int i = 0; i < kLanes; ++i) {
            const int c = v * kLanes + i;
            const int64_t j = mlp.logit && c < count ? mlp.logit[first_chain + c] : 0;
            chosen[v][i] = j >= 0 && j < mlp.n_logits() ? int32_t(j) : -1;
        }
}

} // namespace JLEBM_TARGET
} // namespace jlebm
