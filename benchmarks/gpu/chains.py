"""Whole chains of the published problems, ours and others', by device events; written after every measurement.

A contender of ours is timed only after its chain has agreed with the plain loop in float64 for the same noise.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator

import contenders
import torch
from timing import measure
from torch import Tensor, nn

from jlebm_fast import FastLangevin, backends
from jlebm_fast.backends.cuda_tried import trying
from jlebm_fast.bench.cases import CASES, Case
from jlebm_fast.bench.sections import energy_of

NUMBERS_OF_CHAINS = (100, 1_000, 10_000, 1_000_000)
PARITY_STEPS = 5
# of the root mean square of z - z in float64 after five steps: the rounding of the operands, some dozens of terms
ALLOWED = {"fp32": 1e-5, "tf32": 3e-3, "bf16": 3e-2}
# regimes that are not used unless asked for: cases, precisions and numbers of chains that they are for; their chain is
# compared with as many as come first
TRIED = {
    "warpgroup": (("HS", "FID", "LEBM"), ("bf16",), (10_000, 1_000_000)),
    "cluster": (("LEBM", "WIDE"), ("fp32", "bf16"), (100, 1_000, 10_000)),
}
# torch.compile takes 20 to 40 s for each shape
COMPILED = {("HS", 100), ("LEBM", 100), ("LEBM", 10_000)}
MOST_GRAPH_STEPS = 100  # a graph of the plain loop holds some 70 nodes for each step
MOST_PLAIN_SHARE = 0.75  # of the device's memory for the activations that autograd keeps


def parity_error(
    case: Case, network: nn.Sequential, device: torch.device, backend: str, precision: str, chains: int = 100
) -> float:
    """Root mean square of z - z in float64."""
    z = torch.cat(case.initial(chains, seed=1), dim=1).to(device)
    energy = energy_of(case, network.cpu(), False).to(device)
    network.to(device)
    steps = {"n_steps": PARITY_STEPS, "step_size": case.step_size}
    got = FastLangevin(energy, **steps, backend=backend, precision=precision).sample(z, noise_key=3)
    exact = FastLangevin(energy.double(), **steps, backend="eager").sample(z.double(), noise_key=3)
    return float((got.double() - exact).square().mean().sqrt())


def names_of(case: Case, chains: int, wave: int, dry_run: bool) -> Iterator[str]:
    """Contenders in the order in which they are worth their time: all numbers of chains in one wave, then the next."""
    if dry_run:
        yield from (("cpu fp32", "eager"), ("cpu fp32 spectral", "eager spectral"), ())[wave]
        return
    if wave == 0:
        yield from ("cuda fp32", "cuda bf16", "eager")
        yield from tried_names(case, chains)
    elif wave == 1:
        yield from ("cuda fp32 (graph)", "cuda bf16 (graph)", "cuda tf32")
        if case.n_steps <= MOST_GRAPH_STEPS and chains <= 10_000:
            yield "eager graph"
        if backends.unavailable_reason("triton") is None:
            yield from ("triton fp32", "triton bf16")
    else:
        if case.spectral_norm and chains <= 10_000 and case.n_steps <= MOST_GRAPH_STEPS:
            yield from ("cuda fp32 spectral", "eager spectral")
        if (case.name, chains) in COMPILED:
            yield "compiled graph"


def tried_names(case: Case, chains: int) -> Iterator[str]:
    if os.environ.get("JLEBM_GPU_TRIED") == "no":
        return
    for regime, (cases, precisions, numbers) in TRIED.items():
        if case.name in cases and chains in numbers and backends.load("cuda").runs_here(regime):
            yield from (f"cuda {precision} {regime}" for precision in precisions)


def tried_by(name: str) -> str:
    """The regime of TRIED that a contender's name ends with, or ""."""
    return last if (last := name.split()[-1]) in TRIED else ""


def maker_of(name: str, case: Case, network: nn.Sequential, z: Tensor) -> contenders.Run:
    if name.endswith("(graph)"):
        return contenders.ours_replayed(case, network, z, name.split()[1])
    if tried_by(name):
        return contenders.ours_trying(case, network, z, *name.split())
    if name.startswith(("cuda", "triton", "cpu")):
        return contenders.ours(case, network, z, *name.split())
    makers = {
        "eager": contenders.eager,
        "eager spectral": contenders.eager_spectral,
        "eager graph": contenders.eager_graph,
        "compiled graph": contenders.compiled_graph,
    }
    return makers[name](case, network, z)


