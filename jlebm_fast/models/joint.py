"""The joint latent energy prior with its multi-layer generator and ladder encoder: the system this package is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from jlebm_fast.energy import EnergyMLP
from jlebm_fast.sampler import FastLangevin

from .encoder import LadderEncoder, Posterior
from .generator import LadderGenerator
from .ladder import Ladder
from .learning import LearningRates, descend


@dataclasses.dataclass(frozen=True)
class JointConfig:
    """Everything that decides the shape and the objective of a `JointEBM`.

    latent_dims             (d_1, …, d_L), bottom (fine detail) to top (global form)
    width                   channels of the largest feature map
    combine                 how a lower layer meets what comes from above: "add" or "concat"
    reconstruction_weight   1/(2σ²) of the observation model
    prior                   "ebm" for exp(f(z)) N(0, I), "gaussian" for f = 0 (the VLAE)
    energy_hidden, energy_depth, energy_activation, spectral_norm     the net f
    chain_steps, step_size  of the short-run prior chain, started at N(0, I)
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


class JointEBM(nn.Module):
    """A multi-layer generator whose latent layers share one energy prior, with a ladder encoder for inference.

        p(x, z) = N(x; g(z), σ² I) p(z),    p(z) ∝ exp(f([z_1 … z_L])) N(z; 0, I)

    Learning (variational): generator and encoder minimise

        E_q ‖x − g(z)‖²/(2σ²) + Σ_i KL(q(z_i|x) ‖ N(0, I)) − E_q f(z),

    and f descends E_p f(z) − E_q f(z), with z ~ p from a short Langevin chain started at N(0, I).
    With `prior="gaussian"` there is no f: exactly the variational ladder autoencoder.

    Arguments:
        config: see `JointConfig`.
        image_size: pixels a side, a power of two >= 8.
        image_channels: 1 for grey, 3 for colour.

    Example:
        >>> model = JointEBM(JointConfig(latent_dims=(2, 2, 10), width=8), image_size=16, image_channels=1)
        >>> zs = model.sample_prior(5)
        >>> model.decode(zs).shape
        torch.Size([5, 1, 16, 16])

    Source: Cui, Wu, Han, "Learning Hierarchical Features with Joint Latent Space Energy-Based Prior", ICCV 2023,
    eq. 4 and 9–12.
    """

    name = "joint"

    def __init__(self, config: JointConfig, image_size: int, image_channels: int) -> None:
        super().__init__()
        if config.prior not in ("ebm", "gaussian"):
            raise ValueError(f'prior must be "ebm" or "gaussian", got "{config.prior}"')
        if config.reconstruction_weight <= 0:
            raise ValueError(f"reconstruction_weight must be positive, got {config.reconstruction_weight}")
        self.config = config
        ladder = Ladder(tuple(config.latent_dims), image_size, image_channels, config.width)
        self.latent_dims = ladder.latent_dims
        self.generator = LadderGenerator(ladder, config.combine)
        self.encoder = LadderEncoder(ladder)
        self.energy = None
        if config.prior == "ebm":
            self.energy = EnergyMLP(
                self.latent_dims,
                config.energy_hidden,
                config.energy_depth,
                activation=config.energy_activation,
                spectral_norm=config.spectral_norm,
            )
            self.prior_chain()  # a wrong number of steps or step size shows here, before any training

    def prior_chain(self, n_steps: int | None = None) -> FastLangevin:
        """The Langevin chain of the energy prior; `n_steps` replaces the configured number."""
        if self.energy is None:
            raise ValueError('this model has a Gaussian prior and no energy; train one with prior "ebm"')
        n_steps = self.config.chain_steps if n_steps is None else n_steps
        return FastLangevin(self.energy, n_steps=n_steps, step_size=self.config.step_size)

    def standard_normal(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """z ~ N(0, I): L tensors [n, d_i] on the model's device."""
        device = next(self.parameters()).device
        return [torch.randn((n, dim), generator=generator, device=device) for dim in self.latent_dims]

    def sample_prior(
        self, n: int, generator: torch.Generator | None = None, n_steps: int | None = None
    ) -> list[Tensor]:
        """z ~ p(z) by one chain per sample, all in one call: L tensors [n, d_i], detached."""
        z0 = self.standard_normal(n, generator)
        return z0 if self.energy is None else self.prior_chain(n_steps).sample(z0, generator=generator)

    @torch.no_grad()
    def decode(self, zs: list[Tensor], batch: int = 500) -> Tensor:
        """Images of latents, in pieces that keep memory small: [n, channels, size, size] in (-1, 1)."""
        pieces = [self.generator(list(piece)) for piece in zip(*(z.split(batch) for z in zs), strict=True)]
        return torch.cat(pieces)

    @torch.no_grad()
    def infer(self, images: Tensor, batch: int = 500) -> Posterior:
        """q(z|x) of many images, in pieces."""
        pieces = [self.encoder(piece) for piece in images.split(batch)]
        parts = (
            tuple(torch.cat(layers) for layers in zip(*column, strict=True)) for column in zip(*pieces, strict=False)
        )
        return Posterior(*map(list, parts))

    def reconstruct(self, images: Tensor) -> Tensor:
        """g of the posterior means of `images`."""
        return self.decode(self.infer(images).mean)

    def optimisers(self, rates: LearningRates) -> dict[str, torch.optim.Optimizer]:
        """Adam for generator and encoder together, and for the energy, as published."""
        autoencoder = [*self.generator.parameters(), *self.encoder.parameters()]
        optimisers = {"autoencoder": torch.optim.Adam(autoencoder, lr=rates.autoencoder, betas=(0.5, 0.999))}
        if self.energy is not None:
            optimisers["energy"] = torch.optim.AdamW(
                self.energy.parameters(), lr=rates.energy, betas=(0.0, 0.9), weight_decay=rates.energy_weight_decay
            )
        return optimisers

    def update(
        self,
        images: Tensor,
        optimisers: Mapping[str, torch.optim.Optimizer],
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """One learning step on a batch of images in [-1, 1].

        Returns:
            Scalars: loss, reconstruction (squared error per image), kl, and with an energy prior energy_posterior
            (E_q f) and energy_prior (E_p f).

        Raises:
            NonFiniteLoss: a loss is NaN or infinite; nothing has been changed by it.
        """
        posterior = self.encoder(images)
        z_posterior = posterior.sample(generator)
        squared_error = (images - self.generator(z_posterior)).square().flatten(1).sum(dim=1).mean()
        kl = posterior.kl_to_standard_normal().mean()
        loss = self.config.reconstruction_weight * squared_error + kl
        if self.energy is not None:
            loss = loss - self.energy(z_posterior).mean()
        descend(optimisers["autoencoder"], loss, "loss of generator and encoder")
        metrics = {"loss": loss.detach(), "reconstruction": squared_error.detach(), "kl": kl.detach()}
        if self.energy is not None:
            z_prior = self.sample_prior(len(images), generator)
            energy_posterior = self.energy([z.detach() for z in z_posterior]).mean()
            energy_prior = self.energy(z_prior).mean()
            descend(optimisers["energy"], energy_prior - energy_posterior, "loss of the energy")
            metrics |= {"energy_posterior": energy_posterior.detach(), "energy_prior": energy_prior.detach()}
        return metrics

    def frozen_layers(self, moving: set[int]) -> list[bool]:
        """A chain's mask that freezes every layer but those in `moving` (0 is the bottom)."""
        return [layer not in moving for layer in range(len(self.latent_dims))]
