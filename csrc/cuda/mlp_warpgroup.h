// All steps of 64 chains by one warpgroup of a Hopper chip (sm_90a), in bf16: between the products, pre-activations,
// operands, gradient and z stay in the registers of the thread that computed them.
//
// Chains are the rows of the matrix instructions, features their columns, as an accumulator m64nN lays them out: with
// g = lane / 4, t = lane % 4, a thread holds of each 8 features those at 2t and 2t + 1, of the chains 16 warp + g and 8
// below it. Packed to bfloat16, these are the operand of the next product as they stand. Weights are in shared memory
// once for both directions, as matrices of 8 outputs by 8 inputs, 128 bytes each: forward the instruction reads them as
// they are, backward transposed. No thread waits for another one; two warpgroups of a block take turns by themselves,
// one at the tensor cores while the other is at activations and noise.
#pragma once

#include "cuda/activation.h"
#include "cuda/coordinate_update.h"
#include "cuda/mlp_call.h"
#include "cuda/normal_quad.h"
#include "cuda/operand.h"

namespace jlebm {
namespace cuda {

constexpr int kCoreBytes = 128; // of 8 outputs by 8 inputs

// bytes from a matrix of a weight to the next one in the direction of the outputs
constexpr JLEBM_HD int outputs_stride(int padded_inputs) { return padded_inputs / 8 * kCoreBytes; }

// kDim, kWidth: dim and the widest hidden layer, padded
template <int kDim, int kWidth>
class WarpgroupChains {
    static constexpr int kDimTiles = kDim / 8, kTiles = kWidth / 8; // of 8 features
    using O = Operand<kBf16>;

public:
    JLEBM_DEVICE WarpgroupChains(const MlpCall& call, int64_t first_of_block)
        : call_(call), plan_(call.plan), mlp_(call.mlp), dim_(call.mlp.dim()), t_(lane_index() % 4),
          thread_(int(threadIdx.x) % kWarpgroup),
          chain_(first_of_block + int64_t(threadIdx.x) / kWarpgroup * kWarpgroupChains + warp_index() % 4 * 16 +
                 lane_index() / 4),
          slopes_(shared_memory<O::Slopes>(plan_.group_at +
                                           int64_t(threadIdx.x) / kWarpgroup * int64_t(plan_.group_bytes)) +
                  thread_),
          key_(call.update.noise_key_at ? *call.update.noise_key_at : call.update.noise_key),
          until_kept_(call.record.thin) {}

    JLEBM_DEVICE void run() {
        load();
        for (int64_t step = 0; step < call_.n_steps; ++step) {
            float grad[4 * kDimTiles];
            float energy[2];
            energy_and_grad(grad, energy);
            // What the update computes from these is the same in every step, and would wait through the products in
            // registers that they need (compiler's report: 200 to 300 bytes of spills).
            t_ = opaque(t_), dim_ = opaque(dim_), chain_ = opaque(chain_);
            key_ = shuffle(key_, 0); // one lane's, so that the compiler knows it to be the same in all of them
            update(step, grad, energy);
        }
        store_rows(call_.out);
        for (int r = 0; r < 2; ++r)
            if (call_.record.first_bad_step && t_ == 0 && is_real(r))
                call_.record.first_bad_step[chain_ + 8 * r] = first_bad_[r];
    }

private:
    JLEBM_DEVICE bool is_real(int r) const { return chain_ + 8 * r < call_.chains; }
    // first of this thread's two features of a tile
    JLEBM_DEVICE int feature(int tile) const { return 8 * tile + 2 * t_; }
    JLEBM_DEVICE float2 pair_at(int block_offset, int tile) const {
        return *reinterpret_cast<const float2*>(shared_memory<float>(block_offset) + feature(tile));
    }

    JLEBM_DEVICE void load() {
#pragma unroll
        for (int j = 0; j < kDimTiles; ++j)
            for (int r = 0; r < 2; ++r)
                for (int i = 0; i < 2; ++i) {
                    const int d = feature(j) + i;
                    z_[4 * j + 2 * r + i] =
                        is_real(r) && d < dim_ ? load_readonly(call_.z + (chain_ + 8 * r) * dim_ + d) : 0.0f;
                }
    }
    JLEBM_DEVICE void store_rows(float* rows) const {
#pragma unroll
        for (int j = 0; j < kDimTiles; ++j)
            for (int r = 0; r < 2; ++r) {
                const int d = feature(j);
                float* at = rows + (chain_ + 8 * r) * dim_ + d;
                if (!is_real(r)) continue;
                if (call_.whole_quads) {
                    if (d < dim_)
                        *reinterpret_cast<float2*>(at) = make_float2(z_[4 * j + 2 * r], z_[4 * j + 2 * r + 1]);
                } else {
                    if (d < dim_) at[0] = z_[4 * j + 2 * r];
                    if (d + 1 < dim_) at[1] = z_[4 * j + 2 * r + 1];
                }
            }
    }

