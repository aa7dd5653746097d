"""What is measured on a trained model: distance and score of its samples, content of its layers, anomalies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from jlebm_fast.models import LatentModel
from jlebm_fast.models.model import squared_error
from jlebm_fast.training.frechet import FeatureNet, frechet_distance
from jlebm_fast.training.samples import decoded_pixels, drawn_prior
from jlebm_fast.training.sources import Images, to_network

from .cells import Cell
from .classifier import features_and_classes
from .settings import Settings

SAMPLE_SEED = 12345  # of samples and encodings, the same for every model
RECONSTRUCTED = 500  # held-out images whose reconstruction is measured: chains for each of 10,000 would take minutes
CONTENT_IMAGES = 20_000  # encoded training images that the classifiers on single layers learn from
CONTENT_HIDDEN = 128


class Subject(NamedTuple):
    """A trained model and what it is measured against.

    images   all classes, also those that the model was trained without
    """

    model: LatentModel
    cell: Cell
    images: Images
    classifier: FeatureNet
    settings: Settings

    def generator(self) -> torch.Generator:
        return torch.Generator(self.model.device).manual_seed(SAMPLE_SEED)


def class_score(probabilities: Tensor) -> float:
    """exp E KL(p(y|x) ‖ p(y)): the inception score, with the classes of another classifier.

    Source: Salimans et al., "Improved Techniques for Training GANs", NeurIPS 2016, section 4.

    Example:
        >>> round(class_score(torch.eye(10)), 6)
        10.0
        >>> round(class_score(torch.full((5, 10), 0.1)), 6)
        1.0
    """
    p = probabilities.double().clamp(min=1e-12)
    marginal = p.mean(dim=0, keepdim=True)
    return float((p * (p.log() - marginal.log())).sum(dim=1).mean().exp())


def distance(subject: Subject) -> dict[str, float]:
    """Fréchet distance of samples to the held-out images, class score, and reconstruction error of the latter."""
    model, device = subject.model, subject.model.device
    zs = drawn_prior(model, subject.settings.samples, subject.generator())
    features, classes = features_and_classes(subject.classifier, decoded_pixels(model, zs), device)
    reference, _ = features_and_classes(subject.classifier, subject.images.held_out, device)
    shown = to_network(subject.images.held_out[:RECONSTRUCTED], device)
    error = squared_error(shown, model.reconstruct(shown, subject.generator())).mean().item()
    return {
        "frechet": frechet_distance(features, reference),
        "class_score": class_score(classes),
        "reconstruction_mse": error / shown[0].numel(),
    }


def content(subject: Subject) -> dict[str, Any]:
    """Test accuracy of a two-layer classifier on each latent layer alone, bottom to top."""
    device, images = subject.model.device, subject.images
    train = subject.model.encode(to_network(images.train[:CONTENT_IMAGES], device), subject.generator())
    held_out = subject.model.encode(to_network(images.held_out, device), subject.generator())
    labels, true = images.train_labels[:CONTENT_IMAGES].to(device), images.held_out_labels.to(device)
    accuracies = []
    for z, z_held_out in zip(train, held_out, strict=True):
        net = train_on_latents(z, labels, subject.settings.content_steps)
        with torch.no_grad():
            accuracies.append((net(z_held_out).argmax(dim=1) == true).double().mean().item())
    return {"layer_accuracy": accuracies}


def train_on_latents(z: Tensor, labels: Tensor, steps: int) -> nn.Module:
    """A classifier with one hidden layer on standardised latents [n, d], from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SAMPLE_SEED)
        hidden = nn.Linear(z.shape[1], CONTENT_HIDDEN)
        net = nn.Sequential(nn.BatchNorm1d(z.shape[1], affine=False), hidden, nn.ReLU(),
                            nn.Linear(CONTENT_HIDDEN, int(labels.max()) + 1)).to(z.device)  # fmt: skip
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(z), (256,), generator=generator).to(z.device)
        loss = functional.cross_entropy(net(z[rows]), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval()


def anomaly(subject: Subject) -> dict[str, float]:
    """AUPRC of the digit that the model never saw among the test images: an anomaly is what the model finds unlikely.

    auprc          score −log p(x, z) at the encoded z,  log p(x, z) = log p(z) − ‖x − g(z)‖²/(2σ²) + const
    auprc_prior    score −log p(z) alone,  log p(z) = f(z) + log N(z; 0, I)
    share          of the digit: what a score that knows nothing gets
    """
    from sklearn.metrics import average_precision_score

    model, images = subject.model, subject.images
    of_prior, of_image = [], []
    for piece in images.held_out.split(1000):
        x = to_network(piece, model.device)
        zs = model.encode(x, subject.generator())
        with torch.no_grad():
            of_prior.append(-model.log_prior(zs).cpu())
            of_image.append(model.config.reconstruction_weight * squared_error(x, model.generator(zs)).cpu())
    is_anomaly = (images.held_out_labels == subject.cell.without_digit).numpy()
    prior, image = torch.cat(of_prior), torch.cat(of_image)
    return {
        "auprc": float(average_precision_score(is_anomaly, (prior + image).numpy())),
        "auprc_prior": float(average_precision_score(is_anomaly, prior.numpy())),
        "share": float(is_anomaly.mean()),
    }


MEASURES: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "distance": distance,
    "content": content,
    "anomaly": anomaly,
}
