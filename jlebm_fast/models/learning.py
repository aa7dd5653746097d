"""What every model's learning step shares: rates, and a descent that refuses non-finite losses."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


class NonFiniteLoss(ArithmeticError):
    """A loss became NaN or infinite; the step that met it changed no parameter."""


@dataclasses.dataclass(frozen=True)
class LearningRates:
    """Adam's learning rates at the start, of generator and encoder and of the energy, and the energy's weight decay.

    The decay is decoupled: each step multiplies the energy's parameters by 1 - energy * energy_weight_decay.
    """

    autoencoder: float
    energy: float
    energy_weight_decay: float = 0.0


def descend(optimiser: torch.optim.Optimizer, loss: Tensor, name: str) -> None:
    """One optimiser step down `loss`; gradients of earlier losses are dropped first.

    Raises:
        NonFiniteLoss: `loss` is NaN or infinite.
    """
    value = loss.item()
    if value != value or value in (float("inf"), float("-inf")):
        raise NonFiniteLoss(f"{name} is {value}")
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
