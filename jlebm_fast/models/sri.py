"""SRI, short-run inference: the multi-layer generator with conditional Gaussians, learned by posterior chains alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .conditional import ConditionalGaussians
from .learning import Batch, LearningRates, LearningStep
from .model import ModelConfig, adam, squared_error
from .short_run import ShortRunModel


class SRI(ShortRunModel):
    """No encoder and no f: z starts at N(0, I) and follows the posterior of the current generator for a few steps.

        p(z) = N(z_L; 0, I) Π N(z_i; μ_i(z_{i+1}), V_i(z_{i+1})),    x ~ N(g(z), σ² I)
        E [ ‖x − g(z)‖²/(2σ²) − log p(z) ] falls, with z where the chain on log p(x|z) + log p(z) ended

    Example:
        >>> config = ModelConfig(latent_dims=(2, 3), width=8, prior="gaussian", posterior_steps=2)
        >>> model = SRI(config, image_size=16, image_channels=1)
        >>> model.decode(model.sample_prior(4)).shape
        torch.Size([4, 1, 16, 16])

    Source: Nijkamp et al., "Learning Multi-layer Latent Variable Model via Variational Optimization of Short Run MCMC
    for Approximate Inference", ECCV 2020, eq. 4 and 6.
    """

    name = "sri"
    prior_name = "conditional Gaussians"
    reference = None

    def __init__(self, config: ModelConfig, image_size: int, image_channels: int, n_images: int = 0) -> None:
        super().__init__(config, image_size, image_channels, n_images)
        self.conditional = ConditionalGaussians(self.latent_dims, config.conditional_hidden)

    def log_prior(self, zs: list[Tensor]) -> Tensor:
        return self.conditional.log_density(zs)

    def optimisers(self, rates: LearningRates) -> dict[str, torch.optim.Optimizer]:
        return {"autoencoder": adam([*self.generator.parameters(), *self.conditional.parameters()], rates.autoencoder)}

    def update(self, batch: Batch, step: LearningStep) -> dict[str, Tensor]:
        """Returns the scalars loss, reconstruction and log_prior (E log p(z), in nats)."""
        z = self.infer(batch, step)
        reconstruction = squared_error(batch.images, self.generator(z)).mean()
        log_prior = self.log_prior(z).mean()
        loss = self.config.reconstruction_weight * reconstruction - log_prior
        step.descend("autoencoder", loss, "loss of the generator")
        return {"loss": loss.detach(), "reconstruction": reconstruction.detach(), "log_prior": log_prior.detach()}

    @torch.no_grad()
    def sample_prior(
        self, n: int, generator: torch.Generator | None = None, n_steps: int | None = None
    ) -> list[Tensor]:
        return self.conditional.sample(self.standard_normal(n, generator))
