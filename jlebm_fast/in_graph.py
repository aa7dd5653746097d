"""`FastLangevin.sample` while torch.compile traces it: plain torch and registered operators, nothing else.

    in the graph       an EnergyMLP, or a module recognised by an earlier call outside the graph; the key drawn by the
                       operator draw_noise_key; noise, mask, schedules, diagnostics, context, y, noise_key
    outside it         any other energy, a log_likelihood, a generator: the call runs as without a compiler, between two
                       graphs, and fullgraph=True refuses it

Noise and values are those of a call outside a graph: the key is drawn by the same operation from the same generator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import dynamics, registration
from .energy import EnergyLinear
from .energy_source import runs_energy_mlp_forward
from .latents import LatentLayout, flatten_latents, flatten_mask
from .problem import MLP, MLPSpec, Record, Update
from .recognition.recognised import assembled
from .rng import noise_key_of

if TYPE_CHECKING:
    from .sampler import FastLangevin


def sample(sampler: FastLangevin, z: Any, options: dict[str, Any]) -> Any:
    """`FastLangevin.sample`, traced."""
    if options["log_likelihood"] is not None or options["generator"] is not None:
        return outside(sampler, z, options)
    with torch.no_grad(), torch.autocast(_device_type(z), enabled=False):
        flat, layout = flatten_latents(z)
        mlp = mlp_of(sampler, flat, layout, options["context"], options["y"])
        if mlp is None:
            return outside(sampler, z, options)
        record = Record(options["return_info"], options["return_trajectory"], options["thin"])
        update = _update(sampler, flat, layout, options)
        result = registration.mlp_langevin_chain(
            flat, mlp, update, sampler.n_steps, record, sampler.backend, sampler.precision, negated=not sampler.maximize
        )
        return sampler._answer(result, layout.restore(result.z), record)


@torch.compiler.disable
def outside(sampler: FastLangevin, z: Any, options: dict[str, Any]) -> Any:
    """The call as without a compiler."""
    return sampler.sample(z, **options)


def _device_type(z: Any) -> str:
    return (z if isinstance(z, Tensor) else z[0]).device.type


def _update(sampler: FastLangevin, flat: Tensor, layout: LatentLayout, options: dict[str, Any]) -> Update:
    noise, noise_key = options["noise"], options["noise_key"]
    if noise is not None:
        if noise_key is not None:
            raise ValueError("noise replaces the noise field: give either noise, or a generator or noise_key")
        noise, noise_key = sampler._flat_noise(noise, flat, layout), 0
    mean, precision = (None, None) if sampler.prior is None else sampler.prior.terms(flat)
    return Update(
        sampler._step_rows.to(flat.device, flat.dtype),
        dynamics.chain_coefficients(sampler.step_size, sampler.noise_scale, flat),
        mean,
        precision,
        flatten_mask(options["mask"], layout, flat),
        noise,
        noise_key_of(noise_key, None, flat.device),
        options["first_step"],
        options["first_chain"],
    )


def mlp_of(
    sampler: FastLangevin, flat: Tensor, layout: LatentLayout, context: Tensor | None, y: Tensor | int | None
) -> MLP | None:
    """The energy's parameters as tensors of the graph; None where the energy is no MLP, or not known to be one."""
    source, net = sampler._source, sampler._source.energy
    if runs_energy_mlp_forward(net):
        if layout.container is not Tensor and layout.dims != net.latent_dims:
            raise ValueError(f"z must be layers of widths {net.latent_dims}, got {layout.dims}")
        net.check_z(flat)
        mlp = net.mlp(flat, context, y)
    elif isinstance(net, nn.Module) and context is None and y is None:
        known = source.known(layout, net.training)
        if known is None:
            return None
        mlp = _read(net, *known)
    else:
        return None
    return mlp


def _read(net: nn.Module, spec: MLPSpec, terms: tuple) -> MLP:
    """A recognised module's parameters, found through its attributes."""
    weights, biases = [], []
    for path, kind, weight_name, bias_path, bias_name in [site for sites, _, _ in terms for site in sites]:
        module = _submodule(net, path)
        if kind == "spectral" and hasattr(module, "parametrizations"):
            chain = module.parametrizations.weight
            weight = _normalised(chain.original, chain[0]._u)
        elif kind == "spectral" and isinstance(module, EnergyLinear):
            weight = _normalised(module.weight, module.weight_u)
        elif kind == "spectral":
            weight = _normalised(module.weight_orig, module.weight_u)
        elif kind == "weight_norm":
            weight = torch._weight_norm(module.weight_v, module.weight_g, 0)
        else:
            weight = getattr(module, weight_name)
        weights.append(weight.flatten(1) if weight.dim() > 2 else weight)
        biases.append(None if bias_name is None else getattr(_submodule(net, bias_path), bias_name))
    device = weights[0].device
    indices = [None if columns is None else torch.tensor(columns, device=device) for _, columns, _ in terms]
    return assembled(spec, [(index, term[2]) for index, term in zip(indices, terms, strict=True)], weights, biases)


def _submodule(net: nn.Module, path: str) -> nn.Module:
    for name in path.split(".") if path else ():
        net = getattr(net, name)
    return net


def _normalised(original: Tensor, u: Tensor) -> Tensor:
    weight = original.flatten(1)
    return weight / registration.operators.top_singular.default(weight, u)[2]
