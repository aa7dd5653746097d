"""The four operations in plain torch: the oracle that every other backend is tested against.

    a_l = W_l h_{l-1} + b_l,  h_l = phi_l(a_l),  f = out_scale * head(W_out h_L + b_out)
    delta_L = (W_out^T d head) * phi_L'(a_L),  delta_l = (W_{l+1}^T delta_{l+1}) * phi_l'(a_l),  grad f = W_1^T delta_1
    z <- z + c_grad * grad + c_prior * ((mean - z) * precision + extra_grad) + c_noise * eps

Written to be read, not to be fast; any device, float32 and float64. The formulas are tested against autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import MLP, ChainResult, MLPSpec, Record, Update
from . import eager_noise

NAME = "eager"

_SQRT_HALF = math.sqrt(0.5)
_INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_GELU_TANH_CUBIC = 0.044715


def unavailable_reason() -> str | None:
    return None


def unsupported_reason(
    op: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    spec: MLPSpec | None = None,
    update: Update | None = None,
) -> str | None:
    return None


def regime(op: str, spec: MLPSpec | None) -> str:
    return "plain torch, one operation after the other"


def build() -> str:
    """What it stands on."""
    return f"torch {torch.__version__}"


langevin_noise = eager_noise.langevin_noise


def activation(name: str, parameter: float, a: Tensor) -> Tensor:
    """phi(a)."""
    if name == "identity":
        return a
    if name == "leaky_relu":
        return F.leaky_relu(a, parameter)
    if name == "relu":
        return F.relu(a)
    if name == "gelu":
        return F.gelu(a)
    if name == "gelu_tanh":
        return F.gelu(a, approximate="tanh")
    if name == "silu":
        return F.silu(a)
    if name == "mish":
        return F.mish(a)
    if name == "tanh":
        return torch.tanh(a)
    if name == "softplus":
        return F.softplus(a, beta=parameter)
    if name == "elu":
        return F.elu(a, alpha=parameter)
    raise ValueError(f"activation must be one of problem.ACTIVATIONS, got {name!r}")


def activation_slope(name: str, parameter: float, a: Tensor) -> Tensor:
    """phi'(a); at a kink the value that torch's autograd takes (the one from the left)."""
    if name == "identity":
        return torch.ones_like(a)
    if name == "leaky_relu":
        return torch.where(a > 0, torch.ones_like(a), parameter)
    if name == "relu":
        return (a > 0).to(a.dtype)
    if name == "gelu":
        return 0.5 * (1 + torch.erf(a * _SQRT_HALF)) + a * _INV_SQRT_2PI * torch.exp(-0.5 * a * a)
    if name == "gelu_tanh":
        inner = torch.tanh(_SQRT_2_OVER_PI * (a + _GELU_TANH_CUBIC * a**3))
        inner_slope = _SQRT_2_OVER_PI * (1 + 3 * _GELU_TANH_CUBIC * a * a)
        return 0.5 * (1 + inner) + 0.5 * a * (1 - inner * inner) * inner_slope
    if name == "silu":
        gate = torch.sigmoid(a)
        return gate * (1 + a * (1 - gate))
    if name == "mish":
        t = torch.tanh(F.softplus(a))
        return t + a * torch.sigmoid(a) * (1 - t * t)
    if name == "tanh":
        t = torch.tanh(a)
        return 1 - t * t
    if name == "softplus":
        # from 20 on F.softplus is the identity
        return torch.where(parameter * a > 20, torch.ones_like(a), torch.sigmoid(parameter * a))
    if name == "elu":
        return torch.where(a > 0, torch.ones_like(a), parameter * torch.exp(a.clamp(max=0)))
    raise ValueError(f"activation must be one of problem.ACTIVATIONS, got {name!r}")


def head_value_and_slope(mlp: MLP, logits: Tensor) -> tuple[Tensor, Tensor]:
    """f [chains] and df/dlogits [chains, J] from the logits [chains, J]."""
    name, scale = mlp.spec.head, mlp.spec.out_scale
    if name == "logsumexp":
        value, slope = torch.logsumexp(logits, dim=1), torch.softmax(logits, dim=1)
    elif name == "logit":
        # a number that is no logit's makes its chain NaN
        there = ((mlp.logit >= 0) & (mlp.logit < logits.shape[1])).unsqueeze(1)
        chosen = torch.where(there, mlp.logit.unsqueeze(1), 0)
        value = torch.where(there, logits.gather(1, chosen), torch.nan).squeeze(1)
        slope = torch.where(there, torch.zeros_like(logits).scatter(1, chosen, 1.0), torch.nan)
    elif name == "identity":
        value, slope = logits.squeeze(1), torch.ones_like(logits)
    elif name == "tanh":
        t = torch.tanh(logits)
        value, slope = t.squeeze(1), 1 - t * t
    elif name == "sigmoid":
        gate = torch.sigmoid(logits)
        value, slope = gate.squeeze(1), gate * (1 - gate)
    elif name == "softplus":
        value, slope = F.softplus(logits).squeeze(1), torch.sigmoid(logits)
    else:
        raise ValueError(f"head must be one of problem.HEADS, got {name!r}")
    return scale * value, scale * slope


def mlp_forward(z: Tensor, mlp: MLP) -> tuple[Tensor, Tensor, list[Tensor]]:
    """f [chains], df/dlogits [chains, J] and the pre-activations a_1 … a_L; differentiable by autograd."""
    h, pre_activations = z, []
    for layer, (name, parameter) in enumerate(zip(mlp.spec.activations, mlp.spec.activation_params, strict=True)):
        a = F.linear(h, mlp.weights[layer], mlp.biases[layer])
        if layer == 0 and mlp.context_bias is not None:
            a = a + mlp.context_bias
        pre_activations.append(a)
        h = activation(name, parameter, a)
    energy, slope = head_value_and_slope(mlp, F.linear(h, mlp.weights[-1], mlp.biases[-1]))
    return energy, slope, pre_activations


def mlp_energy_grad(z: Tensor, mlp: MLP) -> tuple[Tensor, Tensor]:
    """f(z) [chains] and its gradient [chains, dim]."""
    energy, slope, pre_activations = mlp_forward(z, mlp)
    delta = slope @ mlp.weights[-1]
    for layer in reversed(range(mlp.spec.n_hidden)):
        name, parameter = mlp.spec.activations[layer], mlp.spec.activation_params[layer]
        delta = (delta * activation_slope(name, parameter, pre_activations[layer])) @ mlp.weights[layer]
    return energy, delta


def _updated(z: Tensor, grad: Tensor, update: Update, step: int) -> Tensor:
    """z after step number `step` of this call."""
    c_grad, c_prior, c_noise = update.step_coefficients[step].unbind()
    if update.chain_coefficients is not None:
        per_chain = update.chain_coefficients
        c_grad, c_prior, c_noise = c_grad * per_chain[:, :1], c_prior * per_chain[:, 1:2], c_noise * per_chain[:, 2:]
    if update.noise is not None:
        eps = update.noise[step]
    else:
        eps = langevin_noise(
            update.noise_key,
            1,
            *z.shape,
            first_step=update.first_step + step,
            first_chain=update.first_chain,
            device=z.device,
            dtype=z.dtype,
        )[0]
    z_new = z + c_grad * grad
    if update.prior_precision is not None:
        to_mean = -z if update.prior_mean is None else update.prior_mean - z
        z_new = z_new + c_prior * (to_mean * update.prior_precision)
    if update.extra_grad is not None:
        z_new = z_new + c_prior * update.extra_grad
    z_new = z_new + c_noise * eps
    return z_new if update.frozen is None else torch.where(update.frozen, z, z_new)


def langevin_step(z: Tensor, grad: Tensor, update: Update) -> Tensor:
    """One update of z [chains, dim] with a given gradient [chains, dim]."""
    return _updated(z, grad, update, 0)


def mlp_langevin_chain(z: Tensor, mlp: MLP, update: Update, n_steps: int, record: Record) -> ChainResult:
    """n_steps updates with the MLP's own gradient."""
    return chain_by(mlp_energy_grad, z, mlp, update, n_steps, record)


