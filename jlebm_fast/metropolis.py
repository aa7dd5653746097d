"""MALA: the Langevin step of this package with an accept/reject test, which makes its law exact at any step size."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import dynamics
from .checks import whole
from .dynamics import STANDARD_NORMAL, GaussianPrior
from .functional import energy_and_grad, langevin_noise, langevin_step
from .latents import LatentLayout, Latents, flatten_latents
from .modes import chain_mode, device_of, refuse_trace
from .ops import check_count, check_counter, check_thin
from .rng import ACCEPT_REJECT, COUNTER_RANGE, noise_key_of


class MALAInfo(NamedTuple):
    """What a MALA chain tells about itself; kept are the steps k with (k + 1) % thin == 0, n_kept = n_steps // thin.

    acceptance    [chains] share of the proposals that were accepted
    energy        [n_kept, chains] what the energy returned at z after step k
    trajectory    [n_kept, chains, dim] z after step k, or None where it was not asked for
    """

    acceptance: Tensor
    energy: Tensor
    trajectory: Tensor | None


def mala(
    energy: nn.Module | Callable[..., Tensor],
    z: Latents,
    *,
    n_steps: int,
    step_size: float | Tensor = 0.4,
    prior: GaussianPrior | None = STANDARD_NORMAL,
    maximize: bool = True,
    generator: torch.Generator | None = None,
    noise_key: int | None = None,
    first_step: int = 0,
    first_chain: int = 0,
    thin: int = 1,
    return_trajectory: bool = False,
    backend: str = "auto",
) -> tuple[Latents, MALAInfo]:
    """Run the Metropolis-adjusted Langevin algorithm on p(z) ∝ exp(f(z)) N(z; mean, std²), exact where ULA is biased.

        z' = z + s²/2 ∇ log p(z) + s ε,    accept with probability  min(1, p(z') q(z|z') / (p(z) q(z'|z))),
        q(b|a) = N(b; a + s²/2 ∇ log p(a), s²),    ∇ log p(z) = ∇f(z) + (mean − z)/std²

    The proposal is `langevin_step` under the same noise: with every proposal accepted it is the chain of
    `FastLangevin`. A proposal whose density is not finite is rejected.

    Args:
        energy: EnergyMLP, module or callable, as for FastLangevin
        z: start, [chains, dim], [chains, dim, 1, 1], or a list or tuple of layers; float32 or float64
        n_steps: steps of a chain
        step_size: s > 0, float or tensor [chains]
        prior, maximize: as for FastLangevin
        generator, noise_key: where the 64-bit key comes from; stream 0 proposes, stream 2 accepts
        first_step, first_chain: place in the noise field, for a chain continued or one part of many
        thin: keep every thin-th step
        return_trajectory: keep z too
        backend: "auto" or a backend's name

    Returns:
        (z, MALAInfo): where the chains ended, in the structure of z, and what they tell

    Raises:
        ValueError: an argument does not fit: what was expected and what came.

    Example:
        >>> from jlebm_fast import EnergyMLP
        >>> z, info = mala(EnergyMLP(16, 50, 4), torch.randn(100, 16), n_steps=10, noise_key=1)
        >>> tuple(info.energy.shape), bool(info.acceptance.mean() > 0.5)
        ((10, 100), True)

    Source: Roberts and Tweedie, "Exponential convergence of Langevin distributions and their discrete approximations",
    Bernoulli 2 (1996).
    """
    refuse_trace("mala")
    n_steps, thin, first_step, first_chain = (whole(value) for value in (n_steps, thin, first_step, first_chain))
    check_count("n_steps", n_steps)
    check_thin(thin)
    check_counter("first_step", first_step)
    check_counter("first_chain", first_chain)
    dynamics.check_prior(prior)
    dynamics.check_maximize(maximize)
    listed = not isinstance(step_size, Tensor) and getattr(step_size, "ndim", hasattr(step_size, "__len__"))
    step_size = 1.0 if listed else dynamics.check_schedule("step_size", step_size, 1)
    if listed:
        raise ValueError("step_size must be a float or a tensor [chains]: a proposal with a schedule is another kernel")
    if not (step_size > 0 if isinstance(step_size, float) else bool((step_size > 0).all())):
        raise ValueError("step_size must be positive: without noise there is no density to correct")
    with chain_mode(device_of(z)):
        flat, layout = flatten_latents(z)
        key = noise_key_of(noise_key, generator, flat.device)
        target = _Target(energy, layout, prior, maximize, backend)
        drift, noise = dynamics.step_numbers(step_size)
        factors = dynamics.chain_coefficients(step_size, 1.0, flat)
        if factors is not None:
            drift, noise = drift * factors[:, :1], noise * factors[:, 2:]
        chains = flat.shape[0]
        place = {"first_chain": first_chain, "backend": backend}
        here = target(flat.clone())  # what comes back is never the caller's memory
        accepted = torch.zeros(chains, dtype=torch.int64, device=flat.device)
        energies, trajectory = [], []
        for k in range(n_steps):
            step = (first_step + k) % COUNTER_RANGE
            there = target(
                langevin_step(
                    here.z,
                    here.grad,
                    step_size=step_size,
                    prior=prior,
                    maximize=maximize,
                    noise_key=key,
                    step=step,
                    **place,
                )
            )
            normal = langevin_noise(
                key, 1, chains, 1, first_step=step, stream=ACCEPT_REJECT, device=flat.device, dtype=flat.dtype, **place
            )
            log_u = torch.special.log_ndtr(normal[0, :, 0])  # Φ of a normal is uniform
            log_ratio = there.log_density - here.log_density
            log_ratio += _log_q(here, there, drift, noise) - _log_q(there, here, drift, noise)
            # False where the ratio is not a number
            accept = (log_u < log_ratio) & torch.isfinite(there.log_density)
            here = _State(*(_where(accept, new, old) for new, old in zip(there, here, strict=True)))
            accepted = accepted + accept
            if (k + 1) % thin == 0:
                energies.append(here.energy)
                if return_trajectory:
                    trajectory.append(here.z)
        empty = flat.new_empty((0, *flat.shape))
        info = MALAInfo(
            accepted.to(flat.dtype) / max(n_steps, 1),
            torch.stack(energies) if energies else empty[:, :, 0],
            (torch.stack(trajectory) if trajectory else empty) if return_trajectory else None,
        )
        return layout.restore(here.z), info


class _State(NamedTuple):
    """z [chains, dim] with the energy, log p(z) up to a constant, the energy's gradient and ∇ log p(z)."""

    z: Tensor
    energy: Tensor
    log_density: Tensor
    grad: Tensor
    score: Tensor


