"""The multi-layer generator: independent latent layers, merged from the top down into one image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .ladder import Ladder

SLOPE = 0.2  # of LeakyReLU in the published generators
TOP_WIDTH = 256  # hidden units of the MLP that reads the top layer


class LadderGenerator(nn.Module):
    """Turns L latent layers into the mean of an image.

        h_L = g_L(z_L),    h_i = g_i([z_i, h_{i+1}]),    x ~ N(tanh(h_1), σ² I)

    The top latents pass through an MLP onto the smallest feature map; each lower layer is embedded by a linear map at
    its own resolution and added to, or concatenated with, what comes from above.

    Arguments:
        ladder: geometry, with latent dims bottom to top.
        combine: "add", or "concat" for extra channels.

    Example:
        >>> net = LadderGenerator(Ladder((2, 2, 10), image_size=32, image_channels=1, width=16))
        >>> net([torch.zeros(5, 2), torch.zeros(5, 2), torch.zeros(5, 10)]).shape
        torch.Size([5, 1, 32, 32])

    Source: Cui, Wu, Han, "Learning Hierarchical Features with Joint Latent Space Energy-Based Prior", ICCV 2023, eq. 2.
    """

    def __init__(self, ladder: Ladder, combine: str = "add") -> None:
        super().__init__()
        if combine not in ("add", "concat"):
            raise ValueError(f'combine must be "add" or "concat", got "{combine}"')
        self.ladder = ladder
        self.combine = combine
        embeddings, stages = [], []
        n_layers = len(ladder.latent_dims)
        for i, (dim, level) in enumerate(zip(ladder.latent_dims, ladder.levels, strict=True)):
            pixels, channels = ladder.pixels(level), ladder.channels(level)
            is_top = i == n_layers - 1
            # Concatenated latents get a quarter of the channels: enough for a few dims, and the width stays bounded.
            embedded = channels if is_top or combine == "add" else max(channels // 4, 4)
            to_map = nn.Unflatten(1, (embedded, pixels, pixels))
            if is_top:
                mlp = (nn.Linear(dim, TOP_WIDTH), nn.LeakyReLU(SLOPE), nn.Linear(TOP_WIDTH, embedded * pixels**2))
                embeddings.append(nn.Sequential(*mlp, to_map))
            else:
                embeddings.append(nn.Sequential(nn.Linear(dim, embedded * pixels**2), to_map))
            merged = channels if is_top or combine == "add" else channels + embedded
            next_level = ladder.levels[i - 1] if i > 0 else ladder.n_levels
            stages.append(self._stage(merged, level, next_level))
        self.embeddings = nn.ModuleList(embeddings)
        self.stages = nn.ModuleList(stages)

    def _stage(self, channels: int, level: int, next_level: int) -> nn.Sequential:
        """From the merged feature map at `level` to the one where the next lower layer (or the image) is."""
        ladder, parts = self.ladder, []
        if next_level == level:
            parts += [nn.LeakyReLU(SLOPE), nn.Conv2d(channels, ladder.channels(level), 3, padding=1)]
        for target in range(level + 1, next_level + 1):
            out = ladder.image_channels if target == ladder.n_levels else ladder.channels(target)
            parts += [nn.LeakyReLU(SLOPE), nn.ConvTranspose2d(channels, out, 4, stride=2, padding=1)]
            channels = out
        return nn.Sequential(*parts)

    def forward(self, zs: Sequence[Tensor]) -> Tensor:
        """Images of latents.

        Arguments:
            zs: L tensors [n, d_i] float32, bottom to top.

        Returns:
            [n, image_channels, image_size, image_size] float32 in (-1, 1).
        """
        dims = self.ladder.latent_dims
        if [z.shape[-1] for z in zs] != list(dims):
            got = [tuple(z.shape) for z in zs]
            raise ValueError(f"zs must be {len(dims)} tensors [n, d] with d = {list(dims)}, bottom to top, got {got}")
        h = None
        for i in reversed(range(len(dims))):
            embedded = self.embeddings[i](zs[i])
            if h is None:
                h = embedded
            elif self.combine == "add":
                h = h + embedded
            else:
                h = torch.cat([h, embedded], dim=1)
            h = self.stages[i](h)
        return torch.tanh(h)
