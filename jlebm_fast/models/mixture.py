"""A Gaussian mixture fitted to the latents of a finished autoencoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .learning import LearningStep
from .model import ModelConfig
from .second_stage import SecondStagePrior

FIT_ON_AT_MOST = 20_000  # latents: full covariances of a few dozen dims need no more


def require_enough(n_images: int, components: int) -> None:
    """
    Raises:
        ValueError: there are more components than latents to fit them to.
    """
    usable = min(n_images, FIT_ON_AT_MOST)
    if components > usable:
        limit = "" if usable == n_images else f" (it is fitted to at most {FIT_ON_AT_MOST})"
        raise ValueError(
            f"a mixture of {components} components needs at least as many training images, got {n_images}{limit}: "
            f"--mixture-components must be at most {usable}"
        )


class MixturePrior(SecondStagePrior):
    """p(z) = Σ π_k N(z; m_k, C_k) with full covariances, by expectation-maximisation in one learning step.

    Example:
        >>> prior = MixturePrior(ModelConfig(latent_dims=(2, 3), mixture_components=2))
        >>> prior.sample(4, None, None).shape
        torch.Size([4, 5])

    Source: Ghosh, Sajjadi, Vergari, Black, Schölkopf, "From Variational to Deterministic Autoencoders", ICLR 2020,
    section 4 (ex-post density estimation, 10 components).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, components = sum(config.latent_dims), config.mixture_components
        self.register_buffer("weights", torch.full((components,), 1.0 / components))
        self.register_buffer("means", torch.zeros(components, dim))
        self.register_buffer("factors", torch.eye(dim).repeat(components, 1, 1))  # Cholesky factors of the C_k

    def stages(self, steps: int) -> tuple[int, ...]:
        return (1,)

    def learn(self, z: Tensor, step: LearningStep, stage: int, all_z: Callable[[], Tensor]) -> dict[str, Tensor]:
        from sklearn.mixture import GaussianMixture

        latents = all_z().double().cpu()
        rows = torch.randperm(len(latents), generator=torch.Generator().manual_seed(step.noise_key("mixture") >> 1))
        latents = latents[rows[:FIT_ON_AT_MOST]]
        components = len(self.weights)
        require_enough(len(latents), components)
        fit = GaussianMixture(components, covariance_type="full", random_state=0, reg_covar=1e-5, max_iter=200)
        fit.fit(latents.numpy())
        covariances = torch.from_numpy(fit.covariances_)
        self.weights.copy_(torch.from_numpy(fit.weights_))
        self.means.copy_(torch.from_numpy(fit.means_))
        self.factors.copy_(torch.linalg.cholesky(covariances))
        return {"loss": torch.tensor(-fit.score(latents.numpy()))}

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None, n_steps: int | None) -> Tensor:
        device = self.means.device
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator) if n else []
        noise = torch.randn(n, self.means.shape[1], generator=generator, device=device)
        return self.means[component] + torch.einsum("nij,nj->ni", self.factors[component], noise)

    def log_density(self, z: Tensor) -> Tensor:
        law = torch.distributions.MultivariateNormal(self.means, scale_tril=self.factors, validate_args=False)
        return torch.logsumexp(self.weights.log() + law.log_prob(z[:, None, :]), dim=1)
