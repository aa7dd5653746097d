"""What `jlebm train` can be told, with its defaults: the content of a run's config.json."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jlebm_fast.models import LearningRates, ModelConfig

from .errors import RunError

# Options that may change when a run goes on: they move its end, or what it writes when, but none of its numbers.
RESUMABLE_CHANGES = {"steps", "epochs", "log_every", "checkpoint_every"}


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Images, model, learning."""

    data: str = "digits"
    """Images: digits (bundled with scikit-learn), mnist, fashion_mnist, svhn, cifar10, celeba (downloaded), or the path
    of a Parquet file or of a folder with Parquet files or images."""

    image_size: int = 0
    """Pixels a side, a power of two; 0 takes the smallest of 16, 32, 64 that holds the images."""

    latent_dims: tuple[int, ...] = ModelConfig.latent_dims
    """Dims of each latent layer, bottom (fine detail) to top (global form)."""

    prior: Literal["ebm", "gaussian"] = "ebm"
    """ebm: p(z) ∝ exp(f(z)) N(0, I). gaussian: f = 0, the variational ladder autoencoder."""

    width: int = ModelConfig.width
    """Channels of the largest feature map of generator and encoder; doubled at each smaller one."""

    combine: Literal["add", "concat"] = "add"
    """How a lower latent layer meets the features from above."""

    reconstruction_weight: float = ModelConfig.reconstruction_weight
    """1/(2σ²) of the observation model, for pixels in [-1, 1]."""

    energy_hidden: int = ModelConfig.energy_hidden
    """Units of each hidden layer of f."""

    energy_depth: int = ModelConfig.energy_depth
    """Hidden layers of f."""

    energy_activation: Literal["leaky_relu", "relu", "gelu", "silu", "mish", "tanh", "softplus", "elu"] = "leaky_relu"
    """Activation of f."""

    spectral_norm: bool = False
    """Divide each weight matrix of f by its largest singular value."""

    chain_steps: int = ModelConfig.chain_steps
    """Langevin steps of the prior chain, started at N(0, I)."""

    step_size: float = ModelConfig.step_size
    """s of the Langevin step: drift s²/2, noise s."""

    steps: int = 2500
    """Learning steps, one batch each."""

    epochs: int = 0
    """Passes over the images, instead of --steps; 0 leaves it to --steps."""

    batch_size: int = 100
    """Images, and prior chains, per learning step."""

    autoencoder_lr: float = 1e-3
    """Adam's learning rate of generator and encoder."""

    energy_lr: float = 1e-4
    """Adam's learning rate of f."""

    energy_weight_decay: float = 0.0
    """Decoupled weight decay of f, in units of its learning rate: holds f and the encoder back from drifting off
    together, which no other term of the objective prevents."""

    lr_decay: float = 0.998
    """Factor on both learning rates after each epoch."""

    seed: int = 0
    """Everything random follows from it: same seed, machine and thread count, same run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""

    log_every: int = 50
    """Steps between lines of metrics.jsonl."""

    checkpoint_every: int = 500
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "width", "energy_hidden", "energy_depth", "chain_steps"):
            self._require(name, "a positive integer", getattr(self, name) >= 1)
        for name in ("log_every", "checkpoint_every"):
            self._require(name, "a positive integer", getattr(self, name) >= 1)
        for name in ("autoencoder_lr", "energy_lr", "lr_decay", "step_size", "reconstruction_weight"):
            self._require(name, "positive and finite", 0 < getattr(self, name) < float("inf"))
        self._require(
            "energy_weight_decay", "between 0 and 1 / --energy-lr", 0 <= self.energy_weight_decay * self.energy_lr <= 1
        )
        self._require("epochs", "positive, or 0 for --steps", self.epochs >= 0)
        self._require("seed", "between 0 and 2^63 - 1", 0 <= self.seed < 2**63)
        self._require(
            "latent_dims", "one or more positive integers", bool(self.latent_dims) and min(self.latent_dims) > 0
        )

    def _require(self, name: str, expected: str, holds: bool) -> None:
        if not holds:
            raise RunError(f"--{name.replace('_', '-')} must be {expected}, got {getattr(self, name)}")

    def model_config(self) -> ModelConfig:
        """The part that the model is built from."""
        names = [field.name for field in dataclasses.fields(ModelConfig)]
        return ModelConfig(**{name: getattr(self, name) for name in names})

    def learning_rates(self) -> LearningRates:
        return LearningRates(self.autoencoder_lr, self.energy_lr, self.energy_weight_decay)

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.epochs * steps_per_epoch if self.epochs else self.steps
