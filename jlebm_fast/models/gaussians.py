"""Diagonal Gaussians, given by mean and log-variance [n, d]: the few formulae that the hierarchical models share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def standard_normal_log_density(zs: Sequence[Tensor]) -> Tensor:
    """log N(z; 0, I) of latents, summed over layers: [n]."""
    return torch.stack([-0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=1) for z in zs]).sum(dim=0)


def log_density(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(z; mean, exp(log_variance)) of each row: [n]."""
    scaled = (z - mean).square() * torch.exp(-log_variance)
    return -0.5 * (scaled + log_variance + math.log(2 * math.pi)).sum(dim=1)


def kl(mean: Tensor, log_variance: Tensor, prior_mean: Tensor, prior_log_variance: Tensor) -> Tensor:
    """KL(N(mean, v) ‖ N(m, w)) of each row: [n], in nats.

    ½ Σ ( (v + (mean − m)²) / w − 1 + log w − log v )
    """
    ratio = torch.exp(log_variance - prior_log_variance)
    distance = (mean - prior_mean).square() * torch.exp(-prior_log_variance)
    return 0.5 * (ratio + distance - 1.0 + prior_log_variance - log_variance).sum(dim=1)


def product(
    mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the normalised product of two Gaussians: their precision-weighted merge.

    v⁻¹ = v₁⁻¹ + v₂⁻¹,    m = v (m₁/v₁ + m₂/v₂)

    Source: Sønderby et al., "Ladder Variational Autoencoders", NeurIPS 2016, eq. 17 and 18.
    """
    weight = torch.sigmoid(other_log_variance - log_variance)  # v₂/(v₁ + v₂), the share of the first mean
    merged_log_variance = log_variance + torch.nn.functional.logsigmoid(other_log_variance - log_variance)
    return weight * mean + (1.0 - weight) * other_mean, merged_log_variance


def draw(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """mean + std · noise, differentiable in mean and log-variance."""
    return mean + torch.exp(0.5 * log_variance) * noise
