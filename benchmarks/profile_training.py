"""Where the time of one training iteration goes, with the prior chain as a published eager loop and as one native call.

    python benchmarks/profile_training.py [--rounds 15] [--threads N] [--out FILE]

Joint priors with batch 100: what `jlebm train` trains by default (digits), and the published SVHN runs, with the nets
HS and FID of `jlebm_fast/bench/cases.py`. Everything but the chain is the same code in both. Images are noise: they
cost what real ones cost. Writes JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jlebm_fast.bench import machine, rivals
from jlebm_fast.bench.cases import FID, HS, Case
from jlebm_fast.models import Batch, JointEBM, LearningRates, LearningStep, ModelConfig

DEFAULT = Case("digits", (2, 4, 8), 100, 2, "leaky_relu", False, n_steps=60, step_size=0.4, batch=100)
# case, pixels a side, channels of an image, width of generator and encoder
JOBS = ((DEFAULT, 16, 1, 32), (HS, 32, 3, 64), (FID, 32, 3, 64))
PARTS = ("prior chain", "descent of generator and encoder", "descent of the energy", "the rest")


@dataclasses.dataclass
class TimedStep(LearningStep):
    """A learning step that notes how long its chain and its descents take.

    eager    the chain of the published loops, run instead of the model's own; None for that
    """

    eager: Callable[[list[Tensor]], Any] | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def run_chain(self, purpose: str, chain: Callable[[dict[str, Any]], Any]) -> Any:
        if self.eager is not None:
            z0 = self.prior_start(self.batch, self.dims)
            return self.timed(PARTS[0], lambda: self.eager(z0))
        return self.timed(PARTS[0], lambda: super(TimedStep, self).run_chain(purpose, chain))

    def descend(self, name: str, loss: Tensor, description: str) -> None:
        part = PARTS[1] if name == "autoencoder" else PARTS[2]
        self.timed(part, lambda: super(TimedStep, self).descend(name, loss, description))

    def timed(self, part: str, run: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = run()
        self.seconds[part] = time.perf_counter() - begin
        return result


def profile(case: Case, size: int, channels: int, width: int, rounds: int) -> dict[str, Any]:
    """Median milliseconds of each part of an iteration, the two kinds of chain taking turns."""
    torch.manual_seed(0)
    config = ModelConfig(
        latent_dims=case.latent_dims, width=width, energy_hidden=case.hidden, energy_depth=case.depth,
        spectral_norm=case.spectral_norm, chain_steps=case.n_steps, step_size=case.step_size,
    )  # fmt: skip
    model = JointEBM(config, size, channels)
    optimisers = model.optimisers(LearningRates(3e-4, 2e-6))
    batch = Batch(torch.rand(case.batch, channels, size, size) * 2 - 1, torch.arange(case.batch))
    eager = (rivals.eager_spectral if case.spectral_norm else rivals.eager)(case, case.network())
    found: dict[str, dict[str, list[float]]] = {"eager loop": {}, "native call": {}}
    for i in range(rounds + 1):
        for kind, chain in (("eager loop", eager), ("native call", None)):
            step = TimedStep(optimisers, index=i, eager=chain)
            step.batch, step.dims = case.batch, case.latent_dims
            begin = time.perf_counter()
            model.update(batch, step)
            whole = time.perf_counter() - begin
            step.seconds["the rest"] = whole - sum(step.seconds.values())
            if i > 0:  # the first is for allocations and caches
                for part, seconds in (step.seconds | {"iteration": whole}).items():
                    found[kind].setdefault(part, []).append(1e3 * seconds)
    result: dict[str, Any] = {"case": case.name, "chain_steps": case.n_steps, "batch": case.batch, "rounds": rounds}
    result |= {"image": [channels, size, size], "width": width}
    for kind, parts in found.items():
        medians = {part: statistics.median(values) for part, values in parts.items()}
        shares = [chain / whole for chain, whole in zip(parts[PARTS[0]], parts["iteration"], strict=True)]
        result[kind] = {"milliseconds": medians, "share_of_prior_chain": statistics.median(shares)}
    ratios = [a / b for a, b in zip(*(found[kind]["iteration"] for kind in found), strict=True)]
    result["iteration_times_faster"] = statistics.median(ratios)
    return result


def table(results: list[dict[str, Any]]) -> str:
    """A column per case and kind of chain."""
    kinds = ("eager loop", "native call")
    lines = ["| ms, median | " + " | ".join(f"{r['case']}, {kind}" for r in results for kind in kinds) + " |"]
    lines.append("|---" * (1 + 2 * len(results)) + "|")
    for part in (*PARTS, "iteration"):
        cells = [f"{r[kind]['milliseconds'][part]:.1f}" for r in results for kind in kinds]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    shares = [f"{r[kind]['share_of_prior_chain']:.0%}" for r in results for kind in kinds]
    lines.append("| share of the prior chain | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="iterations of each kind")
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks", "results", "training.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = [profile(*job, options.rounds) for job in JOBS]
    print(table(results))
    for result in results:
        print(f"{result['case']}: an iteration is {result['iteration_times_faster']:.1f} times faster")
    command = f"python benchmarks/profile_training.py --rounds {options.rounds} --threads {options.threads}"
    written = {"command": command, "machine": machine.describe()}
    written["threads"] = options.threads
    options.out.write_text(json.dumps(written | {"results": results}, indent=1) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
