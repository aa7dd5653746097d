"""Latent-variable models with energy priors, and their rivals: each a subclass of `LatentModel`, named in `MODELS`."""

from .abp import ABP
from .biva import BIVA
from .cg import ConditionalVAE
from .cg_ebm import ConditionalEBM
from .conditional import ConditionalGaussians
from .encoder import LadderEncoder, Posterior
from .generator import LadderGenerator
from .joint import JointEBM
from .ladder import Ladder
from .latent_vae import LatentVAE
from .learning import Batch, LearningRates, LearningStep, NonFiniteLoss
from .lebm import LEBM
from .lvae import LadderVAE
from .mixture import MixturePrior
from .model import LatentModel, ModelConfig
from .nce import ContrastivePrior
from .rae import RAE
from .registry import MODELS, build, resolve_prior, used_fields
from .sri import SRI

__all__ = [
    "ABP",
    "BIVA",
    "LEBM",
    "MODELS",
    "RAE",
    "SRI",
    "Batch",
    "ConditionalEBM",
    "ConditionalGaussians",
    "ConditionalVAE",
    "ContrastivePrior",
    "JointEBM",
    "Ladder",
    "LadderEncoder",
    "LadderGenerator",
    "LadderVAE",
    "LatentModel",
    "LatentVAE",
    "LearningRates",
    "LearningStep",
    "MixturePrior",
    "ModelConfig",
    "NonFiniteLoss",
    "Posterior",
    "build",
    "resolve_prior",
    "used_fields",
]
