"""Per-example warm starts: where the posterior chain of each training image ended, and starts next time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jlebm_fast.checks import describe
from jlebm_fast.functional import langevin_noise
from jlebm_fast.rng import INITIAL_Z


class WarmStarts(nn.Module):
    """A latent z_n for each training image n, from N(0, I) until the first chain of that image has ended.

        z_n ← end of the chain on p(z | x_n) that started at z_n

    It is a buffer of the model that owns it, so a checkpoint holds it and `.to(device)` moves it.

    Args:
        n_images: training images, n = 0 … n_images - 1
        dims: widths of the latent layers
        noise_key: 64 bits that name the noise of the first starts

    Raises:
        ValueError: there are no images; or at the call, rows or z do not fit.

    Example:
        >>> starts = WarmStarts(1000, (2, 3))
        >>> rows = torch.tensor([7, 999])
        >>> starts.put(rows, [torch.ones(2, 2), torch.ones(2, 3)])
        >>> [tuple(z.shape) for z in starts.get(rows)], float(starts.get(rows)[1].min())
        ([(2, 2), (2, 3)], 1.0)

    Source: Han, Lu, Zhu, Wu, "Alternating Back-Propagation for Generator Network", AAAI 2017, section 3.
    """

    def __init__(self, n_images: int, dims: Sequence[int], noise_key: int = 0) -> None:
        super().__init__()
        if n_images < 1:
            raise ValueError(f"n_images must be a positive number of training images, got {n_images}")
        self.dims = tuple(dims)
        self.register_buffer("z", langevin_noise(noise_key, 1, n_images, sum(self.dims), stream=INITIAL_Z)[0])

    def get(self, rows: Tensor) -> list[Tensor]:
        """The starts of the images `rows` (int64 [n], on any device): one [n, d] per layer, copies."""
        return list(self.z[self._checked(rows)].split(self.dims, dim=1))

    def put(self, rows: Tensor, zs: Sequence[Tensor]) -> None:
        """Remembers one [n, d] per layer for the images `rows`; detached."""
        shapes = [tuple(z.shape) for z in zs]
        if shapes != [(len(rows), d) for d in self.dims]:
            raise ValueError(f"zs must be {[[len(rows), d] for d in self.dims]}, got {[list(s) for s in shapes]}")
        self.z[self._checked(rows)] = torch.cat([z.detach() for z in zs], dim=1).to(self.z)

    def _checked(self, rows: Tensor) -> Tensor:
        if rows.dtype != torch.int64 or rows.dim() != 1:
            raise ValueError(f"rows must be int64 [n], the images' places in the training set, got {describe(rows)}")
        return rows.to(self.z.device)