def chain_by(
    energy_grad: Callable[[Tensor, MLP], tuple[Tensor, Tensor]],
    z: Tensor,
    mlp: MLP,
    update: Update,
    n_steps: int,
    record: Record,
) -> ChainResult:
    """`mlp_langevin_chain` with the gradient that is given."""
    chains, dim = z.shape
    n_kept = n_steps // record.thin
    energies, grad_norms, displacements, first_bad_step, trajectory = None, None, None, None, None
    if record.diagnostics:
        energies, grad_norms, displacements = (z.new_empty(n_kept, chains) for _ in range(3))
        first_bad_step = torch.full((chains,), -1, dtype=torch.int64, device=z.device)
    if record.trajectory:
        trajectory = z.new_empty(n_kept, chains, dim)
    z = z.clone()
    for k in range(n_steps):
        energy, grad = energy_grad(z, mlp)
        z_new = _updated(z, grad, update, k)
        if record.diagnostics:
            bad = ~torch.isfinite(z_new).all(dim=1)
            first_bad_step[bad & (first_bad_step < 0)] = k
        if (k + 1) % record.thin == 0:
            kept = (k + 1) // record.thin - 1
            if record.diagnostics:
                energies[kept] = energy
                grad_norms[kept] = (grad if update.extra_grad is None else grad + update.extra_grad).norm(dim=1)
                displacements[kept] = (z_new - z).norm(dim=1)
            if record.trajectory:
                trajectory[kept] = z_new
        z = z_new
    return ChainResult(z, energies, grad_norms, displacements, first_bad_step, trajectory)
