"""A few learning steps on a handful of images, without a run folder."""

import torch

from jlebm_fast.models import Batch, LearningRates, LearningStep

RATES = LearningRates(autoencoder=1e-3, energy=1e-3)


def images_of(n=6):
    return torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


def generator_of(seed=0):
    return torch.Generator().manual_seed(seed)


def learn(model, steps, images=None, *, rates=RATES, optimisers=None, step=LearningStep, seed=0, stage=0, first=0):
    """The metrics of `steps` learning steps on the same images."""
    images = images_of() if images is None else images
    optimisers = model.optimisers(rates) if optimisers is None else optimisers
    training_set = images.add(1).mul(127.5).round().to(torch.uint8)
    batch = Batch(images, torch.arange(len(images)), training_set)
    return [model.update(batch, step(optimisers, seed, first + i, stage)) for i in range(steps)]
