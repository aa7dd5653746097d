"""Latent-variable models with energy priors, and their rivals. Each is one subclass of `LatentModel`."""

from .encoder import LadderEncoder, Posterior
from .generator import LadderGenerator
from .joint import JointEBM
from .ladder import Ladder
from .learning import Batch, LearningRates, LearningStep, NonFiniteLoss
from .model import LatentModel, ModelConfig

__all__ = [
    "Batch",
    "JointEBM",
    "Ladder",
    "LadderEncoder",
    "LadderGenerator",
    "LatentModel",
    "LearningRates",
    "LearningStep",
    "ModelConfig",
    "NonFiniteLoss",
    "Posterior",
]
