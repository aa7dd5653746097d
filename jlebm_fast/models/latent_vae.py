"""The second VAE of the two-stage VAE: a small one whose data are the latents of the first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .gaussians import draw, kl
from .learning import LearningRates, LearningStep
from .model import ModelConfig, adam
from .second_stage import SecondStagePrior

HIDDEN = 256


def _mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, HIDDEN), nn.LeakyReLU(0.2),
        nn.Linear(HIDDEN, outputs),
    )  # fmt: skip


class LatentVAE(SecondStagePrior):
    """u ~ N(0, I), z ~ N(μ(u), γ² I) with as many dims in u as in z, and γ learned.

        minimise  E_{q(z)} E_{q(u|z)} [ ‖z − μ(u)‖²/(2γ²) + dim log γ ] + KL(q(u|z) ‖ N(0, I))

    q(z) fills its space once the first stage has thrown away the dims that images do not need, so a VAE of equal
    dimension can match it.

    Example:
        >>> prior = LatentVAE(ModelConfig(latent_dims=(2, 3)))
        >>> prior.sample(4, None, None).shape
        torch.Size([4, 5])

    Source: Dai and Wipf, "Diagnosing and Enhancing VAE Models", ICLR 2019, section 4.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dim = sum(config.latent_dims)
        self.encoder = _mlp(self.dim, 2 * self.dim)
        self.decoder = _mlp(self.dim, self.dim)
        self.log_gamma = nn.Parameter(torch.zeros(()))

    def optimisers(self, rates: LearningRates) -> dict[str, torch.optim.Optimizer]:
        return {"second": adam(list(self.parameters()), rates.autoencoder)}

    def learn(self, z: Tensor, step: LearningStep, stage: int, all_z: Callable[[], Tensor]) -> dict[str, Tensor]:
        mean, log_variance = self.encoder(z).chunk(2, dim=1)
        (noise,) = step.normal("second posterior", len(z), (self.dim,), z.device)
        error = (z - self.decoder(draw(mean, log_variance, noise))).square().sum(dim=1)
        reconstruction = (0.5 * error * torch.exp(-2 * self.log_gamma) + self.dim * self.log_gamma).mean()
        divergence = kl(mean, log_variance, torch.zeros_like(mean), torch.zeros_like(mean)).mean()
        step.descend("second", reconstruction + divergence, "loss of the second VAE")
        metrics = {"loss": reconstruction + divergence, "second_kl": divergence, "gamma": self.log_gamma.exp()}
        return {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None, n_steps: int | None) -> Tensor:
        u, noise = torch.randn(2, n, self.dim, generator=generator, device=self.log_gamma.device)
        return self.decoder(u) + self.log_gamma.exp() * noise

    def log_density(self, z: Tensor) -> Tensor:
        raise ValueError("the prior of a two-stage VAE has no closed density")
