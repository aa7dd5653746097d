"""ABP, alternating back-propagation: a plain generator whose posterior chains go on where they last ended."""

from __future__ import annotations

import torch
from torch import Tensor

from .learning import Batch, LearningStep
from .model import ModelConfig
from .short_run import ShortRunModel
from .warm_starts import WarmStarts

# A chain on a new image starts cold, where those of training have run since the first epoch: it gets more steps.
COLD_START_FACTOR = 10


class ABP(ShortRunModel):
    """LEBM with f = 0 and a stored z per training example.

        inferential step:  z_x goes on along  z ← z + s²/2 ∇ [ log p(x|z) − ‖z‖²/2 ] + s ε  from where it was
        learning step:     E ‖x − g(z_x)‖²/(2σ²) falls

    The stored latents, `warm_starts`, are part of the model's state, so a resumed run goes on with them.

    Example:
        >>> config = ModelConfig(latent_dims=(10,), width=8, prior="gaussian")
        >>> ABP(config, image_size=16, image_channels=1, n_images=100).warm_starts.z.shape
        torch.Size([100, 10])

    Source: Han, Lu, Zhu, Wu, "Alternating Back-Propagation for Generator Network", AAAI 2017, algorithm 1.
    """

    name = "abp"

    def __init__(self, config: ModelConfig, image_size: int, image_channels: int, n_images: int = 0) -> None:
        super().__init__(config, image_size, image_channels, n_images)
        self.warm_starts = WarmStarts(n_images, self.latent_dims)

    def infer(self, batch: Batch, step: LearningStep) -> list[Tensor]:
        start = self.warm_starts.get(batch.rows)
        z = step.run_chain("posterior chain", lambda noise: self.posterior_chain(batch.images, start, noise))
        rows, ends = step.gather(batch.rows, torch.cat(z, dim=1))
        self.warm_starts.put(rows, ends.split(self.latent_dims, dim=1))
        return z

    @property
    def encode_steps(self) -> int:
        return COLD_START_FACTOR * self.config.posterior_steps
