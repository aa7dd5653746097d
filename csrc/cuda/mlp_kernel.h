// The kernel of both MLP operations, one instance for each precision, number of chain tiles and regime.
#pragma once

#include "cuda/mlp_chain_group.h"

namespace jlebm {
namespace cuda {

// What all groups of a block share: rounded weights (resident), biases, and the row above a plain single logit.
template <int kPrecision, Regime kRegime>
JLEBM_DEVICE void load_parameters(const MlpCall& call) {
    using O = Operand<kPrecision>;
    const MlpParams& mlp = call.mlp;
    const int n_layers = mlp.n_hidden + (call.plan.logits ? 1 : 0);
    const int thread = int(threadIdx.x), n_threads = int(blockDim.x);
    for (int l = 0; l < n_layers; ++l) {
        const int n_out = mlp.widths[l + 1];
        if (kRegime != Regime::kLean && kRegime != Regime::kCluster && call.plan.layer_resident(l))
            load_weight<kPrecision>(shared_memory<unsigned char>(call.plan.weights_at[l]), mlp.weights[l], n_out,
                                    mlp.widths[l]);
        auto* bias = shared_memory<float>(call.plan.bias_at[l]);
        for (int i = thread; i < round_up(n_out, kTileRows); i += n_threads)
            bias[i] = mlp.biases[l] && i < n_out ? load_readonly(mlp.biases[l] + i) : 0.0f;
    }
    const int width = mlp.widths[mlp.n_hidden];
    auto* top = shared_memory<float>(call.plan.top_at);
    for (int i = thread; i < round_up(width, kTileRows); i += n_threads)
        top[i] = i < width ? O::round(load_readonly(mlp.weights[mlp.n_hidden] + i)) * O::round(mlp.out_scale) : 0.0f;
}

template <int kPrecision, int kChainTiles, Regime kRegime>
JLEBM_KERNEL(kMlpThreads, 1)
mlp_kernel(JLEBM_PARAMETER MlpCall call) {
    load_parameters<kPrecision, kRegime>(call);
    sync_block();
    if constexpr (kRegime == Regime::kLean) {
        constexpr int kChains = kChainTiles * kTileChains;
        // No barrier between two batches: behind the last one of a batch, a thread reads only what it alone writes at
        // the beginning of the next, or what is written some barriers later.
#pragma unroll 1
        for (int64_t first = int64_t(blockIdx.x) * kChains; first < call.chains; first += int64_t(gridDim.x) * kChains)
            LangevinGroup<kPrecision, kChainTiles, kRegime>(call, first).run();
    } else {
        const int64_t batch = kRegime == Regime::kCluster ? int(blockIdx.x) / call.plan.cluster : int(blockIdx.x);
        LangevinGroup<kPrecision, kChainTiles, kRegime>(call, batch * call.plan.chains_per_block()).run();
    }
}

template <int kPrecision>
JLEBM_KERNEL(kMlpThreads, 1)
mlp_pack_kernel(JLEBM_PARAMETER MlpCall call, Fragment* fragments) {
    pack_stream<kPrecision>(call.mlp, call.plan, call.general_head, fragments);
}

template <int kPrecision>
void enqueue_pack(const MlpCall& call, const CudaLaunch& launch) {
    int64_t row_tiles_of_all = 0;
    for (int n = 0; n < phase_count(call.mlp.n_hidden, call.plan.logits, call.general_head); ++n)
        row_tiles_of_all +=
            streamed_tiles(call.mlp, call.plan, phase_of(n, call.mlp.n_hidden, call.plan.logits, call.general_head));
    // a warp for each of the first steps of the contraction; four give every multiprocessor a few blocks
    constexpr int kPackThreads = 128;
    JLEBM_LAUNCH((mlp_pack_kernel<kPrecision>), (Geometry{row_tiles_of_all, kPackThreads, 0}), launch, call,
                 static_cast<Fragment*>(launch.workspace));
}

template <int kPrecision, int kChainTiles, Regime kRegime>
void enqueue_chains(const MlpCall& call, const CudaLaunch& launch) {
    const int64_t blocks = mlp_blocks(call.plan, call.chains, launch);
    JLEBM_LAUNCH((mlp_kernel<kPrecision, kChainTiles, kRegime>),
                 (Geometry{blocks, call.plan.threads(), call.plan.shared_bytes, 1, call.plan.cluster}), launch, call);
}

template <int kPrecision, Regime kRegime>
void enqueue_tiles(const MlpCall& call, const CudaLaunch& launch) {
    switch (call.plan.chain_tiles) {
    case 1:
        return enqueue_chains<kPrecision, 1, kRegime>(call, launch);
    case 2:
        return enqueue_chains<kPrecision, 2, kRegime>(call, launch);
    default:
        return enqueue_chains<kPrecision, 4, kRegime>(call, launch);
    }
}

template <int kPrecision>
void enqueue_mlp_kernel(const MlpCall& call, const CudaLaunch& launch) {
    if (call.plan.resident()) return enqueue_tiles<kPrecision, Regime::kResident>(call, launch);
    if (call.plan.stream_fragments) enqueue_pack<kPrecision>(call, launch);
#if defined(JLEBM_CUDA_CLUSTERS) || defined(JLEBM_CUDA_ON_HOST)
    if (call.plan.regime == Regime::kCluster) return enqueue_mlp_cluster<kPrecision>(call, launch);
#endif
    if (call.plan.regime == Regime::kLean) return enqueue_tiles<kPrecision, Regime::kLean>(call, launch);
    enqueue_tiles<kPrecision, Regime::kStreamed>(call, launch);
}

} // namespace cuda
} // namespace jlebm
