"""RAE: a deterministic autoencoder whose latents get a Gaussian mixture afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from .autoencoder import Autoencoder
from .encoder import LadderEncoder
from .learning import Batch, LearningRates, LearningStep
from .model import ModelConfig, adam, encode_in_pieces, squared_error

WEIGHT_DECAY = 1e-4  # of the generator: RAE's L2 regularisation, which takes the place of the VAE's noise


class RAE(Autoencoder):
    """z = μ(x) without noise; latents and generator are regularised instead.

        minimise  w ‖x − g(μ(x))‖² + ½ Σ ‖μ_i(x)‖² + L2 of g,    then fit p(z) to { μ(x) }

    with w the reconstruction weight. The prior after it is a mixture of 10 Gaussians as published; others of the
    second stage can be chosen.

    Example:
        >>> model = RAE(ModelConfig(latent_dims=(2, 3), width=8, prior="gmm"), 16, 1)
        >>> model.stages(1000)
        (1000, 1)

    Source: Ghosh, Sajjadi, Vergari, Black, Schölkopf, "From Variational to Deterministic Autoencoders", ICLR 2020,
    eq. 8–9 and section 4.
    """

    name = "rae"

    def __init__(self, config: ModelConfig, image_size: int, image_channels: int, n_images: int = 0) -> None:
        super().__init__(config, image_size, image_channels, n_images)
        self.encoder = LadderEncoder(self.ladder)
        self.second = self.build_second()

    def posterior_sample(self, images: Tensor, noise: list[Tensor]) -> list[Tensor]:
        return self.encoder(images).mean

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        return encode_in_pieces(lambda piece: self.encoder(piece).mean, images)

    def optimisers(self, rates: LearningRates) -> dict[str, torch.optim.Optimizer]:
        autoencoder = adam(list(self.encoder.parameters()), rates.autoencoder)
        generator = {"params": list(self.generator.parameters()), "weight_decay": WEIGHT_DECAY}
        autoencoder.add_param_group(generator)
        return {"autoencoder": autoencoder} | (self.second.optimisers(rates) if self.second is not None else {})

    def learn_autoencoder(self, batch: Batch, step: LearningStep) -> dict[str, Tensor]:
        """Returns the scalars loss, reconstruction and latent_norm (½ E ‖z‖²)."""
        zs = self.encoder(batch.images).mean
        reconstruction = squared_error(batch.images, self.generator(zs)).mean()
        norm = 0.5 * torch.cat(zs, dim=1).square().sum(dim=1).mean()
        loss = self.config.reconstruction_weight * reconstruction + norm
        step.descend("autoencoder", loss, "loss of the autoencoder")
        return {"loss": loss.detach(), "reconstruction": reconstruction.detach(), "latent_norm": norm.detach()}
