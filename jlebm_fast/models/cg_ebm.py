"""The conditional-Gaussian generator tilted by a sum of layer energies, learned with prior and posterior chains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jlebm_fast.energy import EnergyMLP
from jlebm_fast.sampler import FastLangevin

from .conditional import ConditionalGaussians
from .learning import Batch, LearningRates, LearningStep
from .model import ModelConfig, adam, energy_adam, squared_error
from .short_run import ShortRunModel


class LayerEnergies(nn.Module):
    """f(z) = Σ f_i(z_i): one small MLP per layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EnergyMLP(
                dim,
                config.energy_hidden,
                config.energy_depth,
                activation=config.energy_activation,
                spectral_norm=config.spectral_norm,
            )
            for dim in config.latent_dims
        )

    def forward(self, zs: Sequence[Tensor]) -> Tensor:
        return torch.stack([f(z) for f, z in zip(self.layers, zs, strict=True)]).sum(dim=0)


class ConditionalEBM(ShortRunModel):
    """A joint prior that keeps the conditional Gaussians and corrects them layer by layer.

        p(z) ∝ exp(Σ f_i(z_i)) p₀(z),    p₀(z) = N(z_L; 0, I) Π N(z_i; μ_i(z_{i+1}), V_i(z_{i+1}))

        generator    E_{p(z|x)} ‖x − g(z)‖²/(2σ²) falls
        f, μ, V      E_{p(z|x)} [Σ f_i + log p₀] − E_{p(z)} [Σ f_i + log p₀] rises

    Both chains differentiate the conditional nets, so their gradient comes from autograd; the step is fused.

    Example:
        >>> model = ConditionalEBM(ModelConfig(latent_dims=(2, 3), width=8, chain_steps=3), 16, 1)
        >>> model.decode(model.sample_prior(4)).shape
        torch.Size([4, 1, 16, 16])

    Source: Cui, Wu, Han, "Learning Joint Latent Space EBM Prior Model for Multi-layer Generator", CVPR 2023, eq. 5–10.
    """

    name = "cg_ebm"
    reference = None

    def __init__(self, config: ModelConfig, image_size: int, image_channels: int, n_images: int = 0) -> None:
        super().__init__(config, image_size, image_channels, n_images)
        self.conditional = ConditionalGaussians(self.latent_dims, config.conditional_hidden)
        self.energy = LayerEnergies(config)
        self.prior_chain()  # a wrong number of steps or step size shows here, before any training

    def log_prior(self, zs: list[Tensor]) -> Tensor:
        return self.energy(zs) + self.conditional.log_density(zs)

    def prior_chain(self, n_steps: int | None = None) -> FastLangevin:
        n_steps = self.config.chain_steps if n_steps is None else n_steps
        return FastLangevin(self.log_prior, n_steps=n_steps, step_size=self.config.step_size, prior=None)

    def optimisers(self, rates: LearningRates) -> dict[str, torch.optim.Optimizer]:
        optimisers = {"autoencoder": adam(list(self.generator.parameters()), rates.autoencoder)}
        if len(self.latent_dims) > 1:  # p₀ is learned against the chain's samples like f, and as slowly
            optimisers["conditional"] = energy_adam(self.conditional, rates)
        return optimisers | {"energy": energy_adam(self.energy, rates)}

    def update(self, batch: Batch, step: LearningStep) -> dict[str, Tensor]:
        """Returns the scalars loss, reconstruction, energy_posterior, energy_prior (E f) and log_prior_gap (of p₀)."""
        n = len(batch.images)
        z = self.infer(batch, step)
        start = step.prior_start(n, self.latent_dims, self.device)
        z_prior = step.run_chain("prior chain", lambda noise: self.prior_chain().sample(start, **noise))
        step.prior_end(z_prior)
        reconstruction = squared_error(batch.images, self.generator(z)).mean()
        loss = self.config.reconstruction_weight * reconstruction
        step.descend("autoencoder", loss, "loss of the generator")
        gap = self.conditional.log_density(z).mean() - self.conditional.log_density(z_prior).mean()
        if "conditional" in step.optimisers:
            step.descend("conditional", -gap, "loss of the conditional Gaussians")
        energy_posterior, energy_prior = self.energy(z).mean(), self.energy(z_prior).mean()
        step.descend("energy", energy_prior - energy_posterior, "loss of the energy")
        metrics = {"loss": loss, "reconstruction": reconstruction, "energy_posterior": energy_posterior}
        metrics |= {"energy_prior": energy_prior, "log_prior_gap": gap}
        return {name: value.detach() for name, value in metrics.items()}
