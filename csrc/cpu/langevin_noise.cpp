// langevin_noise: the noise field eps [n_steps, chains, dim] of the noise contract (common/normal.h).
// Compiled once per target.
#include "cpu/arena.h"
#include "cpu/chain_rows.h"
#include "cpu/kernels_target.h"
#include "cpu/noise_lanes.h"
#include "cpu/schedule.h"

namespace jlebm {
namespace JLEBM_TARGET {

void langevin_noise(const LangevinNoiseParams& p, int n_threads) {
    const int64_t blocks = (p.chains + kLanes - 1) / kLanes;
    const int n_groups = int((p.dim + 3) / 4);
    const int64_t floats = int64_t(4) * n_groups * kLanes;
    const Schedule schedule(blocks * p.n_steps, 1, 1, n_threads);
    static thread_local ArenaStorage storage;
    float* memory = storage.reserve(floats * schedule.workers());
    schedule.run([&](const Piece& piece) {
        const int64_t step = piece.first_unit / blocks, first = piece.first_unit % blocks * kLanes;
        float* eps = memory + floats * piece.worker;
        normals_of_step<1>(eps, n_groups, p.first_chain + uint32_t(first), p.first_step + uint32_t(step), p.stream,
                           p.noise_key);
        rows_from_lanes<1>(p.out + step * p.chains * p.dim, eps, p.dim, first,
                           int(std::min<int64_t>(kLanes, p.chains - first)));
    });
    storage.give_back();
}

namespace {
template <int kRounds>
void words_of_lanes(const uint32_t counter[4], const uint32_t key[2], uint32_t* out) {
    const KeySchedule<kRounds> keys(uint64_t(key[1]) << 32 | key[0]);
    const auto s =
        philox_last_rounds(philox_start(ChainLanes(counter[1]), counter[0], counter[2], counter[3], keys), keys);
    const U words[4] = {interleave(s.c0), interleave(s.c1), interleave(s.c2), interleave(s.c3)};
    std::memcpy(out, words, sizeof words);
}
} // namespace

const int lanes = kLanes;

void philox_words(int rounds, const uint32_t counter[4], const uint32_t key[2], uint32_t* out) {
    if (rounds == 7)
        words_of_lanes<7>(counter, key, out);
    else
        words_of_lanes<kPhiloxRounds>(counter, key, out);
}

} // namespace JLEBM_TARGET
} // namespace jlebm
