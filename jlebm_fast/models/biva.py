"""BIVA: each layer has a bottom-up and a top-down part, and a deterministic path runs past the latents."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .encoder import LadderEncoder
from .gaussians import draw, kl, log_density
from .learning import Batch, LearningRates, LearningStep
from .model import LatentModel, ModelConfig, adam, encode_in_pieces, squared_error

SLOPE = 0.2
LOG_VARIANCE_BOUND = 5.0  # of p and q, by tanh: the bottom-up term is a log-ratio of samples, which must not explode


def _gaussian(inputs: int, dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LeakyReLU(SLOPE), nn.Linear(hidden, 2 * dim))


def _split(output: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_variance = output.chunk(2, dim=1)
    return mean, LOG_VARIANCE_BOUND * torch.tanh(log_variance / LOG_VARIANCE_BOUND)


class _Inferred(NamedTuple):
    zs: list[Tensor]
    divergence: Tensor


class BIVA(LatentModel):
    """The bidirectional-inference variational autoencoder, z_i = (u_i, v_i): u bottom-up, v top-down.

        generative    t_L = const,  t_i = D_i(t_{i+1}, z_{i+1}),   p(z) = Π p(u_i|t_i) p(v_i|t_i),   x ~ N(g(z), σ² I)
        inference     q(u_i | r_i(x), u_{i-1}) from the bottom up, then q(v_i | t_i, r_i(x), u_i) from the top down
        minimise      E_q ‖x − g(z)‖²/(2σ²) + E_q Σ [ log q(u_i)/p(u_i) + KL(q(v_i) ‖ p(v_i)) ]

    t is the deterministic path: what a layer says reaches every layer below. The bottom-up parts of a layer are the
    first half of its dims. log q/p of u is taken at the sample: t depends on the u of higher layers, so its KL is
    not closed.

    Example:
        >>> model = BIVA(ModelConfig(latent_dims=(2, 4), width=8, prior="gaussian"), 16, 1)
        >>> model.decode(model.sample_prior(3)).shape
        torch.Size([3, 1, 16, 16])

    Source: Maaløe, Fraccaro, Liévin, Winther, "BIVA: A Very Deep Hierarchy of Latent Variables for Generative
    Modeling", NeurIPS 2019, eq. 4–8.
    """

    name = "biva"
    prior_name = "bidirectional hierarchy"

    def __init__(self, config: ModelConfig, image_size: int, image_channels: int, n_images: int = 0) -> None:
        super().__init__(config, image_size, image_channels, n_images)
        if min(self.latent_dims) < 2:
            raise ValueError(f"biva needs at least 2 dims in each latent layer, one each way, got {self.latent_dims}")
        hidden = config.conditional_hidden
        self.encoder = LadderEncoder(self.ladder)  # its heads' outputs serve as features r_i
        self.up_dims = [d // 2 for d in self.latent_dims]
        self.down_dims = [d - d // 2 for d in self.latent_dims]
        below = [0, *self.up_dims]
        features = [2 * d for d in self.latent_dims]
        self.up = nn.ModuleList(
            _gaussian(r + b, d, hidden) for r, b, d in zip(features, below, self.up_dims, strict=False)
        )
        self.down = nn.ModuleList(
            _gaussian(hidden + r + u, d, hidden) for r, u, d in zip(features, self.up_dims, self.down_dims, strict=True)
        )
        self.prior_heads = nn.ModuleList(_gaussian(hidden, d, hidden) for d in self.latent_dims)
        self.top = nn.Parameter(torch.zeros(hidden))
        self.path = nn.ModuleList(nn.Linear(hidden + d, hidden) for d in self.latent_dims[1:])

    def _descend_path(self, layer: int, t: Tensor, z: Tensor) -> Tensor:
        """t of `layer` from t and z of the layer above it; what was there passes by."""
        return t + nn.functional.leaky_relu(self.path[layer](torch.cat([t, z], dim=1)), SLOPE)

    def _infer(self, images: Tensor, noise: list[Tensor]) -> _Inferred:
        bottom_up = self.encoder(images)
        features = [torch.cat(layer, dim=1) for layer in zip(*bottom_up, strict=True)]
        noise = [eps.split((u, d), dim=1) for eps, u, d in zip(noise, self.up_dims, self.down_dims, strict=True)]
        us, up_laws = [], []
        for layer, r in enumerate(features):
            up_laws.append(_split(self.up[layer](torch.cat([r, *us[-1:]], dim=1))))
            us.append(draw(*up_laws[-1], noise[layer][0]))
        t = self.top.expand(len(images), -1)
        zs, divergence = [], torch.zeros(len(images), device=images.device)
        for layer in reversed(range(len(features))):
            if zs:
                t = self._descend_path(layer, t, zs[0])
            u, dims = us[layer], (self.up_dims[layer], self.down_dims[layer])
            mean, log_variance = _split(self.prior_heads[layer](t))
            (mean_u, mean_v), (variance_u, variance_v) = mean.split(dims, dim=1), log_variance.split(dims, dim=1)
            law = _split(self.down[layer](torch.cat([t, features[layer], u], dim=1)))
            divergence = divergence + log_density(u, *up_laws[layer]) - log_density(u, mean_u, variance_u)
            divergence = divergence + kl(*law, mean_v, variance_v)
            zs.insert(0, torch.cat([u, draw(*law, noise[layer][1])], dim=1))
        return _Inferred(zs, divergence)

    @torch.no_grad()
    def sample_prior(
        self, n: int, generator: torch.Generator | None = None, n_steps: int | None = None
    ) -> list[Tensor]:
        noise = self.standard_normal(n, generator)
        t, zs = self.top.expand(n, -1), []
        for layer in reversed(range(len(noise))):
            if zs:
                t = self._descend_path(layer, t, zs[0])
            zs.insert(0, draw(*_split(self.prior_heads[layer](t)), noise[layer]))
        return zs

    def log_prior(self, zs: list[Tensor]) -> Tensor:
        t, total = self.top.expand(len(zs[0]), -1), 0.0
        for layer in reversed(range(len(zs))):
            if layer < len(zs) - 1:
                t = self._descend_path(layer, t, zs[layer + 1])
            total = total + log_density(zs[layer], *_split(self.prior_heads[layer](t)))
        return total

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        def means(piece: Tensor) -> list[Tensor]:
            return self._infer(piece, [piece.new_zeros(len(piece), d) for d in self.latent_dims]).zs

        return encode_in_pieces(means, images)

    def optimisers(self, rates: LearningRates) -> dict[str, torch.optim.Optimizer]:
        return {"autoencoder": adam(list(self.parameters()), rates.autoencoder)}

    def update(self, batch: Batch, step: LearningStep) -> dict[str, Tensor]:
        """Returns the scalars loss, reconstruction and kl."""
        inferred = self._infer(batch.images, step.normal("posterior", len(batch.images), self.latent_dims, self.device))
        reconstruction = squared_error(batch.images, self.generator(inferred.zs)).mean()
        divergence = inferred.divergence.mean()
        loss = self.config.reconstruction_weight * reconstruction + divergence
        step.descend("autoencoder", loss, "loss of generator and encoder")
        return {"loss": loss.detach(), "reconstruction": reconstruction.detach(), "kl": divergence.detach()}
