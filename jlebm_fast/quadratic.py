"""A quadratic part of an energy beside its MLP, and how a chain takes it: as part of the reference prior.

    f(z) = mlp(z) + q(z),    q(z) = constant + linear · z - precision · z² / 2,    ∇q = linear - precision z

A step adds c (∇f + prior_precision (prior_mean - z)) with one c for both (`dynamics.step_rows`), so q changes the
prior's two tensors and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .problem import Update

_LEAST_PRECISION = 1e-12  # that a force without any precision is written with: far below what float32 resolves


class Quadratic(NamedTuple):
    """What an energy adds to its MLP: log of a Gaussian with independent coordinates, up to a constant.

    constant    [] q(0)
    linear      [dim] ∇q(0)
    precision   [dim] 1 / std²; negative where the energy widens the prior
    """

    constant: Tensor
    linear: Tensor
    precision: Tensor

    def value(self, z: Tensor) -> Tensor:
        """q of latents [chains, dim]: [chains]."""
        return self.constant + (z * (self.linear - 0.5 * self.precision * z)).sum(dim=1)

    def gradient(self, z: Tensor) -> Tensor:
        """∇q at latents [chains, dim]."""
        return self.linear - self.precision * z

    def times(self, sign: float) -> Quadratic:
        """sign · q."""
        return Quadratic(*(sign * part for part in self))

    def joined(self, update: Update) -> Update:
        """The update of a chain without q that moves as the given one does with it."""
        mean, precision = update.prior_mean, update.prior_precision
        total, force = self.precision.double(), self.linear.double()
        if precision is not None:
            total = total + precision.double()
            force = force if mean is None else force + precision.double() * mean.double()
        total = torch.where((total == 0) & (force != 0), _LEAST_PRECISION, total)
        mean = torch.where(total == 0, 0.0, force / total)
        return update._replace(
            prior_mean=mean.to(self.linear.dtype).contiguous(), prior_precision=total.to(self.linear.dtype).contiguous()
        )
