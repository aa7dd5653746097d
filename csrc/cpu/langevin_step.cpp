// langevin_step: one update with a gradient from anywhere, [chains, dim] -> [chains, dim].
//
//     z <- z + c_grad * grad + c_prior * ((mean - z) * precision + extra_grad) + c_noise * eps
// Compiled once per target.
#include "cpu/kernels_target.h"
#include "cpu/schedule.h"
#include "cpu/update_lanes.h"

namespace jlebm {
namespace JLEBM_TARGET {

void langevin_step(const LangevinStepParams& p, int n_threads) {
    using Workspace = UpdateWorkspace<1>;
    const int64_t floats = Workspace::floats(p.dim) + 2 * kLanes * p.dim + 2 * kArenaAlign;
    const Schedule schedule((p.chains + kLanes - 1) / kLanes, 1, 1, n_threads);
    static thread_local ArenaStorage storage;
    float* memory = storage.reserve(floats * schedule.workers());
    schedule.run([&](const Piece& piece) {
        Arena arena(memory + floats * piece.worker, floats);
        const int64_t first = piece.first_unit * kLanes;
        const int count = int(std::min<int64_t>(kLanes, p.chains - first));
        Workspace workspace;
        workspace.take(p.update, p.dim, arena);
        float* z = arena.take(kLanes * p.dim);
        float* grad = arena.take(kLanes * p.dim);
        lanes_from_rows<1>(z, p.z, p.dim, first, count);
        lanes_from_rows<1>(grad, p.grad, p.dim, first, count);
        workspace.load_chains(p.update, p.dim, first, count);
        workspace.load_coefficients(p.update, 0);
        const bool noisy = workspace.load_noise(p.update, p.chains, p.dim, first, count, 0);
        update_block<1, false>(p.update, workspace, p.dim, noisy, z, grad, nullptr);
        rows_from_lanes<1>(p.out, z, p.dim, first, count);
    });
    storage.give_back();
}

} // namespace JLEBM_TARGET
} // namespace jlebm
