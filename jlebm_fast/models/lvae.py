"""LVAE, the ladder variational autoencoder: image and layer above, merged by precision."""

from __future__ import annotations

from torch import Tensor

from .cg import ConditionalVAE
from .gaussians import product


class LadderVAE(ConditionalVAE):
    """The conditional-Gaussian generator with top-down inference that shares the generative nets.

        q(z_i|z_{i+1}, x) ∝ N(z_i; μ̂_i(x), V̂_i(x)) · N(z_i; μ_i(z_{i+1}), V_i(z_{i+1})),    q(z_L|x) = N(μ̂_L, V̂_L)
        minimise  E_q ‖x − g(z)‖²/(2σ²) + KL(q(z_L|x) ‖ N(0, I)) + Σ_i E_q KL(q(z_i|z_{i+1}, x) ‖ p(z_i|z_{i+1}))

    The encoder's heads give μ̂_i and V̂_i from features that go up deterministically.

    Example:
        >>> from jlebm_fast.models import ModelConfig
        >>> model = LadderVAE(ModelConfig(latent_dims=(2, 3), width=8, prior="gaussian"), 16, 1)
        >>> [tuple(z.shape) for z in model.encode(torch.zeros(5, 1, 16, 16))]
        [(5, 2), (5, 3)]

    Source: Sønderby, Raiko, Maaløe, Sønderby, Winther, "Ladder Variational Autoencoders", NeurIPS 2016, eq. 13–19.
    """

    name = "lvae"

    def layer_posterior(
        self, mean: Tensor, log_variance: Tensor, prior_mean: Tensor, prior_log_variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        return product(mean, log_variance, prior_mean, prior_log_variance)
