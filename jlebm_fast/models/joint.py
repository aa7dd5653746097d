"""The joint latent energy prior with its multi-layer generator and ladder encoder: the system this package is for."""

from __future__ import annotations

import torch
from torch import Tensor

from .autoencoder import Autoencoder
from .encoder import LadderEncoder, Posterior
from .learning import Batch, LearningRates, LearningStep
from .model import ModelConfig, adam, energy_adam, squared_error


class JointEBM(Autoencoder):
    """A multi-layer generator whose latent layers share one energy prior, with a ladder encoder for inference.

        p(x, z) = N(x; g(z), σ² I) p(z),    p(z) ∝ exp(f([z_1 … z_L])) N(z; 0, I)

    Learning (variational): generator and encoder minimise

        E_q ‖x − g(z)‖²/(2σ²) + Σ_i KL(q(z_i|x) ‖ N(0, I)) − E_q f(z),

    and f descends E_p f(z) − E_q f(z), with z ~ p from a short Langevin chain started at N(0, I).
    With `prior="gaussian"` there is no f: exactly the variational ladder autoencoder (VLAE), which the second-stage
    priors "nce" (NCP-VAE), "vae" (two-stage VAE) and "gmm" are learned on.

    Arguments:
        config: see `ModelConfig`.
        image_size: pixels a side, a power of two >= 8.
        image_channels: 1 for grey, 3 for colour.

    Example:
        >>> model = JointEBM(ModelConfig(latent_dims=(2, 2, 10), width=8), image_size=16, image_channels=1)
        >>> zs = model.sample_prior(5)
        >>> model.decode(zs).shape
        torch.Size([5, 1, 16, 16])

    Source: Cui, Wu, Han, "Learning Hierarchical Features with Joint Latent Space Energy-Based Prior", ICCV 2023,
    eq. 4 and 9–12.
    """

    name = "joint"

    def __init__(self, config: ModelConfig, image_size: int, image_channels: int, n_images: int = 0) -> None:
        super().__init__(config, image_size, image_channels, n_images)
        self.encoder = LadderEncoder(self.ladder)
        if config.prior == "ebm":
            self.energy = self.build_energy()
            self.prior_chain()  # a wrong number of steps or step size shows here, before any training
        self.second = self.build_second()

    @torch.no_grad()
    def infer(self, images: Tensor, batch: int = 500) -> Posterior:
        """q(z|x) of many images, in pieces."""
        pieces = [self.encoder(piece) for piece in images.split(batch)]
        parts = (
            tuple(torch.cat(layers) for layers in zip(*column, strict=True)) for column in zip(*pieces, strict=False)
        )
        return Posterior(*map(list, parts))

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        return self.infer(images).mean

    def optimisers(self, rates: LearningRates) -> dict[str, torch.optim.Optimizer]:
        autoencoder = [*self.generator.parameters(), *self.encoder.parameters()]
        optimisers = {"autoencoder": adam(autoencoder, rates.autoencoder)}
        if self.energy is not None:
            optimisers["energy"] = energy_adam(self.energy, rates)
        return optimisers | (self.second.optimisers(rates) if self.second is not None else {})

    def posterior_sample(self, images: Tensor, noise: list[Tensor]) -> list[Tensor]:
        return self.encoder(images).sample(noise)

    def learn_autoencoder(self, batch: Batch, step: LearningStep) -> dict[str, Tensor]:
        """One learning step on a batch of images.

        Returns:
            Scalars: loss, reconstruction (squared error per image), kl, and with an energy prior energy_posterior
            (E_q f) and energy_prior (E_p f).
        """
        n = len(batch.images)
        posterior = self.encoder(batch.images)
        z_posterior = posterior.sample(step.normal("posterior", n, self.latent_dims, self.device))
        reconstruction = squared_error(batch.images, self.generator(z_posterior)).mean()
        kl = posterior.kl_to_standard_normal().mean()
        loss = self.config.reconstruction_weight * reconstruction + kl
        if self.energy is not None:
            loss = loss - self.energy(z_posterior).mean()
        step.descend("autoencoder", loss, "loss of generator and encoder")
        metrics = {"loss": loss.detach(), "reconstruction": reconstruction.detach(), "kl": kl.detach()}
        if self.energy is not None:
            metrics |= self.update_energy([z.detach() for z in z_posterior], step)
        return metrics
