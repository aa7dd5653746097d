"""f(z) of an MLP as EnergyMLP.forward computes it: one native pass where that is faster, else plain torch.

    forward    f, and for the derivative to come h_l and delta_l = df/da_l of all layers, in one call
    backward   with g = dloss/df:   dW_l = (g delta_l) h_{l-1}ᵀ,   db_l = delta_l g,   dc = g delta_1,   dz = g ∇f

A backward that is itself to be differentiated runs through the formulas of `backends/eager.py`, and so does everything
that `serves` turns away: other devices and dtypes, wide layers, autocast, compilers, torch.func, forward-mode autograd.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .backends import _native, cpu, eager
from .problem import MLP

# Gradients in the parameters: the native pass pays where many small layers make calls the cost. With fewer layers, or
# more chains, torch's own backward makes fewer passes over memory (benchmarks/results, section "energy").
_FEWEST_LAYERS_FOR_PARAMETERS, _MOST_CHAINS_FOR_PARAMETERS = 3, 1024


def energy(z: Tensor, mlp: MLP) -> Tensor:
    """f(z) [chains], differentiable in z, weights, biases and context_bias."""
    if not serves(z, mlp):
        return eager.mlp_forward(z, mlp)[0]
    if not torch.is_grad_enabled():
        return cpu.mlp_energy_layers(z.contiguous(), mlp, layers=False, grad=False)[0]
    pays = mlp.spec.n_hidden >= _FEWEST_LAYERS_FOR_PARAMETERS and z.shape[0] <= _MOST_CHAINS_FOR_PARAMETERS
    if not pays and any(weight.requires_grad for weight in mlp.weights):
        return eager.mlp_forward(z, mlp)[0]
    return _Energy.apply(mlp, z, mlp.context_bias, *mlp.weights, *mlp.biases)


def serves(z: Tensor, mlp: MLP) -> bool:
    """Whether the native pass can compute this call."""
    return (
        not ops.watched(z)
        and z.dtype is torch.float32
        and z.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and cpu.fits_lanes(mlp.spec)
        and _native.unavailable_reason() is None
    )


class _Energy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mlp: MLP, z: Tensor, context_bias: Tensor | None, *parameters: Tensor | None) -> Tensor:
        of_z, of_layers = ctx.needs_input_grad[1], any(ctx.needs_input_grad[2:])
        value, hidden, delta, grad = cpu.mlp_energy_layers(z.contiguous(), mlp, layers=of_layers, grad=of_z)
        ctx.save_for_backward(z, context_bias, *parameters)
        ctx.mlp, ctx.found = mlp, (hidden, delta, grad)
        return value

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        z, context_bias, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (None, *_differentiable_backward(ctx, cotangent, [z, context_bias, *parameters]))
        needs, widths = ctx.needs_input_grad[1:], ctx.mlp.spec.widths
        hidden, delta, grad = ctx.found
        n = len(widths) - 1
        of_z = cotangent.unsqueeze(1) * grad if needs[0] else None
        if delta is None:
            return (None, of_z, None, *[None] * (2 * n))
        of_biases = delta.mv(cotangent).split_with_sizes(widths[1:])
        scaled = (delta * cotangent).split_with_sizes(widths[1:])
        below = [z.t(), *hidden.split_with_sizes(widths[1:-1])]
        of_weights = [
            torch.mm(d, h.t()) if need else None for d, h, need in zip(scaled, below, needs[2:], strict=False)
        ]
        of_context = scaled[0].t() if needs[1] else None
        return (
            None,
            of_z,
            of_context,
            *of_weights,
            *[d if need else None for d, need in zip(of_biases, needs[2 + n :], strict=True)],
        )


def _differentiable_backward(ctx: Any, cotangent: Tensor, inputs: list[Tensor | None]) -> list[Tensor | None]:
    """The same through autograd, connected to the inputs: for derivatives of second and higher order."""
    # tensors of our own, so that what z and the weights may share upstream is not counted twice
    z, context_bias, *parameters = own = [None if t is None else t.view_as(t) for t in inputs]
    n = len(parameters) // 2
    mlp = ctx.mlp._replace(weights=parameters[:n], biases=parameters[n:], context_bias=context_bias)
    value = eager.mlp_forward(z, mlp)[0]
    wanted = list(itertools.compress(own, ctx.needs_input_grad[1:]))
    found = iter(torch.autograd.grad(value, wanted, cotangent, create_graph=True, allow_unused=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[1:]]
