"""What serves float64 on the CPU in place of eager, where eager was not asked for by name: the same operations, faster.

    noise      drawn by the compiled kernel, which agrees with eager's in every bit, and cast
    gradient   torch's own backward of each activation, one pass, in place of the formulas written out
    update     eager's own

No fused kernel computes in float64. What this takes is mostly torch's matrix products and activations, as in a loop
written by hand.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..problem import MLP, ChainResult, Record, Update
from . import cpu, eager
from .cpu_blas import rows_of

_NOISE_FLOATS = 1 << 20  # of one draw: 4 MB
_aten = torch.ops.aten
# (d loss / d h, a, h, parameter) -> d loss / d a
_BACKWARD: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "identity": lambda d, a, h, p: d,
    "leaky_relu": lambda d, a, h, p: _aten.leaky_relu_backward(d, a, p, False),
    "relu": lambda d, a, h, p: _aten.threshold_backward(d, h, 0),
    "gelu": lambda d, a, h, p: _aten.gelu_backward(d, a),
    "gelu_tanh": lambda d, a, h, p: _aten.gelu_backward(d, a, approximate="tanh"),
    "silu": lambda d, a, h, p: _aten.silu_backward(d, a),
    "mish": lambda d, a, h, p: _aten.mish_backward(d, a),
    "tanh": lambda d, a, h, p: _aten.tanh_backward(d, h),
    "softplus": lambda d, a, h, p: _aten.softplus_backward(d, a, p, 20),
    "elu": lambda d, a, h, p: _aten.elu_backward(d, p, 1, 1, False, a),
}


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether it can, in this process, for tensors of that kind."""
    return dtype is torch.float64 and device.type == "cpu" and cpu.unavailable_reason() is None


def regime(op: str, spec: object) -> str:
    return "float64 by torch's own operations, noise by the compiled kernel; fused kernels are float32"


def langevin_noise(
    noise_key: int, n_steps: int, chains: int, dim: int, *, dtype: torch.dtype = torch.float64, **rest: object
) -> Tensor:
    """The noise field eps [n_steps, chains, dim]."""
    return cpu.langevin_noise(noise_key, n_steps, chains, dim, **rest).to(dtype)


def langevin_step(z: Tensor, grad: Tensor, update: Update) -> Tensor:
    """One update of z [chains, dim] with a given gradient [chains, dim]."""
    return eager.langevin_step(z, grad, _with_noise(update, 1, z))


def mlp_energy_grad(z: Tensor, mlp: MLP) -> tuple[Tensor, Tensor]:
    """f(z) [chains] and its gradient [chains, dim]."""
    names, parameters = mlp.spec.activations, mlp.spec.activation_params
    h, made = z, []
    for layer, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        a = torch.nn.functional.linear(h, mlp.weights[layer], mlp.biases[layer])
        if layer == 0 and mlp.context_bias is not None:
            a = a + mlp.context_bias
        h = eager.activation(name, parameter, a)
        made.append((a, h))
    logits = torch.nn.functional.linear(h, mlp.weights[-1], mlp.biases[-1])
    energy, delta = eager.head_value_and_slope(mlp, logits)
    delta = delta @ mlp.weights[-1]
    for layer in reversed(range(mlp.spec.n_hidden)):
        a, h = made[layer]
        delta = _BACKWARD[names[layer]](delta, a, h, parameters[layer]) @ mlp.weights[layer]
    return energy, delta


def mlp_langevin_chain(z: Tensor, mlp: MLP, update: Update, n_steps: int, record: Record) -> ChainResult:
    """n_steps updates with the MLP's own gradient; chains go in groups whose noise is drawn in one go."""
    chains, dim = z.shape
    group = max(1, _NOISE_FLOATS // max(1, n_steps * dim))
    if chains <= group:
        return _chain(z, mlp, update, n_steps, record)
    parts = []
    for first in range(0, chains, group):
        rows = slice(first, first + group)
        bias, logit = (None if t is None else t[rows] for t in (mlp.context_bias, mlp.logit))
        part = mlp._replace(context_bias=bias, logit=logit)
        parts.append(_chain(z[rows], part, rows_of(update, first, rows), n_steps, record))
    # chains stand last in energy, grad_norm and displacement, first in z and first_bad_step, between in a trajectory
    dims = (0, 1, 1, 1, 0, 1)
    return ChainResult(*(None if f[0] is None else torch.cat(f, d) for f, d in zip(zip(*parts, strict=True), dims)))


def _chain(z: Tensor, mlp: MLP, update: Update, n_steps: int, record: Record) -> ChainResult:
    return eager.chain_by(mlp_energy_grad, z, mlp, _with_noise(update, n_steps, z), n_steps, record)


def _with_noise(update: Update, n_steps: int, z: Tensor) -> Update:
    if update.noise is not None:
        return update
    offsets = {"first_step": update.first_step, "first_chain": update.first_chain}
    return update._replace(noise=langevin_noise(update.noise_key, n_steps, *z.shape, **offsets))
