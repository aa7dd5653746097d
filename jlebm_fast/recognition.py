from __future__ import annotations

import dataclasses
from typing import NamedTuple

from torch import Tensor

from .energy import EnergyMLP
from .latents import LatentLayout
from .problem import MLP


class Unrecognised(NamedTuple):
    reason: str


def recognise(net, layout):
    return Unrecognised("recognition of other modules is not there yet")


class EnergySource:
    """Where the sampler gets its energy from."""

    def __init__(self, energy):
        self.energy = energy

    def callable(self):
        return self.energy

    def name(self):
        return type(self.energy).__name__

    def reason(self, flat, layout, context, y):
        return "recognition of other modules is not there yet"

    def mlp(self, flat: Tensor, layout: LatentLayout, context, y, sign: float) -> MLP | None:
        energy = self.energy
        if type(energy) is not EnergyMLP:
            return None
        if layout.container is not Tensor and layout.dims != energy.latent_dims:
            raise ValueError(f"z must be layers of widths {energy.latent_dims}, got {layout.dims}")
        energy.check_z(flat)
        mlp = energy.mlp(flat, context, y)
        spec = mlp.spec
        if sign != 1.0:
            spec = dataclasses.replace(spec, out_scale=sign * spec.out_scale)
        return mlp._replace(
            spec=spec,
            weights=tuple(w.detach() for w in mlp.weights),
            biases=tuple(None if b is None else b.detach() for b in mlp.biases),
        )
