"""The general multi-layer generator: conditional Gaussians between the layers, a ladder encoder for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from .conditional import ConditionalGaussians
from .encoder import LadderEncoder, Posterior
from .gaussians import draw, kl
from .learning import Batch, LearningRates, LearningStep
from .model import LatentModel, ModelConfig, adam, encode_in_pieces, squared_error


class ConditionalVAE(LatentModel):
    """A hierarchical variational autoencoder with bottom-up inference.

        p(z) = N(z_L; 0, I) Π N(z_i; μ_i(z_{i+1}), V_i(z_{i+1})),    x ~ N(g(z), σ² I),    q(z|x) = Π q(z_i|x)
        minimise  E_q ‖x − g(z)‖²/(2σ²) + KL(q(z_L|x) ‖ N(0, I)) + Σ_i E_q KL(q(z_i|x) ‖ p(z_i|z_{i+1}))

    Each KL is closed given a sample of the layer above. g reads every layer, so that the generator is the same in all
    models; published hierarchies of this kind often let the image depend on z_1 alone.

    Example:
        >>> model = ConditionalVAE(ModelConfig(latent_dims=(2, 3), width=8, prior="gaussian"), 16, 1)
        >>> model.decode(model.sample_prior(4)).shape
        torch.Size([4, 1, 16, 16])

    Source: Cui, Wu, Han, ICCV 2023, section 3.1 (the generator); Kingma and Welling, ICLR 2014 (the learning).
    """

    name = "cg"
    prior_name = "conditional Gaussians"

    def __init__(self, config: ModelConfig, image_size: int, image_channels: int, n_images: int = 0) -> None:
        super().__init__(config, image_size, image_channels, n_images)
        self.encoder = LadderEncoder(self.ladder)
        self.conditional = ConditionalGaussians(self.latent_dims, config.conditional_hidden)

    def top_down(self, bottom_up: Posterior, noise: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """A sample of q(z|x), and the KL of q against p along it: L tensors [n, d_i] and [n]."""
        top_mean, top_log_variance = bottom_up.mean[-1], bottom_up.log_variance[-1]
        zs = [draw(top_mean, top_log_variance, noise[-1])]
        zero = torch.zeros_like(top_mean)
        divergence = kl(top_mean, top_log_variance, zero, zero)
        for layer in reversed(range(len(noise) - 1)):
            prior = self.conditional.of(layer, zs[0])
            posterior = self.layer_posterior(bottom_up.mean[layer], bottom_up.log_variance[layer], *prior)
            divergence = divergence + kl(*posterior, *prior)
            zs.insert(0, draw(*posterior, noise[layer]))
        return zs, divergence

    def layer_posterior(
        self, mean: Tensor, log_variance: Tensor, prior_mean: Tensor, prior_log_variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """q(z_i|x) from the encoder's Gaussian and p(z_i|z_{i+1}); here the encoder's alone."""
        return mean, log_variance

    def log_prior(self, zs: list[Tensor]) -> Tensor:
        return self.conditional.log_density(zs)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        def means(piece: Tensor) -> list[Tensor]:
            return self.top_down(self.encoder(piece), [piece.new_zeros(len(piece), d) for d in self.latent_dims])[0]

        return encode_in_pieces(means, images)

    @torch.no_grad()
    def sample_prior(
        self, n: int, generator: torch.Generator | None = None, n_steps: int | None = None
    ) -> list[Tensor]:
        return self.conditional.sample(self.standard_normal(n, generator))

    def optimisers(self, rates: LearningRates) -> dict[str, torch.optim.Optimizer]:
        return {"autoencoder": adam(list(self.parameters()), rates.autoencoder)}

    def update(self, batch: Batch, step: LearningStep) -> dict[str, Tensor]:
        """Returns the scalars loss, reconstruction and kl."""
        noise = step.normal("posterior", len(batch.images), self.latent_dims, self.device)
        zs, divergence = self.top_down(self.encoder(batch.images), noise)
        reconstruction, divergence = squared_error(batch.images, self.generator(zs)).mean(), divergence.mean()
        loss = self.config.reconstruction_weight * reconstruction + divergence
        step.descend("autoencoder", loss, "loss of generator and encoder")
        return {"loss": loss.detach(), "reconstruction": reconstruction.detach(), "kl": divergence.detach()}
