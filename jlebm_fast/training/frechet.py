"""Fréchet distance between samples and held-out images, in the features of a small classifier trained on the spot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .progress import progress_bar
from .sources import Images, to_network

FEATURES = 64
CLASSIFIER_STEPS = 1500
CLASSIFIER_BATCH = 128
CLASSIFIER_SEED = 0  # the same for every run: distances of two runs on the same images share their features


class FeatureNet(nn.Module):
    """A small convolutional classifier whose last hidden layer is the feature space."""

    def __init__(self, channels: int, size: int, n_classes: int) -> None:
        super().__init__()
        last = size // 8
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * last * last, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.classes = nn.Linear(FEATURES, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classes(self.features(images))


def train_feature_net(images: Tensor, labels: Tensor, device: torch.device) -> FeatureNet:
    """Trains the classifier on uint8 images from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(CLASSIFIER_SEED)
        net = FeatureNet(images.shape[1], images.shape[-1], int(labels.max()) + 1).to(device)
    generator = torch.Generator().manual_seed(CLASSIFIER_SEED)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in progress_bar(range(CLASSIFIER_STEPS), desc="training the feature net", unit="step", leave=False):
        rows = torch.randint(len(images), (CLASSIFIER_BATCH,), generator=generator)
        loss = functional.cross_entropy(net(to_network(images[rows], device)), labels[rows].to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval()


@torch.no_grad()
def _in_batches(function: Any, images: Tensor, device: torch.device) -> Tensor:
    return torch.cat([function(to_network(piece, device)).cpu() for piece in images.split(1000)])


class NonFiniteFeatures(ValueError):
    """Features that are NaN or infinite have no mean and no covariance."""


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features.

        ‖m_a − m_b‖² + tr(C_a + C_b − 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2})

    Arguments:
        a, b: [n, features] and [m, features], any float dtype.

    Returns:
        The squared distance, as FID reports it.

    Raises:
        ValueError: a set has fewer than two rows, or the widths differ.
        NonFiniteFeatures: a row is not finite.

    Example:
        >>> a = torch.tensor([[0.0], [2.0]])
        >>> frechet_distance(a, a + 3)
        9.0

    Source: Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982; Heusel et al.,
    "GANs trained by a two time-scale update rule", NeurIPS 2017.
    """
    if min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must be [n, d] and [m, d] with n, m >= 2, got {list(a.shape)} and {list(b.shape)}")
    bad = [len(rows) - int(torch.isfinite(rows).all(dim=1).sum()) for rows in (a, b)]
    if any(bad):
        raise NonFiniteFeatures(
            f"a and b must be finite, got {bad[0]} of {len(a)} and {bad[1]} of {len(b)} rows that are not"
        )
    a, b = a.double(), b.double()
    covariance_a, covariance_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(covariance_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ covariance_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(float(distance), 0.0)


def frechet_to_held_out(images: Images, samples: Tensor, normal: Tensor | None, device: torch.device) -> dict[str, Any]:
    """Fréchet distances to the held-out images, in the features of a classifier that is trained on the others.

    Arguments:
        images: with class labels.
        samples: uint8 [n, c, s, s] from the prior.
        normal: the same from z ~ N(0, I) through the same generator, or None where that is the prior.

    Returns:
        classifier_accuracy (on held-out images), frechet_prior, frechet_standard_normal (absent without `normal`), and
        frechet_train (as many training images, the floor).
    """
    net = train_feature_net(images.train, images.train_labels, device)
    held_out = _in_batches(net.features, images.held_out, device)
    predicted = _in_batches(net, images.held_out, device).argmax(dim=1)

    def distance(pixels: Tensor) -> float:
        return frechet_distance(_in_batches(net.features, pixels, device), held_out)

    result: dict[str, Any] = {}
    result["classifier_accuracy"] = (predicted == images.held_out_labels).double().mean().item()
    result["frechet_prior"] = distance(samples)
    if normal is not None:
        result["frechet_standard_normal"] = distance(normal)
    result["frechet_train"] = distance(images.train[: len(samples)])
    return result
