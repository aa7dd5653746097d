"""Fréchet distance between samples and held-out images, in the features of a small classifier trained on the spot."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import RunError
from .progress import progress_bar
from .run_folder import open_run
from .sources import load_images, to_network, to_pixels

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


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features.

        ‖m_a − m_b‖² + tr(C_a + C_b − 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2})

    Arguments:
        a, b: [n, features] and [m, features], any float dtype.

    Returns:
        The squared distance, as FID reports it.

    Raises:
        ValueError: a set has fewer than two rows, or the widths differ.

    Example:
        >>> a = torch.tensor([[0.0], [2.0]])
        >>> frechet_distance(a, a + 3)
        9.0

    Source: Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982; Heusel et al.,
    "GANs trained by a two time-scale update rule", NeurIPS 2017.
    """
    if min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must be [n, d] and [m, d] with n, m >= 2, got {list(a.shape)} and {list(b.shape)}")
    a, b = a.double(), b.double()
    covariance_a, covariance_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(covariance_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ covariance_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(float(distance), 0.0)


def evaluate(run: pathlib.Path | str, n: int = 10_000, *, seed: int = 0, device: str = "auto") -> dict[str, Any]:
    """Measures a trained run against its held-out images.

    Arguments:
        run: the run folder.
        n: samples to draw.
        seed: of the samples.

    Returns:
        n, n_held_out, classifier_accuracy (on held-out images), frechet_prior, frechet_standard_normal (z ~ N(0, I)
        through the same generator; absent when that is the prior), frechet_train (training images, the floor), and
        reconstruction_mse (per pixel, pixels in [-1, 1]).

    Raises:
        RunError: there is no trained run, its images have no labels, or `n` is below 2.
    """
    if n < 2:
        raise RunError(f"evaluation needs at least 2 samples, got {n}")
    _, config, model = open_run(run, device)
    images = load_images(config.options.data, config.image_size)
    if images.train_labels is None or images.held_out_labels is None:
        raise RunError(f'"{images.name}" has no class labels; the feature net of the Fréchet distance needs them')
    where = next(model.parameters()).device
    net = train_feature_net(images.train, images.train_labels, where)
    held_out = _in_batches(net.features, images.held_out, where)
    predicted = _in_batches(net, images.held_out, where).argmax(dim=1)

    def distance(pixels: Tensor) -> float:
        return frechet_distance(_in_batches(net.features, pixels, where), held_out)

    generator = torch.Generator(where).manual_seed(seed)
    result: dict[str, Any] = {"n": n, "n_held_out": len(images.held_out)}
    result["classifier_accuracy"] = (predicted == images.held_out_labels).double().mean().item()
    result["frechet_prior"] = distance(to_pixels(model.decode(model.sample_prior(n, generator))))
    if model.energy is not None:
        normal = model.decode(model.standard_normal(n, generator))
        result["frechet_standard_normal"] = distance(to_pixels(normal))
    result["frechet_train"] = distance(images.train[:n])
    truth = to_network(images.held_out, where)
    result["reconstruction_mse"] = (model.reconstruct(truth) - truth).square().mean().item()
    return result