    // acc += operand_ W^T (forward) or operand_ W (backward) of one layer
    template <bool kForward, bool kAdd, int kInputs, int kOutputs, int kColumns>
    JLEBM_DEVICE void multiply(float (&acc)[kColumns / 2], int layer) {
        constexpr int kAlongInputs = kCoreBytes, kAlongOutputs = outputs_stride(kInputs);
        constexpr int kAlongK = kForward ? kAlongInputs : kAlongOutputs,
                      kAlongN = kForward ? kAlongOutputs : kAlongInputs;
        constexpr int kSteps = (kForward ? kInputs : kOutputs) / 16;
        static_assert(kColumns == (kForward ? kOutputs : kInputs), "columns of the result");
        const uint64_t b = wgmma_operand(shared_memory<unsigned char>(plan_.weights_at[layer]), kAlongK, kAlongN);
        if constexpr (kAdd) wgmma_keep(acc);
        wgmma_begin<4 * kSteps>(operand_);
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            const uint32_t a[4] = {operand_[4 * k], operand_[4 * k + 1], operand_[4 * k + 2], operand_[4 * k + 3]};
            const uint64_t b_k = wgmma_operand_at(b, k * 2 * kAlongK);
            if (kAdd || k > 0)
                wgmma_bf16<true, !kForward>(acc, a, b_k);
            else
                wgmma_bf16<false, !kForward>(acc, a, b_k);
        }
        wgmma_end(acc);
    }

    JLEBM_DEVICE void energy_and_grad(float (&grad)[4 * kDimTiles], float (&energy)[2]) {
        const int n = mlp_.n_hidden;
#pragma unroll
        for (int j = 0; j < kDimTiles; ++j)
            for (int r = 0; r < 2; ++r) operand_[2 * j + r] = pack_bf16(z_[4 * j + 2 * r], z_[4 * j + 2 * r + 1]);
        float acc[4 * kTiles];
        begin_with_bias(acc, 0);
        if (mlp_.context_bias) add_context(acc);
        multiply<true, true, kDim, kWidth, kWidth>(acc, 0);
        // one copy of the activations, and no branch around a product: the compiler would let no two instructions of it
        // overlap
#pragma unroll 1
        for (int l = 0;; ++l) {
            activate(acc, l, energy);
            if (l == n - 1) break;
            begin_with_bias(acc, l + 1);
            multiply<true, true, kWidth, kWidth, kWidth>(acc, l + 1);
        }
#pragma unroll 1
        for (int l = n - 1; l > 0; --l) {
            multiply<false, false, kWidth, kWidth, kWidth>(acc, l);
            const O::Slopes* slopes = slopes_of(l - 1);
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
                float d[4];
                O::unpack(slopes[j * kWarpgroup], d);
                operand_[2 * j] = pack_bf16(acc[4 * j] * d[0], acc[4 * j + 1] * d[1]);
                operand_[2 * j + 1] = pack_bf16(acc[4 * j + 2] * d[2], acc[4 * j + 3] * d[3]);
            }
        }
        multiply<false, false, kDim, kWidth, kDim>(grad, 0);
    }

