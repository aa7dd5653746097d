"""What the prior chain of a trained model does: mixing of long chains, and their bias against exact ones (MALA)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jlebm_fast import FastLangevin, energy_and_grad, mala
from jlebm_fast.models import LatentModel

from .frechet import frechet_distance

LONG_STEPS = 2000  # Langevin steps of a long chain, discarded ones included
MIXING_CHAINS = 32
DISCARDED = 0.5  # share of a long chain that is thrown away as its way to the target
DRAWS = 500  # of each long chain that are kept, evenly spaced
BIAS_CHAINS = 2000
MISSING_ARVIZ = "not measured: this needs the module arviz_stats (Python 3.11 or newer): pip install arviz-stats"


class Traces(NamedTuple):
    """Long chains: what the figures draw.

    energy       [draws, chains] f along the mixing chains, discarded part included
    ends         name → f at the ends of many chains: [chains]
    """

    energy: Tensor
    ends: dict[str, Tensor]


def mixing(model: LatentModel, generator: torch.Generator, n_steps: int = LONG_STEPS) -> tuple[dict[str, Any], Tensor]:
    """Effective sample size and R-hat of long prior chains, for every latent dimension and for the energy.

    Arguments:
        model: with a prior chain.
        n_steps: length of a chain; the first half is discarded.

    Returns:
        ({"steps", "chains", "draws", "ess_…", "rhat_…"}, energy [draws of the whole chain, chains]). The effective
        sample sizes are for all chains together: bulk, rank-normalised; "steps_per_sample" are the Langevin steps of
        all chains behind one effective sample of the worst dimension.

    Source: Vehtari, Gelman, Simpson, Carpenter, Bürkner, "Rank-normalization, folding, and localization: an improved
    R-hat for assessing convergence of MCMC", Bayesian Analysis 2021; computed by ArviZ.
    """
    thin = max(1, round(n_steps * (1 - DISCARDED)) // DRAWS)
    chain = model.prior_chain(n_steps)
    z0 = model.standard_normal(MIXING_CHAINS, generator)
    _, info = chain.sample(z0, generator=generator, return_info=True, return_trajectory=True, thin=thin)
    first = int(len(info.energy) * DISCARDED)
    z, energy = info.trajectory[first:].transpose(0, 1), info.energy[first:].transpose(0, 1)  # [chains, draws, …]
    found: dict[str, Any] = {"steps": n_steps, "chains": MIXING_CHAINS, "draws": z.shape[1], "draw_every": thin}
    try:
        from arviz_stats.base import array_stats
    except ModuleNotFoundError:
        return found | {"ess": MISSING_ARVIZ}, info.energy
    draws, curve = z.double().cpu().numpy(), energy.double().cpu().numpy()
    axes = {"chain_axis": 0, "draw_axis": 1}
    with np.errstate(invalid="ignore"):  # an energy that is constant has neither; None says so
        ess, rhat = array_stats.ess(draws, **axes), array_stats.rhat(draws, **axes)
        ess_energy, rhat_energy = array_stats.ess(curve, **axes), array_stats.rhat(curve, **axes)
    found |= {
        "ess_min": float(ess.min()),
        "ess_mean": float(ess.mean()),
        "ess_energy": float(ess_energy) if np.isfinite(ess_energy) else None,
        "rhat_max": float(rhat.max()),
        "rhat_mean": float(rhat.mean()),
        "rhat_energy": float(rhat_energy) if np.isfinite(rhat_energy) else None,
    }
    found["steps_per_sample"] = MIXING_CHAINS * z.shape[1] * thin / found["ess_min"]
    return found, info.energy


def bias(
    model: LatentModel, generator: torch.Generator, n_steps: int = LONG_STEPS
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """How far the prior chain's law is from p(z) itself, which a Metropolis-adjusted chain of the same steps has.

    Three sets of independent chains: short, as long as in training; long, unadjusted; long, adjusted (MALA), where
    every proposal is a step of the unadjusted chain. Short against adjusted is the bias of stopping early, long
    against adjusted the bias of the step size: for f = 0 it is a variance of 1/(1 − s²/4) instead of 1.

    Returns:
        ({numbers}, name → f at the ends of the chains [chains]). Energies are means with standard errors;
        "energy_gap_…" is the difference to MALA in standard errors; "variance_…" is the mean variance of a latent
        dimension; "frechet_latents_…" the Fréchet distance of the latents to as many of MALA's, "…_floor" that of two
        sets of MALA chains.
    """
    chain = model.prior_chain(n_steps)
    short = model.prior_chain()

    def start(n: int = BIAS_CHAINS) -> list[Tensor]:
        return model.standard_normal(n, generator)

    ends = {"short": short.sample(start(), generator=generator), "long": chain.sample(start(), generator=generator)}
    # twice as many: one half for the comparisons, the other for their floor
    ends["mala"], info = mala(
        chain.energy,
        start(2 * BIAS_CHAINS),
        n_steps=n_steps,
        step_size=chain.step_size,
        prior=chain.prior,
        maximize=chain.maximize,
        generator=generator,
        thin=n_steps,
    )
    flat = {name: torch.cat(zs, dim=1) for name, zs in ends.items()}
    energy = {name: energy_of(chain, zs) for name, zs in ends.items()}
    found: dict[str, Any] = {"chains": BIAS_CHAINS, "steps": n_steps, "short_steps": short.n_steps}
    found["step_size"] = float(chain.step_size)
    found["acceptance"] = float(info.acceptance.mean())
    error = {name: float(f.std()) / len(f) ** 0.5 for name, f in energy.items()}
    for name, f in energy.items():
        found |= {f"energy_{name}": float(f.mean()), f"energy_{name}_error": error[name]}
        found[f"variance_{name}"] = float(flat[name].var(dim=0).mean())
    halves = flat["mala"].cpu().chunk(2)
    for name in ("short", "long"):
        gap = found[f"energy_{name}"] - found["energy_mala"]
        found[f"energy_gap_{name}"] = gap / max((error[name] ** 2 + error["mala"] ** 2) ** 0.5, 1e-12)
        found[f"frechet_latents_{name}"] = frechet_distance(flat[name].cpu(), halves[0])
    found["frechet_latents_floor"] = frechet_distance(*halves)
    return found, energy


def energy_of(chain: FastLangevin, zs: list[Tensor]) -> Tensor:
    """f of latents, positive where p(z) is raised: [n]."""
    value, _ = energy_and_grad(chain.energy, zs)
    return value if chain.maximize else -value


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts of values in equal bins over the common range of several sets: what the figure and the JSON hold.

    edges    n_bins + 1 numbers
    counts   name → n_bins counts
    """

    edges: list[float]
    counts: dict[str, list[int]]

    @classmethod
    def of(cls, values: dict[str, Tensor], n_bins: int = 40) -> Histogram:
        """Bins from the smallest finite value of all sets to the largest.

        Example:
            >>> Histogram.of({"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([2.0])}, n_bins=2).counts
            {'a': [1, 1], 'b': [0, 1]}
        """
        finite = {name: v[torch.isfinite(v)].double().cpu() for name, v in values.items()}
        together = torch.cat(list(finite.values()))
        low, high = float(together.min()), float(together.max())
        edges = torch.linspace(low, high if high > low else low + 1.0, n_bins + 1, dtype=torch.float64)
        counts = {name: torch.histogram(v, edges).hist.long().tolist() for name, v in finite.items()}
        return cls(edges.tolist(), counts)
