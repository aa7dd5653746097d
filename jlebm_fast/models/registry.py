"""The models by name: their class, the priors they can have, and which parts of the configuration they read."""

from __future__ import annotations

from typing import NamedTuple

from .abp import ABP
from .biva import BIVA
from .cg import ConditionalVAE
from .cg_ebm import ConditionalEBM
from .joint import JointEBM
from .lebm import LEBM
from .lvae import LadderVAE
from .model import LatentModel, ModelConfig
from .rae import RAE
from .sri import SRI

ENERGY = {"energy_hidden", "energy_depth", "energy_activation", "spectral_norm"}
PRIOR_CHAIN = {"chain_steps", "step_size"}
POSTERIOR_CHAIN = {"posterior_steps", "posterior_step_size"}
EVERY_MODEL = {"latent_dims", "width", "combine", "reconstruction_weight", "prior"}
BY_PRIOR = {
    "gaussian": set(),
    "ebm": ENERGY | PRIOR_CHAIN,
    "nce": ENERGY | PRIOR_CHAIN | {"nce_stages", "nce_sampler", "stage_steps"},
    "gmm": {"mixture_components"},
    "vae": {"stage_steps"},
}


class Entry(NamedTuple):
    """One name of `jlebm train --model`.

    model     the class
    priors    what --prior may say; the first is the default
    uses      parts of the configuration that it reads besides `EVERY_MODEL` and those of the prior
    nce_stages   classifiers of a contrastive prior, unless --nce-stages says otherwise
    """

    model: type[LatentModel]
    priors: tuple[str, ...]
    uses: frozenset[str] = frozenset()
    nce_stages: int = 1


ANY_SECOND = ("nce", "gmm", "vae")
MODELS: dict[str, Entry] = {
    "joint": Entry(JointEBM, ("ebm", "gaussian", *ANY_SECOND)),
    "lebm": Entry(LEBM, ("ebm", "gaussian"), frozenset(POSTERIOR_CHAIN)),
    "cg": Entry(ConditionalVAE, ("gaussian",), frozenset({"conditional_hidden"})),
    "cg_ebm": Entry(ConditionalEBM, ("ebm",), frozenset({"conditional_hidden", *POSTERIOR_CHAIN})),
    "abp": Entry(ABP, ("gaussian",), frozenset(POSTERIOR_CHAIN)),
    "sri": Entry(SRI, ("gaussian",), frozenset({"conditional_hidden", *POSTERIOR_CHAIN})),
    "vlae": Entry(JointEBM, ("gaussian", "ebm", *ANY_SECOND)),
    "lvae": Entry(LadderVAE, ("gaussian",), frozenset({"conditional_hidden"})),
    "biva": Entry(BIVA, ("gaussian",), frozenset({"conditional_hidden"})),
    "two_stage_vae": Entry(JointEBM, ("vae",)),
    "rae": Entry(RAE, ("gmm", "gaussian", "nce", "vae")),
    "ncp_vae": Entry(JointEBM, ("nce",)),
    "multi_ncp": Entry(JointEBM, ("nce",), nce_stages=3),
}


def resolve_prior(model: str, prior: str) -> str:
    """The prior that `model` gets when asked for `prior`, where "auto" is the model's own.

    Raises:
        ValueError: there is no such model, or it cannot have that prior.

    Example:
        >>> resolve_prior("rae", "auto")
        'gmm'
    """
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model}")
    priors = MODELS[model].priors
    if prior != "auto" and prior not in priors:
        raise ValueError(f"model {model} takes prior {' or '.join(priors)}, got {prior}")
    return priors[0] if prior == "auto" else prior


def used_fields(model: str, prior: str) -> set[str]:
    """The fields of `ModelConfig` that `model` reads when its prior is `prior`."""
    return EVERY_MODEL | BY_PRIOR[prior] | MODELS[model].uses


def build(model: str, config: ModelConfig, image_size: int, image_channels: int, n_images: int = 0) -> LatentModel:
    """The untrained model of that name, on the CPU; parameters come from torch's global random state.

    Example:
        >>> build("rae", ModelConfig(prior="gmm"), image_size=16, image_channels=1).name
        'rae'
    """
    resolve_prior(model, config.prior)
    return MODELS[model].model(config, image_size, image_channels, n_images)