    JLEBM_DEVICE void begin_with_bias(float (&acc)[4 * kTiles], int layer) const {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
            const float2 bias = pair_at(plan_.bias_at[layer], j);
            acc[4 * j] = acc[4 * j + 2] = bias.x;
            acc[4 * j + 1] = acc[4 * j + 3] = bias.y;
        }
    }

    JLEBM_DEVICE O::Slopes* slopes_of(int layer) const { return slopes_ + layer * kTiles * kWarpgroup; }

    JLEBM_DEVICE void add_context(float (&acc)[4 * kTiles]) const {
        const int width = mlp_.widths[1];
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
            for (int r = 0; r < 2; ++r)
                for (int i = 0; i < 2; ++i)
                    if (is_real(r) && feature(j) + i < width)
                        acc[4 * j + 2 * r + i] +=
                            load_readonly(mlp_.context_bias + (chain_ + 8 * r) * width + feature(j) + i);
    }

    // Pre-activations of layer l become the next product's operand: h_{l+1}, or delta_L after the last layer.
    JLEBM_DEVICE void activate(float (&acc)[4 * kTiles], int layer, float (&energy)[2]) {
        const Activation kind = mlp_.activations[layer];
        const float param = kind == Activation::kIdentity ? 1.0f : mlp_.activation_params[layer];
        const bool last = layer == mlp_.n_hidden - 1;
        energy[0] = energy[1] = 0.0f;
        ValueSlope v[4];
        if (is_broken_line(kind)) {
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
                for (int i = 0; i < 4; ++i) v[i] = broken_line_slope(acc[4 * j + i], param);
                keep(v, layer, last, j, operand_[2 * j], operand_[2 * j + 1], energy);
            }
        } else if (kind == Activation::kGelu) {
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
                for (int i = 0; i < 4; ++i) v[i] = gelu_slope<true>(acc[4 * j + i]);
                keep(v, layer, last, j, operand_[2 * j], operand_[2 * j + 1], energy);
            }
        } else {
            // one copy of the code, through which the registers pass
#pragma unroll 1
            for (int j = 0; j < kTiles; ++j) {
                for (int i = 0; i < 4; ++i) v[i] = other_slope(kind, acc[i], param);
                uint32_t word[2];
                keep(v, layer, last, j, word[0], word[1], energy);
#pragma unroll
                for (int i = 0; i < 4 * kTiles - 4; ++i) acc[i] = acc[i + 4];
#pragma unroll
                for (int i = 0; i < 2 * kTiles - 2; ++i) operand_[i] = operand_[i + 2];
                operand_[2 * kTiles - 2] = word[0], operand_[2 * kTiles - 1] = word[1];
            }
        }
        if (!last || !plan_.logits) return;
        const float* bias = mlp_.biases[mlp_.n_hidden];
        const float b = bias ? load_readonly(bias) : 0.0f;
        for (int r = 0; r < 2; ++r) {
            energy[r] += shuffle_xor(energy[r], 1);
            energy[r] += shuffle_xor(energy[r], 2);
            energy[r] = (energy[r] + b) * mlp_.out_scale;
        }
    }

    JLEBM_DEVICE void keep(const ValueSlope (&v)[4], int layer, bool last, int tile, uint32_t& upper, uint32_t& lower,
                           float (&energy)[2]) const {
        if (!last) {
            upper = pack_bf16(v[0].h, v[1].h), lower = pack_bf16(v[2].h, v[3].h);
            const float d[4] = {v[0].d, v[1].d, v[2].d, v[3].d};
            slopes_of(layer)[tile * kWarpgroup] = O::pack(d);
            return;
        }
        // f = out_scale (w . h_L + b): delta_L = out_scale w phi' needs no product
        const float2 top = pair_at(plan_.top_at, tile);
        upper = pack_bf16(v[0].d * top.x, v[1].d * top.y), lower = pack_bf16(v[2].d * top.x, v[3].d * top.y);
        if (!plan_.logits) return;
        const float2 w = pair_at(plan_.out_at, tile);
        energy[0] = fma_rn(v[1].h, w.y, fma_rn(v[0].h, w.x, energy[0]));
        energy[1] = fma_rn(v[3].h, w.y, fma_rn(v[2].h, w.x, energy[1]));
    }

    // eps of this thread's two features of a tile, for both of its chains. A Philox call makes four features of one
    // chain: the threads of even t make those of the upper chain, their neighbours those of the lower, and they swap.
    JLEBM_DEVICE void noise_of(int64_t step, int tile, float (&eps)[4]) const {
        const bool odd = t_ % 2;
        float quad[4];
        normal_quad(quad, uint32_t(2 * tile + t_ / 2), call_.update.first_chain + uint32_t(chain_) + (odd ? 8u : 0u),
                    call_.update.first_step + uint32_t(step), kStreamLangevin, key_);
        const float other0 = shuffle_xor(odd ? quad[0] : quad[2], 1), other1 = shuffle_xor(odd ? quad[1] : quad[3], 1);
        eps[0] = odd ? other0 : quad[0], eps[1] = odd ? other1 : quad[1];
        eps[2] = odd ? quad[2] : other0, eps[3] = odd ? quad[3] : other1;
    }

    JLEBM_DEVICE void update(int64_t step, float (&grad)[4 * kDimTiles], const float (&energy)[2]) {
        const UpdateParams& u = call_.update;
        const RecordParams& record = call_.record;
        const Coefficients coefficients = Coefficients::of_step(u, step);
        const bool diagnostics = record.grad_norm || record.displacement || record.first_bad_step;
        const bool kept = --until_kept_ == 0;
        const int64_t kept_index = kept_index_;
        if (kept) until_kept_ = record.thin, ++kept_index_;
        MoveSums sums[2];
        if (u.noise || u.chain_coefficients || u.extra_grad || u.frozen || u.prior_mean_stride ||
            u.prior_precision_stride)
            move_by_chain(step, coefficients, grad, sums);
        else
            move_all_alike(step, coefficients, grad, sums, diagnostics);
        if (kept && record.trajectory) store_rows(record.trajectory + kept_index * call_.chains * dim_);
        if (kept && record.energy && t_ == 0)
            for (int r = 0; r < 2; ++r)
                if (is_real(r)) record.energy[kept_index * call_.chains + chain_ + 8 * r] = energy[r];
        if (diagnostics)
            for (int r = 0; r < 2; ++r) record_chain(step, r, kept, kept_index, sums[r]);
    }

    // the contract's noise, and nothing that differs from chain to chain
    JLEBM_DEVICE void move_all_alike(int64_t step, const Coefficients& c, const float (&grad)[4 * kDimTiles],
                                     MoveSums (&sums)[2], bool diagnostics) {
        const bool noisy = c.noise != 0.0f;
#pragma unroll
        for (int j = 0; j < kDimTiles; ++j) {
            float eps[4] = {};
            if (noisy && 8 * j < dim_) noise_of(step, j, eps);
            if (8 * j + 8 > dim_) // features beyond the last stay 0: so are their gradient and their prior's precision
                for (int i = 0; i < 4; ++i) eps[i] = feature(j) + i % 2 < dim_ ? eps[i] : 0.0f;
            const float2 mean = pair_at(plan_.mean_at, j), precision = pair_at(plan_.precision_at, j);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float z0 = z_[4 * j + i], g = grad[4 * j + i];
                float z1 = fma_rn(c.grad, g, z0);
                z1 = fma_rn(c.prior * (i % 2 ? precision.y : precision.x), (i % 2 ? mean.y : mean.x) - z0, z1);
                z_[4 * j + i] = z1 = fma_rn(c.noise, eps[i], z1);
                if (diagnostics) sums[i / 2].add(g, z0, z1);
            }
        }
    }

    // everything else: one copy of the code, through which the registers pass
    JLEBM_DEVICE void move_by_chain(int64_t step, const Coefficients& coefficients, float (&grad)[4 * kDimTiles],
                                    MoveSums (&sums)[2]) {
        const UpdateParams& u = call_.update;
        const bool noisy = coefficients.noise != 0.0f;
        Coefficients c[2];
        for (int r = 0; r < 2; ++r) c[r] = is_real(r) ? coefficients.of_chain(u, chain_ + 8 * r) : coefficients;
#pragma unroll 1
        for (int j = 0; j < kDimTiles; ++j) {
            float eps[4] = {}, z[4];
            if (noisy && !u.noise) noise_of(step, j, eps);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int d = feature(j) + i % 2, r = i / 2;
                const int64_t chain = chain_ + 8 * r;
                z[i] = z_[i];
                if (!is_real(r) || d >= dim_) continue;
                float g = grad[i];
                if (noisy && u.noise) eps[i] = load_readonly(u.noise + (step * call_.chains + chain) * dim_ + d);
                z[i] = moved(u, c[r], chain, dim_, d, z_[i], g, eps[i], noisy);
                sums[r].add(g, z_[i], z[i]);
            }
#pragma unroll
            for (int i = 0; i < 4 * kDimTiles - 4; ++i) z_[i] = z_[i + 4], grad[i] = grad[i + 4];
#pragma unroll
            for (int i = 0; i < 4; ++i) z_[4 * kDimTiles - 4 + i] = z[i];
        }
    }

    JLEBM_DEVICE void record_chain(int64_t step, int r, bool kept, int64_t kept_index, MoveSums sums) {
        for (int mask = 1; mask <= 2; mask *= 2) {
            sums.grad2 += shuffle_xor(sums.grad2, mask);
            sums.move2 += shuffle_xor(sums.move2, mask);
            sums.bad += shuffle_xor(sums.bad, mask);
        }
        if (sums.bad != sums.bad && first_bad_[r] < 0) first_bad_[r] = step;
        if (!kept || t_ != 0 || !is_real(r)) return;
        const int64_t at = kept_index * call_.chains + chain_ + 8 * r;
        if (call_.record.grad_norm) call_.record.grad_norm[at] = sqrt_rn(sums.grad2);
        if (call_.record.displacement) call_.record.displacement[at] = sqrt_rn(sums.move2);
    }

    const MlpCall& call_;
    const MlpPlan& plan_;
    const MlpParams& mlp_;
    int dim_, t_, thread_;
    int64_t chain_; // the upper one of this thread's two
    O::Slopes* const slopes_;
    uint64_t key_;
    float z_[4 * kDimTiles];
    uint32_t operand_[2 * (kTiles > kDimTiles ? kTiles : kDimTiles)];
    int64_t first_bad_[2] = {-1, -1}, until_kept_, kept_index_ = 0;
};

