"""What the package is compared with: the published loop written out, random problems, the accuracy rule.

error <= 2 * error(plain torch in float32) + 1e-6 * scale, both against float64
"""

from __future__ import annotations

import torch
from torch import Tensor

from jlebm_fast.problem import MLP, MLPSpec, Update

PARAMETERS = {"leaky_relu": 0.2, "elu": 0.9, "softplus": 1.3}
ONE_LOGIT_HEADS = ("identity", "tanh", "sigmoid", "softplus")


def published_loop(f, z, step_size, noise, *, noise_scale=1.0, mean=0.0, std=1.0):
    """The short-run chain as the public codes write it, on one tensor [chains, dim], with given noise."""
    z = z.clone()
    for eps in noise:
        z.requires_grad_(True)
        (grad,) = torch.autograd.grad(f(z).sum(), z)
        z = z.detach()
        z = z + 0.5 * step_size * step_size * (grad + (mean - z) / std**2) + step_size * noise_scale * eps
    return z


def random_mlp(widths, activation="leaky_relu", head="identity", *, seed=0, chains=None, context=False, out_scale=1.0):
    """An MLP record with random float32 parameters on the CPU."""
    g = torch.Generator().manual_seed(seed)
    n_hidden = len(widths) - 2
    parameter = PARAMETERS.get(activation, 0.0)
    spec = MLPSpec(tuple(widths), (activation,) * n_hidden, (parameter,) * n_hidden, head, out_scale)
    shapes = list(zip(widths[1:], widths[:-1], strict=True))
    weights = tuple(torch.randn(b, a, generator=g) * (1.5 / a) ** 0.5 for b, a in shapes)
    biases = tuple(0.3 * torch.randn(b, generator=g) for b, _ in shapes)
    context_bias = torch.randn(chains, widths[1], generator=g) if context else None
    logit = torch.randint(0, widths[-1], (chains,), generator=g) if head == "logit" else None
    return MLP(spec, weights, biases, context_bias, logit)


def moved(record, device=None, dtype=None):
    """A record with its tensors on another device, its floating point ones in another dtype."""

    def move(value):
        if isinstance(value, Tensor):
            return value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, tuple) and not isinstance(value, MLPSpec):
            return tuple(move(entry) for entry in value)
        return value

    return type(record)(*(move(value) for value in record))


def steps(n_steps, s=0.3, noise_scale=1.0):
    return torch.tensor([[s * s / 2, s * s / 2, s * noise_scale]]).repeat(n_steps, 1)


def plain_update(n_steps, dim, **changes) -> Update:
    return Update(steps(n_steps), prior_precision=torch.ones(dim), noise_key=99)._replace(**changes)


def assert_accurate(ours, plain, exact, what="", times=2):
    """The accuracy rule, with another factor than 2 where a comment there says why; NaN fails."""
    assert ours.shape == exact.shape, what
    if exact.numel() == 0:
        return
    error = (ours.double().cpu() - exact).abs().max().item()
    allowed = times * (plain.double() - exact).abs().max().item() + 1e-6 * max(1.0, exact.abs().max().item())
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
