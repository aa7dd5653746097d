// One plain record per operation: the contract between the bindings, the launchers and the kernels.
// Pointers, sizes and strides only; no torch, no Python, no ownership. Row-major, float32 unless said otherwise.
#pragma once

#include <cstdint>

#include "common/philox.h" // JLEBM_HD

namespace jlebm {

constexpr int kMaxHiddenLayers = 16;

enum class Activation : int32_t {
    kIdentity = 0,
    kLeakyRelu,
    kRelu,
    kGelu,
    kGeluTanh,
    kSilu,
    kMish,
    kTanh,
    kSoftplus,
    kElu,
    kCount
};

enum class Head : int32_t { kIdentity = 0, kTanh, kSigmoid, kSoftplus, kLogsumexp, kLogit, kCount };

// f(z) = out_scale * head(W_out h_L + b_out),  h_l = phi_l(W_l h_{l-1} + b_l),  h_0 = z
struct MlpParams {
    int32_t n_hidden = 0;                      // L, 1 .. kMaxHiddenLayers
    int32_t widths[kMaxHiddenLayers + 2] = {}; // dim, H_1, ..., H_L, J
    Activation activations[kMaxHiddenLayers] = {};
    float activation_params[kMaxHiddenLayers] = {}; // slope of leaky_relu, alpha of elu, beta of softplus
    Head head = Head::kIdentity;
    float out_scale = 1.0f;
    const float* weights[kMaxHiddenLayers + 1] = {}; // [out, in]
    const float* biases[kMaxHiddenLayers + 1] = {};  // [out] or null
    const float* context_bias = nullptr;             // [chains, H_1] or null
    const int64_t* logit = nullptr;                  // [chains], for Head::kLogit

    JLEBM_HD int dim() const { return widths[0]; }
    JLEBM_HD int n_logits() const { return widths[n_hidden + 1]; }
};

// z <- z + c_grad * grad + c_prior * ((mean - z) * precision + extra_grad) + c_noise * eps
struct UpdateParams {
    const float* step_coefficients = nullptr;  // [n_steps, 3]: c_grad, c_prior, c_noise
    const float* chain_coefficients = nullptr; // [chains, 3] factors, or null
    const float* prior_mean = nullptr;         // [dim] or [chains, dim] (stride below), or null: zero
    int64_t prior_mean_stride = 0;             // 0 or dim
    const float* prior_precision = nullptr;    // the same, or null: no prior term
    int64_t prior_precision_stride = 0;
    const uint8_t* frozen = nullptr; // the same, non-zero keeps the coordinate, or null
    int64_t frozen_stride = 0;
    const float* noise = nullptr;      // [n_steps, chains, dim] replaces the contract's noise, or null
    const float* extra_grad = nullptr; // [chains, dim] or null
    uint64_t noise_key = 0;
    uint32_t first_step = 0;
    uint32_t first_chain = 0;
    // CUDA only, else null: the key stands in device memory and replaces noise_key (replays of a graph draw fresh
    // noise)
    const uint64_t* noise_key_at = nullptr;
};

// Kept steps are those k with (k + 1) % thin == 0; each pointer may be null.
struct RecordParams {
    int64_t thin = 1;
    float* energy = nullptr;           // [n_kept, chains]
    float* grad_norm = nullptr;        // [n_kept, chains]
    float* displacement = nullptr;     // [n_kept, chains]
    int64_t* first_bad_step = nullptr; // [chains]
    float* trajectory = nullptr;       // [n_kept, chains, dim]
};

struct LangevinNoiseParams {
    uint64_t noise_key = 0;
    uint32_t first_step = 0, first_chain = 0, stream = 0;
    int64_t n_steps = 0, chains = 0, dim = 0;
    float* out = nullptr;                   // [n_steps, chains, dim]
    const uint64_t* noise_key_at = nullptr; // as in UpdateParams
};

struct LangevinStepParams {
    int64_t chains = 0, dim = 0;
    const float* z = nullptr;    // [chains, dim]
    const float* grad = nullptr; // [chains, dim]
    UpdateParams update;         // one step
    float* out = nullptr;        // [chains, dim]
};

// Part of mlp_langevin_chain for layers too wide for the lanes: h may be a (in place) or null
struct MlpActivationParams {
    Activation activation = Activation::kIdentity;
    float param = 0.0f;
    int64_t n = 0;
    const float* a = nullptr; // [n]
    float* h = nullptr;       // [n] phi(a)
    float* d = nullptr;       // [n] phi'(a)
};

struct MlpEnergyGradParams {
    int64_t chains = 0;
    const float* z = nullptr; // [chains, dim]
    MlpParams mlp;
    float* energy = nullptr; // [chains]
    float* grad = nullptr;   // [chains, dim] or null
    // CUDA only, else null: what the gradients in the parameters need, dW_l = delta_l^T h_{l-1} summed over chains
    float* hidden[kMaxHiddenLayers] = {}; // [chains, H_l] h_l, or null
    float* delta[kMaxHiddenLayers] = {};  // [chains, H_l] delta_l = df / da_l, or null
};

// Part of mlp_energy_grad on the CPU: everything that gradients in z and in the parameters are made of
struct MlpEnergyLayersParams {
    int64_t chains = 0;
    const float* z = nullptr; // [chains, dim]
    MlpParams mlp;
    float* energy = nullptr; // [chains]
    float* hidden = nullptr; // [H_1 + ... + H_L, chains] h_l, layer after layer, or null
    float* delta = nullptr;  // [H_1 + ... + H_L + J, chains] df / da_l, then df / dlogits, or null
    float* grad = nullptr;   // [chains, dim] or null
};

// Gradients of sum_c g_c f(z_c) in the parameters, from what mlp_energy_layers found; on the CPU
struct MlpWeightGradsParams {
    int64_t chains = 0;
    const float* z = nullptr; // [chains, dim]
    MlpParams mlp;
    const float* hidden = nullptr;                  // as in MlpEnergyLayersParams
    const float* delta = nullptr;                   // as there
    const float* cotangent = nullptr;               // [chains] g
    float* weight_grads[kMaxHiddenLayers + 1] = {}; // [n_out, n_in] each, or null
    float* bias_grads[kMaxHiddenLayers + 1] = {};   // [n_out] each, or null
};

// Of each of several weights the largest singular value, by power iteration (jlebm_fast/spectral.py), on CUDA
struct SpectralWeight {
    int32_t n_out = 0, n_in = 0;
    const float* weight = nullptr; // [n_out, n_in]
    const float* start = nullptr;  // [n_out], of length 1; another one costs iterations
    float* u = nullptr;            // [n_out]
    float* v = nullptr;            // [n_in]
    float* sigma = nullptr;        // [1]; NaN where the weight is not finite, and so is normalised
    float* normalised = nullptr;   // [n_out, n_in] W / sigma
    float* kept_u = nullptr;       // [n_out] u once more where sigma is finite and not 0, or null; may be start
    float* kept_v = nullptr;       // [n_in] v likewise, or null
};

struct SpectralNormsParams {
    int32_t count = 0;
    float tolerance = 0.0f;
    SpectralWeight weights[kMaxHiddenLayers + 1];
};

struct MlpLangevinChainParams {
    int64_t chains = 0, n_steps = 0;
    const float* z = nullptr; // [chains, dim]
    MlpParams mlp;
    UpdateParams update;
    RecordParams record;
    float* out = nullptr; // [chains, dim]; may not overlap z
};

} // namespace jlebm
