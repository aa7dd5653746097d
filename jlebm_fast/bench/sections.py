"""What is measured: each function runs one table's worth at the present number of threads and returns plain records.

A contender is measured only after its parity test has passed in this process; one that fails is left out and reported.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from jlebm_fast import EnergyMLP, FastLangevin, ops
from jlebm_fast.bench import parity, peak, rivals
from jlebm_fast.bench.cases import Case, mlp_of
from jlebm_fast.bench.parity import Parity
from jlebm_fast.bench.timing import PATIENCE_SECONDS, Timing, interleaved
from jlebm_fast.problem import Update

MANY = 10_000
_PEAK_SECONDS = 0.05
RIVALS = {
    "eager": rivals.eager,
    "compiled": rivals.compiled,
    "jax": rivals.jax_scan,
    "torchebm": rivals.torchebm_sampler,
}
LABELS = {"eager": "eager loop", "compiled": "torch.compile", "jax": "jax.jit scan", "torchebm": "torchebm"}
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Record:
    """One measured number with all that is needed to read it.

    section       "chain", "diagnostics" or "op"
    contender     a backend's name or a rival's
    gflops        arithmetic of the gradient alone per second of the whole call; None where not counted
    fma_peak      GFLOP/s of multiply-adds, measured with the same threads before and after each turn, mean; or None
    fma_fraction  median over the turns of the turn's GFLOP/s by the peak measured around that turn; or None
    fma_fraction_best   GFLOP/s of the fastest call by the highest of those peaks: what is left when other users of the
                  machine are quiet; or None
    turns_s       median seconds of each turn; contenders of one case take turns, so n-th turns are neighbours in time
    """

    section: str
    op: str
    case: str
    chains: int
    n_steps: int
    threads: int
    contender: str
    timing: dict[str, float]
    parity: dict[str, object]
    gflops: float | None = None
    fma_peak: float | None = None
    fma_fraction: float | None = None
    fma_fraction_best: float | None = None
    turns_s: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return self.timing["median_s"]


def energy_of(case: Case, network: nn.Sequential, spectral_norm: bool) -> EnergyMLP:
    """The network as the package's own energy, with or without the spectral norm computed at every call."""
    energy = EnergyMLP(
        case.latent_dims, case.hidden, case.depth, activation=case.activation, spectral_norm=spectral_norm
    )
    linears = [layer for layer in network if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for ours, theirs in zip(energy.layers, linears, strict=True):
            ours.weight.copy_(theirs.weight)
            ours.bias.copy_(theirs.bias)
        energy(case.initial(1))  # in a training loop the forward before keeps the singular vectors near these weights
    return energy


def sampler_of(case: Case, network: nn.Sequential, backend: str, spectral_norm: bool = False) -> FastLangevin:
    return FastLangevin(
        energy_of(case, network, spectral_norm), n_steps=case.n_steps, step_size=case.step_size, backend=backend
    )


def _passed(check: Parity, say: Say) -> bool:
    if not check.passed:
        say(f"  {check.sentence()}; no number for it")
    return check.passed


class Contenders:
    """Named calls of one case that have passed their parity test, and the records of their times."""

    def __init__(self, section: str, op: str, case: Case, chains: int, say: Say) -> None:
        self.section, self.op, self.case, self.chains, self.say = section, op, case, chains, say
        self.runs: dict[str, Callable[[], object]] = {}
        self.checks: dict[str, Parity] = {}
        self.failed: list[Parity] = []

    def add(self, name: str, run: Callable[[], object], check: Parity) -> None:
        if _passed(check, self.say):
            self.runs[name], self.checks[name] = run, check
        else:
            self.failed.append(check)

    def measure(
        self,
        rounds: int,
        peak_of: int | None = None,
        flops: int | None = None,
        patience: float = PATIENCE_SECONDS,
    ) -> list[Record]:
        """Times of all; with `peak_of` threads the FMA peak is measured before and after every turn."""
        rate = functools.partial(peak.fma_peak, peak_of, _PEAK_SECONDS) if peak_of else None
        timings = interleaved(self.runs, rounds, rate, patience)
        return [self._record(name, timing, flops) for name, timing in timings.items()]

    def _record(self, name: str, timing: Timing, flops: int | None) -> Record:
        rates = timing.rates if flops else ()
        fractions = [flops / s / 1e9 / rate for s, rate in zip(timing.turns, rates, strict=True)] if rates else []
        return Record(
            section=self.section,
            op=self.op,
            case=self.case.name,
            chains=self.chains,
            n_steps=self.case.n_steps if self.op == "mlp_langevin_chain" else 1,
            threads=torch.get_num_threads(),
            contender=name,
            timing=timing.summary(),
            parity=dataclasses.asdict(self.checks[name]),
            gflops=None if flops is None else flops / timing.median / 1e9,
            fma_peak=statistics.mean(rates) if rates else None,
            fma_fraction=statistics.median(fractions) if rates else None,
            fma_fraction_best=flops / min(timing.seconds) / 1e9 / max(rates) if rates else None,
            turns_s=timing.turns,
        )


def chain_times(
    case: Case, chains: int, with_rivals: list[str], spectral: bool, rounds: int, say: Say
) -> tuple[list[Record], list[Parity]]:
    """Whole chains through `FastLangevin.sample`, list of latents in and out, against the rivals.

    spectral    also both sides with spectral norm: the published loop with its power iteration in every step, ours with
                the norm converged once per call
    """
    network = case.network()
    z0 = case.initial(chains)
    contenders = Contenders("chain", "mlp_langevin_chain", case, chains, say)
    for backend in parity.backends_with_kernels():
        for name, norm in [(backend.NAME, False), (f"{backend.NAME}, spectral norm", True)][: 1 + spectral]:
            sampler = sampler_of(case, network, backend.NAME, norm)
            contenders.add(name, functools.partial(sampler, z0), parity.chain(case, network, sampler, chains))
    for name in with_rivals:
        run = RIVALS[name](case, network)
        check = parity.rival(case, network, LABELS[name], run, chains)
        contenders.add(LABELS[name], functools.partial(run, z0), check)
    if spectral and "eager" in with_rivals:
        run = rivals.eager_spectral(case, network)
        name = f"{LABELS['eager']}, spectral norm"
        contenders.add(name, functools.partial(run, z0), parity.rival(case, network, name, run, chains))
    threads = torch.get_num_threads()
    records = contenders.measure(rounds, peak_of=threads, flops=case.flops(chains))
    return records, contenders.failed


def share_of_peak(case: Case, chains: int, rounds: int, say: Say) -> tuple[list[Record], list[Parity]]:
    """Whole chains of our backends alone, in many turns between measurements of the multiply-add peak."""
    network = case.network()
    z0 = case.initial(chains)
    contenders = Contenders("share", "mlp_langevin_chain", case, chains, say)
    for backend in parity.backends_with_kernels():
        sampler = sampler_of(case, network, backend.NAME)
        contenders.add(
            backend.NAME, functools.partial(sampler, z0), parity.chain(case, network, sampler, min(chains, 1000))
        )
    return contenders.measure(rounds, peak_of=torch.get_num_threads(), flops=case.flops(chains)), contenders.failed


def diagnostics_cost(case: Case, chains: int, rounds: int, say: Say) -> tuple[list[Record], list[Parity]]:
    """The same chains with and without energy, gradient norm and displacement of every step."""
    network = case.network()
    z0 = case.initial(chains)
    contenders = Contenders("diagnostics", "mlp_langevin_chain", case, chains, say)
    for backend in parity.backends_with_kernels():
        sampler = sampler_of(case, network, backend.NAME)
        check = parity.chain(case, network, sampler, chains)
        contenders.add(backend.NAME, functools.partial(sampler.sample, z0), check)
        contenders.add(
            f"{backend.NAME} with diagnostics", functools.partial(sampler.sample, z0, return_info=True), check
        )
    # a difference of few per cent between calls of half a second takes many turns to see
    return contenders.measure(rounds, patience=60.0), contenders.failed


def op_times(case: Case, chains: int, rounds: int, say: Say) -> tuple[list[Record], list[Parity]]:
    """The three smaller operations on the case's sizes, each beside plain torch."""
    records: list[Record] = []
    failed: list[Parity] = []
    for contenders, flops in _ops(case, chains, say):
        records += contenders.measure(rounds, peak_of=torch.get_num_threads() if flops else None, flops=flops)
        failed += contenders.failed
    return records, failed


def _ops(case: Case, chains: int, say: Say) -> Iterator[tuple[Contenders, int | None]]:
    network = case.network()
    mlp = mlp_of(network, case.spec)
    z0 = torch.cat(case.initial(chains), dim=1)
    gradient = torch.randn_like(z0)
    s = case.step_size
    update = Update(torch.tensor([[s * s / 2, s * s / 2, s]]), prior_precision=torch.ones(case.dim), noise_key=1)

    noise = Contenders("op", "langevin_noise", case, chains, say)
    step = Contenders("op", "langevin_step", case, chains, say)
    energy = Contenders("op", "mlp_energy_grad", case, chains, say)
    for backend in parity.backends_with_kernels():
        name = backend.NAME
        noise.add(
            name,
            functools.partial(ops.langevin_noise, 1, 1, chains, case.dim, backend=name),
            parity.noise(backend, 3, 101, case.dim),
        )
        step.add(
            name,
            functools.partial(ops.langevin_step, z0, gradient, update, backend=name),
            parity.step(backend, 101, case.dim),
        )
        energy.add(
            name,
            functools.partial(ops.mlp_energy_grad, z0, mlp, backend=name),
            parity.energy_grad(case, network, backend, 1000),
        )

    def plain_step() -> Tensor:
        return z0 + s * s / 2 * (gradient - z0) + s * torch.randn_like(z0)

    def plain_energy_grad() -> tuple[Tensor, Tensor]:
        z = z0.detach().requires_grad_(True)
        f = network(z)
        return f, torch.autograd.grad(f.sum(), z)[0]

    torchs_own = functools.partial(Parity, backend="torch", passed=True, error=0.0, error_of_torch=0.0)
    noise.add("plain torch", functools.partial(torch.randn, 1, chains, case.dim), torchs_own("langevin_noise"))
    step.add("plain torch", plain_step, torchs_own("langevin_step"))
    energy.add("plain torch", plain_energy_grad, torchs_own("mlp_energy_grad"))
    yield noise, None
    yield step, None
    yield energy, case.spec.flops_per_chain_step * chains