class _Target:
    """Evaluates p(z) ∝ exp(± energy) · prior at flat latents."""

    def __init__(
        self,
        energy: nn.Module | Callable[..., Tensor],
        layout: LatentLayout,
        prior: GaussianPrior | None,
        maximize: bool,
        backend: str,
    ) -> None:
        self.energy, self.layout, self.prior, self.backend = energy, layout, prior, backend
        self.sign = 1.0 if maximize else -1.0

    def __call__(self, z: Tensor) -> _State:
        energy, grad = energy_and_grad(self.energy, self.layout.restore(z), backend=self.backend)
        grad = flatten_latents(grad)[0]
        log_density, score = self.sign * energy, self.sign * grad
        if self.prior is not None:
            mean, precision = self.prior.terms(z)
            offset = -z if mean is None else mean - z
            log_density = log_density - 0.5 * (precision * offset.square()).sum(dim=1)
            score = score + precision * offset
        return _State(z, energy, log_density, grad, score)


def _where(accept: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(accept if new.dim() == 1 else accept[:, None], new, old)


def _log_q(to: _State, source: _State, drift: float | Tensor, noise: float | Tensor) -> Tensor:
    """log N(to; source + drift ∇ log p(source), noise²) up to the constant that both directions share: [chains]."""
    residual = (to.z - source.z - drift * source.score) / noise
    return -0.5 * residual.square().sum(dim=1)
