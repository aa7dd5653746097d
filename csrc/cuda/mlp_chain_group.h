// A group's chains through all steps: energy and gradient, then the update, one thread for each quadruple of
// coordinates.
//
//     z <- z + c_grad * grad + c_prior * ((mean - z) * precision + extra_grad) + c_noise * eps
// Sums over coordinates are added quadruple after quadruple, whoever computed them, so results do not depend on the
// geometry of the launch.
#pragma once

#include "cuda/coordinate_update.h"
#include "cuda/mlp_layers.h"
#include "cuda/normal_quad.h"

namespace jlebm {
namespace cuda {

template <int kPrecision, int kChainTiles, Regime kRegime>
class LangevinGroup : private ChainGroup<kPrecision, kChainTiles, kRegime> {
    using Base = ChainGroup<kPrecision, kChainTiles, kRegime>;
    using Base::call_, Base::plan_, Base::mlp_, Base::rank_, Base::thread_, Base::threads_, Base::first_, Base::memory_;
    using Base::kChains, Base::kInCluster;
    using O = typename Base::O;

public:
    JLEBM_DEVICE LangevinGroup(const MlpCall& call, int64_t first_of_block)
        : Base(call, first_of_block), dim_(call.mlp.dim()), first_quad_(own_quad(0)),
          n_items_((own_quad(1) - first_quad_) * kChains),
          // Items are dealt from the last thread on: the first warps have the larger share of the gradient's row tiles
          // and are the last to finish them.
          first_item_(threads_ - 1 - thread_),
          key_(call.update.noise_key_at ? *call.update.noise_key_at : call.update.noise_key),
          until_kept_(call.record.thin) {}

    JLEBM_DEVICE void run() {
        load();
        share_z(false);
        for (int64_t step = 0; step < call_.n_steps; ++step) {
            float energy = 0.0f;
            this->energy_and_grad(energy);
            if (call_.out)
                update(step, energy);
            else
                this->sync(After::kGrad);
            if (call_.energy && tells_of_chain()) call_.energy[first_ + thread_] = energy;
        }
        finish();
        this->stream_.finish();
        if constexpr (kInCluster) sync_cluster(); // a block's memory is there until nobody writes to it
    }

private:
    struct Quad {
        float v[4];
    };

    // quadruples [own_quad(0), own_quad(1)) are this block's: those of its row tiles of the gradient
    JLEBM_DEVICE int own_quad(int next) const {
        const int n_quads = (dim_ + 3) / 4;
        if constexpr (!kInCluster) return next ? n_quads : 0;
        const int quad = this->block_tile(tiles(dim_), next) * (kTileRows / 4);
        return quad < n_quads ? quad : n_quads;
    }
    JLEBM_DEVICE int quad_of(int item) const { return first_quad_ + item / kChains; }
    JLEBM_DEVICE int chain_of(int item) const { return item % kChains; }
    // whether this thread writes what there is one of for a chain
    JLEBM_DEVICE bool tells_of_chain() const {
        return rank_ == 0 && thread_ < kChains && first_ + thread_ < call_.chains;
    }
    JLEBM_DEVICE bool is_real(int item) const { return item < n_items_ && first_ + chain_of(item) < call_.chains; }

    JLEBM_DEVICE Quad read_rows(const float* rows, int64_t row, int quad) const {
        const float* at = rows + row * dim_ + 4 * quad;
        if (call_.whole_quads) {
            const float4 v = *reinterpret_cast<const float4*>(at);
            return {{v.x, v.y, v.z, v.w}};
        }
        Quad q;
        for (int i = 0; i < 4; ++i) q.v[i] = 4 * quad + i < dim_ ? at[i] : 0.0f;
        return q;
    }
    JLEBM_DEVICE void write_rows(float* rows, int64_t row, int quad, const Quad& q) const {
        float* at = rows + row * dim_ + 4 * quad;
        if (call_.whole_quads) {
            *reinterpret_cast<float4*>(at) = make_float4(q.v[0], q.v[1], q.v[2], q.v[3]);
            return;
        }
        for (int i = 0; i < 4; ++i)
            if (4 * quad + i < dim_) at[i] = q.v[i];
    }

