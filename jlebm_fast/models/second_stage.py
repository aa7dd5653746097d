"""What a prior answers that is learned after the autoencoder, on its latents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .learning import LearningRates, LearningStep


class SecondStagePrior(nn.Module):
    """p(z) for a finished autoencoder, learned from z ~ q(z) = E_x q(z|x), on flat latents [n, dim]."""

    def stages(self, steps: int) -> tuple[int, ...]:
        """Learning steps of each of its stages, when a stage of batches has `steps`."""
        return (steps,)

    def optimisers(self, rates: LearningRates) -> dict[str, torch.optim.Optimizer]:
        """The optimisers of all its stages, by name."""
        return {}

    def learn(self, z: Tensor, step: LearningStep, stage: int, all_z: Callable[[], Tensor]) -> dict[str, Tensor]:
        """One learning step of its stage `stage` from z ~ q(z); `all_z` encodes the whole training set."""
        raise NotImplementedError

    def sample(self, n: int, generator: torch.Generator | None, n_steps: int | None) -> Tensor:
        """z ~ p(z), [n, dim]."""
        raise NotImplementedError

    def log_density(self, z: Tensor) -> Tensor:
        """log p(z) up to a constant: [n]."""
        raise NotImplementedError
