"""`FastLangevin.sample` while torch.compile traces it: plain torch and registered operators, nothing else.

    in the graph       an EnergyMLP, or a module recognised by an earlier call outside the graph; the key drawn by the
                       operator draw_noise_key; noise, mask, schedules, diagnostics, context, y, noise_key
    outside it         any other energy, a log_likelihood, a generator: the call runs as without a compiler, between two
                       graphs, and fullgraph=True refuses it

Noise and values are those of a call outside a graph: the key is drawn by the same operation from the same generator.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from . import dynamics, ops, registration
from .checks import whole
from .energy import EnergyLinear
from .energy_source import runs_energy_mlp_forward
from .latents import LatentLayout, flatten_latents, flatten_mask
from .modes import device_of
from .problem import MLP, MLPSpec, Record, Update
from .recognition.recognised import assembled
from .rng import check_generator, check_sources, noise_key_of
from .settings import are_still, submodule
from .stepwise import check_likelihood

if TYPE_CHECKING:
    from .sampler import FastLangevin


PLACES = ("thin", "first_step", "first_chain")  # options that are whole numbers


def sample(sampler: FastLangevin, z: Any, options: dict[str, Any]) -> Any:
    """`FastLangevin.sample`, traced."""
    if any(isinstance(options[name], np.ndarray) for name in PLACES):  # what a tracer makes of any number of numpy
        return with_numpy(sampler.sample, z, **options)
    options = _checked(options)
    if options["log_likelihood"] is not None:
        return with_likelihood(sampler.sample, z, **options)
    if options["generator"] is not None:
        return with_generator(sampler.sample, z, **options)
    with torch.no_grad(), torch.autocast(device_of(z).type, enabled=False):
        flat, layout = flatten_latents(z)
        mlp = mlp_of(sampler, flat, layout, options["context"], options["y"])
        if mlp is None:
            return with_other_energy(sampler.sample, z, **options)
        record = Record(options["return_info"], options["return_trajectory"], options["thin"])
        update = _update(sampler, flat, layout, options)
        result = registration.mlp_langevin_chain(
            flat, mlp, update, sampler.n_steps, record, sampler.backend, sampler.precision, negated=not sampler.maximize
        )
        return sampler._answer(result, layout.restore(result.z), record)


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """The options, after the checks that a call outside a graph makes: the operator would refuse what is no integer in
    a tracer's words, and a generator or a likelihood are checked before fullgraph=True refuses even a good one."""
    options = {**options, **{name: whole(options[name]) for name in PLACES}}
    ops.check_thin(options["thin"])
    ops.check_counter("first_step", options["first_step"])
    ops.check_counter("first_chain", options["first_chain"])
    check_sources(options["noise"], options["noise_key"], options["generator"])
    check_likelihood(options["log_likelihood"])
    if options["generator"] is not None:
        check_generator(options["generator"])
    return options


def _outside(reason: str) -> Callable[..., Any]:
    """A call as without a compiler; reason is what fullgraph=True says, where torch can be told (2.7 and newer), and a
    RuntimeError in torch.export's own mode, which leaves no graph."""

    def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():  # still: torch.export with strict=False, under which all of Python is inside
            where = "with strict=False nothing is outside its graph"
            raise RuntimeError(f"torch.export cannot hold this call, and {where}: {reason}")
        return function(*args, **options)

    if "reason" in inspect.signature(torch.compiler.disable).parameters:
        return torch.compiler.disable(call, reason=f"{reason}; or leave out fullgraph=True")
    return torch.compiler.disable(call)


with_numpy = _outside("numbers of numpy are arrays to a graph: give thin, first_step and first_chain as int")
with_likelihood = _outside("a chain with a log_likelihood takes autograd at every step: call it outside the graph")
with_generator = _outside("no graph reads a torch.Generator: draw outside, and pass noise_key= as a tensor")
with_other_energy = _outside(
    "the energy is no MLP, takes a context or y of its own, or was not recognised yet by this sampler, as it is now, "
    "in this mode and with such layers: call the sampler once outside the graph with such latents (`explain` says what "
    "it found)"
)
with_unread_energy = _outside("energy_and_grad reads an energy that is no EnergyMLP anew: call it outside the graph")


def _update(sampler: FastLangevin, flat: Tensor, layout: LatentLayout, options: dict[str, Any]) -> Update:
    noise, noise_key = options["noise"], options["noise_key"]
    if noise is not None:
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
        settings, structure = known
        if not are_still(net, settings):
            return None
        mlp = _read(net, *structure)
    else:
        return None
    return mlp


def _read(net: nn.Module, spec: MLPSpec, terms: tuple) -> MLP:
    """A recognised module's parameters, found through its attributes."""
    weights, biases = [], []
    for path, kind, weight_name, bias_path, bias_name in [site for sites, _, _ in terms for site in sites]:
        module = submodule(net, path)
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
        biases.append(None if bias_name is None else getattr(submodule(net, bias_path), bias_name))
    device = weights[0].device
    indices = [None if columns is None else torch.tensor(columns, device=device) for _, columns, _ in terms]
    return assembled(spec, [(index, term[2]) for index, term in zip(indices, terms, strict=True)], weights, biases)


def _normalised(original: Tensor, u: Tensor) -> Tensor:
    weight = original.flatten(1)
    return weight / registration.operators.top_singular.default(weight, u)[2]