    JLEBM_DEVICE Quad load_z(int item) const {
        if (!plan_.z_in_shared) return read_rows(call_.out, first_ + chain_of(item), quad_of(item));
        const float4 v = reinterpret_cast<const float4*>(memory_ + plan_.z_at)[item];
        return {{v.x, v.y, v.z, v.w}};
    }
    JLEBM_DEVICE void store_z(int item, const Quad& z) const {
        if (plan_.z_in_shared)
            reinterpret_cast<float4*>(memory_ + plan_.z_at)[item] = make_float4(z.v[0], z.v[1], z.v[2], z.v[3]);
        else if (call_.out)
            write_rows(call_.out, first_ + chain_of(item), quad_of(item), z);
        const int quad = quad_of(item), chain = chain_of(item);
        for (int i = 0; i < 4; ++i) this->store_operand(0, 4 * quad + i, chain, z.v[i]);
        // Features up to the tile's end meet zero weights, but 0 * NaN of an earlier layer's leftovers would be NaN.
        if (quad == (dim_ + 3) / 4 - 1)
            for (int d = 4 * quad + 4; d < round_up(dim_, kTileRows); ++d) this->store_operand(0, d, chain, 0.0f);
    }

    // Behind it, the group has z as it was stored in this block, and, where they are told, the first block of a cluster
    // the sums of the others.
    JLEBM_DEVICE void share_z(bool diagnostics) {
        if constexpr (kInCluster) {
            this->sync(After::kMoved);
            const int n_tiles = tiles(dim_), begin = this->block_tile(n_tiles, 0) * kTileRows;
            const int end = this->block_tile(n_tiles, 1) * kTileRows;
            // rows of a tile stand together, whatever their order
            const int of_plane = (end - begin) * O::kRowBytes / 16;
            for (int i = thread_; i < of_plane * kChainTiles; i += threads_) {
                unsigned char* at = this->buffer(0) + i / of_plane * this->plane(0) + begin * O::kRowBytes;
                auto* words = reinterpret_cast<Fragment*>(at) + i % of_plane;
                this->exchange_.send(words, *words);
            }
            int bytes = (n_tiles * kTileRows - (end - begin)) * kChainTiles * O::kRowBytes;
            if (diagnostics && rank_ == 0) {
                const int64_t real = call_.chains - first_ < kChains ? call_.chains - first_ : int64_t(kChains);
                bytes += ((dim_ + 3) / 4 - n_items_ / kChains) * int(real) * 3 * 4;
            }
            this->await(After::kUpdate, bytes);
        } else {
            this->sync(After::kUpdate);
        }
    }

    JLEBM_DEVICE void load() {
        for (int item = first_item_; item < n_items_; item += threads_) {
            Quad z = {};
            if (is_real(item)) z = read_rows(call_.z, first_ + chain_of(item), quad_of(item));
            if (is_real(item) || plan_.z_in_shared) store_z(item, z);
        }
    }

    JLEBM_DEVICE Quad noise_of(int item, int64_t step) const {
        const int64_t chain = first_ + chain_of(item);
        if (call_.update.noise) return read_rows(call_.update.noise, step * call_.chains + chain, quad_of(item));
        Quad eps;
        normal_quad(eps.v, uint32_t(quad_of(item)), call_.update.first_chain + uint32_t(chain),
                    call_.update.first_step + uint32_t(step), kStreamLangevin, key_);
        return eps;
    }

