"""NCP-VAE and Multi-NCP: after the autoencoder, classifiers learn what tells its latents from the prior's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from jlebm_fast.energy import EnergyMLP
from jlebm_fast.sampler import FastLangevin

from .gaussians import standard_normal_log_density
from .learning import LearningRates, LearningStep
from .model import ModelConfig
from .second_stage import SecondStagePrior

PROPOSALS = 500  # of importance resampling, for each sample
PIECE = 200  # samples resampled at once: bounds the memory of their proposals


class ContrastivePrior(SecondStagePrior):
    """p_m(z) ∝ exp(f_1(z) + … + f_m(z)) N(z; 0, I), one f per stage, each learned as a classifier.

        stage k:  minimise  E_{q(z)} log(1 + e^{−f_k(z)}) + E_{p_{k−1}(z)} log(1 + e^{f_k(z)}),    p_0 = N(0, I)

    whose optimum is f_k = log q / p_{k−1}, so p_k = q. Negative samples of stage k > 1 come from chains on p_{k−1}.
    Sampling: the Langevin chain, or importance resampling of draws from N(0, I) with weights exp(f). Chains run on one
    block-diagonal MLP that computes the sum of the m nets, so the whole chain stays one call.

    Example:
        >>> prior = ContrastivePrior(ModelConfig(latent_dims=(2, 3), nce_stages=2, chain_steps=5))
        >>> prior.sample(4, None, None).shape
        torch.Size([4, 5])

    Source: Aneja, Schwing, Kautz, Vahdat, "A Contrastive Learning Approach for Training Variational Autoencoder
    Priors", NeurIPS 2021, eq. 5–7; Xiao and Han, "Adaptive Multi-stage Density Ratio Estimation for Learning Latent
    Space Energy-based Model", NeurIPS 2022, eq. 8–10 (several stages).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.nce_sampler not in ("chain", "resampling"):
            raise ValueError(f'nce_sampler must be "chain" or "resampling", got "{config.nce_sampler}"')
        self.config = config
        self.dim = sum(config.latent_dims)
        self.classifiers = nn.ModuleList(
            EnergyMLP(
                config.latent_dims, config.energy_hidden, config.energy_depth, activation=config.energy_activation,
                spectral_norm=config.spectral_norm,
            )
            for _ in range(config.nce_stages)
        )  # fmt: skip

    def forward(self, z: Tensor | list[Tensor]) -> Tensor:
        """f = Σ f_k of all stages: [n]."""
        return torch.stack([f(z) for f in self.classifiers]).sum(dim=0)

    def stages(self, steps: int) -> tuple[int, ...]:
        return (steps,) * len(self.classifiers)

    def optimisers(self, rates: LearningRates) -> dict[str, torch.optim.Optimizer]:
        return {
            f"classifier {k + 1}": torch.optim.AdamW(
                f.parameters(), lr=rates.energy, weight_decay=rates.energy_weight_decay
            )
            for k, f in enumerate(self.classifiers)
        }

    def learn(self, z: Tensor, step: LearningStep, stage: int, all_z: Callable[[], Tensor]) -> dict[str, Tensor]:
        negative = torch.cat(step.normal("prior start", len(z), self.config.latent_dims, z.device), dim=1)
        if stage:
            start, chain = negative, self.chain(None, stage)
            negative = step.run_chain("prior chain", lambda noise: chain.sample(start, **noise))
        f = self.classifiers[stage]
        on_q, on_p = f(z), f(negative)
        loss = functional.softplus(-on_q).mean() + functional.softplus(on_p).mean()
        step.descend(f"classifier {stage + 1}", loss, f"loss of classifier {stage + 1}")
        return {"loss": loss.detach(), "energy_posterior": on_q.mean().detach(), "energy_prior": on_p.mean().detach()}

    def chain(self, n_steps: int | None = None, stages: int | None = None) -> FastLangevin:
        """The Langevin chain on p of the first `stages` stages, all by default."""
        n_steps = self.config.chain_steps if n_steps is None else n_steps
        return FastLangevin(self.stacked(stages), n_steps=n_steps, step_size=self.config.step_size)

    @torch.no_grad()
    def stacked(self, stages: int | None = None) -> EnergyMLP:
        """One MLP, block-diagonal, with the value of the sum of the first `stages` classifiers; a copy."""
        nets = list(self.classifiers)[: len(self.classifiers) if stages is None else stages]
        width, depth = self.config.energy_hidden, self.config.energy_depth
        stack = EnergyMLP(
            self.config.latent_dims, len(nets) * width, depth, activation=self.config.energy_activation
        ).to(nets[0].layers[0].weight.device)
        for layer, target in enumerate(stack.layers):
            weights = [net.layers[layer].effective_weight() for net in nets]
            biases = [net.layers[layer].bias for net in nets]
            if layer == 0:
                weight, bias = torch.cat(weights), torch.cat(biases)
            elif layer == depth:
                weight, bias = torch.cat(weights, dim=1), torch.stack(biases).sum(dim=0)
            else:
                weight, bias = torch.block_diag(*weights), torch.cat(biases)
            target.weight.copy_(weight)
            target.bias.copy_(bias)
        return stack

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None, n_steps: int | None) -> Tensor:
        device = self.classifiers[0].layers[0].weight.device
        if self.config.nce_sampler == "chain":
            return self.chain(n_steps).sample(self.chain_start(n, generator), generator=generator)
        pieces = []
        for start in range(0, n, PIECE):
            rows = min(PIECE, n - start)
            z = torch.randn(rows * PROPOSALS, self.dim, generator=generator, device=device)
            weights = self(z).view(rows, PROPOSALS).softmax(dim=1)
            chosen = torch.multinomial(weights, 1, generator=generator)[:, 0]
            pieces.append(z.view(rows, PROPOSALS, self.dim)[torch.arange(rows, device=device), chosen])
        return torch.cat(pieces) if pieces else torch.empty(0, self.dim, device=device)

    def chain_start(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Where the chains of `sample` start: z ~ N(0, I), [n, dim]."""
        return torch.randn(n, self.dim, generator=generator, device=self.classifiers[0].layers[0].weight.device)

    def log_density(self, z: Tensor) -> Tensor:
        return self(z) + standard_normal_log_density([z])
