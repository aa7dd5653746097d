"""The autoencoders whose prior can be learned after them, in a second stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .latent_vae import LatentVAE
from .learning import Batch, LearningStep
from .mixture import MixturePrior, require_enough
from .model import LatentModel, ModelConfig
from .nce import ContrastivePrior
from .second_stage import SecondStagePrior

if TYPE_CHECKING:
    from jlebm_fast.sampler import FastLangevin


class Autoencoder(LatentModel):
    """A model whose first stage needs no prior net, or learns it on the way; a second stage may learn one after it.

    Subclasses answer `learn_autoencoder` and `posterior_sample`.
    """

    second: SecondStagePrior | None

    def __init__(self, config: ModelConfig, image_size: int, image_channels: int, n_images: int = 0) -> None:
        super().__init__(config, image_size, image_channels, n_images)
        if config.prior == "gmm" and n_images:  # known only to a run; its fit is the last step of all
            require_enough(n_images, config.mixture_components)
        self.second = None

    def build_second(self) -> SecondStagePrior | None:
        """The second-stage prior that the configuration names; built last, so that the first stage of one seed is the
        same whatever comes after it."""
        kinds = {"nce": ContrastivePrior, "gmm": MixturePrior, "vae": LatentVAE}
        kind = kinds.get(self.config.prior)
        return None if kind is None else kind(self.config)

    def learn_autoencoder(self, batch: Batch, step: LearningStep) -> dict[str, Tensor]:
        """One learning step of the first stage."""
        raise NotImplementedError

    def posterior_sample(self, images: Tensor, noise: list[Tensor]) -> list[Tensor]:
        """z ~ q(z|x) from standard normals [n, d_i]."""
        raise NotImplementedError

    def stages(self, steps: int) -> tuple[int, ...]:
        if self.second is None:
            return (steps,)
        return (steps, *self.second.stages(self.config.stage_steps or steps))

    def update(self, batch: Batch, step: LearningStep) -> dict[str, Tensor]:
        """Returns the first stage's scalars, then the second's."""
        if step.stage == 0 or self.second is None:
            return self.learn_autoencoder(batch, step)
        with torch.no_grad():
            noise = step.normal("posterior", len(batch.images), self.latent_dims, self.device)
            z = torch.cat(self.posterior_sample(batch.images, noise), dim=1)
        return self.second.learn(z, step, step.stage - 1, lambda: self._encode_training_set(batch, step))

    @torch.no_grad()
    def _encode_training_set(self, batch: Batch, step: LearningStep) -> Tensor:
        if batch.training_set is None:
            raise ValueError("this stage learns from all training images at once: the batch must carry training_set")
        pieces = []
        for number, pixels in enumerate(batch.training_set.split(500)):
            images = pixels.to(self.device).float().div(127.5).sub(1.0)
            noise = step.normal_of_every_rank(f"training set {number}", len(images), self.latent_dims, self.device)
            pieces.append(torch.cat(self.posterior_sample(images, noise), dim=1))
        return torch.cat(pieces)

    @property
    def has_prior_chain(self) -> bool:
        return super().has_prior_chain or hasattr(self.second, "chain")

    @property
    def samples_by_chain(self) -> bool:
        return self.has_prior_chain and (self.second is None or self.config.nce_sampler == "chain")

    def chain_start(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        if self.second is None:
            return super().chain_start(n, generator)
        return list(self.second.chain_start(n, generator).split(self.latent_dims, dim=1))

    @property
    def prior_name(self) -> str:
        names = {"nce": "contrastive prior", "gmm": "Gaussian mixture", "vae": "second VAE"}
        return names.get(self.config.prior, super().prior_name)

    def prior_chain(self, n_steps: int | None = None) -> FastLangevin:
        return self.second.chain(n_steps) if hasattr(self.second, "chain") else super().prior_chain(n_steps)

    def sample_prior(
        self, n: int, generator: torch.Generator | None = None, n_steps: int | None = None
    ) -> list[Tensor]:
        if self.second is not None:
            return list(self.second.sample(n, generator, n_steps).split(self.latent_dims, dim=1))
        z0 = self.standard_normal(n, generator)
        return z0 if self.energy is None else self.prior_chain(n_steps).sample(z0, generator=generator)

    def log_prior(self, zs: list[Tensor]) -> Tensor:
        return super().log_prior(zs) if self.second is None else self.second.log_density(torch.cat(zs, dim=1))
