"""What people run today, each as strong as it honestly gets, on the same weights and the same starts.

    eager           the loop of the published codes: a list of latents, torch.autograd.grad, randn_like per layer
    eager_spectral  the same with torch's spectral norm in training mode: a power iteration in every step, as published
    compiled        torch.func.grad and the update in one function under torch.compile, called once per step
    jax             jax.jit of one lax.scan over value_and_grad in float32
    torchebm        LangevinDynamics of the public library of that name, on the potential |z|²/2 - f(z)

A maker takes (case, network) and returns `run(z0, noise_scale=1.0) -> z`, warm after its first call. `noise_scale` is
there so that the rivals can be checked: without noise all of them must arrive at the same z.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from jlebm_fast.bench.cases import Case, mlp_of

Run = Callable[..., list[Tensor]]


def eager(case: Case, network: nn.Module) -> Run:
    """z_l <- z_l + s²/2 (∂f/∂z_l - z_l) + s eps, one latent layer after the other, through autograd."""
    s = case.step_size

    def run(z0: list[Tensor], noise_scale: float = 1.0) -> list[Tensor]:
        zs = [z.clone().detach().requires_grad_(True) for z in z0]
        for _ in range(case.n_steps):
            f = network(torch.cat(zs, dim=1))
            gradients = torch.autograd.grad(f.sum(), zs)
            for z, gradient in zip(zs, gradients, strict=True):
                z.data += 0.5 * s * s * (gradient - z.data) + noise_scale * s * torch.randn_like(z)
        return [z.detach() for z in zs]

    return run


def eager_spectral(case: Case, network: nn.Module) -> Run:
    """`eager` on a net whose Linear layers carry torch.nn.utils.spectral_norm and stay in training mode.

    The weights of `network` have σ_max = 1 already: after some power iterations both nets are the same function.
    """
    normed = copy.deepcopy(network).train()
    for layer in normed:
        if isinstance(layer, nn.Linear):
            torch.nn.utils.spectral_norm(layer, n_power_iterations=3000)  # from a random start
    with torch.no_grad():
        normed(torch.zeros(1, case.dim))  # converged before the first chain
    for layer in normed:
        for hook in layer._forward_pre_hooks.values():
            hook.n_power_iterations = 1
    return eager(case, normed)


def compiled(case: Case, network: nn.Module) -> Run:
    """One Langevin step, gradient, noise and update, in one graph of torch.compile; the steps are a Python loop."""
    s = case.step_size
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def energy(z: Tensor) -> Tensor:
        return torch.func.functional_call(network, parameters, (z,)).sum()

    # torch's own vectorised normals inside the graph: Inductor's are scalar on the CPU and up to 2.5 times slower here
    @torch.compile(fullgraph=True, dynamic=False, options={"fallback_random": True})
    def step(z: Tensor, noise_factor: Tensor) -> Tensor:
        drift = torch.func.grad(energy)(z) - z
        return z + 0.5 * s * s * drift + noise_factor * torch.randn_like(z)

    def run(z0: list[Tensor], noise_scale: float = 1.0) -> list[Tensor]:
        z = torch.cat(z0, dim=1)
        noise_factor = torch.tensor(s * noise_scale)  # a tensor: a float would be compiled in
        with torch.no_grad():
            for _ in range(case.n_steps):
                z = step(z, noise_factor)
        return list(z.split(case.latent_dims, dim=1))

    return run


OPTIONAL = {"jax": "pip install 'jlebm-fast[bench]'", "torchebm": "pip install torchebm (torch 2.10 or newer)"}


def missing(name: str) -> bool:
    """Whether a rival takes no part because its own package is not installed."""
    return name in OPTIONAL and importlib.util.find_spec(name) is None


def jax_scan(case: Case, network: nn.Module) -> Run:
    """The whole chain as one compiled XLA program; a fresh key per call, starts and ends cross as numpy arrays.

    jax's default random numbers (threefry) are the fastest of its three kinds here: rbg took twice as long at 10,000.
    """
    import jax
    import jax.numpy as jnp

    s = case.step_size
    mlp = mlp_of(network, case.spec)
    layers = [(jnp.asarray(w.numpy()), jnp.asarray(b.numpy())) for w, b in zip(mlp.weights, mlp.biases, strict=True)]
    activation = {
        "leaky_relu": lambda a: jax.nn.leaky_relu(a, 0.2),
        "gelu": lambda a: jax.nn.gelu(a, approximate=False),
    }[case.activation]

    def energy(z, layers):
        h = z
        for weight, bias in layers[:-1]:
            h = activation(h @ weight.T + bias)
        weight, bias = layers[-1]
        f = h @ weight.T + bias
        return f.sum()

    @jax.jit
    def chain(z, layers, key, noise_factor):
        def step(z, step_key):
            f, gradient = jax.value_and_grad(energy)(z, layers)
            noise = jax.random.normal(step_key, z.shape, z.dtype)
            return z + 0.5 * s * s * (gradient - z) + noise_factor * noise, f

        return jax.lax.scan(step, z, jax.random.split(key, case.n_steps))[0]

    calls = iter(range(2**31))

    def run(z0: list[Tensor], noise_scale: float = 1.0) -> list[Tensor]:
        z = jnp.asarray(torch.cat(z0, dim=1).numpy())
        z = chain(z, layers, jax.random.key(next(calls)), s * noise_scale)
        # a copy: jax's arrays are read-only, what a training loop receives is not
        return list(torch.from_numpy(jax.device_get(z).copy()).split(case.latent_dims, dim=1))

    return run


def torchebm_sampler(case: Case, network: nn.Module) -> Run:
    """x <- x - η ∂U/∂x + σ √(2η) eps of torchebm's sampler, with U = |x|²/2 - f(x) and η = s²/2: the same chain."""
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics

    class Potential(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x.square().sum(dim=1) - self.network(x).squeeze(1)

    potential, tiny = Potential(), 1e-30  # the library wants a noise scale above 0

    def run(z0: list[Tensor], noise_scale: float = 1.0) -> list[Tensor]:
        sampler = LangevinDynamics(potential, step_size=0.5 * case.step_size**2, noise_scale=max(noise_scale, tiny))
        z = sampler.sample(torch.cat(z0, dim=1), n_steps=case.n_steps)
        return list(z.split(case.latent_dims, dim=1))

    return run