def memory_of(device: torch.device) -> float:
    """Bytes that one measurement may count on."""
    return float(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else 8e9


def why_not(name: str, case: Case, chains: int, left_s: float, memory: float) -> str | None:
    """left_s: seconds beside those that two runs of it would take."""
    if left_s < (60 if name == "compiled graph" else 8):
        return "no time left"
    kept = 4.0 * chains * (case.hidden * case.depth * 4 + case.dim * 8)
    if name.startswith(("eager", "compiled")) and kept > MOST_PLAIN_SHARE * memory:
        return "its activations do not fit"
    if name.startswith("eager") and case.n_steps > 1000 and chains > 100:
        return "takes too long"
    return None


class Bench:
    def __init__(self, target: pathlib.Path, dry_run: bool) -> None:
        self.target, self.dry_run = target, dry_run
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.deadline = time.monotonic() + float(os.environ.get("JLEBM_GPU_LIMIT_S", "300")) - 15
        self.measurements: list[dict] = []
        self.parity: dict[str, float | str] = {}

    def run(self) -> int:
        torch.set_float32_matmul_precision("highest")
        cases = list(CASES.values())
        numbers = NUMBERS_OF_CHAINS
        if self.dry_run:
            cases, numbers = [dataclasses.replace(case, n_steps=3) for case in cases], (8, 40)
        for wave, chains, case in itertools.product(range(3), numbers, cases):
            for name in names_of(case, chains, wave, self.dry_run):
                self.measurements.append(self.measured(name, case, chains))
                self.write()
        return 0 if not any("error" in m for m in self.measurements) else 1

    def expected_s(self, name: str, case: Case, chains: int) -> float:
        """Seconds of one run, at most: in proportion to what it took with fewer chains; 0 where that is not known."""
        known = [m for m in self.measurements if (m["case"], m["name"]) == (case.name, name) and "median_ms" in m]
        return known[-1]["median_ms"] / 1e3 * chains / known[-1]["chains"] if known else 0.0

    def write(self) -> None:
        self.target.write_text(json.dumps({"parity": self.parity, "measurements": self.measurements}))

    def measured(self, name: str, case: Case, chains: int) -> dict:
        entry: dict = {"case": case.name, "chains": chains, "name": name, "flops": case.flops(chains)}
        left = self.deadline - time.monotonic() - 2 * self.expected_s(name, case, chains)
        reason = why_not(name, case, chains, left, memory_of(self.device))
        if reason is not None:
            return {**entry, "skipped": reason}
        # a failure of one contender is written down and costs no other: the only place where any exception is caught
        try:
            network = case.network().to(self.device)
            reason = self.disagreement(name, case, network)
            if reason is None:
                generator = torch.Generator(self.device).manual_seed(chains)
                z = torch.randn(chains, case.dim, generator=generator, device=self.device)
                entry.update(measure(maker_of(name, case, network, z), self.device))
                print(f"{case.name:5}{chains:>8} {name:18}{entry['median_ms']:10.3f} ms", flush=True)
            else:
                entry["skipped"] = reason
        except Exception as error:  # noqa: BLE001
            entry["skipped"] = entry["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"{case.name:5}{chains:>8} {name:18}{entry['error']}", flush=True)
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return entry

    def disagreement(self, name: str, case: Case, network: nn.Sequential) -> str | None:
        """Why this contender is not timed: it is ours and does not agree."""
        if not name.startswith(("cuda", "triton", "cpu")):
            return None
        backend, precision = name.split()[:2]
        key = f"{case.name} {backend} {precision}"
        if wanted := tried_by(name):
            key = f"{case.name} {name}"
            if key not in self.parity:
                cuda, least = backends.load("cuda"), TRIED[wanted][2][0]
                with trying(wanted):
                    regime = cuda.regime("mlp_langevin_chain", case.spec, chains=least, name=precision)
                    if not regime.startswith(wanted):
                        return f"the plan's choice is {regime}"
                    self.parity[key] = parity_error(case, network, self.device, backend, precision, chains=least)
        elif key not in self.parity:
            self.parity[key] = parity_error(case, network, self.device, backend, precision)
        error = self.parity[key]
        return None if error <= ALLOWED[precision] else f"parity: error {error:.3g}, allowed {ALLOWED[precision]:.3g}"


if __name__ == "__main__":
    sys.exit(Bench(pathlib.Path(sys.argv[1]), "--dry-run" in sys.argv).run())
