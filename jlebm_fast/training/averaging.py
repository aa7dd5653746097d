"""An exponential moving average of a model's parameters: what a run samples from when it is on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import CheckpointError


class ParameterAverage:
    """The exponential moving average of parameters over learning steps.

        a_0 = θ_0,      a_t = d_t · a_{t−1} + (1 − d_t) · θ_t,      d_t = min(decay, (1 + t) / (10 + t)),    t = 1, 2, …

    The first steps remember little, else a run shorter than 1/(1 − decay) would sample from its random initialisation:
    after 100 steps with 0.999 that has a weight of 2 · 10⁻¹² instead of 0.9. d_t follows from t: nothing of it is
    stored.

    Args:
        model: whose parameters are averaged, on their device
        decay: in [0, 1); 0.999 remembers about the last 1,000 steps once there were 9,000, (10 + t) / 9 of them before

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> average = ParameterAverage(model, 0.9)
        >>> _ = nn.init.ones_(model.weight)
        >>> average.update(model, 1)
        >>> round(float(average.values["weight"]), 4)  # 1 − 2/11
        0.8182

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; as used for sampling
    in Yazıcı et al., "The unusual effectiveness of averaging in GAN training", ICLR 2019; d_t as in TensorFlow's
    ExponentialMovingAverage with num_updates.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, t: int) -> None:
        """Moves the average towards the model's present parameters, those after `t` learning steps."""
        decay = min(self.decay, (1 + t) / (10 + t))
        torch._foreach_lerp_(list(self.values.values()), list(model.parameters()), 1.0 - decay)

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
