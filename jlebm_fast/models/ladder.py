"""Geometry that generator and encoder share: where each latent layer enters, and how wide the nets are there."""

from __future__ import annotations

import dataclasses

BASE_SIZE = 4  # pixels of the smallest feature map: where the top layer enters
MAX_CHANNELS = 512  # keeps 128-pixel images from doubling the width without end


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Where L latent layers meet the feature maps of an image network.

    Feature maps have `4 * 2**level` pixels a side; layer i = 1 … L (bottom to top) enters at `levels[i - 1]`.
    The top layer enters at level 0, and the others are spread evenly upwards: for 32 pixels and L = 3 at
    4, 8 and 16 pixels (top to bottom).

    latent_dims      (d_1, …, d_L), bottom to top
    image_size       pixels a side, a power of two >= 8
    image_channels   1 for grey, 3 for colour
    width            channels of the largest feature map (half the image's size); doubled at each smaller one
    """

    latent_dims: tuple[int, ...]
    image_size: int
    image_channels: int
    width: int

    def __post_init__(self) -> None:
        if not self.latent_dims or min(self.latent_dims) < 1:
            raise ValueError(f"latent_dims must be one or more positive integers, got {self.latent_dims}")
        if self.image_size < 2 * BASE_SIZE or self.image_size & (self.image_size - 1):
            raise ValueError(f"image_size must be a power of two of at least 8 pixels, got {self.image_size}")
        if self.width < 1 or self.image_channels < 1:
            raise ValueError(f"width and image_channels must be positive, got {self.width} and {self.image_channels}")

    @property
    def n_levels(self) -> int:
        """Number of doublings between the smallest feature map and the image."""
        return (self.image_size // BASE_SIZE).bit_length() - 1

    @property
    def levels(self) -> tuple[int, ...]:
        """The level at which each latent layer enters, bottom to top."""
        n_layers = len(self.latent_dims)
        return tuple(from_top * self.n_levels // n_layers for from_top in reversed(range(n_layers)))

    def channels(self, level: int) -> int:
        """Channels of the feature map at `level`."""
        return min(self.width << (self.n_levels - 1 - level), MAX_CHANNELS)

    def pixels(self, level: int) -> int:
        """Pixels a side of the feature map at `level`."""
        return BASE_SIZE << level
