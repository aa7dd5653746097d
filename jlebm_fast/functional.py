"""The rungs that other samplers build on: the noise field, one Langevin step, an energy and its gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import backends, dynamics, ops
from .checks import check_like, describe, whole
from .dynamics import STANDARD_NORMAL, GaussianPrior
from .energy_source import EnergySource, runs_energy_mlp_forward
from .latents import Latents, flatten_latents, flatten_mask
from .modes import chain_mode, device_of, refuse_trace
from .problem import Update
from .rng import COUNTER_RANGE, check_noise_key, check_sources, noise_key_of
from .stepwise import AnyEnergy


def langevin_noise(
    key: int,
    n_steps: int,
    chains: int,
    dim: int,
    *,
    first_step: int = 0,
    first_chain: int = 0,
    stream: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Standard normals eps[step, chain, dim], a pure function of (key, stream, step, chain, dim).

        counter (dim // 4, chain, step, stream)  --philox4x32-10, key-->  four words  --Box-Muller-->  four normals

    Args:
        key: 64 bits, an integer in [0, 2**64)
        n_steps, chains, dim: shape of the field
        first_step, first_chain: where this piece begins in the whole field
        stream: 0 Langevin noise, 1 initial z, 2 accept/reject, 3 and more free
        device, dtype: of the result; float64 holds the float32 values
        backend: "auto" or a backend's name; all give the same bits

    Returns:
        [n_steps, chains, dim]

    Raises:
        ValueError: an argument out of range, or a named backend that cannot serve the call.

    Example:
        >>> whole = langevin_noise(7, 4, 10, 16)
        >>> half = langevin_noise(7, 4, 5, 16, first_chain=5)
        >>> torch.equal(whole[:, 5:], half)
        True

    Source: Salmon et al., SC 2011 (Philox); Box and Muller, 1958.
    """
    refuse_trace("langevin_noise")
    for name, size in (("n_steps", whole(n_steps)), ("chains", whole(chains))):
        if type(size) is int and size > COUNTER_RANGE:
            raise ValueError(f"{name} must be at most 2**32, as many as a noise field tells apart, got {size}")
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # what is made inside it could not be used outside
            return langevin_noise(
                key, n_steps, chains, dim, first_step=first_step, first_chain=first_chain, stream=stream,
                device=device, dtype=dtype, backend=backend,
            )  # fmt: skip
    return ops.langevin_noise(
        check_noise_key(key, "key"),
        whole(n_steps),
        whole(chains),
        whole(dim),
        first_step=whole(first_step),
        first_chain=whole(first_chain),
        stream=whole(stream),
        device=_check_device(device),
        dtype=dtype,
        backend=backend,
    )


def _check_device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a device of torch, got {device!r}: {error}") from None