    JLEBM_DEVICE void update(int64_t step, float energy) {
        const RecordParams& record = call_.record;
        const Coefficients coefficients = Coefficients::of_step(call_.update, step);
        const bool noisy = coefficients.noise != 0.0f;
        // counted, since a 64-bit division takes as long as the noise
        const bool kept = --until_kept_ == 0;
        const int64_t kept_index = kept_index_;
        if (kept) until_kept_ = record.thin, ++kept_index_;
        const bool diagnostics = record.grad_norm || record.displacement || record.first_bad_step;
        float* trajectory = kept && record.trajectory ? record.trajectory + kept_index * call_.chains * dim_ : nullptr;

        // the first quadruple's noise needs no gradient: drawn while other warps still multiply
        Quad eps = {};
        if (noisy && is_real(first_item_)) eps = noise_of(first_item_, step);
        this->sync(After::kGrad);
#pragma unroll 1
        for (int item = first_item_; item < n_items_; item += threads_) {
            if (!is_real(item)) continue;
            if (noisy && item != first_item_) eps = noise_of(item, step);
            update_quad(item, coefficients, eps, noisy, diagnostics, trajectory);
        }
        share_z(diagnostics);
        if (kept && record.energy && tells_of_chain())
            record.energy[kept_index * call_.chains + first_ + thread_] = energy;
        if (!diagnostics) return;
        if (tells_of_chain()) record_chain(step, kept, kept_index);
        // the sums lie where the next step's slopes go; without these, where its gradient goes, barriers later
        if (kRegime != Regime::kLean) this->sync(After::kDiagnostics);
    }

    JLEBM_DEVICE void update_quad(int item, const Coefficients& step, const Quad& eps, bool noisy, bool diagnostics,
                                  float* trajectory) const {
        const UpdateParams& u = call_.update;
        const int quad = quad_of(item);
        const int64_t chain = first_ + chain_of(item);
        float* grad = this->grad_at(quad, chain_of(item));
        Quad z = load_z(item);
        const Coefficients c = step.of_chain(u, chain);
        MoveSums sums;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int d = 4 * quad + i;
            if (d >= dim_) break;
            const float z0 = z.v[i];
            float g = grad[i * kTileChains];
            z.v[i] = moved(u, c, chain, dim_, d, z0, g, eps.v[i], noisy);
            sums.add(g, z0, z.v[i]);
        }
        store_z(item, z);
        if (trajectory) write_rows(trajectory, chain, quad, z);
        if (!diagnostics) return;
        // in the quadruple's own rows of the gradient, which nobody else reads; a cluster's in those of its rank 0
        if constexpr (kInCluster) {
            if (rank_ > 0) {
                this->exchange_.send_to(0, grad, sums.grad2);
                this->exchange_.send_to(0, grad + kTileChains, sums.move2);
                this->exchange_.send_to(0, grad + 2 * kTileChains, sums.bad);
                return;
            }
        }
        grad[0] = sums.grad2, grad[kTileChains] = sums.move2, grad[2 * kTileChains] = sums.bad;
    }

    JLEBM_DEVICE void record_chain(int64_t step, bool kept, int64_t kept_index) {
        const RecordParams& record = call_.record;
        float grad2 = 0.0f, move2 = 0.0f, bad = 0.0f;
        for (int quad = 0; 4 * quad < dim_; ++quad) {
            const float* sums = this->grad_at(quad, thread_);
            grad2 += sums[0], move2 += sums[kTileChains], bad += sums[2 * kTileChains];
        }
        if (bad != bad && first_bad_ < 0) first_bad_ = step;
        if (!kept) return;
        const int64_t at = kept_index * call_.chains + first_ + thread_;
        if (record.grad_norm) record.grad_norm[at] = sqrt_rn(grad2);
        if (record.displacement) record.displacement[at] = sqrt_rn(move2);
    }

    JLEBM_DEVICE void finish() {
        for (int item = first_item_; item < n_items_; item += threads_) {
            if (!is_real(item)) continue;
            const int64_t chain = first_ + chain_of(item);
            if (call_.out && plan_.z_in_shared) write_rows(call_.out, chain, quad_of(item), load_z(item));
            if (call_.grad) {
                const float* grad = this->grad_at(quad_of(item), chain_of(item));
                Quad g;
                for (int i = 0; i < 4; ++i) g.v[i] = grad[i * kTileChains];
                write_rows(call_.grad, chain, quad_of(item), g);
            }
        }
        if (call_.record.first_bad_step && tells_of_chain()) call_.record.first_bad_step[first_ + thread_] = first_bad_;
    }

    const int dim_, first_quad_, n_items_, first_item_;
    const uint64_t key_;
    int64_t first_bad_ = -1, until_kept_, kept_index_ = 0;
};

} // namespace cuda
} // namespace jlebm
