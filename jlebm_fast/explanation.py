"""What FastLangevin.explain prints: the path a call would take, and every reason behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from . import backends, ops
from .latents import LatentLayout
from .problem import MLPSpec

if TYPE_CHECKING:
    from .sampler import FastLangevin


def describe_spec(spec: MLPSpec) -> str:
    """ "16 -> 50 -> 50 -> 1, leaky_relu(0.2), head identity"."""
    names = []
    for name, parameter in zip(spec.activations, spec.activation_params, strict=True):
        text = f"{name}({parameter:g})" if name in ("leaky_relu", "elu", "softplus") else name
        if text not in names[-1:]:
            names.append(text)
    scale = "" if spec.out_scale == 1.0 else f"{spec.out_scale:g} * "
    return f"{' -> '.join(map(str, spec.widths))}, {', '.join(names)}, head {scale}{spec.head}"


def _how(n_terms: int) -> str:
    return "" if n_terms == 1 else f"the sum of {n_terms} networks, side by side as "


def explain(sampler: FastLangevin, flat: Tensor, layout: LatentLayout, context: object, y: object) -> str:
    """Lines "label  text": energy, path, backend, and one line per backend that was passed over."""
    source = sampler._source
    mlp, quadratic = source.mlp(flat, layout, context, y, 1.0, sampler.n_steps)
    name = source.name()
    if mlp is None:
        spec, op = None, "langevin_step"
        lines = [
            f"energy    {name}: not recognised as an MLP: {source.reason(flat, layout, context, y)}",
            f"path      autograd of the energy, then langevin_step, {sampler.n_steps} times",
        ]
    else:
        spec, op = mlp.spec, "mlp_langevin_chain"
        n_terms, said = source.how(flat, layout, context, y)
        if quadratic is not None:
            said.insert(0, "and a Gaussian in z, joined with the prior; with return_info one gradient per step instead")
        lines = [
            f"energy    {name}: {_how(n_terms)}{describe_spec(spec)}",
            *(f"          {sentence}" for sentence in said),
            f"path      mlp_langevin_chain: all {sampler.n_steps} steps in one call",
        ]
    times, change = source.examinations(flat, layout, context, y)
    if change is not None:
        # a forward that counts its calls has it done at every one
        lines.insert(1, f"          examined {times} times; before the last time {change} had changed")
    chosen, others = None, []
    names = backends.candidates(sampler.backend, flat.device)
    for candidate in (*names, *(name for name in backends.NAMES if name not in names)):
        reason = backends.reason_against(candidate, op, device=flat.device, dtype=flat.dtype, spec=spec)
        if candidate not in names and sampler.backend != "auto":
            reason = f"backend={sampler.backend!r} was asked for"
        elif candidate not in names and reason is None:
            reason = f"not in line for tensors on {flat.device.type}"
        elif reason is None and chosen is not None:
            reason = f"{chosen} comes first"
        if reason is None:
            chosen = candidate
        else:
            others.append(f"          not {candidate}: {reason}")
    if chosen is None:
        lines.append("backend   none: such a call raises ValueError")
    else:
        module = ops.serving(backends.load(chosen), sampler.backend, flat.device, flat.dtype)
        lines.append(f"backend   {chosen} ({module.regime(op, spec)})")
    return "\n".join(lines + others)