// One layer's weight [n_out, n_in] as matrices of 8 outputs by 8 inputs, zeros up to the padded sizes.
JLEBM_DEVICE void load_cores(unsigned char* to, const float* weight, int n_out, int n_in, int outputs, int inputs) {
    // a thread takes 8 inputs of one output, which are 16 bytes there
    const int per_row = inputs / 8;
    for (int at = int(threadIdx.x); at < outputs * per_row; at += int(blockDim.x)) {
        const int out = at / per_row, core = at % per_row;
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int in = 8 * core + 2 * i;
            const float* from = weight + int64_t(out) * n_in + in;
            words[i] = pack_bf16(out < n_out && in < n_in ? load_readonly(from) : 0.0f,
                                 out < n_out && in + 1 < n_in ? load_readonly(from + 1) : 0.0f);
        }
        *reinterpret_cast<Fragment*>(to + out / 8 * outputs_stride(inputs) + core * kCoreBytes +
                                     out % 8 * 16) = {{words[0], words[1], words[2], words[3]}};
    }
}

template <int kDim, int kWidth>
JLEBM_DEVICE void load_warpgroup_parameters(const MlpCall& call) {
    const MlpParams& mlp = call.mlp;
    const int thread = int(threadIdx.x), n_threads = int(blockDim.x);
    for (int l = 0; l < mlp.n_hidden; ++l) {
        load_cores(shared_memory<unsigned char>(call.plan.weights_at[l]), mlp.weights[l], mlp.widths[l + 1],
                   mlp.widths[l], kWidth, l == 0 ? kDim : kWidth);
        auto* bias = shared_memory<float>(call.plan.bias_at[l]);
        for (int i = thread; i < kWidth; i += n_threads)
            bias[i] = mlp.biases[l] && i < mlp.widths[l + 1] ? load_readonly(mlp.biases[l] + i) : 0.0f;
    }
    const int width = mlp.widths[mlp.n_hidden];
    auto *top = shared_memory<float>(call.plan.top_at), *out = shared_memory<float>(call.plan.out_at);
    for (int i = thread; i < kWidth; i += n_threads) {
        const float w = i < width ? Operand<kBf16>::round(load_readonly(mlp.weights[mlp.n_hidden] + i)) : 0.0f;
        top[i] = w * Operand<kBf16>::round(mlp.out_scale);
        if (call.plan.logits) out[i] = w;
    }
    // a prior that is the same for all chains; without one, the precision is 0
    const UpdateParams& u = call.update;
    auto *mean = shared_memory<float>(call.plan.mean_at), *precision = shared_memory<float>(call.plan.precision_at);
    for (int i = thread; i < kDim; i += n_threads) {
        const bool there = u.prior_precision && i < mlp.dim();
        precision[i] = there && u.prior_precision_stride == 0 ? load_readonly(u.prior_precision + i) : 0.0f;
        mean[i] = there && u.prior_mean && u.prior_mean_stride == 0 ? load_readonly(u.prior_mean + i) : 0.0f;
    }
    fence_for_wgmma();
}

template <int kDim, int kWidth, int kGroups>
JLEBM_KERNEL(kGroups* kWarpgroup, 1)
mlp_warpgroup_kernel(JLEBM_PARAMETER MlpCall call) {
    load_warpgroup_parameters<kDim, kWidth>(call);
    sync_block();
    const int64_t first = int64_t(blockIdx.x) * call.plan.chains_per_block();
    // a warpgroup without a chain: nobody waits for it
    if (first + int64_t(threadIdx.x) / kWarpgroup * kWarpgroupChains >= call.chains) return;
    WarpgroupChains<kDim, kWidth>(call, first).run();
}

} // namespace cuda
} // namespace jlebm
