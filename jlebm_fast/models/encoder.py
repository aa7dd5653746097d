"""The ladder encoder: one Gaussian over each latent layer, read off deeper and deeper features of the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .ladder import Ladder

SLOPE = 0.01  # of LeakyReLU in the published encoders


class Posterior(NamedTuple):
    """q(z|x) = Π N(z_i; mean_i, exp(log_variance_i)), layers bottom to top.

    mean           L tensors [n, d_i]
    log_variance   L tensors [n, d_i]
    """

    mean: list[Tensor]
    log_variance: list[Tensor]

    def sample(self, noise: Sequence[Tensor]) -> list[Tensor]:
        """z_i = mean_i + std_i * noise_i for standard normal noise, L tensors [n, d_i]; differentiable in both."""
        layers = zip(self.mean, self.log_variance, noise, strict=True)
        return [mean + torch.exp(0.5 * log_variance) * eps for mean, log_variance, eps in layers]

    def kl_to_standard_normal(self) -> Tensor:
        """KL(q(z|x) ‖ N(0, I)) of each image, summed over layers: [n], in nats."""
        terms = [
            0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(dim=1)
            for mean, log_variance in zip(self.mean, self.log_variance, strict=True)
        ]
        return torch.stack(terms).sum(dim=0)


class LadderEncoder(nn.Module):
    """Infers every latent layer of an image in one pass, from the bottom up.

        r_1 = h_1(x),    r_i = h_i(r_{i-1}),    q(z_i|x) = N(μ_i(r_i), V_i(r_i))

    Arguments:
        ladder: geometry, the same as the generator's.

    Example:
        >>> net = LadderEncoder(Ladder((2, 2, 10), image_size=32, image_channels=1, width=16))
        >>> [tuple(mean.shape) for mean in net(torch.zeros(5, 1, 32, 32)).mean]
        [(5, 2), (5, 2), (5, 10)]

    Source: Zhao, Song, Ermon, "Learning Hierarchical Features from Generative Models", ICML 2017; Cui, Wu, Han,
    ICCV 2023, section 3.3.
    """

    def __init__(self, ladder: Ladder) -> None:
        super().__init__()
        self.ladder = ladder
        stages, heads = [], []
        level, channels = ladder.n_levels, ladder.image_channels
        for dim, target in zip(ladder.latent_dims, ladder.levels, strict=True):
            parts: list[nn.Module] = []
            if level == target:
                parts += [nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(SLOPE)]
            while level > target:
                level -= 1
                parts += [nn.Conv2d(channels, ladder.channels(level), 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
                channels = ladder.channels(level)
            stages.append(nn.Sequential(*parts))
            heads.append(nn.Sequential(nn.Flatten(), nn.Linear(channels * ladder.pixels(level) ** 2, 2 * dim)))
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleList(heads)

    def forward(self, images: Tensor) -> Posterior:
        """The posterior of each image.

        Arguments:
            images: [n, image_channels, image_size, image_size] float32 in [-1, 1].
        """
        ladder = self.ladder
        expected = (ladder.image_channels, ladder.image_size, ladder.image_size)
        if images.shape[1:] != expected:
            raise ValueError(f"images must be [n, {', '.join(map(str, expected))}], got {list(images.shape)}")
        means, log_variances = [], []
        r = images
        for stage, head in zip(self.stages, self.heads, strict=True):
            r = stage(r)
            mean, log_variance = head(r).chunk(2, dim=1)
            means.append(mean)
            log_variances.append(log_variance)
        return Posterior(means, log_variances)
