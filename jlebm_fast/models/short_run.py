"""The posterior-chain driver: models that infer latents by short Langevin chains instead of an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jlebm_fast.dynamics import STANDARD_NORMAL, GaussianPrior
from jlebm_fast.sampler import FastLangevin

from .learning import Batch, LearningRates, LearningStep
from .model import LatentModel, adam, energy_adam, squared_error


class ShortRunModel(LatentModel):
    """A generator learned with latents from a posterior chain; f joins in where there is one.

        z ← z + s²/2 ∇_z [ log p(x|z) + log p(z) ] + s ε,    `posterior_steps` times

    Generator: E ‖x − g(z)‖²/(2σ²) falls, with z where the chain ended; f as in `update_energy`.

    Source: Nijkamp et al., "Learning Multi-layer Latent Variable Model via Variational Optimization of Short Run MCMC
    for Approximate Inference", ECCV 2020; Pang et al., NeurIPS 2020, algorithm 1.
    """

    def log_likelihood(self, images: Tensor, zs: list[Tensor]) -> Tensor:
        """log p(x|z) of each image up to a constant: [n]."""
        return -self.config.reconstruction_weight * squared_error(images, self.generator(zs))

    def posterior_chain(
        self, images: Tensor, start: list[Tensor], noise: Mapping[str, Any], n_steps: int | None = None
    ) -> list[Tensor]:
        """Latents of images after a chain on p(z|x) that begins at `start`: L tensors [n, d_i], detached.

        Arguments:
            noise: `noise_key` and `first_chain`, or `generator`, as `FastLangevin.sample` takes them.
            n_steps: replaces the configured number.
        """
        n_steps = self.config.posterior_steps if n_steps is None else n_steps
        options = {"n_steps": n_steps, "step_size": self.config.posterior_step_size}
        if self.energy is not None and self.reference is not None:  # f through the fused kernels, the rest by autograd
            chain = FastLangevin(self.energy, prior=self.reference, **options)
            return chain.sample(start, log_likelihood=lambda zs: self.log_likelihood(images, zs), **noise)

        def log_joint(zs: list[Tensor]) -> Tensor:
            total = self.log_likelihood(images, zs)
            return total if self.reference is not None else total + self.log_prior(zs)

        return FastLangevin(log_joint, prior=self.reference, **options).sample(start, **noise)

    @property
    def reference(self) -> GaussianPrior | None:
        """The Gaussian that f tilts; None where p(z) has another form and `log_prior` holds all of it."""
        return STANDARD_NORMAL

    def infer(self, batch: Batch, step: LearningStep) -> list[Tensor]:
        """z of a learning step: the ends of posterior chains that start at N(0, I)."""
        start = step.normal("posterior start", len(batch.images), self.latent_dims, self.device)
        return step.run_chain("posterior chain", lambda noise: self.posterior_chain(batch.images, start, noise))

    def optimisers(self, rates: LearningRates) -> dict[str, torch.optim.Optimizer]:
        optimisers = {"autoencoder": adam(list(self.generator.parameters()), rates.autoencoder)}
        if self.energy is not None:
            optimisers["energy"] = energy_adam(self.energy, rates)
        return optimisers

    def update(self, batch: Batch, step: LearningStep) -> dict[str, Tensor]:
        """Returns the scalars loss, reconstruction, and with an f energy_posterior and energy_prior."""
        z = self.infer(batch, step)
        reconstruction = squared_error(batch.images, self.generator(z)).mean()
        loss = self.config.reconstruction_weight * reconstruction
        step.descend("autoencoder", loss, "loss of the generator")
        metrics = {"loss": loss.detach(), "reconstruction": reconstruction.detach()}
        return metrics if self.energy is None else metrics | self.update_energy(z, step)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """Ends of posterior chains from N(0, I), in pieces."""
        pieces = []
        for piece in images.split(500):
            start = self.standard_normal(len(piece), generator)
            pieces.append(self.posterior_chain(piece, start, {"generator": generator}, self.encode_steps))
        return [torch.cat(layer) for layer in zip(*pieces, strict=True)]

    @property
    def encode_steps(self) -> int:
        return self.config.posterior_steps

    def sample_prior(
        self, n: int, generator: torch.Generator | None = None, n_steps: int | None = None
    ) -> list[Tensor]:
        z0 = self.standard_normal(n, generator)
        return z0 if self.energy is None else self.prior_chain(n_steps).sample(z0, generator=generator)
