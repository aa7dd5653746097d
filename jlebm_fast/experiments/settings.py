"""How much `jlebm reproduce mnist` does: the full set, and the quick one that fits a coffee break."""

from __future__ import annotations

import dataclasses

PARTS = ("models", "chain_steps", "energy_width", "layers", "anomaly", "figures")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of everything.

    steps              learning steps of every model's first stage, one batch of `batch_size` images each
    seeds              of every row of the tables
    samples            drawn for each Fréchet distance
    chain_steps        K of the table of chain lengths; the models' own is 60
    energy_widths      hidden units of f in the table of widths; 0 is the VLAE, the models' own is 100
    digits             held out, one at a time, for anomaly detection
    classifier_steps   of the classifier whose features and classes measure samples
    content_steps      of the classifiers on single latent layers
    width              channels of the largest feature map
    latent_dims        bottom to top; models with one layer have the sum
    reconstruction_weight    1/(2σ²)
    energy_rate        learning rate of f where it is learned against the prior chain
    contrastive_rate   learning rate of f in the models that learn it as a classifier
    """

    steps: int = 3000
    seeds: tuple[int, ...] = (0, 1, 2)
    samples: int = 10_000
    chain_steps: tuple[int, ...] = (15, 30, 60, 150, 300)
    energy_widths: tuple[int, ...] = (0, 10, 20, 50, 100)
    digits: tuple[int, ...] = (1, 4, 5, 7, 9)
    classifier_steps: int = 3000
    content_steps: int = 2000
    batch_size: int = 100
    width: int = 16
    latent_dims: tuple[int, ...] = (4, 6, 10)
    reconstruction_weight: float = 3.0
    energy_rate: float = 2e-4
    contrastive_rate: float = 1e-3


FULL = Settings()
QUICK = Settings(
    steps=400,
    seeds=(0,),
    samples=2000,
    chain_steps=(15, 60, 300),
    energy_widths=(0, 20, 100),
    digits=(1,),
    content_steps=500,
    # f has little time to learn; this rate makes long runs diverge (docs/models.md)
    energy_rate=5e-4,
)
