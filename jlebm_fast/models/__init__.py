"""Latent-variable models with energy priors. Each model is one class with a `name`, `update` and `sample_prior`."""

from .encoder import LadderEncoder, Posterior
from .generator import LadderGenerator
from .joint import JointConfig, JointEBM
from .ladder import Ladder
from .learning import LearningRates, NonFiniteLoss

__all__ = [
    "JointConfig",
    "JointEBM",
    "Ladder",
    "LadderEncoder",
    "LadderGenerator",
    "LearningRates",
    "NonFiniteLoss",
    "Posterior",
]
