"""f(z) of an MLP as EnergyMLP.forward computes it: one native pass where that is faster, else plain torch.

    forward    f, and for the derivative to come h_l and delta_l = df/da_l of all layers, in one call
    backward   with g = dloss/df:   dW_l = (g delta_l) h_{l-1}ᵀ,   db_l = delta_l g,   dc = g delta_1,   dz = g ∇f

Backends cpu and cuda have such a pass. A backward that is itself to be differentiated runs through the formulas of
`backends/eager.py`, and so does everything that `native_pass` turns away: other devices and dtypes, wide layers,
autocast, compilers, torch.func, forward-mode autograd.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, ops, precision
from .backends import _native, cpu, cpu_plain, eager
from .checks import has_memory
from .modes import autocast_enabled
from .problem import MLP

# Gradients in the parameters on the CPU where torch (before 2.10) has to multiply them out: the native pass then pays
# only where many small layers make calls the cost.
_FEWEST_LAYERS_FOR_PARAMETERS, _MOST_CHAINS_FOR_PARAMETERS = 3, 1024


class Pass(NamedTuple):
    """What a native pass found; all but the value are None unless asked for.

    value    f [chains]
    hidden   h_1 … h_L, each [H_l, chains]
    delta    df/da_1 … df/da_L, df/dlogits, each [H_l, chains]
    grad     ∇f [chains, dim]
    joined   (hidden, delta) of all layers, [H_1 + … + H_L, chains] and [H_1 + … + J, chains], in place of the two above
    """

    value: Tensor
    hidden: Sequence[Tensor] | None = None
    delta: Sequence[Tensor] | None = None
    grad: Tensor | None = None
    joined: tuple[Tensor, Tensor] | None = None


NativePass = Callable[[Tensor, MLP, bool, bool], Pass]  # z, mlp, layers asked for, gradient asked for


def energy(z: Tensor, mlp: MLP) -> Tensor:
    """f(z) [chains], differentiable in z, weights, biases and context_bias."""
    native = native_pass(z, mlp)
    if native is None:
        return eager.mlp_forward(z, mlp)[0]
    if not torch.is_grad_enabled():
        return native(z.contiguous().resolve_neg(), mlp, False, False).value
    learned = any(weight.requires_grad for weight in mlp.weights)
    pays = mlp.spec.n_hidden >= _FEWEST_LAYERS_FOR_PARAMETERS and z.shape[0] <= _MOST_CHAINS_FOR_PARAMETERS
    if z.is_cpu and learned and not (pays or cpu_plain.available()):
        return eager.mlp_forward(z, mlp)[0]
    return _Energy.apply(native, mlp, z, mlp.context_bias, *mlp.weights, *mlp.biases)


def native_pass(z: Tensor, mlp: MLP) -> NativePass | None:
    """The native pass that can compute this call; None if plain torch has to."""
    if ops.watched(z) or z.dtype is not torch.float32 or forward_ad._current_level >= 0 or autocast_enabled(z.device):
        return None
    if not all(map(has_memory, mlp.weights)):
        return None
    if z.is_cpu:
        return _on_cpu if cpu.fits_lanes(mlp.spec) and _native.unavailable_reason() is None else None
    # delta of the logit is a constant there. One launch instead of some fifty; not yet measured on a GPU.
    plain_head = mlp.spec.head == "identity" and mlp.spec.n_logits == 1
    if z.is_cuda and z.shape[0] > 0 and plain_head:
        reason = backends.reason_against("cuda", "mlp_energy_grad", device=z.device, dtype=z.dtype, spec=mlp.spec)
        return pass_of(backends.load("cuda")) if reason is None else None
    return None


def _on_cpu(z: Tensor, mlp: MLP, layers: bool, grad: bool) -> Pass:
    found = cpu_plain.mlp_energy_layers(z, mlp, layers=layers, grad=grad)
    if found is None:
        ops.check_mlp(mlp, z)  # a layer may have been given any weight
        found = cpu.mlp_energy_layers(z, mlp, layers=layers, grad=grad)
    value, hidden, delta, gradient = found
    if not layers:
        return Pass(value, grad=gradient)
    return Pass(value, grad=gradient, joined=(hidden, delta))


def pass_of(kernels: Any) -> NativePass:
    """The native pass by the CUDA kernels, for one plain logit."""

    def run(z: Tensor, mlp: MLP, layers: bool, grad: bool) -> Pass:
        ops.check_mlp(mlp, z)
        # "medium" lets chains run in bf16; what a loss is made of stays at what torch itself makes of that setting
        asked = precision.asked()
        with precision.using("tf32" if asked is None and precision.current() == "bf16" else asked):
            value, gradient, hidden, delta = kernels.mlp_energy_layers(z, mlp, layers=layers)
        if not layers:
            return Pass(value, grad=gradient)
        of_logit = z.new_full((1, z.shape[0]), mlp.spec.out_scale)
        return Pass(value, [h.t() for h in hidden], [*(d.t() for d in delta), of_logit], gradient)

    return run


class _Energy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, native: NativePass, mlp: MLP, z: Tensor, context_bias: Tensor | None, *parameters: Tensor | None
    ) -> Tensor:
        of_z, of_layers = ctx.needs_input_grad[2], any(ctx.needs_input_grad[3:])
        found = native(z.contiguous().resolve_neg(), mlp, of_layers, of_z)
        ctx.save_for_backward(z, context_bias, *parameters)
        ctx.mlp, ctx.found = mlp, found._replace(value=None)
        return found.value

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        z, context_bias, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (None, None, *_differentiable_backward(ctx, cotangent, [z, context_bias, *parameters]))
        needs, widths = ctx.needs_input_grad[2:], ctx.mlp.spec.widths
        found = ctx.found
        n = len(widths) - 1
        of_z = cotangent.unsqueeze(1) * found.grad if needs[0] else None
        if found.delta is None and found.joined is None:
            return (None, None, of_z, None, *[None] * (2 * n))
        if found.joined is None:
            hidden, of_biases = found.hidden, [d.mv(cotangent) for d in found.delta]
            scaled = [d * cotangent for d in found.delta]
        else:
            hidden, delta = found.joined
            if not needs[1]:
                grads = cpu_plain.mlp_weight_grads(
                    z, ctx.mlp, hidden, delta, cotangent.contiguous(), needs[2 : 2 + n], needs[2 + n :]
                )
                if grads is not None:
                    return (None, None, of_z, None, *grads[0], *grads[1])
            hidden = hidden.split_with_sizes(widths[1:-1])
            of_biases = delta.mv(cotangent).split_with_sizes(widths[1:])
            scaled = (delta * cotangent).split_with_sizes(widths[1:])
        below = [z.t(), *hidden]
        of_weights = [
            torch.mm(d, h.t()) if need else None for d, h, need in zip(scaled, below, needs[2:], strict=False)
        ]
        of_context = scaled[0].t() if needs[1] else None
        return (
            None,
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
    wanted = list(itertools.compress(own, ctx.needs_input_grad[2:]))
    found = iter(torch.autograd.grad(value, wanted, cotangent, create_graph=True, allow_unused=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[2:]]
