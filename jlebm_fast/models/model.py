"""What every model has in common: its configuration, and the interface that loop, figures and evaluation call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from jlebm_fast.energy import EnergyMLP
from jlebm_fast.sampler import FastLangevin

from .gaussians import standard_normal_log_density
from .generator import LadderGenerator
from .ladder import Ladder
from .learning import Batch, LearningRates, LearningStep

PRIORS = ("ebm", "gaussian", "nce", "gmm", "vae")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shape and the objective of a model.

    latent_dims             (d_1, …, d_L), bottom (fine detail) to top (global form)
    width                   channels of the largest feature map
    combine                 how a lower layer meets what comes from above: "add" or "concat"
    reconstruction_weight   1/(2σ²) of the observation model
    prior                   "ebm" for exp(f(z)) N(0, I), "gaussian" for f = 0; "nce", "gmm", "vae": see autoencoder.py
    energy_hidden, energy_depth, energy_activation, spectral_norm     the net f
    chain_steps, step_size  of the short-run prior chain, started at N(0, I)
    posterior_steps, posterior_step_size    of the posterior chain, in models without an encoder
    conditional_hidden      units of the nets of conditional Gaussians
    nce_stages, nce_sampler of the contrastive prior: number of classifiers; "chain" or "resampling"
    mixture_components      of the Gaussian mixture
    stage_steps             learning steps of each stage after the first; 0 for as many as the first
    """

    latent_dims: tuple[int, ...] = (2, 4, 8)
    width: int = 32
    combine: str = "add"
    reconstruction_weight: float = 6.0
    prior: str = "ebm"
    energy_hidden: int = 100
    energy_depth: int = 2
    energy_activation: str = "leaky_relu"
    spectral_norm: bool = False
    chain_steps: int = 60
    step_size: float = 0.4
    posterior_steps: int = 20
    posterior_step_size: float = 0.1
    conditional_hidden: int = 100
    nce_stages: int = 1
    nce_sampler: str = "chain"
    mixture_components: int = 10
    stage_steps: int = 0


