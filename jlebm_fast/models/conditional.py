"""The prior of a multi-layer generator with conditional Gaussians: each layer depends on the one above."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .gaussians import draw, log_density, standard_normal_log_density

SLOPE = 0.2  # of LeakyReLU in the published generators
# Conditional log-variances stay within ± this. The lower end keeps Langevin steps of 0.4 stable, where the drift's
# factor s²/2 / V must stay below 2; it costs no generality, since the means may grow instead.
LOG_VARIANCE_BOUND = 2.0


class ConditionalGaussians(nn.Module):
    """p(z) = N(z_L; 0, I) Π_i N(z_i; μ_i(z_{i+1}), V_i(z_{i+1})), μ_i and log V_i from one MLP per layer.

    Arguments:
        latent_dims: (d_1, …, d_L), bottom to top.
        hidden: units of both hidden layers of each MLP.

    Example:
        >>> prior = ConditionalGaussians((2, 3, 4), hidden=16)
        >>> zs = prior.sample([torch.randn(5, d) for d in (2, 3, 4)])
        >>> prior.log_density(zs).shape
        torch.Size([5])

    Source: Sønderby et al., NeurIPS 2016, eq. 2; Cui, Wu, Han, ICCV 2023, section 3.1.
    """

    def __init__(self, latent_dims: Sequence[int], hidden: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(
                nn.Linear(above, hidden), nn.LeakyReLU(SLOPE),
                nn.Linear(hidden, hidden), nn.LeakyReLU(SLOPE),
                nn.Linear(hidden, 2 * dim),
            )
            for dim, above in itertools.pairwise(latent_dims)
        )  # fmt: skip

    def of(self, layer: int, z_above: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [n, d] of layer `layer` (0 is the bottom) given the layer above it."""
        mean, log_variance = self.nets[layer](z_above).chunk(2, dim=1)
        return mean, LOG_VARIANCE_BOUND * torch.tanh(log_variance / LOG_VARIANCE_BOUND)

    def sample(self, noise: Sequence[Tensor]) -> list[Tensor]:
        """Ancestral sampling, top down: L tensors [n, d_i] from standard normals of the same shapes."""
        zs = [noise[-1]]
        for layer in reversed(range(len(self.nets))):
            zs.insert(0, draw(*self.of(layer, zs[0]), noise[layer]))
        return zs

    def log_density(self, zs: Sequence[Tensor]) -> Tensor:
        """log p(z) of each chain: [n]."""
        total = standard_normal_log_density(zs[-1:])
        for layer in range(len(self.nets)):
            total = total + log_density(zs[layer], *self.of(layer, zs[layer + 1]))
        return total
