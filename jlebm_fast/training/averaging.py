"""An exponential moving average of a model's parameters: what a run samples from when it is on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .errors import CheckpointError


class ParameterAverage:
    """The exponential moving average of parameters over learning steps.

        a_0 = θ_0,      a_t = decay · a_{t−1} + (1 − decay) · θ_t

    Args:
        model: whose parameters are averaged, on their device
        decay: in [0, 1); 0.999 remembers about the last 1,000 steps

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> average = ParameterAverage(model, 0.9)
        >>> _ = nn.init.ones_(model.weight)
        >>> average.update(model)
        >>> round(float(average.values["weight"]), 4)
        0.1

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; as used for sampling
    in Yazıcı et al., "The unusual effectiveness of averaging in GAN training", ICLR 2019.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model's present parameters."""
        torch._foreach_lerp_(list(self.values.values()), list(model.parameters()), 1.0 - self.decay)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Takes the average of a checkpoint.

        Raises:
            CheckpointError: it belongs to another model.
        """
        put_parameters(self.values, values)


def put_parameters(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies averaged parameters into tensors of the same names.

    Raises:
        CheckpointError: names or shapes differ.
    """
    if into.keys() != values.keys() or any(into[name].shape != values[name].shape for name in into):
        raise CheckpointError("the averaged parameters in the checkpoint belong to another model")
    with torch.no_grad():
        for name, value in values.items():
            into[name].copy_(value)