class LatentModel(nn.Module):
    """A generator of images from latent layers, with the rule that learns it: one subclass per model.

    A subclass builds its further nets and answers

        optimisers(rates)        the optimisers, by name
        update(batch, step)      one learning step: metrics as scalars; everything random comes from `step`
        encode(images)           latents of images
        sample_prior(n)          z ~ p(z)

    and, where learning has several parts, `stages`. Whatever it must remember is a parameter or a buffer: the
    checkpoint holds `state_dict()` and the optimisers, nothing else.

    Arguments:
        config: see `ModelConfig`.
        image_size: pixels a side, a power of two >= 8.
        image_channels: 1 for grey, 3 for colour.
        n_images: size of the training set, for models that remember a latent per example.
    """

    name: ClassVar[str]
    energy: nn.Module | None  # f: L layers [n, d_i] -> [n]; None for a Gaussian prior

    def __init__(self, config: ModelConfig, image_size: int, image_channels: int, n_images: int = 0) -> None:
        super().__init__()
        if config.reconstruction_weight <= 0:
            raise ValueError(f"reconstruction_weight must be positive, got {config.reconstruction_weight}")
        if config.prior not in PRIORS:
            raise ValueError(f"prior must be one of {', '.join(PRIORS)}, got {config.prior}")
        self.config = config
        self.energy = None
        self.ladder = Ladder(tuple(config.latent_dims), image_size, image_channels, config.width)
        self.latent_dims = self.ladder.latent_dims
        self.generator = LadderGenerator(self.ladder, config.combine)

    def build_energy(self) -> EnergyMLP:
        """The net f that the configuration describes, on all layers."""
        config = self.config
        return EnergyMLP(
            self.latent_dims,
            config.energy_hidden,
            config.energy_depth,
            activation=config.energy_activation,
            spectral_norm=config.spectral_norm,
        )

    @property
    def device(self) -> torch.device:
        return next(self.generator.parameters()).device

    def optimisers(self, rates: LearningRates) -> dict[str, torch.optim.Optimizer]:
        """The optimisers that `update` descends with, by name."""
        raise NotImplementedError

    def update(self, batch: Batch, step: LearningStep) -> Mapping[str, Tensor]:
        """One learning step; returns scalars for metrics.jsonl, among them `loss`.

        Raises:
            NonFiniteLoss: a loss is NaN or infinite; nothing has been changed by it.
        """
        raise NotImplementedError

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """One latent per image: the posterior mean, or the end of a posterior chain: L tensors [n, d_i], detached."""
        raise NotImplementedError

    def sample_prior(
        self, n: int, generator: torch.Generator | None = None, n_steps: int | None = None
    ) -> list[Tensor]:
        """z ~ p(z), all in one call: L tensors [n, d_i], detached; `n_steps` replaces the chain's configured number."""
        raise NotImplementedError

    def log_prior(self, zs: list[Tensor]) -> Tensor:
        """log p(z) up to a constant, f + log N(z; 0, I) unless a model says otherwise: [n], differentiable in z."""
        log_density = standard_normal_log_density(zs)
        return log_density if self.energy is None else log_density + self.energy(zs)

    def stages(self, steps: int) -> tuple[int, ...]:
        """Learning steps of each stage when the first has `steps`."""
        return (steps,)

    @property
    def has_prior_chain(self) -> bool:
        """Whether p(z) is sampled by a Langevin chain."""
        return self.energy is not None

    @property
    def samples_by_chain(self) -> bool:
        """Whether `sample_prior` runs that chain, and so reads `n_steps`."""
        return self.has_prior_chain

    def chain_start(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Where `sample_prior(n, generator)` starts its chains: L tensors [n, d_i]."""
        return self.standard_normal(n, generator)

    @property
    def prior_name(self) -> str:
        """p(z) in words, for figures."""
        return "energy prior" if self.energy is not None else "N(0, I)"

    def prior_chain(self, n_steps: int | None = None) -> FastLangevin:
        """The Langevin chain of the energy prior; `n_steps` replaces the configured number."""
        if self.energy is None:
            raise ValueError('this model has a Gaussian prior and no energy; train one with prior "ebm"')
        n_steps = self.config.chain_steps if n_steps is None else n_steps
        return FastLangevin(self.energy, n_steps=n_steps, step_size=self.config.step_size)

    def update_energy(self, z_posterior: list[Tensor], step: LearningStep) -> dict[str, Tensor]:
        """f descends E_p f(z) − E_q f(z), with z ~ p from the prior chain of this step."""
        start = step.prior_start(len(z_posterior[0]), self.latent_dims, self.device)
        z_prior = step.run_chain("prior chain", lambda noise: self.prior_chain().sample(start, **noise))
        step.prior_end(z_prior)
        energy_posterior, energy_prior = self.energy(z_posterior).mean(), self.energy(z_prior).mean()
        step.descend("energy", energy_prior - energy_posterior, "loss of the energy")
        return {"energy_posterior": energy_posterior.detach(), "energy_prior": energy_prior.detach()}

    def standard_normal(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """z ~ N(0, I): L tensors [n, d_i] on the model's device."""
        return [torch.randn((n, dim), generator=generator, device=self.device) for dim in self.latent_dims]

    @torch.no_grad()
    def decode(self, zs: list[Tensor], batch: int = 500) -> Tensor:
        """Images of latents, in pieces that keep memory small: [n, channels, size, size] in (-1, 1)."""
        pieces = [self.generator(list(piece)) for piece in zip(*(z.split(batch) for z in zs), strict=True)]
        return torch.cat(pieces)

    def reconstruct(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The generator's images of `encode(images)`."""
        return self.decode(self.encode(images, generator))

    def frozen_layers(self, moving: set[int]) -> list[bool]:
        """A chain's mask that freezes every layer but those in `moving` (0 is the bottom)."""
        return [layer not in moving for layer in range(len(self.latent_dims))]


@torch.no_grad()
def encode_in_pieces(encoder: Callable[[Tensor], list[Tensor]], images: Tensor, batch: int = 500) -> list[Tensor]:
    """L tensors [n, d_i] of an encoder applied to many images, in pieces that keep memory small."""
    return [torch.cat(layer) for layer in zip(*map(encoder, images.split(batch)), strict=True)]


def squared_error(images: Tensor, reconstructions: Tensor) -> Tensor:
    """‖x − g(z)‖² of each image: [n]."""
    return (images - reconstructions).square().flatten(1).sum(dim=1)


def adam(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """Adam as all generators and encoders are trained with."""
    return torch.optim.Adam(parameters, lr=rate, betas=(0.5, 0.999))


def energy_adam(energy: nn.Module, rates: LearningRates) -> torch.optim.Optimizer:
    """Adam for an energy, as published: no momentum, since its negative samples change at every step."""
    return torch.optim.AdamW(
        energy.parameters(), lr=rates.energy, betas=(0.0, 0.9), weight_decay=rates.energy_weight_decay
    )