def langevin_step(
    z: Latents,
    grad: Latents,
    *,
    step_size: float | Tensor = 0.4,
    noise_scale: float | Tensor = 1.0,
    prior: GaussianPrior | None = STANDARD_NORMAL,
    maximize: bool = True,
    mask: object = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    noise_key: int | None = None,
    step: int = 0,
    first_chain: int = 0,
    backend: str = "auto",
) -> Latents:
    """One Langevin update with a gradient that the caller computed, in one launch.

        z + s²/2 (± grad + (mean − z)/std²) + s · noise_scale · eps[step]

    Args:
        z: [chains, dim], [chains, dim, 1, 1], or a list or tuple of layers [chains, d_l]; float32 or float64
        grad: gradient of f (maximize) or of E (not maximize), in the structure of z
        step_size, noise_scale: float, or tensor [chains]
        prior: GaussianPrior or None
        maximize: sign of grad, + for True
        mask: True freezes, as in FastLangevin.sample
        noise: eps [chains, dim] instead of the noise contract's
        generator, noise_key: where the 64-bit key comes from
        step, first_chain: place in the noise field: one key serves a whole chain when step counts up
        backend: "auto" or a backend's name

    Returns:
        The new z, in the structure of z; z is untouched.

    Raises:
        ValueError: an argument does not fit: what was expected and what came.

    Example:
        >>> z = torch.zeros(3, 8)
        >>> z = langevin_step(z, torch.ones(3, 8), step_size=0.5, noise_scale=0.0, prior=None)
        >>> float(z[0, 0])
        0.125

    Source: Cui, Wu, Han, ICCV 2023, eq. 8.
    """
    refuse_trace("langevin_step")
    with chain_mode(device_of(z)):
        flat, layout = flatten_latents(z)
        flat_grad, grad_layout = flatten_latents(grad, "grad")
        if grad_layout.dims != layout.dims:
            raise ValueError(f"grad must have the layers of z, widths {layout.dims}, got {grad_layout.dims}")
        dynamics.check_prior(prior)
        dynamics.check_maximize(maximize)
        step, first_chain = whole(step), whole(first_chain)
        ops.check_counter("step", step)
        step_size = dynamics.check_schedule("step_size", step_size, 1)
        noise_scale = dynamics.check_schedule("noise_scale", noise_scale, 1)
        rows = dynamics.step_rows(step_size, noise_scale, 1)
        mean, precision = (None, None) if prior is None else prior.terms(flat)
        if noise is not None:
            check_sources(noise, noise_key, generator)
            noise_key = 0
            noise = check_like("noise", flatten_latents(noise, "noise")[0], (tuple(flat.shape),), flat).unsqueeze(0)
        update = Update(
            rows.to(flat.device, flat.dtype),
            dynamics.chain_coefficients(step_size, noise_scale, flat),
            mean,
            precision,
            flatten_mask(mask, layout, flat),
            noise,
            noise_key_of(noise_key, generator, flat.device),
            step,
            first_chain,
        )
        return layout.restore(ops.langevin_step(flat, flat_grad if maximize else -flat_grad, update, backend=backend))


def energy_and_grad(
    energy: nn.Module | Callable[..., Tensor],
    z: Latents,
    *,
    context: Tensor | None = None,
    y: Tensor | int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Latents]:
    """An energy's value and its gradient in z, fused where the energy is a (recognised) MLP.

        a_l = W_l h_{l−1} + b_l,  h_l = phi(a_l);   delta_l = (W_{l+1}ᵀ delta_{l+1}) phi′(a_l),  ∇f = W_1ᵀ delta_1

    Args:
        energy: EnergyMLP, module or callable, as for FastLangevin
        z: [chains, dim], [chains, dim, 1, 1], or a list or tuple of layers; float32 or float64
        context, y: condition and chosen logit
        backend: "auto" or a backend's name

    Returns:
        (value [chains], gradient in the structure of z), detached

    Raises:
        ValueError: an argument does not fit: what was expected and what came.

    Example:
        >>> from jlebm_fast import EnergyMLP
        >>> value, grad = energy_and_grad(EnergyMLP(16, 50, 4), torch.randn(3, 16))
        >>> value.shape, grad.shape
        (torch.Size([3]), torch.Size([3, 16]))

    Source: Cui, Wu, Han, ICCV 2023, section 3.2.
    """
    if not callable(energy):
        raise ValueError(f"energy must be a module or a callable, got {describe(energy)}")
    refuse_trace("energy_and_grad")
    if torch.compiler.is_compiling() and not runs_energy_mlp_forward(energy):
        from . import in_graph  # imports torch's compiler, which costs seconds

        return in_graph.with_unread_energy(energy_and_grad, energy, z, context=context, y=y, backend=backend)
    with chain_mode(device_of(z)):
        flat, layout = flatten_latents(z)
        source = EnergySource(energy)
        mlp, quadratic = source.mlp(flat, layout, context, y, 1.0)
        if mlp is None:
            # autograd needs no kernel, but a backend named for another device would be a mistake
            backends.choose("langevin_step", backend, device=flat.device, dtype=flat.dtype)
            own = source.for_autograd(flat, layout, context, y)
            value, grad = AnyEnergy(own, layout, context, y, 1.0)(flat.clone())
        else:
            value, grad = ops.mlp_energy_grad(flat, mlp, backend=backend)
            if quadratic is not None:
                value, grad = value + quadratic.value(flat), grad + quadratic.gradient(flat)
        return value, layout.restore(grad)
