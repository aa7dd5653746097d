"""The classifier that measures samples: its last hidden layer is the feature space, its classes the score."""

from __future__ import annotations

import pathlib

import torch
from torch import Tensor
from torch.nn import functional

from jlebm_fast.training.checkpoints import load_checkpoint, save_checkpoint
from jlebm_fast.training.frechet import FeatureNet
from jlebm_fast.training.progress import progress_bar
from jlebm_fast.training.sources import Images, to_network

SEED = 0
BATCH = 128
SHIFT = 2  # pixels: training digits are moved by up to so much, which is worth half a per cent
PEAK_RATE = 2e-3
GOOD_ENOUGH = 0.985  # test accuracy below which its features say little about digits


def train_classifier(images: Images, steps: int, device: torch.device) -> FeatureNet:
    """A small convolutional net with 64 features, from a fixed seed, on randomly shifted digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        net = FeatureNet(images.channels, images.size, int(images.train_labels.max()) + 1).to(device)
    generator = torch.Generator().manual_seed(SEED)
    optimiser = torch.optim.Adam(net.parameters(), lr=PEAK_RATE)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_RATE, total_steps=steps)
    for _ in progress_bar(range(steps), desc="training the classifier", unit="step", leave=False):
        rows = torch.randint(len(images.train), (BATCH,), generator=generator)
        shift = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
        batch = torch.roll(to_network(images.train[rows], device), shift, dims=(2, 3))
        loss = functional.cross_entropy(net(batch), images.train_labels[rows].to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rates.step()
    return net.eval()


def cached_classifier(path: pathlib.Path, images: Images, steps: int, device: torch.device) -> FeatureNet:
    """The classifier in the file `path`, trained and written there first if it is missing or of other sizes."""
    wanted = {"steps": steps, "images": images.fingerprint()}
    net = FeatureNet(images.channels, images.size, int(images.train_labels.max()) + 1)
    if path.is_file():
        state = load_checkpoint(path)
        if {key: state.get(key) for key in wanted} == wanted:
            net.load_state_dict(state["net"])
            return net.to(device).eval()
    net = train_classifier(images, steps, device)
    save_checkpoint(path, wanted | {"net": dict(net.state_dict())})
    return net


@torch.no_grad()
def features_and_classes(net: FeatureNet, pixels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features [n, 64] and class probabilities [n, classes] of uint8 images, on the CPU."""
    features, classes = [], []
    for piece in pixels.split(1000):
        found = net.features(to_network(piece, device))
        features.append(found.cpu())
        classes.append(net.classes(found).softmax(dim=1).cpu())
    return torch.cat(features), torch.cat(classes)


def accuracy(net: FeatureNet, images: Images, device: torch.device) -> float:
    """Share of held-out images that it names right."""
    _, classes = features_and_classes(net, images.held_out, device)
    return (classes.argmax(dim=1) == images.held_out_labels).double().mean().item()
