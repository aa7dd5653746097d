"""LEBM: one latent vector, an energy prior, both chains by Langevin dynamics, no encoder."""

from __future__ import annotations

from .model import ModelConfig
from .short_run import ShortRunModel


class LEBM(ShortRunModel):
    """The latent energy-based model of a generator, learned by maximum likelihood with two short chains.

        p(z) ∝ exp(f(z)) N(z; 0, I),    x ~ N(g(z), σ² I)
        generator: E_{p(z|x)} ‖x − g(z)‖²/(2σ²) falls        f: E_{p(z|x)} f(z) − E_{p(z)} f(z) rises

    Published with one layer; several are the same rule on their concatenation. With `prior="gaussian"` f = 0: short-run
    inference of a plain generator.

    Example:
        >>> model = LEBM(ModelConfig(latent_dims=(10,), width=8, posterior_steps=2), image_size=16, image_channels=1)
        >>> [tuple(z.shape) for z in model.encode(torch.zeros(3, 1, 16, 16))]
        [(3, 10)]

    Source: Pang, Han, Nijkamp, Zhu, Wu, "Learning Latent Space Energy-Based Prior Model", NeurIPS 2020, eq. 5–9.
    """

    name = "lebm"

    def __init__(self, config: ModelConfig, image_size: int, image_channels: int, n_images: int = 0) -> None:
        super().__init__(config, image_size, image_channels, n_images)
        if config.prior == "ebm":
            self.energy = self.build_energy()
            self.prior_chain()  # a wrong number of steps or step size shows here, before any training
